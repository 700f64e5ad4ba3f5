"""A part of a checkpoint: the weights, or the optimizer state, in a torch file of their own or under a key of one."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..containers.pickles.foreign import foreign_calls
from ..containers.spec import TensorSpec
from ..containers.torch_files.file import open_torch_file
from ..containers.torch_files.stream import TorchStream
from ..containers.torch_files.zip import TorchZip
from ..errors import CheckpointError
from ..families.fused import Shape

WEIGHTS_KEYS = ("model_state_dict", "state_dict")
"""Where files that hold more than a state dict have it."""


class TorchFile:
    """A torch file, open; its header is read once, when it is first asked for."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file = file
        self.path = path

    @functools.cached_property
    def header(self) -> TorchZip | TorchStream:
        """What the file says of itself: its structure, with a spec for each tensor.

        Raises: CheckpointError when it is no torch file, or is damaged.
        """
        return open_torch_file(self.file, str(self.path))

    @property
    def foreign(self) -> list[str]:
        """What the pickle of the file names besides data, as text: in its content, and computed and thrown away."""
        return foreign_calls([self.header.content, self.header.unused])

    def refuse_foreign(self) -> None:
        """Raise CheckpointError when the file names anything but data; nothing of it was executed."""
        calls = self.foreign
        if calls:
            raise CheckpointError(
                f"{self.path}: its pickle names {', '.join(calls[:3])}. Nothing was executed, and nothing is loaded; "
                "inspect_model.py shows its tensors and plain values."
            )


class Part:
    """The content of a torch file, or what lies under one of its keys."""

    def __init__(self, source: TorchFile, keys: tuple[str, ...] = ()) -> None:
        self.source = source
        self._keys = keys

    @functools.cached_property
    def key(self) -> str | None:
        """The first of the keys that the content has; None for the whole content."""
        content = self.source.header.content
        return next(
            (key for key in self._keys if isinstance(content, dict) and isinstance(content.get(key), dict)), None
        )

    def of(self, content: Any) -> Any:
        """What of a file's content is this part."""
        return content if self.key is None else content[self.key]

    @property
    def content(self) -> Any:
        """The part as the header has it: plain values, and a spec for each tensor."""
        return self.of(self.source.header.content)

    @functools.cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        """The tensors of the part by name."""
        before = "" if self.key is None else f"{self.key}."
        found = self.source.header.tensors
        return {name.removeprefix(before): spec for name, spec in found.items() if name.startswith(before)}

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of its tensors by name."""
        return {name: spec.shape for name, spec in self.tensors.items()}


def once(tensors: Mapping[str, TensorSpec]) -> dict[str, Shape]:
    """The shapes of tensors, tied ones under their first name alone, as a program's parameters are."""
    seen: dict[tuple[Any, ...], str] = {}
    for name, t in tensors.items():
        seen.setdefault((t.storage, t.offset, t.shape, t.strides), name)
    return {name: tensors[name].shape for name in seen.values()}
