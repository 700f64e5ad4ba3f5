"""How many updates a checkpoint counts: by the names that programs give the count, as a number or a tensor of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, BinaryIO

from ..errors import CheckpointDamaged
from .blocks import read_at
from .checksum import crc32_range
from .container import Container
from .pickles.foreign import attributes
from .pickles.inert import Call
from .spec import ITEM_SIZES, TensorSpec

NAMES = (
    "step",
    "global_step",
    "step_count",  # litgpt: optimizer steps, where iter_num counts batches
    "iter_num",
    "iteration",
    "iter",
    "current_step",
    "train_step",
    "train_steps",
    "num_updates",
    "num_steps_completed",
)
"""What programs call the count; the first that is there is used."""

HOLDERS = (
    "train_state",
    "training_state",
    "trainer",
    "trainer_state",
    "progress",
    "train_progress",
    "loop_state",
    "extra_state",
    "metadata",
    "meta",
)
"""Entries, also within each other, in which programs put it."""

_DEPTH = 3
_NUMBERS = ("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "bfloat16")
_DTYPES = frozenset((*_NUMBERS, "float32", "float64"))


def step_of(container: Container, opened: BinaryIO | None = None) -> tuple[int | None, list[str]]:
    """The step of a checkpoint, and a sentence for each other count in it; None where none is recorded.

    `opened` is the container's file, if it is open already.

    Raises: CheckpointDamaged when the bytes of a count differ from their checksum, or end too early.
    """
    found: dict[str, int] = {}
    for path, value in _counts(container.content):
        number = number_of(container, value, opened) if isinstance(value, TensorSpec) else value
        if number >= 0 and number == number // 1 and number < 2**63:
            found[path] = int(number)
    if not found:
        return None, []
    (first, step), *others = found.items()
    return step, [f"step {step} is its {first}; its {path} is {n}" for path, n in others if n != step]


def _counts(content: Any, before: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield everything that is named like a count, outer entries first."""
    fields = attributes(content) if isinstance(content, (dict, Call)) else None
    if fields is None:
        return
    for name in (*NAMES, *(f"{holder}.{name}" for holder in HOLDERS for name in NAMES)):  # DCP may save flat names
        value = fields.get(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number or (isinstance(value, TensorSpec) and value.numel == 1 and value.dtype in _DTYPES):
            yield before + name, value
    for name in HOLDERS if depth < _DEPTH else ():
        if isinstance(fields.get(name), (Mapping, Call)):
            yield from _counts(fields[name], f"{before}{name}.", depth + 1)


def number_of(container: Container, spec: TensorSpec, opened: BinaryIO | None = None) -> float:
    """Read the only number of a tensor, after a comparison of its bytes with their checksum.

    Raises: CheckpointDamaged.
    """
    from .tensors.dtypes import decode

    block = next(block for block in spec.blocks if 0 not in block.shape)
    with nullcontext(opened) if opened is not None else container.open(block.file) as file:
        for check in container.checks:
            if check.crc32 is not None and spec.name in check.names:
                crc32 = crc32_range(file.fileno(), check.offset, check.offset + check.size)
                if crc32 != check.crc32:
                    raise CheckpointDamaged(
                        f"{container.path}: {spec.name} is damaged (CRC32 {crc32:08x}, recorded {check.crc32:08x})."
                    )
        data = read_at(file, block.offset, ITEM_SIZES[spec.dtype], f"{container.path}: {spec.name}")
    value = decode(data, spec.dtype)[0]
    return float(value) if spec.dtype.startswith(("float", "bfloat")) else int(value)
