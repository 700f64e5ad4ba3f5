"""tokenizer.json as data: which vocabulary it holds, and whether it is whole; nothing here encodes text."""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import Any

from ..errors import CheckpointMismatch

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
    return kind, {"char": state.get("chars"), "hf": state.get("definition")}.get(str(kind))


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
