"""tokenizer.json as data: which vocabulary it holds, and whether it is whole; nothing here encodes text."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..containers.pickles.inert import as_text
from ..errors import CheckpointMismatch
from .vocabularies import VOCABULARIES, Vocabulary

State = dict[str, Any]
"""The content of a tokenizer.json."""

GPT2_FINGERPRINT = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
"""SHA-256 of GPT-2's ranks as a tiktoken file, one `base64 rank` line each; tiktoken expects the same."""


def same_vocabulary(a: State, b: State) -> bool:
    """Whether two tokenizer.json give every id the same meaning."""
    return _vocabulary(a) == _vocabulary(b)


def describe(state: State) -> str:
    """Describe the tokenizer that a tokenizer.json holds: `char, 65 characters, fingerprint ab12cd34ef56`."""
    kind = state.get("token_kind")
    if kind == "char" and isinstance(state.get("chars"), list):
        chars = checked_chars(state["chars"], "tokenizer.json")
        return f"char, {len(chars)} characters, fingerprint {char_fingerprint(chars)[:12]}"
    if kind == "symbols":
        size, symbols = checked_symbols(state, "tokenizer.json")
        return f"{size} {'ids without symbols' if symbols is None else 'symbols'}, " + (
            f"fingerprint {symbols_fingerprint(size, symbols)[:12]}"
        )
    if kind == "tiktoken":
        vocabulary, _ = checked_ranks(state, "tokenizer.json")
        return f"tiktoken, {vocabulary.whose}'s {vocabulary.size:,} ids, fingerprint {ranks_fingerprint(state)[:12]}"
    if kind == "hf":
        return f"hf, fingerprint {definition_fingerprint(state.get('definition'))[:12]}"
    return str(kind)


def proves_itself(state: State | None) -> bool:
    """Whether the fingerprint in a tokenizer.json is that of its vocabulary."""
    if state is None or "fingerprint" not in state:
        return False
    definition, found = state.get("definition"), None
    with contextlib.suppress(CheckpointMismatch):
        if state.get("token_kind") == "char":
            found = char_fingerprint(checked_chars(state.get("chars"), "tokenizer.json"))
        elif state.get("token_kind") == "hf" and isinstance(definition, dict):
            found = definition_fingerprint(definition)
        elif state.get("token_kind") == "symbols":
            found = symbols_fingerprint(*checked_symbols(state, "tokenizer.json"))
        elif state.get("token_kind") == "tiktoken":
            checked_ranks(state, "tokenizer.json")
            found = ranks_fingerprint(state)
        elif state.get("token_kind") == "gpt2":
            found = GPT2_FINGERPRINT
    return found is not None and state["fingerprint"] == found


def char_fingerprint(chars: list[str]) -> str:
    """SHA-256 of characters in order, as UTF-8 behind `char` and a zero byte."""
    return hashlib.sha256(b"char\0" + "".join(chars).encode("utf-8", "surrogatepass")).hexdigest()


