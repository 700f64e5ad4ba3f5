"""Read the contents of a .safetensors file from its header alone: no torch, no weights.

The format is described in the README of huggingface/safetensors: the length of the header in 8 bytes, a JSON object
with each tensor's dtype, shape and offsets, then the bytes of the tensors, dense and without gaps. It has no checksums.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointDamaged, CheckpointError
from .blocks import naturals, read_at
from .container import Check, Container, reading
from .json_files import parse_json
from .pickles.inert import as_name, as_text
from .recognised import NEVER_WRITTEN, answer_in_place, other_kind
from .spec import DTYPES, ITEM_SIZES, LONGEST_NAME, MOST_DIMENSIONS, TensorSpec, dense_strides

METADATA = "__metadata__"

_LENGTH = 8  # bytes of the header's length
_LONGEST_HEADER = 100_000_000

_DTYPES = {code: dtype for dtype, (*_, code) in DTYPES.items() if code}
"""Torch's names of the dtypes; F4 counts single numbers, and an element of torch holds two of them."""

_UNKNOWN_TO_TORCH = ("F6_E2M3", "F6_E3M2")


def open_safetensors(path: Path) -> Container:
    """Open a .safetensors file; only its header is read.

    Its content is the header's free text, under `__metadata__`, if there is any.

    Raises: CheckpointNotFound, CheckpointDamaged when it is cut off or contradicts itself, CheckpointError for a dtype
        that torch does not have.
    """
    where = str(path)
    with reading(path) as file:
        size = file.seek(0, os.SEEK_END)
        header, begin = _read_header(file, size, where)
    metadata = header.pop(METADATA, None)
    if metadata is not None and not _is_text(metadata):
        raise CheckpointDamaged(f"{where}: its {METADATA} is {as_text(metadata, 80)}, expected texts by name.")
    tensors = {name: _spec(name, entry, begin, size, where) for name, entry in header.items()}
    _check_layout(list(tensors.values()), begin, size, where)
    return Container(
        kind="safetensors",
        path=path,
        tensors=tensors,
        content={} if metadata is None else {METADATA: metadata},
        files={path.name: size},
        checks=[Check(path.name, spec.offset, spec.nbytes, None, (name,)) for name, spec in tensors.items()],
    )


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins with these bytes is meant as safetensors: text has no zeros before its first brace."""
    return head[_LENGTH : _LENGTH + 1] == b"{" and b"\0" in head[:_LENGTH]


def _read_header(file: BinaryIO, size: int, where: str) -> tuple[dict[str, Any], int]:
    """Read the header; returns it and the offset at which the bytes of the tensors begin."""
    if size < _LENGTH:
        raise CheckpointDamaged(f"{where}: {size} bytes, expected a safetensors file, which begins with {_LENGTH}.")
    head = read_at(file, 0, min(size, 512), where)
    length = int.from_bytes(head[:_LENGTH], "little")
    if not is_safetensors(head):
        if said := other_kind(head, where, f"a safetensors file (its header claims {length} bytes)"):
            raise CheckpointError(said)
        if head.lstrip()[:1] == b"{":
            raise CheckpointError(answer_in_place(head, where))
    if length > _LONGEST_HEADER:
        raise CheckpointDamaged(f"{where}: its header claims {length} bytes, a safetensors file has at most 100000000.")
    if _LENGTH + length > size:
        raise CheckpointDamaged(f"{where}: cut off after {size} bytes; its header ends at byte {_LENGTH + length}.")
    first = read_at(file, _LENGTH, min(length, 1), where)
    if first != b"{":
        said = "" if any(head) else f" {NEVER_WRITTEN}"
        raise CheckpointDamaged(
            f"{where}: its header begins with {as_text(first)}, that of safetensors with b'{{'.{said}"
        )
    return parse_json(read_at(file, _LENGTH, length, where), f"{where}: its header"), _LENGTH + length


def _spec(name: str, entry: Any, begin: int, size: int, where: str) -> TensorSpec:
    """Check one tensor of the header by itself; `begin` is the offset of the bytes of all tensors."""
    if len(name) > LONGEST_NAME or not _is_text(name):
        raise CheckpointDamaged(f"{where}: a tensor is called {as_text(name, 80)}, which is not a valid name.")
    if not isinstance(entry, dict):
        raise CheckpointDamaged(
            f"{where}: {as_name(name)} is {as_text(entry, 80)}, expected dtype, shape and data_offsets."
        )
    code, sizes, offsets = entry.get("dtype"), _naturals(entry.get("shape")), _naturals(entry.get("data_offsets"))
    if sizes is None or len(sizes) > MOST_DIMENSIONS:
        raise CheckpointDamaged(
            f"{where}: {as_name(name)} has the shape {as_text(entry.get('shape'), 80)}, expected at most "
            f"{MOST_DIMENSIONS} whole numbers of at least 0."
        )
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointDamaged(
            f"{where}: {as_name(name)} has the data_offsets {as_text(entry.get('data_offsets'), 80)}, expected two "
            "whole numbers of at least 0, the smaller one first."
        )
    dtype = _DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None or code == "F4":
        dtype, sizes = _torch_type(code, sizes, f"{where}: {as_name(name)}")
    first, end = offsets
    strides = dense_strides(sizes)
    nbytes = math.prod(sizes) * ITEM_SIZES[dtype]
    if begin + end > size:
        raise CheckpointDamaged(f"{where}: cut off after {size} bytes; {as_name(name)} ends at byte {begin + end}.")
    if end - first != nbytes or (sizes and strides[0] * max(sizes[0], 1) >= 1 << 60):
        raise CheckpointDamaged(
            f"{where}: {as_name(name)} has {end - first} bytes, its dtype {code} and shape {as_text(sizes, 80)} need "
            f"{as_text(nbytes, 40)}."
        )
    return TensorSpec(name, dtype, sizes, strides, begin + first, nbytes, name)


def _torch_type(code: Any, shape: tuple[int, ...], what: str) -> tuple[str, tuple[int, ...]]:
    """The dtype and shape in torch's terms, of a code that is unusual or unknown."""
    odd = code == "F4" and (not shape or shape[-1] % 2)
    if odd or code in _UNKNOWN_TO_TORCH:
        raise CheckpointError(
            f"{what} has dtype {code} and shape {as_text(shape, 80)}, for which torch has no dtype. Read it with the "
            "program that wrote it."
        )
    if code != "F4":
        raise CheckpointDamaged(f"{what} has dtype {as_text(code, 40)}, expected one of {', '.join(_DTYPES)}.")
    return _DTYPES[code], (*shape[:-1], shape[-1] // 2)


def _check_layout(specs: list[TensorSpec], begin: int, size: int, where: str) -> None:
    """Refuse tensors that overlap, or bytes that belong to none."""
    before: TensorSpec | None = None
    position = begin
    for spec in sorted(specs, key=lambda s: (s.offset, s.nbytes)):
        if spec.offset != position:
            raise CheckpointDamaged(
                f"{where}: {_shown(before)} ends at byte {position}, and {_shown(spec)} begins at {spec.offset}."
            )
        position, before = position + spec.nbytes, spec
    if position != size:
        raise CheckpointDamaged(
            f"{where}: has {size} bytes, and {_shown(before)} ends at byte {position}: {size - position} bytes "
            "belong to nothing."
        )


def _shown(spec: TensorSpec | None) -> str:
    return "the header" if spec is None else as_name(spec.name)


def _naturals(values: Any) -> tuple[int, ...] | None:
    """A tuple of whole numbers of at least 0; None for anything else."""
    return tuple(values) if isinstance(values, list) and naturals(tuple(values)) else None


def _is_text(value: Any) -> bool:
    """Whether a value is a string that can be encoded, or a dict of such strings."""
    if isinstance(value, dict):
        return all(_is_text(text) for item in value.items() for text in item)
    try:
        return isinstance(value, str) and bool(value.encode() or True)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
