"""Convert the tokenizer of another program's model to our tokenizer.json."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..bundle.foreign import META
from ..bundle.tokenizer_state import checked_chars, checked_ranks, checked_symbols, ranks_fault, state_of_meta
from ..bundle.vocabularies import vocabulary_of_size
from ..console.commands import typed
from ..containers.container import is_plain, reading
from ..containers.json_files import parse_json
from ..containers.pickles.foreign import attributes
from ..containers.pickles.reader import read_pickle
from ..data.gpt2_ranks import COUNT, FINGERPRINT, fingerprint, parse_lines
from ..errors import CheckpointError, CheckpointMismatch, InputError
from .hf_tokenizer import added_tokens, state_of_words
from .plan import Options, Source

GPT2_ROWS = range(50257, 50305)
"""Numbers of rows for GPT-2's 50257 tokens: exact, or padded to a multiple of 64 or 128."""

GPT2_FAMILIES = ("hf_gpt2", "nanogpt", "modded_")

_GPT2_TOKENS = {"!": 0, "\u0120t": 256, "\u0120the": 262, "\u0120gazed": 50255, "<|endoftext|>": 50256}
"""Some of its tokens, including the first and the last: no other vocabulary of 50257 has the same ids for them."""

_LARGEST = 64 << 20  # bytes


def add_tokenizer(model: Source, options: Options) -> None:
    """Add the tokenizer of a model, if it is known; a note tells what is missing.

    Raises: CheckpointMismatch when a vocabulary has another size than the model; CheckpointDamaged, CheckpointNotFound.
    """
    if options.meta is not None:
        if model.tokenizer is not None:
            raise model.refuse("it has a tokenizer of its own. Leave out --meta.")
        model.tokenizer = vocabulary_of(options.meta, model.sizes.get("vocab_size"))
        return
    rows = model.sizes.get("vocab_size", 0)
    if model.tokenizer is not None:
        return
    folder = model.container.path if model.container.path.is_dir() else model.container.path.parent
    if state := _beside(model, folder, rows) or _of_ranks(model, folder, rows) or _of_meta(model, folder, rows):
        model.tokenizer = state
    elif rows in GPT2_ROWS and model.family_of_source.startswith(GPT2_FAMILIES):
        model.tokenizer = {"token_kind": "gpt2"}
        model.notes.append(f"{rows} rows: its tokenizer is taken to be GPT-2's")
    elif model.family_of_source == "nanogpt":
        model.notes.append("the characters of nanoGPT are in meta.pkl beside its data: --meta FILE includes them")
    else:
        model.notes.append(typed("its tokenizer is unknown: generate.py needs one to write text"))


