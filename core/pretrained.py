"""One-call loading of modded-nanogpt checkpoints: what a file holds is told from its tensors, and computed exactly."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .bundle.intact import open_chosen
from .bundle.parts import Part, TorchFile
from .bundle.storage import DISK
from .bundle.verify import verify_records
from .config.modded import CLASSES, SpeedrunConfig
from .console.words import listed
from .errors import CheckpointMismatch, CheckpointNotFound
from .families.family import plain_names
from .families.identify import Identity, identify, weights_key
from .families.match import skeleton
from .families.modded import FAMILIES, merged
from .loading.classifier import load_classifier
from .loading.modded import load_speedrun
from .loading.tensors import read_part, read_tensor
from .networks.batched import GPTBatched
from .networks.device import resolve_device, resolve_dtype
from .networks.flex import GPTFlexAttention
from .networks.modded import SpeedrunGPT

__all__ = ["inspect_checkpoint", "load_classifier", "load_flex_checkpoint", "load_pretrained_checkpoint"]

Info = dict[str, Any]

NAMES = {f"modded_{name}": name for name in ("small", "small_2025_02", "medium")}
"""Families of tensors, and the variants that compute with them."""


@dataclass
class _Opened:
    """A checkpoint of the program: its content, mapped, and what it is."""

    content: Any
    tensors: dict[str, torch.Tensor]  # by upstream's names
    config: SpeedrunConfig
    info: Info


def load_pretrained_checkpoint(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    *,
    say: Callable[[str], None] = print,
    verify: bool = True,
) -> tuple[GPTBatched, Info, Any]:
    """Load a modded-nanogpt checkpoint, or a bundle of ours, as a GPTBatched; also what it is, and its whole content.

    Which variant it is, its sizes, padded rows and padded scalars are told from the tensors. Weights keep their dtype
    unless one is given, and stay mapped where only their names change; every record is compared with its checksum
    first (unless `verify` is off), and nothing in the file is executed. The info has: format ("small" or "medium"),
    variant, program, vocab_size (rows of the embedding), head_rows, num_layers, num_heads, model_dim, max_seq_len,
    step, dtype, parameters, prefix, scalars_padding, path.

    Raises: CheckpointNotFound, CheckpointDamaged (naming the tensor), CheckpointMismatch (naming what has no place).
    """
    path = Path(path)
    if path.is_dir():
        return _from_bundle(path, device, dtype, say, verify)
    opened = _open(path, resolve_dtype(dtype), verify=verify)
    say(f"Format: {opened.info['program']}")
    config = opened.config
    with torch.device("meta"):
        model = GPTBatched.of_config(config)
    model.load_state_dict(merged(opened.tensors, config.variant, config.n_layer, torch.cat), assign=True)
    model.to(device=resolve_device(device))
    model.requires_grad_(True)
    model.step = opened.info["step"] or 0
    return model.eval(), opened.info, opened.content


def load_flex_checkpoint(path: str | Path) -> tuple[GPTFlexAttention, Info, Any]:
    """Load a modded-nanogpt checkpoint as the program had it, a GPTFlexAttention; see `load_pretrained_checkpoint`."""
    opened = _open(Path(path))
    with torch.device("meta"):
        model = GPTFlexAttention.of_config(opened.config)
    model.load_state_dict(opened.tensors, assign=True)
    model.requires_grad_(True)
    model.step = opened.info["step"] or 0
    return model.eval(), opened.info, opened.content


def inspect_checkpoint(path: str | Path, *, say: Callable[[str], None] = print) -> tuple[Info, Any]:
    """Say which modded-nanogpt checkpoint a file is; returns the info and the content of `load_pretrained_checkpoint`.

    Raises: as `load_pretrained_checkpoint`.
    """
    opened = _open(Path(path))
    info = opened.info
    say(f"Format: {info['program']}")
    say(
        f"{info['num_layers']} layers, {info['num_heads']} heads, width {info['model_dim']}, vocabulary "
        f"{info['vocab_size']} (head {info['head_rows']}), step {info['step']}, {info['parameters']:,} parameters, "
        f"{info['dtype']}"
    )
    return info, opened.content


def _open(path: Path, dtype: torch.dtype | None = None, *, verify: bool = True) -> _Opened:
    """Open a file, check it, and map its tensors, or read them into another dtype one by one."""
    try:
        file = DISK.open(path)
    except OSError as error:
        raise CheckpointNotFound(
            f"{path}: cannot be opened ({error.strerror}). Expected a state_step*.pt of modded-nanogpt."
        ) from error
    with file:
        source = TorchFile(file, path)
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
        **_facts(config, path, {specs[name].dtype for name in found.places}),
        "step": step if isinstance(step, int) else None,
        "parameters": sum(t.numel() for t in tensors.values()) - padding,
        "prefix": found.prefix,
        "scalars_padding": padding,
    }
    return _Opened(content, tensors, config, info)


def _facts(config: SpeedrunConfig, path: Path, dtypes: set[str]) -> Info:
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


def _config(path: Path, found: Identity, names: list[str]) -> SpeedrunConfig:
    """Read the sizes off what was recognised.

    Raises: CheckpointMismatch when it is another program's, or a version without a place for all of its tensors.
    """
    size = found.architecture
    if found.family not in NAMES or size is None:
        strange = _without_place(names)
        what = f"it is of {found.program}" if found.program else found.reason
        listing = f" Without a place: {listed(strange)}." if strange else ""
        raise CheckpointMismatch(
            f"{path}: no modded-nanogpt checkpoint of a version that is computed here: {what}.{listing} "
            "inspect_model.py shows what it holds."
        )
    faults = [f"{name} is missing" for name in found.missing]
    faults += [f"{name} has no place" for name in found.unplaced] + found.conflicts
    if faults:
        raise CheckpointMismatch(f"{path}: {found.program}, but {listed(faults)}.")
    assert size.n_layer and size.n_head and size.n_embd and size.vocab_size and size.head_rows
    return SpeedrunConfig(
        variant=NAMES[found.family],
        vocab_size=size.vocab_size,
        head_rows=size.head_rows,
        n_layer=size.n_layer,
        n_head=size.n_head,
        n_embd=size.n_embd,
    )


def _without_place(names: list[str]) -> list[str]:
    """Which names no version of the program has that is known here."""
    known = {skeleton(re.sub(r"\{[ijn]\}", "0", row)) for family in FAMILIES for row in family.tensors}
    return [name for plain, name in plain_names(names).items() if skeleton(plain) not in known]


def _from_bundle(
    path: Path,
    device: str | torch.device,
    dtype: str | torch.dtype | None,
    say: Callable[[str], None],
    verify: bool,
) -> tuple[GPTBatched, Info, Any]:
    with open_chosen(path, check=verify) as bundle:
        name = bundle.config_values.get("model_class", "GPT")
        if name not in CLASSES:
            raise CheckpointMismatch(
                f"{path}: its model is a {name}, expected one of {', '.join(CLASSES)}. "
                "CheckpointManager.load_for_inference opens it."
            )
        model: SpeedrunGPT = load_speedrun(bundle, device=device, dtype=resolve_dtype(dtype))
        batched = model.batched() if isinstance(model, GPTFlexAttention) else model
        assert isinstance(batched, GPTBatched)
        config = batched.config
        say(f"Format: {config.kind.program}")
        weights = model.state_dict()
        info = {
            **_facts(config, path, {str(t.dtype).removeprefix("torch.") for t in weights.values()}),
            "step": bundle.step,
            "parameters": sum(p.numel() for p in model.parameters()),
            "prefix": "",
            "scalars_padding": 0,
        }
        content = {"step": bundle.step, "model": weights, "config": bundle.config_values, "state": bundle.state}
        return batched, info, content