def definition_fingerprint(definition: Any) -> str:
    """SHA-256 of a Hugging Face definition in canonical JSON."""
    return hashlib.sha256(json.dumps(definition, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _vocabulary(state: State) -> tuple[Any, Any]:
    """What decides the meaning of ids; GPT-2's never varies."""
    kind = state.get("token_kind")
    symbols = (state.get("vocab_size"), state.get("symbols"))
    ranks = (state.get("vocabulary"), state.get("ranks"))
    known = {"char": state.get("chars"), "hf": state.get("definition"), "symbols": symbols, "tiktoken": ranks}
    return kind, known.get(str(kind))


def ranks_fingerprint(state: State) -> str:
    """SHA-256 of the name of a vocabulary of tiktoken and of its ranks in order, behind `tiktoken` and a zero byte."""
    return hashlib.sha256("\0".join(("tiktoken", state["vocabulary"], *state["ranks"])).encode()).hexdigest()


def checked_ranks(state: State, where: str) -> tuple[Vocabulary, dict[bytes, int]]:
    """The vocabulary of a tokenizer.json of tiktoken, and its ranks.

    Raises: CheckpointMismatch naming what is wrong.
    """
    name, listed = state.get("vocabulary"), state.get("ranks")
    vocabulary = VOCABULARIES.get(name) if isinstance(name, str) else None
    if vocabulary is None:
        raise CheckpointMismatch(f"{where}: vocabulary is {str(name)[:40]!r}, expected {', '.join(VOCABULARIES)}.")
    if not isinstance(listed, list) or not all(isinstance(token, str) for token in listed):
        raise CheckpointMismatch(f"{where}: ranks is {str(listed)[:40]}, expected a list of tokens in base64.")
    ranks: dict[bytes, int] = {}
    for rank, token in enumerate(listed):
        try:
            ranks[base64.b64decode(token, validate=True)] = rank
        except ValueError:
            raise CheckpointMismatch(f"{where}: ranks[{rank}] is {token[:40]!r}, expected base64.") from None
    if fault := ranks_fault(ranks, vocabulary.count):
        raise CheckpointMismatch(f"{where}: ranks has {fault}.")
    return vocabulary, ranks


def ranks_fault(ranks: Mapping[bytes, int], count: int) -> str:
    """Say why ranks are not those of a vocabulary of `count`; "" where they may be."""
    if len(ranks) != count or sorted(ranks.values()) != list(range(count)):
        return f"{len(ranks):,} tokens, expected {count:,} different ones, numbered from 0 without a gap"
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    return f"no rank for byte 0x{missing[0]:02x}, expected one for each of the 256 bytes" if missing else ""


def symbols_fingerprint(size: int, symbols: list[str] | None) -> str:
    """SHA-256 of a number of ids and their symbols in canonical JSON, behind `symbols` and a zero byte."""
    return hashlib.sha256(b"symbols\0" + json.dumps([size, symbols], separators=(",", ":")).encode()).hexdigest()


def checked_symbols(state: State, where: str) -> tuple[int, list[str] | None]:
    """The number of ids of a tokenizer.json of symbols, and the text of each; None where the ids have none.

    Raises: CheckpointMismatch naming what is wrong.
    """
    size, symbols = state.get("vocab_size"), state.get("symbols")
    if type(size) is not int or size < 1:
        raise CheckpointMismatch(f"{where}: vocab_size is {str(size)[:40]}, expected the number of ids.")
    if symbols is None:
        return size, None
    if not isinstance(symbols, list) or not all(isinstance(symbol, str) for symbol in symbols):
        raise CheckpointMismatch(f"{where}: symbols is {str(symbols)[:40]}, expected a list of texts.")
    if not size == len(symbols) == len(set(symbols)):
        raise CheckpointMismatch(
            f"{where}: {len(symbols)} symbols, {len(set(symbols))} of them different, expected {size}, each once."
        )
    return size, symbols


def state_of_meta(meta: Any, where: str) -> State:
    """The tokenizer of nanoGPT's meta.pkl, read as data: characters, other symbols, or a number of ids alone.

    nanoGPT trains with `vocab_size` alone; its sample.py joins what `itos`, a dict or a list, has for each id.

    Raises: CheckpointMismatch for what is no such vocabulary, or contradicts itself.
    """
    if not isinstance(meta, dict):
        raise CheckpointMismatch(
            f"{where}: found {as_text(meta, 60)}, no table `itos`; expected vocab_size, itos and stoi by name."
        )
    itos, stoi, size = meta.get("itos"), meta.get("stoi"), meta.get("vocab_size")
    if itos is None and type(size) is int and size > 0:
        return {"token_kind": "symbols", "vocab_size": size}
    table = dict(enumerate(itos)) if isinstance(itos, (list, tuple)) else itos
    if not isinstance(table, dict) or not table or set(table) != set(range(len(table))):
        raise CheckpointMismatch(
            f"{where}: its itos is {as_text(itos, 60)}, no table `itos` of ids from 0 without a gap: "
            "expected a character for each id from 0, or a word."
        )
    symbols = [table[index] for index in range(len(table))]
    if not all(isinstance(symbol, str) for symbol in symbols) or len(set(symbols)) != len(symbols):
        raise CheckpointMismatch(f"{where}: its itos is {as_text(itos, 60)}, expected a text for each id, each once.")
    if isinstance(stoi, dict) and stoi != {symbol: index for index, symbol in enumerate(symbols)}:
        raise CheckpointMismatch(f"{where}: its stoi is not the inverse of its itos. It is damaged, or was changed.")
    if size is not None and size != len(symbols):
        raise CheckpointMismatch(
            f"{where}: vocab_size is {as_text(size, 40)}, but itos has {len(symbols)} characters or words. Prepare the "
            "dataset again."
        )
    if all(len(symbol) == 1 for symbol in symbols):
        return {"token_kind": "char", "chars": symbols}
    return {"token_kind": "symbols", "vocab_size": len(symbols), "symbols": symbols}


def checked_chars(chars: Any, where: str) -> list[str]:
    """The characters of a tokenizer.json, each once.

    Raises: CheckpointMismatch naming the entry that is not a character, or is repeated.
    """
    if not isinstance(chars, list) or not chars:
        raise CheckpointMismatch(f"{where}: chars is {str(chars)[:40]!r}, expected a list of characters.")
    seen: dict[str, int] = {}
    for index, char in enumerate(chars):
        if not isinstance(char, str) or len(char) != 1:
            raise CheckpointMismatch(f"{where}: chars[{index}] is {char!r}, expected one character.")
        if char in seen:
            raise CheckpointMismatch(
                f"{where}: chars[{index}] is {char!r}, which is chars[{seen[char]}] too; expected each character once."
            )
        seen[char] = index
    return chars
