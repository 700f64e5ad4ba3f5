"""Which text a run uses, and its tokens."""

from __future__ import annotations

import hashlib
import os
import platform
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from core.errors import CheckpointMismatch, InputError, SaveFailed
from core.shards import MANIFEST, SHARD_TOKENS, Dataset, is_dataset, open_dataset, read_shard, write_dataset
from core.text import CHUNK, Segment, pieces, split
from core.tokenizer import (
    START,
    Gpt2Tokenizer,
    Tokenizer,
    describe,
    make_char,
    same_vocabulary,
    token_dtype,
    tokenizer_from_file,
    tokenizer_from_state,
)
from core.tokens import Tokens

STREAM_ABOVE = 64 * 2**20
"""Bytes of text from which tokens go to mapped shards instead of memory."""

SUFFIXES = (".txt", ".md", ".py")
"""Files of a folder that count as its text."""

DEFAULT_TEXT = "python_reference.txt"
CACHE = Path("data/cache")


@dataclass(frozen=True)
class Source:
    """The text or the tokens of a run: kind is `text` (a file), `folder` (of texts) or `dataset` (a folder of shards).

    `recorded` is what a checkpoint says of its source: contents are not read again for a digest it already has.
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
            manifest = self.path / MANIFEST
            return [manifest] if manifest.exists() else dataset.train + dataset.val
        found = [path for path in self.path.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
        names = sorted(path.relative_to(self.path) for path in found)
        visible = [self.path / name for name in names if not any(part.startswith(".") for part in name.parts)]
        if not visible:
            raise InputError(f"{self.path}: no text here. Expected files that end in {', '.join(SUFFIXES)}.")
        return visible

    def line(self) -> str:
        """Say in one line which text is used, why, and how to use one's own."""
        size = f"{len(self.files):,} files, " if self.kind == "folder" else ""
        what = "tokens" if self.kind == "dataset" else "text"
        return f"{what}: {self.path} ({size}{self._facts['bytes']:,} bytes), {self.why}"

    def record(self) -> dict[str, Any]:
        """What training_state.json keeps of the source: kind, path, bytes, mtime_ns and the SHA-256 of the contents."""
        return {**self._facts, "digest": self.digest}

    def changed(self, recorded: Mapping[str, Any] | None) -> str | None:
        """Say in one sentence that the contents are not the recorded ones; None when they are, or nothing is recorded."""
        if not recorded or recorded.get("digest") in (None, self.digest):
            return None
        return (
            f"{self.path}: not the text this checkpoint was trained on ({self._facts['bytes']:,} bytes, SHA-256 "
            f"{self.digest[:12]}; recorded {recorded.get('path')}, {recorded.get('bytes')} bytes, "
            f"{str(recorded['digest'])[:12]}); training goes on with the new one."
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the contents; of a dataset of ours, of its dataset.json, which has the digest of its text."""
        if self.recorded.get("digest") and all(self.recorded.get(key) == self._facts[key] for key in self._facts):
            return str(self.recorded["digest"])
        digest = hashlib.sha256()
        with _progress("reading", sum(path.stat().st_size for path in self.files)) as bar:
            for path in self.files:
                try:
                    with path.open("rb") as file:
                        while block := file.read(CHUNK):
                            digest.update(block)
                            bar.update(len(block))
                except OSError as error:
                    raise InputError(f"{path}: {error.strerror}, expected a readable file.") from error
        return digest.hexdigest()

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """Kind, path, size and time; the newest of all files and of the folders they are in."""
        stats = [path.stat() for path in self.files]
        folders = {path.parent for path in self.files} if self.kind != "text" else set()
        times = [stat.st_mtime_ns for stat in stats] + [folder.stat().st_mtime_ns for folder in folders]
        path = Path(os.path.relpath(self.path)) if self.path.resolve().is_relative_to(Path.cwd()) else self.path.resolve()
        size = sum(stat.st_size for stat in stats)
        return {"kind": self.kind, "path": path.as_posix(), "bytes": size, "mtime_ns": max(times)}


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and to validate with; `notes` are sentences the user should see."""

    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    source: Source
    notes: tuple[str, ...] = ()


def find_source(
    input_file: str | Path | None,
    dataset_dir: str | Path | None,
    recorded: Mapping[str, Any] | None,
    model_name: str,
    data_dir: Path = Path("data"),
) -> Source:
    """Choose the text of a run: a flag, else what the checkpoint recorded, else data/<model_name>.txt, else the default.

    The default is the Python language reference, written once to data/python_reference.txt.

    Raises: InputError when the chosen one is not there, or is of the other kind.
    """
    recorded = recorded or {}
    default = data_dir / DEFAULT_TEXT
    own = f"use your own with --input_file FILE or as {data_dir / f'{model_name}.txt'}"
    if input_file and dataset_dir:
        raise InputError(f"--input_file {input_file} and --dataset_dir {dataset_dir}: only one can be used. Leave one out.")
    if input_file:
        return _text(Path(input_file), "from --input_file", recorded)
    if dataset_dir:
        return Source("dataset", open_dataset(Path(dataset_dir)).folder, "from --dataset_dir", recorded)
    if recorded.get("path"):
        path = Path(recorded["path"])
        why = "recorded by the checkpoint; change it with --input_file FILE or --dataset_dir DIR"
        if not path.exists() and path != default:
            flag = "--dataset_dir DIR" if recorded.get("kind") == "dataset" else "--input_file PATH"
            raise InputError(f"{path}: not there any more, but the checkpoint was trained on it. Name it with {flag}.")
        if path.exists():
            return Source("dataset", path, why, recorded) if recorded.get("kind") == "dataset" else _text(path, why, recorded)
    named = data_dir / f"{model_name}.txt"
    if not recorded.get("path") and Path(model_name).name == model_name and named.exists():
        return _text(named, "found by the model's name; use another with --input_file FILE", recorded)
    if not default.exists():
        _write_default(default)
    return _text(default, f"the language reference that comes with Python; {own}", recorded)


def open_corpus(
    source: Source,
    tokenization: str | Tokenizer | None = None,
    *,
    bpe_file: str | Path | None = None,
    unknown: str = "error",
    val_fraction: float = 0.1,
    progress: bool = True,
    cache: Path = CACHE,
) -> Corpus:
    """Turn a source into tokens, or open those it has.

    `tokenization` is `char`, `gpt2`, a tokenizer's JSON file, or the tokenizer itself; None takes that of the dataset,
    and `char` for a text. A text above STREAM_ABOVE is tokenized once into mapped shards below `cache`.

    Raises: InputError for text that cannot be decoded or encoded; CheckpointMismatch for a dataset of another tokenizer.
    """
    bpe_path = Path(bpe_file) if bpe_file else None
    if source.kind == "dataset":
        return _open_tokens(source, open_dataset(source.path), tokenization, bpe_path, val_fraction)
    parts = dict(zip(("train", "val"), split(source.files, val_fraction), strict=True))
    everything = Source.files.func(source) if False else source.files  # placeholder
    del everything
    tokenizer = find_tokenizer(source, tokenization, bpe_path, progress)
    if sum(path.stat().st_size for path in source.files) > STREAM_ABOVE:
        key = hashlib.sha256(f"{source.digest} {val_fraction!r} {unknown}".encode()).hexdigest()[:12]
        folder = cache / f"{source.path.stem}-{key}-{tokenizer.fingerprint[:12]}"
        if not (folder / MANIFEST).exists():
            prepare(source, tokenizer, folder, val_fraction=val_fraction, unknown=unknown, progress=progress)
        return _open_tokens(source, open_dataset(folder), tokenizer, bpe_path, val_fraction)
    tokens = {
        name: Tokens(
            list(encode(segments, tokenizer, unknown, progress)),
            vocab_size=tokenizer.vocab_size,
            where=f"{source.path} ({name} part)",
        )
        for name, segments in parts.items()
    }
    return Corpus(tokenizer, tokens["train"], tokens["val"], source)
