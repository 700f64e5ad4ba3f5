"""Records of a source, which are no plain data: one that a conversion needs is refused, the others are left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..console.words import listed
from ..containers.pickles.foreign import BUILDERS, attributes, is_foreign, is_module
from ..containers.pickles.inert import Call, Global, as_name, as_text, children
from ..containers.spec import TensorSpec
from ..containers.torch_files.container import module_said
from ..containers.torch_files.storages import Storage
from ..errors import CheckpointError
from ..families.parts import parts_of
from ..inspection.inspect import Inspection

_MOST_NAMED = 5


def records_left_out(found: Inspection) -> list[str]:
    """A sentence about the values of a file that are records of other programs' classes; [] without any.

    Raises: CheckpointError when one of them, among the weights, is or holds a tensor.
    """
    if not found.container.foreign:
        return []
    content = found.container.content
    records = dict(_records(content))
    aside = {} if found.key else parts_of(content)
    for path, record in records.items():
        is_weight = path.startswith(found.key) and path.partition(".")[0] not in aside
        if is_weight and not is_module(record) and _holds_tensors(record):
            raise CheckpointError(
                f"{found.path}: {as_name(path) or 'its content'} is {as_text(record, 80)}, which is not read as a "
                "tensor. Load the file with the program that wrote it, and save a state dict of plain tensors."
            )
    if not records:
        return []
    named = listed([f"{as_name(path)} is {as_text(record, 60)}" for path, record in records.items()], _MOST_NAMED)
    return [f"no plain data, so it stays text or is left out: {named}"]


def refuse_modules(found: Inspection) -> None:
    """Refuse a whole module whose paths are those of no known family: its tensors may have other names in its program.

    Raises: CheckpointError with the two lines that make a state dict of it.
    """
    content = found.container.content
    parts = content if isinstance(content, Mapping) else {"": content}
    for name, part in parts.items():
        if is_module(part) and (not found.key or found.key.startswith(f"{name}.")):
            raise CheckpointError(f"{found.path}: {module_said(part, str(name), found.path)}")


def _records(value: Any, path: str = "") -> Iterator[tuple[str, Call | Global]]:
    """The outermost records of foreign classes and functions, by the path to each."""
    if isinstance(value, (Call, Global)) and is_foreign(value):
        yield path, value
        return
    before = f"{path}." if path else ""
    fields = attributes(value) if isinstance(value, (Mapping, Call)) else None
    if fields is not None:
        for name, item in fields.items():
            yield from _records(item, before + (name if isinstance(name, str) else as_text(name)))
    elif not isinstance(value, Mapping):
        for i, item in enumerate(children(value) or ()):
            yield from _records(item, f"{before}{i}")


def _holds_tensors(record: Any) -> bool:
    """Whether a tensor, or what would have become one, is anywhere in a record."""
    pending = [record]
    while pending:
        value = pending.pop()
        if isinstance(value, (TensorSpec, Storage)) or (isinstance(value, Global) and value.path.startswith(BUILDERS)):
            return True
        pending += children(value) or ()
    return False
