"""Execute a conversion plan: write tensor by tensor into a hidden folder, verify it, publish it with one rename.

The source is only read, and the result is verified against it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ..bundle.folder import new_id
from ..bundle.output import Output, reserve
from ..bundle.storage import DISK, Storage
from ..bundle.writing import lock_if_model
from ..console.words import size_text
from ..containers import safetensors_writer
from ..containers.checksum import combine, crc32
from ..containers.dcp.folder import SUFFIX
from ..containers.dcp.metadata import METADATA
from ..containers.tensors.reading import PIECE, Gatherer, cast
from ..containers.torch_files.layout import TensorRecord, pickled, write_torch_file
from ..containers.trees import map_leaves
from ..errors import CheckpointError, CheckpointLocked, CheckpointMismatch, SaveFailed
from .meaning import check_meaning
from .plan import Plan, Progress, Ref, Target, WeightFile
from .proof import prove
from .targets.dcp import write_items

WRITEBACK = hasattr(os, "posix_fadvise")
"""Off (macOS, Windows, tests): writeback starts only when the files are synced."""

_AT_ONCE = 16 << 20  # bytes after which writeback is started
_PROBED = 1 << 20  # bytes of which room is reserved first
_MOST_OPEN = 64  # files that are not yet durable

Begin = Callable[[int, int, int], None]
"""Starts writeback of a range of an open file: descriptor, offset, length."""


@contextlib.contextmanager
def writing_back() -> Iterator[Begin]:
    """Start writeback while the conversion continues, in a thread, because the call blocks while the disk is busy."""
    if not WRITEBACK:
        yield lambda fd, start, size: None
        return
    told: SimpleQueue[tuple[int, int, int] | None] = SimpleQueue()

    def tell() -> None:
        for fd, start, size in iter(told.get, None):
            # Linux starts to write the range, and drops only pages that are already on disk, so none at this point.
            with contextlib.suppress(OSError):  # a file system that ignores advice
                os.posix_fadvise(fd, start, size, os.POSIX_FADV_DONTNEED)

    thread = threading.Thread(target=tell)
    thread.start()
    try:
        yield lambda fd, start, size: told.put((fd, start, size))
    finally:
        told.put(None)
        thread.join()


def _has_data(fd: int) -> bool:
    """Whether a file that is written from its front has data from there on already; room that is reserved is none."""
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError:  # no data up to the end
        return False
    os.lseek(fd, 0, os.SEEK_SET)
    return True


class DirectOutput(Output):
    """An output that writes large pieces straight to the file, and computes its CRC32 if one is recorded.

    The disk writes while the conversion continues; closing the output waits for the rest.
    """

    def __init__(self, storage: Storage, fd: int, is_summed: bool, begin: Begin) -> None:
        super().__init__(storage, fd)
        self.is_summed = is_summed
        self._begin = begin
        self._written = self._begun = 0

    def reserve(self, size: int) -> None:
        """Reserve room for the first `size` bytes of the file, if that costs no writing."""
        reserve(self._storage, self._fd, min(size, _PROBED))
        # Where the file system cannot reserve, the C library writes into every block.
        if self._storage.preallocation and size > _PROBED and not _has_data(self._fd):
            reserve(self._storage, self._fd, size)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append bytes and return their CRC32, or 0 when no checksum is computed."""
        view = memoryview(data).cast("B")
        if self.is_summed:
            if len(view) < PIECE // 2:
                return super().write(view)
            crc = crc32(view)
            self.crc32 = combine(self.crc32, crc, len(view))
        else:
            crc = 0
        self.flush()
        self._write_all(view)
        self.size += len(view)
        return crc

    def flush(self) -> None:
        """Pass buffered bytes to the system, so that the file can be read."""
        self._flush()

    def _write_all(self, view: memoryview) -> None:
        super()._write_all(view)
        self._written += len(view)
        if self._written - self._begun >= _AT_ONCE:
            self._begin(self._fd, self._begun, self._written - self._begun)
            self._begun = self._written


