"""Shards of torch's HuggingFaceStorageWriter: safetensors files of which each has one rank's part of every tensor.

The metadata of each file has DCP_SHARDING_INFO, a JSON text with the `saved_offsets` of each of its tensors: where in
the whole tensor the part begins. The shape of the whole and the number of ranks are recorded nowhere, so the parts that
are there have to fill a block from the first element on (torch.distributed.checkpoint, hf_storage.py, _hf_utils.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import CheckpointDamaged
from .blocks import blocks_fault, naturals, spec_of_blocks
from .container import Container
from .json_files import parse_json
from .pickles.inert import as_name, as_text, check_structure
from .safetensors import METADATA
from .series import Series
from .spec import Chunk, TensorSpec

SHARDING = "DCP_SHARDING_INFO"

_OFFSETS = "saved_offsets"


@dataclass(eq=False, repr=False)
class Piece:
    """A tensor of one file, and where it begins in the whole tensor; None: the file does not say."""

    spec: TensorSpec
    begin: tuple[int, ...] | None


def sharding_of(shard: Container) -> str:
    """The text of a file's DCP_SHARDING_INFO; "" for a file that another program wrote."""
    metadata = shard.content.get(METADATA) if isinstance(shard.content, dict) else None
    text = metadata.get(SHARDING) if isinstance(metadata, dict) else None
    return text if isinstance(text, str) else ""


def offsets_of(shard: Container, where: str) -> dict[str, tuple[int, ...]]:
    """Where each tensor of a file begins in the whole tensor; empty for a file that another program wrote.

    Raises: CheckpointDamaged when the record contradicts the tensors.
    """
    text = sharding_of(shard)
    if not text:
        return {}
    recorded = parse_json(text.encode(), f"{where}: its {SHARDING}")
    check_structure(recorded, where, len(text))
    found: dict[str, tuple[int, ...]] = {}
    for name, spec in shard.tensors.items():
        entry = recorded.get(name)
        offsets = entry.get(_OFFSETS) if isinstance(entry, dict) else None
        begin = tuple(offsets) if isinstance(offsets, list) else None
        if not naturals(begin) or len(begin) != len(spec.shape):
            raise CheckpointDamaged(
                f"{where}: its {SHARDING} places {as_name(name)} at {as_text(offsets, 60)}, expected "
                f"{len(spec.shape)} whole numbers, one for each dimension of {spec.shape}."
            )
        found[name] = begin
    return found


def join_pieces(name: str, pieces: list[Piece], where: str, series: Series | None) -> TensorSpec:
    """Make one tensor of the parts in all files; `series` names those that may be missing.

    Raises: CheckpointDamaged when parts are missing, overlap, or differ in their dtype, and when a tensor is in two
        files that do not place it.
    """
    first = pieces[0].spec
    if len(pieces) == 1 and not any(pieces[0].begin or ()):
        return first
    shown = as_name(name)
    parts = [(piece.begin, piece.spec) for piece in pieces if piece.begin is not None]
    if len(parts) < len(pieces):
        raise CheckpointDamaged(f"{where}: {shown} is in {first.file} and in {pieces[1].spec.file}.")
    for _, spec in parts:
        if (spec.dtype, len(spec.shape)) != (first.dtype, len(first.shape)):
            raise CheckpointDamaged(
                f"{where}: {shown} is {first.dtype} {first.shape} in {first.file}, and {spec.dtype} {spec.shape} in "
                f"{spec.file}. The files are of different saves."
            )
    ends = [tuple(b + n for b, n in zip(begin, spec.shape, strict=True)) for begin, spec in parts]
    shape = tuple(map(max, zip(*ends, strict=True)))
    if fault := blocks_fault(shape, [(begin, spec.shape) for begin, spec in parts]):
        raise CheckpointDamaged(f"{where}: {shown} is in {_files(pieces)}: {fault}. {_remedy(fault, series)}")
    chunks = [Chunk(s.file, s.offset, s.nbytes, begin, s.shape, s.strides) for begin, s in parts]
    return spec_of_blocks(name, first.dtype, shape, chunks, first.storage)


def _files(pieces: list[Piece]) -> str:
    rest = len(pieces) - 1
    return pieces[0].spec.file + (f" and {rest} more file{'s' * (rest != 1)}" if rest else " alone")


def _remedy(fault: str, series: Series | None) -> str:
    if "twice" in fault or "overlap" in fault:
        return "Files of another save lie among them: move those to another folder."
    lost = f" ({series.label})" if series else ""
    return f"Copy the shards of all ranks into one folder{lost}."
