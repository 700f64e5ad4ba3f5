"""Token shards: flat files of ids, memory-mapped when read, and the folders that hold them.

A shard is one of
    raw uint16                                     nanoGPT's train.bin and val.bin
    256 int32 (20240520, 1, count, 0 ...), uint16  modded-nanogpt, llm.c, and ours
    256 int32 (20240801, 7, count, 0 ...), uint32  llm.c with larger vocabularies, and ours
all little-endian. A dataset is a folder of them; ours has a dataset.json, written last.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..bundle.storage import DISK
from ..bundle.tokenizer_state import state_of_meta
from ..console.commands import typed
from ..console.files import open_regular, read_regular
from ..console.words import tell
from ..containers.json_files import dump_json
from ..containers.pickles.reader import read_pickle
from ..errors import CheckpointMismatch, InputError, SaveFailed
from .text import readable

HEADER_INTS = 256
LAYOUTS: dict[tuple[int, int], np.dtype] = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
"""Magic number and version of a header, and the tokens behind it."""

VERSIONS = dict(LAYOUTS.keys())

MANIFEST = "dataset.json"
VERSION = 1
SPLITS = ("train", "val")
SHARD_TOKENS = 100_000_000


@dataclass(frozen=True)
class Dataset:
    """A folder of shards: its files, and the tokenizer's state if the folder records it."""

    folder: Path
    tokenizer: dict[str, Any] | None
    train: list[Path]
    val: list[Path]


def read_shard(path: Path) -> np.ndarray:
    """Map the tokens of a shard, uint16 or uint32; pages are read on use.

    Raises: InputError with the path and both sizes when the header and the file disagree.
    """
    with readable(path, "a file of tokens"), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        magic, version, count = struct.unpack("<3i", file.read(12).ljust(12, b"\0"))
        dtype = LAYOUTS.get((magic, version))
        if dtype is None and magic in VERSIONS:
            raise InputError(f"{path}: shard version {version}, expected {VERSIONS[magic]}. Prepare it again.")
        header = 0 if dtype is None else 4 * HEADER_INTS
        if dtype is None:
            dtype, count = np.dtype("<u2"), size // 2
        expected = header + count * dtype.itemsize
        if expected != size:
            promise = f"{expected:,} for the {count:,} tokens of its header" if header else "a whole number of uint16"
            raise InputError(f"{path}: found {size:,} bytes, expected {promise}. Copy or prepare the file again.")
        if not count:
            return np.empty(0, dtype)
        return np.asarray(np.memmap(file, dtype=dtype, mode="r", offset=header, shape=(count,)))


def is_dataset(folder: Path) -> bool:
    """Whether a folder holds shards."""
    return (folder / MANIFEST).is_file() or any(folder.glob("*.bin"))


def open_dataset(folder: Path) -> Dataset:
    """Find the shards of a folder and the tokenizer that made them; no token is read.

    Raises: InputError when it holds no training shard, or its dataset.json, meta.pkl and files contradict each other.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing there"
        raise InputError(
            f"{folder}: {found}, expected a folder made by {typed('data/prepare.py')}, or one of .bin shards."
        )
    if (folder / MANIFEST).exists():
        return _ours(folder)
    shards = sorted(folder.glob("*.bin"))
    train, val = ([path for path in shards if split in path.name] for split in SPLITS)
    if not train:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise InputError(
            f"{folder}: no training shards. Expected {MANIFEST} (made by {typed('data/prepare.py')}), train.bin "
            f"(nanoGPT) or *train*.bin (modded-nanogpt); found {found}."
        )
    meta = folder / "meta.pkl"
    state = _meta_state(meta) if meta.exists() else None
    return Dataset(folder, state, train, val)


def write_dataset(
    folder: Path,
    splits: dict[str, Iterable[np.ndarray]],
    dtype: np.dtype,
    about: dict[str, Any],
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Write a dataset folder that appears whole or not at all.

    `splits` gives the tokens of `train` and `val` piece by piece, `about` the other entries of dataset.json.
    Does nothing when another process has finished the same folder in the meantime.

    Raises: InputError when the folder holds something already, SaveFailed when it cannot be written.
    """
    partial = folder.with_name(folder.name + ".partial")
    wait = f"{partial}: another process is writing this dataset; waiting for it."
    try:
        with DISK.workplace(partial, lambda: tell(wait)):
            if (folder / MANIFEST).exists():
                return
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise InputError(
                    f"{folder}: is there already and holds no {MANIFEST}. Name a new folder; nothing was changed."
                )
            entries = {}
            for split, tokens in splits.items():
                with _Writer(partial, split, dtype, shard_tokens) as writer:
                    for piece in tokens:
                        writer.append(piece)
                entries[split] = writer.entries
            manifest = {"format_version": VERSION, **about, **entries}
            DISK.write(partial / MANIFEST, dump_json(manifest))
            DISK.publish(partial, folder)
    except OSError as error:
        raise SaveFailed(f"{folder}: {error.strerror}. No dataset was written; the text is untouched.") from error