class OutputFiles(contextlib.ExitStack):
    """The files that a conversion writes; they stay open until leaving the context makes all of them durable."""

    def __init__(self, place: Path, begin: Begin) -> None:
        super().__init__()
        self.place = place
        self._begin = begin
        self.recorded: dict[str, dict[str, Any]] = {}  # by name: size and CRC32

    @contextlib.contextmanager
    def file(self, name: str, is_summed: bool = True, least: int = 0) -> Iterator[DirectOutput]:
        """Create a file of this name, and of at least so many bytes, in the folder; with "", the target itself."""
        if len(self.recorded) % _MOST_OPEN == _MOST_OPEN - 1:  # a model may have thousands
            self.close()
        output = DirectOutput(DISK, DISK.descriptor(self.place / name), is_summed, self._begin)
        self.enter_context(output)
        if least >= _AT_ONCE:
            output.reserve(least)
        yield output
        output.flush()
        self.recorded[name] = {"size": output.size, "crc32": f"{output.crc32:08x}"}


def refuse_target(plan: Plan, overwrite: bool) -> None:
    """Refuse a target that exists, unless --overwrite is given, and one that is, contains or lies in the source.

    Raises: CheckpointMismatch.
    """
    if plan.target.name in ("", ".."):
        raise CheckpointMismatch(f"{plan.target}: names no file or folder of its own. Give DST the name it is to have.")
    target = Path(os.path.realpath(plan.target))
    for path in plan.model.averaged or [plan.model.path]:
        source = Path(os.path.realpath(path))
        if source == target:
            raise CheckpointMismatch(f"{plan.target}: is the source itself. Name another place.")
        if target.is_relative_to(source) or source.is_relative_to(target):
            inside = "in the source" if target.is_relative_to(source) else "around the source"
            raise CheckpointMismatch(f"{plan.target}: lies {inside} {path}. Name a place beside it.")
    for name, text in plan.texts_beside.items():
        path = plan.target.parent / name
        if os.path.lexists(path) and not (path.is_file() and DISK.read(path) == text):
            raise CheckpointMismatch(
                f"{path}: is there already with another content, and nothing is overwritten. Name another place, or "
                "move the file away."
            )
    if os.path.lexists(plan.target) and not overwrite:
        raise CheckpointMismatch(
            f"{plan.target}: is there already, and nothing is overwritten. Name another place, or add --overwrite, "
            "which moves it aside."
        )


def convert(
    plan: Plan, *, overwrite: bool = False, verify: bool = True, progress: Progress = lambda _: None
) -> list[str]:
    """Execute a plan: write the files, verify them, and publish them; returns notes for the user.

    `progress` receives the number of bytes written, and then of those compared.

    Raises: CheckpointMismatch before anything is written; CheckpointLocked when a trainer or another conversion writes
        there; CheckpointDamaged when the source or the result is damaged; SaveFailed when the disk refuses. In each
        case the target is left as it was.
    """
    plan.check()
    refuse_target(plan, overwrite)
    stage = plan.target.with_name(f".convert-{plan.target.name}")
    try:
        with lock_if_model(plan.target), DISK.workplace(stage, lambda: _refuse_second(plan.target)):
            place = stage / "made"
            if plan.is_folder:
                DISK.make_folder(place)
            with writing_back() as begin, OutputFiles(place, begin) as made:
                _write(plan, made, progress)
                if verify:
                    prove(plan, place, progress)
            check_meaning(plan, place)
            return _commit(plan, place, overwrite)
    except OSError as error:
        raise SaveFailed(
            f"{plan.target}: not written: {error.strerror} ({size_text(plan.nbytes)} needed). {plan.model.path} is "
            "as it was."
        ) from error


