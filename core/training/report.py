"""What a run reports before its first step and after its last."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..bundle.tokenizer_state import describe
from ..checkpoint import CheckpointManager
from ..console.commandline import spelled
from ..console.commands import typed
from ..console.words import tell
from ..data.corpus import Corpus
from ..data.tokenizer import Tokenizer
from ..errors import CheckpointError
from ..model import GPT, GPTFlexAttention

LEARNED = 1.0
"""Nats below a uniform guess from which on a sample shows more than noise."""


def say_what_runs(
    manager: CheckpointManager, model: GPT | GPTFlexAttention, corpus: Corpus, resumed: int | None
) -> None:
    """Report the model, the data and the device in two lines."""
    device = next(model.parameters()).device
    parameters = sum(p.numel() for p in model.parameters())
    how = "a new model" if resumed is None else f"resuming at step {resumed}"
    tell(f"{manager.checkpoint_dir}: {how}, {parameters:,} parameters on {device}")
    vocabulary = describe(corpus.tokenizer.state())
    tell(f"tokens: {len(corpus.train):,} to train on, {len(corpus.val):,} to validate with, {vocabulary}")


def say_preset(preset: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Report the sizes that the preset of a machine without a GPU chose; nothing where it chose none."""
    words = {"n_layer": "layer", "n_head": "head"}
    sizes = {name: preset[name] for name in (*words, "n_embd", "block_size") if name in preset and name not in given}
    shown = [f"{size} {words[name]}{'s' * (size != 1)}" for name, size in sizes.items() if name in words]
    shown += [f"{sizes['n_embd']} wide"] if "n_embd" in sizes else []
    shown += [f"block {sizes['block_size']}"] if "block_size" in sizes else []
    if shown:
        tell(f"no GPU: a small preset ({', '.join(shown)}); every size is a flag")


def say_result(
    manager: CheckpointManager, model: GPT | GPTFlexAttention, tokenizer: Tokenizer, val_loss: float | None
) -> None:
    """Report the loss, a sample where the model has learned to write one, and the commands to continue with."""
    uniform = math.log(tokenizer.vocab_size)
    if val_loss is not None:
        tell(f"done: step {model.step}, validation loss {val_loss:.4f} (a uniform guess has {uniform:.2f})")
    writes = _can_write(tokenizer)
    if writes and not manager.ranks.world.is_sharded:  # a model in shards would need all ranks for it
        if val_loss is not None and val_loss <= uniform - LEARNED:
            sample = model.generate("", max_new_tokens=200, temperature=0.8, top_k=200, seed=1)
            tell("a sample:")
            print(sample.strip("\n"), flush=True)
        else:
            tell(f"no sample: the loss is not yet {LEARNED:g} below that of a uniform guess; train for longer")
    tell("next:")
    for line in _next_commands(manager, model.step, tokenizer if writes else None):
        tell(f"  {line}")


def _can_write(tokenizer: Tokenizer) -> bool:
    """Whether ids become text here: a dataset of GPT-2's tokens trains without the file of ranks that this needs."""
    try:
        tokenizer.decode([0])
    except CheckpointError as error:
        tell(f"no sample: {error}")
        return False
    return True


def _next_commands(manager: CheckpointManager, step: int, tokenizer: Tokenizer | None) -> list[str]:
    """The commands that use a trained model; without a tokenizer none that writes text."""
    root = manager.checkpoint_dir.parent
    name = spelled("--model_name", manager.model_name)
    name += f" {spelled('--checkpoint_root', root)}" if root != Path("checkpoints") else ""
    commands = [
        f"{typed('python inspect_model.py')} {name}",
        f"{typed('python train.py')} {name} --max_iters {2 * step}",
    ]
    if tokenizer is None:
        return commands
    return [f"{typed('python generate.py')} {name}{_prompt(tokenizer)}", *commands]


def _prompt(tokenizer: Tokenizer) -> str:
    """A prompt as a flag; none where the vocabulary lacks its characters."""
    try:
        tokenizer.encode("The ")
    except CheckpointError:
        return ""
    return " --prompt 'The '"