class _Writer:
    """Tokens of one split, written to `<split>_000000.bin` and so on; `entries` goes into dataset.json."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int) -> None:
        self.entries: list[dict[str, Any]] = []
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._dtype = dtype.newbyteorder("<")
        self._file: BinaryIO | None = None

    def append(self, tokens: np.ndarray) -> None:
        tokens = tokens.astype(self._dtype, copy=False)
        while len(tokens):
            if self._file is None:
                name = f"{self._split}_{len(self.entries):06d}.bin"
                self._file = (self._folder / name).open("xb")
                self._file.write(bytes(4 * HEADER_INTS))
                self.entries.append({"file": name, "tokens": 0})
            part = tokens[: self._shard_tokens - self.entries[-1]["tokens"]]
            self._file.write(part.tobytes())
            self.entries[-1]["tokens"] += len(part)
            tokens = tokens[len(part) :]
            if self.entries[-1]["tokens"] == self._shard_tokens:
                self.finish()

    def finish(self) -> None:
        """Put the header in front of the last shard and make it durable."""
        if self._file is None:
            return
        magic, version = next(kind for kind, dtype in LAYOUTS.items() if dtype == self._dtype)
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:3] = magic, version, self.entries[-1]["tokens"]
        self._file.seek(0)
        self._file.write(header.tobytes())
        DISK.sync(self._file)
        self._file.close()
        self._file = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            if self._file is not None:
                self._file.close()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the dataset.json of a folder of ours: its format, tokenizer and source, and the tokens of each shard.

    Raises: InputError for what data/prepare.py does not write, and for a newer format.
    """
    path = folder / MANIFEST
    try:
        with readable(path, typed("what data/prepare.py writes")):
            manifest = json.loads(read_regular(path))
        version = manifest["format_version"]
        if version > VERSION:
            raise InputError(
                f"{path}: format_version {version}, this program reads up to {VERSION}. Update the program."
            )
        tokens = [entry["tokens"] for split in SPLITS for entry in manifest[split]]
        if not isinstance(manifest["tokenizer"], dict) or not all(type(count) is int for count in tokens):
            raise TypeError("no tokenizer, or no numbers of tokens")
        return {"source": {}, **manifest}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path}: not what {typed('data/prepare.py')} writes ({error!r}). Prepare the dataset again."
        ) from error


def _ours(folder: Path) -> Dataset:
    path, manifest = folder / MANIFEST, read_manifest(folder)
    try:
        shards = {split: [_listed(folder, entry) for entry in manifest[split]] for split in SPLITS}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not what {typed('data/prepare.py')} writes ({error!r}). Prepare the dataset again."
        ) from error
    return Dataset(folder, manifest["tokenizer"], shards["train"], shards["val"])


def _listed(folder: Path, entry: dict[str, Any]) -> Path:
    """Open a shard that dataset.json names, after comparing its header."""
    path = folder / Path(entry["file"]).name
    found = len(read_shard(path))
    if found != entry["tokens"]:
        raise InputError(
            f"{path}: found {found:,} tokens, expected {entry['tokens']:,} as in {MANIFEST}. Prepare the dataset again."
        )
    return path


def _meta_state(path: Path) -> dict[str, Any]:
    """The tokenizer of nanoGPT's meta.pkl; nothing in it is executed."""
    with readable(path, "nanoGPT's vocabulary"):
        meta = read_pickle(read_regular(path), str(path))
    try:
        return state_of_meta(meta, str(path))
    except CheckpointMismatch as error:
        raise InputError(str(error)) from error