def _write(plan: Plan, made: OutputFiles, progress: Progress) -> None:
    metadata: bytes | None = None  # of a DCP folder, with the final positions of its items
    with Gatherer() as gatherer:
        for file in plan.files:
            least = sum({_storage_of(file, target): target.nbytes for target in file.targets}.values())
            with made.file(file.name if plan.is_folder else "", file.is_torch, least) as output:
                if file.name.endswith(SUFFIX):
                    metadata = write_items(file, output, lambda t: elements(gatherer, t, progress))
                else:
                    (write_torch if file.is_torch else _write_safetensors)(file, output, gatherer, progress)
    for name, source in plan.copies.items():
        with made.file(name) as output, DISK.open(source) as copied:
            while data := copied.read(PIECE):
                output.write(data)
    texts = plan.texts if metadata is None else {**plan.texts, METADATA: metadata}
    for name, text in texts.items():
        with made.file(name) as output:
            output.write(text)
    for name, text in (plan.seal(made.recorded) if plan.seal is not None else {}).items():
        with made.file(name) as output:
            output.write(text)


def _write_safetensors(file: WeightFile, output: Output, gatherer: Gatherer, progress: Progress) -> None:
    entries = [(t.path, t.dtype, t.view.shape, t.nbytes) for t in file.targets]
    output.write(safetensors_writer.header(entries, file.metadata))
    for target in file.targets:
        _append(output, elements(gatherer, target, progress))


def _append(output: Output, pieces: Iterator[memoryview]) -> None:
    for piece in pieces:  # the last piece, and the tensor behind it, is released before the next tensor is read
        output.write(piece)


def write_torch(file: WeightFile, output: Output, gatherer: Gatherer, progress: Progress) -> str:
    """Write a torch file, tensor by tensor, and return the digest of its tensors."""
    keys: list[Target] = []
    tensors: dict[str, TensorRecord] = {}
    seen: dict[Hashable, int] = {}
    for target in file.targets:
        key = seen.setdefault(_storage_of(file, target), len(keys))
        if key == len(keys):
            keys.append(target)
        tensors[target.path] = TensorRecord(key, target.dtype, target.view.shape, target.nbytes)
    data_pkl = pickled(map_leaves(lambda leaf: tensors[leaf.path] if isinstance(leaf, Ref) else leaf, file.content))
    return write_torch_file(output, data_pkl, ((t.nbytes, elements(gatherer, t, progress)) for t in keys))


def _storage_of(file: WeightFile, target: Target) -> Hashable:
    """What tells the storage of a target from the others of a file: tied weights of a torch file share one."""
    is_one = file.is_torch and file.ties and target.is_weight and target.view.names
    return (target.dtype, target.view.place) if is_one else target.path


def elements(gatherer: Gatherer, target: Target, progress: Progress) -> Iterator[memoryview]:
    """Yield the bytes of a target, cast if planned."""
    for piece in gatherer.pieces(target.view):
        if target.dtype != target.view.dtype:
            try:
                made = cast(piece, target.view.dtype, target.dtype)
            except CheckpointError as error:
                raise CheckpointMismatch(f"{target.name} {error}") from error
        else:
            made = piece
        yield made
        progress(len(made))


def _refuse_second(target: Path) -> None:
    raise CheckpointLocked(f"{target}: another conversion is writing it. Wait for it, or name another place.")


def _commit(plan: Plan, place: Path, overwrite: bool) -> list[str]:
    """Publish the result under its name."""
    said, aside = [], None
    if os.path.lexists(plan.target):
        if not overwrite:
            raise CheckpointMismatch(f"{plan.target}: appeared while it was written. Nothing was overwritten.")
        aside = plan.target.parent / f"aside_{plan.target.name}_{new_id()}"
        said.append(f"{plan.target}: what was there is now {aside.name}")
    beside = {name: (DISK.read(source), str(source)) for name, source in plan.beside.items()}
    beside |= {name: (text, "what belongs to the result") for name, text in plan.texts_beside.items()}
    for name, (data, what) in beside.items():
        said += _put_beside(plan.target.parent / name, data, what, place.parent / f"{place.name}.{name}")
    DISK.publish(place, plan.target, aside=aside)
    return said


def _put_beside(path: Path, data: bytes, what: str, stage: Path) -> list[str]:
    """Put a file beside the target; an existing one stays, and is reported if it differs."""
    if os.path.lexists(path):
        same = path.is_file() and DISK.read(path) == data
        return [] if same else [f"{path}: was there already, other than {what}. It was left as it is."]
    DISK.write(stage, data)
    DISK.rename(stage, path)
    return []
