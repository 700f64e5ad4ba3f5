"""Bundles of GPTFlexAttention and GPTBatched: from an open bundle to a live model."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..bundle.bundle import TOKENIZER, Bundle
from ..bundle.commit import CONFIG
from ..bundle.parts import Part, TorchFile
from ..bundle.storage import DISK
from ..bundle.tokenizer_state import describe
from ..bundle.verify import verify_records
from ..config.gpt import GPTConfig
from ..config.modded import CLASSES, ModdedConfig
from ..console.commands import typed
from ..console.words import differences, listed, on_one_side
from ..containers.part import part_of_model
from ..containers.torch_files.container import container_of
from ..data.tokenizer import Tokenizer, tokenizer_from_state
from ..errors import CheckpointMismatch, CheckpointNotFound
from ..families.family import plain_names
from ..families.identify import Identity, identify, weights_key
from ..families.match import skeleton
from ..families.modded import FAMILIES
from ..inspection.inspect import inspect_path
from ..networks.batched import GPTBatched
from ..networks.device import resolve_device
from ..networks.flex import GPTFlexAttention
from ..networks.modded import ModdedGPT
from .mapped import read_tensor
from .tensors import read_part

Info = dict[str, Any]

NAMES = {f"modded_{name}": name for name in ("small", "small_2025_02", "medium")}
"""Families of tensors, and the variants that compute with them."""

MODELS: dict[str, type[GPTFlexAttention] | type[GPTBatched]] = dict(
    zip(CLASSES, (GPTFlexAttention, GPTBatched), strict=True)
)
"""The class that each `model_class` of a config.json means."""


def is_modded(path: Path) -> bool:
    """Whether the tensors of a checkpoint are those of a version of modded-nanogpt that is computed here.

    Raises: CheckpointNotFound, CheckpointDamaged, CheckpointError when nothing at the path can be read.
    """
    with inspect_path(path) as found:
        return found.identity.family in NAMES


def load_modded(
    bundle: Bundle,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    writable: bool = False,
    bpe_file: Path | None = None,
) -> GPTFlexAttention | GPTBatched:
    """Build the model of a bundle in eval mode, with its tokenizer and step.

    The mapped tensors replace its own; `writable` copies them out of the file, as training needs.

    Raises: CheckpointMismatch when config, tokenizer and weights contradict each other, before anything is allocated.
    """
    where = str(bundle.path(CONFIG))
    kind = MODELS[bundle.config_values["model_class"]]
    config = ModdedConfig.from_dict(bundle.config_values, where)
    with torch.device("meta"):
        model = kind.of_config(config)
    refuse_other_shapes(bundle, model)
    tokenizer = _tokenizer(bundle, config, bpe_file)
    target = resolve_device(device or config.device, where)
    tensors = read_part(bundle.weights)
    if writable:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    model.to(device=target, dtype=dtype)
    model.requires_grad_(True)
    model.step, model.tokenizer = bundle.step, tokenizer
    return model.eval()


def refuse_other_shapes(bundle: Bundle, model: ModdedGPT) -> None:
    """Raise CheckpointMismatch when the header of a bundle's weights is not that of a model; nothing is allocated."""
    bundle.weights.source.refuse_foreign()
    shapes = bundle.weights.shapes
    found = {plain: shapes[name] for plain, name in plain_names(shapes).items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tail = found.get("scalars", (0,))
    if len(tail) == 1 and tail > expected.get("scalars", tail):
        expected["scalars"] = tail  # padded for several ranks
    if faults := differences(expected, found):
        raise CheckpointMismatch(
            f"{bundle.path(CONFIG)} does not fit {bundle.weights.source.path.name}: {listed(faults)}."
        )


def _tokenizer(bundle: Bundle, config: ModdedConfig, bpe_file: Path | None) -> Tokenizer | None:
    if bundle.tokenizer is None:
        return None
    made = tokenizer_from_state(bundle.tokenizer, bpe_file, str(bundle.path(TOKENIZER)))
    refuse_large_tokenizer(made, config, str(bundle.path(TOKENIZER)))
    return made


def refuse_large_tokenizer(tokenizer: Tokenizer, config: ModdedConfig | GPTConfig, where: str) -> None:
    """Raise CheckpointMismatch when a tokenizer has ids that a model lacks."""
    rows: Any = min(config.vocab_size, getattr(config, "head_rows", config.vocab_size))
    if tokenizer.vocab_size > rows:
        raise CheckpointMismatch(
            f"{where}: {describe(tokenizer.state())}, but the model has {rows} rows. It does not fit this model."
        )


@dataclass
class UpstreamCheckpoint:
    """A checkpoint of the program: its content, mapped, and its description."""

    content: Any
    tensors: dict[str, torch.Tensor]  # under upstream's names
    config: ModdedConfig
    info: Info


def load_flex_checkpoint(path: str | Path) -> tuple[GPTFlexAttention, Info, Any]:
    """Load a modded-nanogpt checkpoint as the program's own GPTFlexAttention; see `load_pretrained_checkpoint`."""
    opened = open_upstream(Path(path))
    with torch.device("meta"):
        model = GPTFlexAttention.of_config(opened.config)
    model.load_state_dict(opened.tensors, assign=True)
    model.requires_grad_(True)
    model.step = opened.info["step"] or 0
    return model.eval(), opened.info, opened.content


def open_upstream(path: Path, dtype: torch.dtype | None = None, *, verify: bool = True) -> UpstreamCheckpoint:
    """Open a file, check it, and map its tensors, or read them into another dtype one by one."""
    try:
        file = DISK.open(path)
    except OSError as error:
        raise CheckpointNotFound(
            f"{path}: cannot be opened ({error.strerror}). Expected a state_step*.pt of modded-nanogpt."
        ) from error
    with file:
        source = TorchFile(file, path)
        size = file.seek(0, os.SEEK_END)
        if reason := part_of_model(container_of(source.header, path, size)):
            raise CheckpointMismatch(f"{path}: {reason}")
        key = weights_key(source.header.tensors)
        specs = {name.removeprefix(key): spec for name, spec in source.header.tensors.items() if name.startswith(key)}
        found = identify({name: spec.shape for name, spec in specs.items()})
        config = _config(path, found, list(specs))
        source.refuse_foreign()
        if verify:
            verify_records(file, path)
        content = read_part(Part(source))
        inside: Any = content
        for word in key.split(".")[:-1]:
            inside = inside[word]
        tensors = {
            place: inside[name] if dtype is None else read_tensor(source, specs[name]).to(dtype)
            for name, place in found.places.items()
        }
    scalars = tensors["scalars"].numel() if "scalars" in tensors else 0
    step = content.get("step") if key and isinstance(content, dict) else None
    padding = max(0, scalars - 5 * config.n_layer)
    info = {
        **facts_of(config, path, {specs[name].dtype for name in found.places}),
        "step": step if isinstance(step, int) else None,
        "parameters": sum(t.numel() for t in tensors.values()) - padding,
        "prefix": found.prefix,
        "scalars_padding": padding,
    }
    return UpstreamCheckpoint(content, tensors, config, info)


def facts_of(config: ModdedConfig, path: Path, dtypes: set[str]) -> Info:
    """Describe a checkpoint, as the info of `load_pretrained_checkpoint`."""
    return {
        "format": config.variant.partition("_")[0],
        "variant": config.variant,
        "program": config.kind.program,
        "vocab_size": config.vocab_size,
        "head_rows": config.head_rows,
        "num_layers": config.n_layer,
        "num_heads": config.n_head,
        "model_dim": config.n_embd,
        "max_seq_len": config.block_size,
        "dtype": ", ".join(sorted(dtypes)),
        "path": str(path),
    }


def _config(path: Path, found: Identity, names: list[str]) -> ModdedConfig:
    """Read the sizes from the recognised tensors.

    Raises: CheckpointMismatch when another program wrote it, or when a version lacks a place for some of its tensors.
    """
    size = found.architecture
    if found.family not in NAMES or size is None:
        strange = _without_place(names)
        what = f"it is of {found.program}" if found.program else found.reason
        listing = f" Without a place: {listed(strange)}." if strange else ""
        raise CheckpointMismatch(
            f"{path}: not a modded-nanogpt checkpoint of a version that this project computes: {what}.{listing} "
            f"{typed('inspect_model.py')} shows what it holds."
        )
    faults = on_one_side(found.missing, found.unplaced) + found.conflicts
    if faults:
        raise CheckpointMismatch(f"{path}: {found.program}, but {listed(faults)}.")
    assert size.n_layer and size.n_head and size.n_embd and size.vocab_size and size.head_rows
    return ModdedConfig(
        variant=NAMES[found.family],
        vocab_size=size.vocab_size,
        head_rows=size.head_rows,
        n_layer=size.n_layer,
        n_head=size.n_head,
        n_embd=size.n_embd,
    )


def _without_place(names: list[str]) -> list[str]:
    """The names that no known version of the program has."""
    known = {skeleton(re.sub(r"\{[ijn]\}", "0", row)) for family in FAMILIES for row in family.tensors}
    return [name for plain, name in plain_names(names).items() if skeleton(plain) not in known]
