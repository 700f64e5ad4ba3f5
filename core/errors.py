"""Every error a caller can act on.

CheckpointError
├── CheckpointNotFound     nothing is there: train a new model, or look elsewhere
├── CheckpointDamaged      bytes differ from what was written: walk back to an older step
│   └── NoneIntact         there are checkpoints, and none can be used: restore one, or start from scratch on purpose
├── CheckpointMismatch     two things contradict each other: change the named field or flag
├── CheckpointLocked       another process writes here: wait for it, or use another name
├── SaveFailed             nothing new is on disk, nothing old is lost: remove the cause, save again
└── InputError             a text, tokenizer or setting that cannot be used: correct it
    └── Unspecified        it would be guessed what a command means: add the flag, or run the command, that is named

A message reads *where: found, expected. What to do, or what stays true.*
"""

from __future__ import annotations


def printable(text: str) -> str:
    """Replace characters that would move the cursor or change the terminal by their escapes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class CheckpointError(Exception):
    """Base of every error this project raises on purpose."""

    def __str__(self) -> str:
        """The message in one line that can be printed: it may quote what a stranger's file says."""
        return printable(super().__str__())


class CheckpointNotFound(CheckpointError):
    """There is no checkpoint at the specified place."""


class CheckpointDamaged(CheckpointError):
    """A file fails its own check, or is cut off."""


class NoneIntact(CheckpointDamaged):
    """There are checkpoints, or remains of some, and none can be trained on."""


class CheckpointMismatch(CheckpointError):
    """Config, tokenizer, weights, optimizer or flags contradict each other."""


class CheckpointLocked(CheckpointError):
    """Another process holds the writer's lock of this model."""


class SaveFailed(CheckpointError):
    """A save did not commit; the last committed step is intact."""


class InputError(CheckpointError):
    """A text, a tokenizer or a setting that cannot be used as given."""


class Unspecified(InputError):
    """A command leaves open what it means, and nothing is guessed; scripts exit with the code of wrong use."""


class TrainingDiverged(CheckpointError):
    """The loss or the gradient is no longer a finite number; the last committed step was saved before that."""
