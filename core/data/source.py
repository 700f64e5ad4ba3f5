"""The text or tokens of a run, and their record in a checkpoint."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..bundle.storage import DISK
from ..console.anchored import anchored
from ..console.files import open_regular
from ..console.progress import byte_bar
from ..errors import InputError, SaveFailed, Unspecified
from .text import CHUNK, readable
from .token_shards import MANIFEST, is_dataset, open_dataset

SUFFIXES = (".txt", ".md", ".py")
"""Files of a folder that count as its text."""

DEFAULT_TEXT = "python_reference.txt"


@dataclass(frozen=True)
class Source:
    """The text or the tokens of a run: kind is `text` (a file), `folder` (of texts) or `dataset` (a folder of shards).

    `recorded` is a checkpoint's record of its source: contents are not read again for a digest that it already has.
    """

    kind: str
    path: Path
    why: str
    recorded: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def files(self) -> list[Path]:
        """The files whose contents count, in order.

        Raises: InputError when there are none.
        """
        if self.kind == "text":
            return [self.path]
        if self.kind == "dataset":
            dataset = open_dataset(self.path)
            return dataset.train + dataset.val
        found = [path for path in self.path.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
        names = sorted(path.relative_to(self.path) for path in found)
        visible = [self.path / name for name in names if not any(part.startswith(".") for part in name.parts)]
        if not visible:
            raise InputError(f"{self.path}: no text here. Expected files that end in {', '.join(SUFFIXES)}.")
        return visible

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return int(self._facts["bytes"])

    def line(self) -> str:
        """Describe in one line which text is used, why, and how to use another."""
        size = f"{len(self.files):,} files, " if self.kind == "folder" else ""
        what = "tokens" if self.kind == "dataset" else "text"
        return f"{what}: {self.path} ({size}{self.size:,} bytes), {self.why}"

    def record(self) -> dict[str, Any]:
        """Its record in training_state.json: kind, path, bytes, mtime_ns and the SHA-256 of the contents."""
        return {**self._facts, "digest": self.digest}

    def changed(self, recorded: Mapping[str, Any] | None) -> str | None:
        """Report in one sentence that the contents are not the recorded ones; None when they are."""
        if not recorded or recorded.get("digest") in (None, self.digest):
            return None
        return (
            f"{self.path}: not the text this checkpoint was trained on ({self.size:,} bytes, SHA-256 "
            f"{self.digest[:12]}; recorded {recorded.get('path')}, {recorded.get('bytes')} bytes, "
            f"{str(recorded['digest'])[:12]}); training continues with the new one."
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the contents; of a dataset of ours, of its dataset.json, which has the digest of its text."""
        if self.recorded.get("digest") and all(self.recorded.get(key) == self._facts[key] for key in self._facts):
            return str(self.recorded["digest"])
        manifest = self.path / MANIFEST
        digest = hashlib.sha256()
        with byte_bar("reading", self.size) as bar:
            for path in [manifest] if self.kind == "dataset" and manifest.exists() else self.files:
                with readable(path), open_regular(path) as file:
                    while block := file.read(CHUNK):
                        digest.update(block)
                        bar.update(len(block))
        return digest.hexdigest()

    def stamp(self) -> list[tuple[int, int]]:
        """Size and time of every file, as they are now."""
        with readable(self.path):
            return [(stat.st_size, stat.st_mtime_ns) for stat in (path.stat() for path in self.files)]

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """Kind, path, size and time; the newest of all files and of the folders they are in."""
        sizes, times = zip(*self.stamp(), strict=True)
        folders = {path.parent for path in self.files} if self.kind != "text" else set()
        newest = max(*times, *(folder.stat().st_mtime_ns for folder in folders), 0)
        inside = self.path.resolve().is_relative_to(Path.cwd())
        path = self.path.resolve().relative_to(Path.cwd()) if inside else self.path.resolve()
        return {"kind": self.kind, "path": path.as_posix(), "bytes": sum(sizes), "mtime_ns": newest}


