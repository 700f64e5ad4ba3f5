"""One-call loading of other programs' checkpoints: the tensors show what a file is, and that is computed exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .bundle.intact import open_chosen
from .config.modded import CLASSES
from .conversion.plan import Options
from .errors import CheckpointMismatch
from .loading.classifier import load_classifier
from .loading.modded import Info, facts_of, is_modded, load_flex_checkpoint, load_modded, open_upstream
from .loading.opened import open_gpt
from .model import GPT
from .networks.batched import GPTBatched
from .networks.device import resolve_device, resolve_dtype
from .networks.flex import GPTFlexAttention
from .networks.layout import as_medium
from .networks.modded import ModdedGPT

__all__ = [
    "inspect_checkpoint",
    "load_classifier",
    "load_flex_checkpoint",
    "load_pretrained_checkpoint",
    "open_checkpoint",
    "open_gpt",
]


def open_checkpoint(
    path: str | Path,
    options: Options | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: bool = True,
    say: Callable[[str], None] = print,
    verify: bool = True,
    bpe_file: Path | None = None,
) -> GPT | GPTBatched:
    """Open a checkpoint of any program: as GPTBatched where it is modded-nanogpt's, else as `open_gpt` does.

    What was found beside it, left out or is in doubt is reported, a line each.

    Raises: as `open_gpt` and `load_pretrained_checkpoint`.
    """
    path, options = Path(path), options or Options()
    if is_modded(path):
        if given := [*options.choices, *options.more, *(["meta"] if options.meta else [])]:
            raise CheckpointMismatch(f"{path}: --{given[0]} has no effect on a model of modded-nanogpt. Leave it out.")
        return load_pretrained_checkpoint(path, device=device or "cpu", dtype=dtype, say=say, verify=verify)[0]
    opened = open_gpt(path, options, device=device, dtype=dtype, tokenizer=tokenizer, verify=verify, bpe_file=bpe_file)
    say(f"Format: {opened.program}")
    for note in opened.notes:
        say(note if note.startswith("WARNING: ") else f"note: {note}")
    return opened.model


def load_pretrained_checkpoint(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    *,
    say: Callable[[str], None] = print,
    verify: bool = True,
) -> tuple[GPTBatched, Info, Any]:
    """Load a modded-nanogpt checkpoint, or a bundle, as a GPTBatched; return it, its info and its whole content.

    The tensors show the variant, its sizes, padded rows and padded scalars. Weights keep their dtype
    unless one is given, and stay mapped where only their names change; every record is compared with its checksum
    first (unless `verify` is off), and nothing in the file is executed. The info has: format ("small" or "medium"),
    variant, program, vocab_size (rows of the embedding), head_rows, num_layers, num_heads, model_dim, max_seq_len,
    step, dtype, parameters, prefix, scalars_padding, path.

    Raises: CheckpointNotFound, CheckpointDamaged (naming the tensor), CheckpointMismatch (naming unknown tensors).
    """
    path = Path(path)
    if path.is_dir():
        return _from_bundle(path, device, dtype, say, verify)
    opened = open_upstream(path, resolve_dtype(dtype), verify=verify)
    say(f"Format: {opened.info['program']}")
    config = opened.config
    with torch.device("meta"):
        model = GPTBatched.of_config(config)
    model.load_state_dict(as_medium(opened.tensors, config.variant, config.n_layer), assign=True)
    model.to(device=resolve_device(device))
    model.requires_grad_(True)
    model.step = opened.info["step"] or 0
    return model.eval(), opened.info, opened.content


def inspect_checkpoint(path: str | Path, *, say: Callable[[str], None] = print) -> tuple[Info, Any]:
    """Identify a modded-nanogpt checkpoint; return the info and the content of `load_pretrained_checkpoint`.

    Raises: as `load_pretrained_checkpoint`.
    """
    opened = open_upstream(Path(path))
    info = opened.info
    say(f"Format: {info['program']}")
    say(
        f"{info['num_layers']} layers, {info['num_heads']} heads, width {info['model_dim']}, vocabulary "
        f"{info['vocab_size']} (head {info['head_rows']}), step {info['step']}, {info['parameters']:,} parameters, "
        f"{info['dtype']}"
    )
    return info, opened.content


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
        model: ModdedGPT = load_modded(bundle, device=device, dtype=resolve_dtype(dtype))
        batched = model.batched() if isinstance(model, GPTFlexAttention) else model
        assert isinstance(batched, GPTBatched)
        config = batched.config
        say(f"Format: {config.kind.program}")
        weights = model.state_dict()
        info = {
            **facts_of(config, path, {str(t.dtype).removeprefix("torch.") for t in weights.values()}),
            "step": bundle.step,
            "parameters": sum(p.numel() for p in model.parameters()),
            "prefix": "",
            "scalars_padding": 0,
        }
        content = {
            "step": bundle.step,
            "model": weights,
            "config": bundle.config_values,
            "state": bundle.state.to_dict(),
        }
        return batched, info, content
