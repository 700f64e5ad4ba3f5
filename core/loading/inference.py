"""Load a model for inference from a model's folder, whichever checkpoints it holds."""

from __future__ import annotations

from pathlib import Path

import torch

from ..bundle import intact
from ..bundle.bundle import EMA, FOR_INFERENCE, TOKENIZER
from ..bundle.choice import choose
from ..config.modded import CLASSES
from ..errors import CheckpointDamaged
from ..model import GPT, GPTBatched, GPTFlexAttention
from .modded import load_modded
from .tensors import load_model


def load_chosen(
    folder: Path,
    step: int | None = None,
    single: str | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    bpe_file: Path | None = None,
    check: bool = True,
    ema: bool = False,
    say: intact.Say = intact.say_on_stderr,
) -> GPT | GPTBatched | GPTFlexAttention:
    """Load a model in eval mode: a kept step, a single file by name, or the newest checkpoint of the folder.

    What is read is checked before use, unless `check` is off; the optimizer state is not read.

    Raises: CheckpointNotFound, CheckpointDamaged (naming the newest intact step), CheckpointMismatch.
    """
    try:
        used = (EMA, TOKENIZER) if ema else FOR_INFERENCE
        with intact.open_chosen(folder, say, step=step, single=single, used=used, check=check) as opened:
            bundle = opened.averaged() if ema else opened
            load = load_modded if bundle.config_values.get("model_class") in CLASSES else load_model
            return load(bundle, device=device, dtype=dtype, bpe_file=bpe_file)
    except CheckpointDamaged as damage:
        candidates = choose(folder).candidates if step is None else []
        chosen = single or next((c.single for c in candidates), None)
        others = [c.name for c in candidates if c.single != chosen]
        hint = f"Beside it: {', '.join(others)}." if others else intact.newest_intact(folder, step)
        raise CheckpointDamaged(f"{damage} {hint}") from damage