def find_source(
    input_file: str | Path | None,
    dataset_dir: str | Path | None,
    recorded: Mapping[str, Any] | None,
    model_name: str,
    data_dir: Path = Path("data"),
    weights: Path | None = None,
) -> Source:
    """Choose a run's text: a flag, else what the checkpoint recorded, else data/<model_name>.txt, else the default.

    The default is the Python language reference, written once to data/python_reference.txt; it is for a new model, and
    never for `weights` without a recorded text.

    Raises: InputError when the chosen one does not exist, or is of the other kind; Unspecified when none is chosen.
    """
    recorded, data_dir = recorded or {}, anchored(data_dir)
    default = data_dir / DEFAULT_TEXT
    own = f"use your own with --input_file FILE or as {data_dir / f'{model_name}.txt'}"
    if input_file and dataset_dir:
        raise InputError(
            f"--input_file {input_file} and --dataset_dir {dataset_dir}: only one can be used. Leave one out."
        )
    if input_file:
        return _text(anchored(input_file), "from --input_file", recorded)
    if dataset_dir:
        return Source("dataset", open_dataset(anchored(dataset_dir)).folder, "from --dataset_dir", recorded)
    if recorded.get("path"):
        path = anchored(recorded["path"])
        if path.exists() or path.absolute() != default.absolute():
            return _recorded(path, recorded, data_dir)
    named = data_dir / f"{model_name}.txt"
    if not recorded.get("path") and Path(model_name).name == model_name and named.exists():
        return _text(named, "found by the model's name; use another with --input_file FILE", recorded)
    if weights is not None and not recorded.get("path"):
        raise Unspecified(
            f"{weights}: the text of its training is not recorded, and the one that comes with Python is not taken "
            f"instead. Name it with --input_file FILE or --dataset_dir DIR, or put it at {named}."
        )
    if not default.exists():
        _write_default(default)
    return _text(default, f"the language reference that comes with Python; {own}", recorded)


def _recorded(path: Path, recorded: Mapping[str, Any], data_dir: Path) -> Source:
    """The source that a checkpoint names. A stranger may have written it, who must not choose what is read here.

    What lies in the data folder is followed, and so is anything that holds what was recorded: whoever wrote the digest
    had the content. No link out of a recorded folder is followed, unless into the data folder.
    """
    flag = "--dataset_dir" if recorded.get("kind") == "dataset" else "--input_file"
    if not path.exists():
        raise InputError(f"{path}: not there any more, but the checkpoint was trained on it. Name it with {flag} PATH.")
    why = "recorded by the checkpoint; change it with --input_file FILE or --dataset_dir DIR"
    is_dataset = recorded.get("kind") == "dataset"
    found = Source("dataset", open_dataset(path).folder, why, recorded) if is_dataset else _text(path, why, recorded)
    inside, data = path.resolve(), data_dir.resolve()
    real = [file.resolve() for file in found.files]
    strays = [file for file in real if not (file.is_relative_to(inside) or file.is_relative_to(data))]
    if strays:
        raise InputError(f"{path}: recorded by the checkpoint, and leads to {strays[0]}. Name it with {flag} {path}")
    if not all(file.is_relative_to(data) for file in real) and found.digest != recorded.get("digest"):
        raise InputError(
            f"{path}: recorded by the checkpoint, but what it holds is not what was recorded, and it is not in "
            f"{data_dir}, so it is not used. If it is yours, name it with {flag} {path}"
        )
    return found


def _text(path: Path, why: str, recorded: Mapping[str, Any]) -> Source:
    if not path.exists():
        raise InputError(f"{path}: not there, expected a text file or a folder of texts. Check the path.")
    if not path.is_dir():
        return Source("text", path, why, recorded)
    if is_dataset(path):
        raise InputError(f"{path}: a folder of tokens, expected texts. Pass it with --dataset_dir {path}")
    return Source("folder", path, why, recorded)


def _write_default(path: Path) -> None:
    """Write the language reference of this Python; a reader never sees half of it."""
    version = platform.python_version()
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            f"this Python {version} does not carry the default text (pydoc_data.topics): pass --input_file FILE."
        ) from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with DISK.published(path) as staged:
            DISK.write(staged, "\n\n".join(topics[name].strip() for name in sorted(topics)).encode() + b"\n")
    except OSError as error:
        raise SaveFailed(
            f"{path}: {error.strerror}, so the default text cannot be written. Pass --input_file FILE."
        ) from error
