"""Prove a model by a text: its mean loss, beside the one that its writer recorded and that of a uniform guess."""

from __future__ import annotations

import hashlib
import itertools
import math
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..bundle.legacy import open_legacy
from ..bundle.training_state import TrainingState
from ..config.modded import CLASSES
from ..console.commands import typed
from ..console.files import open_regular
from ..conversion.plan import Options
from ..conversion.planning import plan_conversion
from ..conversion.writing import convert
from ..data.text import Segment, pieces, readable
from ..data.tokenizer import Tokenizer, tokenizer_from_state
from ..errors import CheckpointMismatch, InputError
from ..inspection.inspect import inspect_path
from ..model import GPT, GPTBatched
from .inference import load_chosen
from .modded import NAMES
from .opened import open_gpt
from .tensors import load_model

TOKENS = 16_384
"""The longest part of the text that is computed, in tokens."""

TOLERANCE = 0.5
"""Nats by which a loss may be above the expected one: the text may be another part than the one measured."""

_BATCH = 8  # blocks computed at once

Progress = Callable[[int], object]


@dataclass(frozen=True)
class TextCheck:
    """What a model makes of a text; `loss` is None where it was not computed, and `reason` says why. Losses in nats."""

    text: str
    loss: float | None = None
    tokens: int = 0  # that were predicted
    skipped: int = 0  # characters outside the vocabulary
    uniform: float | None = None  # loss of a guess that gives every token the same probability
    recorded: float | None = None  # by the program that trained it
    is_recorded_text: bool = False  # whether the checkpoint was trained on this text
    expected: float | None = None  # by the person who asked
    reason: str = ""

    @property
    def faults(self) -> list[str]:
        """What speaks against this being the model that was trained, a sentence each."""
        if self.loss is None or self.uniform is None:
            return []
        found = []
        limits = {"--check_loss": self.expected, "the recorded loss": self.recorded if self.is_recorded_text else None}
        for name, limit in limits.items():
            if limit is not None and self.loss > limit + TOLERANCE:
                found.append(f"{self.text}: loss {self.loss:.4f}, more than {TOLERANCE} above {name}, {limit:.4f}.")
        if not self.loss <= self.uniform:  # NaN is no better
            found.append(f"{self.text}: loss {self.loss:.4f}, worse than a uniform guess, {self.uniform:.4f}.")
        return found

    @property
    def line(self) -> str:
        """The result in one line."""
        if self.loss is None:
            return f"{self.text}: not computed: {self.reason}"
        beside = [f"a uniform guess has {self.uniform:.4f}"]
        if self.recorded is not None:
            beside.insert(0, f"recorded {self.recorded:.4f}{', of this text' if self.is_recorded_text else ''}")
        if self.expected is not None:
            beside.insert(0, f"expected {self.expected:.4f}")
        left_out = f", {self.skipped:,} characters outside the vocabulary skipped" if self.skipped else ""
        verdict = "not proven" if self.faults else "proven on a text"
        what = f"{self.tokens:,} tokens of {self.text}{left_out}"
        return f"{verdict}: loss {self.loss:.4f} over {what} ({', '.join(beside)})"