def _beside(model: Source, folder: Path, rows: int) -> dict[str, Any] | None:
    """Read the tokenizer.json in a folder; None where there is none, or, with a note, one that a file does not fit."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    with reading(path) as file:
        content = parse_json(file.read(_LARGEST), str(path))
    state = content if "token_kind" in content else _state_of(content)
    if (folder == model.container.path and model.family_of_source.startswith("hf_")) or 0 < tokens_of(state) <= rows:
        return state
    model.notes.append(f"{path} is not its tokenizer: {tokens_of(state)} tokens, and the model has {rows} rows")
    return None


def _of_ranks(model: Source, folder: Path, rows: int) -> dict[str, Any] | None:
    """Read a file of tiktoken's ranks beside a model; None where there is none, or, with a note, one that does not fit.

    Its number of ranks tells whose it is; a model of SentencePiece has the same name.
    """
    found = [folder / "tokenizer.model", *sorted(folder.glob("*.tiktoken"))]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        return None
    with reading(path) as file:
        data = file.read(_LARGEST)
    try:
        ranks = parse_lines(data, str(path))
    except InputError as error:
        model.notes.append(f"not used: {error} A model of SentencePiece is not read; its tokenizer.json is")
        return None
    if len(ranks) == COUNT and fingerprint(ranks) == FINGERPRINT and rows > COUNT:
        return {"token_kind": "gpt2"}
    known = vocabulary_of_size(len(ranks))
    fault = "of no vocabulary that is known here" if known is None else ranks_fault(ranks, known.count)
    if known is None or fault or known.size > rows:
        why = fault or f"and the model has {rows} rows"
        model.notes.append(f"{path} is not its tokenizer: {len(ranks):,} ranks, {why}")
        return None
    model.notes.append(f"{path}: {len(ranks):,} ranks, taken to be {known.whose}'s")
    listed = [base64.b64encode(token).decode() for token in sorted(ranks, key=ranks.__getitem__)]
    return {"token_kind": "tiktoken", "vocabulary": known.name, "ranks": listed}


def _of_meta(model: Source, folder: Path, rows: int) -> dict[str, Any] | None:
    """Read the meta.pkl beside a file of nanoGPT, or that of the dataset that its config names; None for another."""
    if model.family_of_source != "nanogpt":
        return None
    content = model.container.content
    config = attributes(content.get("config")) if isinstance(content, Mapping) else None
    dataset = (config or {}).get("dataset")
    places = [folder / META]
    if isinstance(dataset, str) and is_plain(dataset):
        places.append(folder.parent / "data" / dataset / META)
    for path in places:
        if path.is_file():
            try:
                state = vocabulary_of(path, rows)
            except CheckpointError as error:
                model.notes.append(f"not used: {error}")
            else:
                model.notes.append(f"its vocabulary is taken from {path}")
                return state
    return None


def _state_of(definition: dict[str, Any]) -> dict[str, Any]:
    """Convert a Hugging Face tokenizer to ours; GPT-2's, and those of characters and symbols, need no library."""
    if state := state_of_words(definition):
        return state
    model = definition.get("model")
    vocab, merges = (model.get("vocab"), model.get("merges")) if isinstance(model, dict) else (None, None)
    if isinstance(vocab, dict) and isinstance(merges, list):
        known = all(vocab.get(token) == number for token, number in _GPT2_TOKENS.items())
        known = known and all(token.get("id") == GPT2_ROWS.start - 1 for token in added_tokens(definition))
        if known and (len(vocab), len(merges)) == (50257, 50000):
            return {"token_kind": "gpt2"}
    return {"token_kind": "hf", "definition": definition}


def tokens_of(state: dict[str, Any] | None) -> int:
    """The number of tokens of a tokenizer; 0 if it is unknown."""
    kind = (state or {}).get("token_kind")
    if state is None or kind == "gpt2":
        return GPT2_ROWS.start if kind == "gpt2" else 0
    if kind == "char":
        return len(checked_chars(state.get("chars"), "tokenizer.json"))
    if kind == "symbols":
        return checked_symbols(state, "tokenizer.json")[0]
    if kind == "tiktoken":
        return checked_ranks(state, "tokenizer.json")[0].size
    definition = state.get("definition")
    if not isinstance(definition, dict):
        return 0
    model = definition.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    behind = [number + 1 for token in added_tokens(definition) if type(number := token.get("id")) is int]
    return max(len(vocab) if isinstance(vocab, (dict, list)) else 0, *behind, 0)


def vocabulary_of(path: Path, rows: int | None) -> dict[str, Any]:
    """Read nanoGPT's meta.pkl as data; nothing in it is executed.

    Raises: CheckpointMismatch when it holds no such vocabulary, or one of another size than the model's.
    """
    with reading(path) as file:
        state = state_of_meta(read_pickle(file.read(_LARGEST), str(path)), str(path))
    size = tokens_of(state)
    if rows is not None and size != rows:
        what = "characters" if state["token_kind"] == "char" else "symbols"
        raise CheckpointMismatch(f"{path}: {size} {what}, but the model has {rows} rows. It does not fit this model.")
    return state
