"""Turn a source into the tokens for training and validation."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..bundle.tokenizer_state import describe, same_vocabulary
from ..console.anchored import anchored
from ..console.progress import byte_bar
from ..errors import CheckpointMismatch, InputError
from .source import Source, find_source
from .text import Segment, pieces, split
from .token_shards import MANIFEST, SHARD_TOKENS, Dataset, open_dataset, read_shard, write_dataset
from .tokenizer import START, Tokenizer, make_char, named_tokenizer, token_dtype, tokenizer_from_state
from .tokens import Tokens

__all__ = ["Corpus", "Source", "Tokens", "find_source", "open_corpus", "prepare"]

STREAM_ABOVE = 64 * 2**20
"""Bytes of text above which tokens are stored in mapped shards instead of memory."""

CACHE = Path("data/cache")


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and to validate with; `notes` are sentences the user should see."""

    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    source: Source
    notes: tuple[str, ...] = ()


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
    """Turn a text into tokens, or open the tokens of a dataset.

    `tokenization` is `char`, `gpt2`, a tokenizer's JSON file, or the tokenizer itself; None takes that of the dataset,
    and `char` for a text. A text above STREAM_ABOVE is tokenized once, into mapped shards below `cache`.

    Raises: InputError for text that cannot be decoded or encoded; CheckpointMismatch for a dataset of other tokens.
    """
    bpe_path = anchored(bpe_file) if bpe_file else None
    if source.kind == "dataset":
        return _open_tokens(source, open_dataset(source.path), tokenization, bpe_path, val_fraction)
    tokenizer = choose_tokenizer(source, tokenization, bpe_path, progress)
    if source.size > STREAM_ABOVE:
        key = hashlib.sha256(f"{source.digest} {val_fraction!r} {unknown}".encode()).hexdigest()
        folder = cache / f"{source.path.stem}-{key[:12]}-{tokenizer.fingerprint[:12]}"
        if not (folder / MANIFEST).exists():
            prepare(source, tokenizer, folder, unknown=unknown, val_fraction=val_fraction, progress=progress)
        return _open_tokens(source, open_dataset(folder), tokenizer, bpe_path, val_fraction)
    empty = np.empty(0, token_dtype(tokenizer.vocab_size))
    tokens = {
        part: np.concatenate([empty, *arrays])
        for part, arrays in _encoded(source, tokenizer, unknown, val_fraction, progress).items()
    }
    return Corpus(tokenizer, *_train_and_val([tokens["train"]], [tokens["val"]], tokenizer, source.path), source)


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    unknown: str = "error",
    val_fraction: float = 0.1,
    shard_tokens: int = SHARD_TOKENS,
    progress: bool = True,
) -> None:
    """Tokenize a text into a dataset folder, which appears whole or not at all.

    Raises: InputError for text that cannot be decoded or encoded; SaveFailed when the folder cannot be written.
    """
    facts = source.record()
    about = {
        "tokenizer": tokenizer.state(),
        "source": {name: facts[name] for name in ("path", "bytes", "digest")},
        "val_fraction": val_fraction,
        "unknown": unknown,
    }
    splits = _encoded(source, tokenizer, unknown, val_fraction, progress)
    write_dataset(folder, splits, token_dtype(tokenizer.vocab_size), about, shard_tokens)


def choose_tokenizer(
    source: Source, tokenization: str | Tokenizer | None, bpe_file: Path | None = None, progress: bool = True
) -> Tokenizer:
    """Make the tokenizer of a text, given directly or by name; `char` reads the whole text for its characters."""
    if tokenization is None or tokenization == "char":
        with byte_bar("characters", source.size, progress) as bar:
            whole, _ = split(source.files, 0.0)
            return make_char(pieces(whole, bar.update), str(source.path))
    if isinstance(tokenization, str):
        return named_tokenizer(tokenization, bpe_file)
    return tokenization


def _encoded(
    source: Source, tokenizer: Tokenizer, unknown: str, val_fraction: float, progress: bool
) -> dict[str, Iterable[np.ndarray]]:
    """The ids of both parts, piece by piece; `train` must be read to its end before `val`."""
    train, val = split(source.files, val_fraction)
    before = source.stamp()
    bar = byte_bar("tokens", sum(segment.end - segment.start for segment in train + val), progress)
    place = START

    def encode(segments: list[Segment]) -> Iterator[np.ndarray]:
        nonlocal place
        tokenizer.encode("")  # one thread does the loading on first use
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        waiting: deque[Future[np.ndarray]] = deque()
        with ThreadPoolExecutor(workers) as pool:
            for text in pieces(segments, bar.update):
                waiting.append(pool.submit(tokenizer.encode, text, unknown, str(source.path), place))
                place = place.after(text)
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        if segments is val:
            bar.close()
            if source.stamp() != before:
                raise InputError(f"{source.path}: changed while it was read. Run again when nothing writes to it.")

    return {"train": encode(train), "val": encode(val)}


def _open_tokens(
    source: Source, dataset: Dataset, tokenization: str | Tokenizer | None, bpe_file: Path | None, val_fraction: float
) -> Corpus:
    train, val = ([read_shard(path) for path in paths] for paths in (dataset.train, dataset.val))
    state, origin = dataset.tokenizer, "its tokens are"
    if state is None:
        wide = any(array.dtype.itemsize > 2 for array in train)
        if wide and tokenization is None:
            raise InputError(
                f"{dataset.folder}: uint32 tokens without a {MANIFEST} that names their tokenizer. "
                "Pass --tokenization FILE.json."
            )
        state, origin = {"token_kind": "gpt2"}, "without dataset.json or meta.pkl its tokens are taken for"
    if isinstance(tokenization, str) and tokenization != "char":
        tokenization = named_tokenizer(tokenization, bpe_file)
    if tokenization is None or isinstance(tokenization, str):
        tokenizer = tokenizer_from_state(state, bpe_file, str(dataset.folder))
        if tokenization not in (None, tokenizer.kind):
            raise InputError(
                f"{dataset.folder}: {origin} {describe(state)}, found --tokenization {tokenization}. Leave it out."
            )
    else:
        tokenizer = tokenization
        free = dataset.tokenizer is None and tokenizer.kind == "hf"
        if not free and not same_vocabulary(state, tokenizer.state()):
            raise CheckpointMismatch(
                f"{dataset.folder}: {origin} {describe(state)}, this run has {describe(tokenizer.state())}. "
                "Use the dataset's tokenizer, or prepare the text again with this one."
            )
    notes: tuple[str, ...] = ()
    if not val:
        train, val = _cut(train, val_fraction)
        notes = (f"{dataset.folder}: no validation shards; the last {sum(map(len, val)):,} tokens are used for it.",)
    return Corpus(tokenizer, *_train_and_val(train, val, tokenizer, dataset.folder), source, notes)


def _train_and_val(
    train: list[np.ndarray], val: list[np.ndarray], tokenizer: Tokenizer, path: Path
) -> tuple[Tokens, Tokens]:
    size = tokenizer.vocab_size
    return (
        Tokens(train, vocab_size=size, where=f"{path} (training part)"),
        Tokens(val, vocab_size=size, where=f"{path} (validation part)"),
    )


def _cut(arrays: list[np.ndarray], val_fraction: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Cut the last part off a sequence of arrays."""
    keep = int(sum(map(len, arrays)) * (1 - val_fraction))
    train, val = [], []
    for array in arrays:
        train.append(array[:keep])
        val.append(array[keep:])
        keep = max(0, keep - len(array))
    return train, val
