"""Proof: read back what was written, undo the plan's rules on it, and compare with the source, bit for bit.

A cast is compared with the same cast of the source. Whatever came from elsewhere (fills, moments) is compared with what
the plan says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from core.checksum import crc32_range
from core.containers.container import Container
from core.containers.open import open_container
from core.conversion_plan import Plan, Target, WeightFile
from core.errors import CheckpointDamaged, CheckpointMismatch
from core.gather import FLOATS, Gatherer, cast
from core.rules import apply
from core.view import View, cut, stored

Progress = Callable[[int], object]


def prove(plan: Plan, place: Path, progress: Progress) -> None:
    """Compare what lies at `place` with the source of the plan.

    Raises: CheckpointDamaged with the name of the tensor that differs, in what was written or in the source.
    """
    _check_source(plan)
    written: dict[str, View] = {}
    for file in plan.files:
        container = _opened(place / file.name if plan.is_folder else place, file, plan)
        for target in file.targets:
            view = stored(container, container.tensors[target.path])
            if target.is_weight:
                written[target.name] = view
            if not target.is_weight or any(b.source is not plan.model.container for b in target.view.blocks):
                _compare(plan, target.name, target.view, view, progress if not target.is_weight else lambda _: None)
    sizes = {**plan.model.sizes}
    for rows, back in reversed(plan.model.route):
        try:
            written = apply(rows, written, sizes, not back).tensors
        except CheckpointMismatch as error:
            raise CheckpointDamaged(f"{plan.target}: cannot be turned back ({error}). It was removed again.") from error
    for name, source in plan.model.sources.items():
        if name in written:
            _compare(plan, name, *_common(source, written[name]), progress)
        elif any(raw not in plan.model.dropped for raw in source.names):
            raise CheckpointDamaged(f"{plan.target}: {name} of {plan.model.path} is not in it. It was removed again.")


def _common(source: View, made: View) -> tuple[View, View]:
    """Both without the rows that one of them lacks, where rows were cropped or padded."""
    if source.shape == made.shape or not source.shape or source.shape[1:] != made.shape[1:]:
        return source, made
    rows = min(source.shape[0], made.shape[0])
    return cut(source, 0, 0, rows), cut(made, 0, 0, rows)


def _opened(path: Path, file: WeightFile, plan: Plan) -> Container:
    """Open a file that was written, and compare its header with the plan."""
    container = open_container(path)
    expected: dict[str, Target] = {target.path: target for target in file.targets}
    for name in [*expected, *container.tensors]:
        spec, target = container.tensors.get(name), expected.get(name)
        found = (spec.dtype, tuple(spec.shape)) if spec else None
        if target is None or found != (target.dtype, tuple(target.view.shape)):
            raise CheckpointDamaged(
                f"{plan.target}: {name} is {found or 'missing'}, planned was "
                f"{(target.dtype, tuple(target.view.shape)) if target else 'nothing'}. It was removed again."
            )
    return container


def _compare(plan: Plan, name: str, source: View, made: View, progress: Progress) -> None:
    """Raise CheckpointDamaged unless the second holds the elements of the first, cast where the plan says."""
    with Gatherer() as one, Gatherer() as two:
        left, right = _even(one, source, made.dtype), two.pieces(made)
        rest, at = memoryview(b""), 0
        for piece in left:
            if len(rest) < len(piece):
                rest = memoryview(rest.tobytes() + b"".join(_take(right, len(piece) - len(rest))))
            if rest[: len(piece)] != piece:
                near = at // max(made.nbytes // max(made.numel, 1), 1)
                raise CheckpointDamaged(
                    f"{plan.target}: {name} is not what {plan.model.path} holds, within {len(piece)} bytes from "
                    f"element {near} on. It was removed again; the disk may be failing."
                )
            at += len(piece)
            rest = rest[len(piece) :]
            progress(len(piece))


def _take(pieces: Iterator[memoryview], size: int) -> Iterator[bytes]:
    while size > 0:
        piece = next(pieces, None)
        if piece is None:
            return
        size -= len(piece)
        yield piece.tobytes()


def _even(gatherer: Gatherer, view: View, dtype: str) -> Iterator[memoryview]:
    for piece in gatherer.pieces(view):
        yield cast(piece, view.dtype, dtype) if view.dtype != dtype and view.dtype in FLOATS else piece


def _check_source(plan: Plan) -> None:
    """Compare the bytes that were used with the checksums that the source recorded."""
    container = plan.model.container
    used = {name for target in plan.targets for name in target.view.names}
    for check in container.checks:
        if check.crc32 is None or not used & set(check.names):
            continue
        with container.open(check.file) as file:
            found = crc32_range(file.fileno(), check.offset, check.offset + check.size)
        if found != check.crc32:
            name = next(name for name in check.names if name in used)
            raise CheckpointDamaged(
                f"{container.path}: {name} is damaged (CRC32 {found:08x}, recorded {check.crc32:08x}). "
                "Nothing was written."
            )