def check_text(
    path: Path,
    text: Path,
    expected: float | None = None,
    *,
    step: int | None = None,
    choices: Mapping[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
    state: TrainingState | None = None,
    bpe_file: Path | None = None,
    progress: Progress = lambda count: None,
) -> TextCheck:
    """Compute the mean loss of a checkpoint of any program over the first tokens of a text, in blocks of its context.

    A model of another program is computed by ours, with `choices`. `tokenizer` and `state` are those of the model it
    was made from, used where it has none, and `bpe_file` has the ranks of GPT-2. `progress` receives the number of
    tokens computed.

    Raises: InputError for a text that cannot be read; CheckpointError for a checkpoint that cannot.
    """
    beginning = beginning_of(text)
    with ExitStack() as held:
        try:
            model, own_state, own = _load(path, step, choices or {}, held)
        except CheckpointMismatch as error:
            return TextCheck(str(text), expected=expected, reason=str(error))
        known = own if own is not None else tokenizer
        if known is None:
            reason = typed("its tokenizer is not known. convert_checkpoints.py --to bundle --meta FILE adds one.")
            return TextCheck(str(text), expected=expected, reason=reason)
        ids, skipped = _encode(tokenizer_from_state(known, bpe_file), beginning, text)
        loss = mean_loss(model, ids, progress)
        state = own_state if state is None else state
        recorded = state.val_loss if state.val_loss is not None else (state.best or {}).get("val_loss")
        return TextCheck(
            text=str(text),
            loss=loss,
            tokens=len(ids) - 1,
            skipped=skipped,
            uniform=math.log(model.config.vocab_size),
            recorded=recorded if isinstance(recorded, float) else None,
            is_recorded_text=(state.data or {}).get("digest") == _digest(text),
            expected=expected,
        )


def beginning_of(text: Path) -> str:
    """Read the beginning of a text, which is more than is ever computed.

    Raises: InputError when it cannot be read, is not UTF-8, or is empty.
    """
    with readable(text, "a text for --check_text"):
        size = text.stat().st_size
    if beginning := next(pieces([Segment(text, 0, size)]), ""):
        return beginning
    raise InputError(f"{text}: empty, expected a text for --check_text.")


def _load(
    path: Path, step: int | None, choices: Mapping[str, Any], held: ExitStack
) -> tuple[GPT | GPTBatched, TrainingState, dict[str, Any] | None]:
    """Load a model, with what was recorded of it and its tokenizer; files stay mapped until `held` is closed.

    Raises: CheckpointMismatch for a model that ours cannot compute, with the reason.
    """
    with inspect_path(path, step) as found:
        bundle = found.bundle
        if bundle is None and found.identity.family not in NAMES:
            opened = open_gpt(path, Options(choices=choices), tokenizer=False)
            return opened.model, opened.state, opened.tokenizer
        if bundle is None:
            made = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="check-"))) / "model"
            plan = plan_conversion(path, made, "bundle", Options(choices=choices), held)
            convert(plan, verify=False)
            return _load(made, None, {}, held)
        if bundle.single:
            with open_legacy(path) as single:
                return load_model(single, with_optimizer=False), bundle.state, bundle.tokenizer
        if bundle.config is None and bundle.config_values.get("model_class") not in CLASSES:
            raise CheckpointMismatch(
                f"{path}: a {bundle.config_values.get('model_class')} is not a model of this program."
            )
        model = load_chosen(path, step)
        if not isinstance(model, (GPT, GPTBatched)):
            raise CheckpointMismatch(f"{path}: a {type(model).__name__} computes packed documents on CUDA only.")
        return model, bundle.state, bundle.tokenizer


def _encode(tokenizer: Tokenizer, beginning: str, text: Path) -> tuple[np.ndarray, int]:
    """The first ids of a text, and how many characters before their end are outside the vocabulary.

    Raises: InputError when there are fewer than two.
    """
    ids = tokenizer.encode(beginning, unknown="skip", where=str(text))[: TOKENS + 1]
    if len(ids) < 2:
        raise InputError(f"{text}: {len(ids)} tokens of the model's vocabulary, expected at least 2. Name another.")
    if tokenizer.kind != "char":
        return ids, 0
    known = set(tokenizer.decode(np.unique(ids)))
    read = itertools.accumulate(character in known for character in beginning)
    used = next(count for count, found in enumerate(read, 1) if found == len(ids))
    return ids, used - len(ids)


@torch.inference_mode()
def mean_loss(model: GPT | GPTBatched, ids: np.ndarray, progress: Progress = lambda count: None) -> float:
    """Compute the mean loss, in nats, of predicting ids [T + 1] from those before them, in blocks of the context.

    The first token of a block is predicted from itself alone, as in training.
    """
    length = min(model.config.block_size, len(ids) - 1)
    device = next(model.parameters()).device
    tokens = torch.from_numpy(ids.astype(np.int64)).to(device)
    total, starts = 0.0, list(range(0, len(ids) - 1, length))
    whole = [start for start in starts if start + length < len(ids)]
    batches = [whole[at : at + _BATCH] for at in range(0, len(whole), _BATCH)]
    batches += [[start] for start in starts if start not in whole]
    for batch in batches:
        stop = min(batch[0] + length, len(ids) - 1) - batch[0]
        x = torch.stack([tokens[start : start + stop] for start in batch])
        y = torch.stack([tokens[start + 1 : start + 1 + stop] for start in batch])
        logits = model(x)[0].float()
        total += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
        progress(y.numel())
    return total / (len(ids) - 1)


def _digest(text: Path) -> str:
    with open_regular(text) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
