"""Decode ids one by one into text, never returning half a character."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Protocol

HALF = "\ufffd"
"""The replacement that decoders show for bytes that are not, or not yet, a character."""


class Stream(Protocol):
    """Decodes ids one by one; half a character is held back until the rest arrives."""

    def push(self, token: int) -> str:
        """Take one id and return the text that is certain now."""

    def flush(self) -> str:
        """Return what was held back."""


class ByteStream:
    """A stream for tokenizers whose tokens are bytes."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Take one id and return the text that is certain now."""
        return self._decoder.decode(self._bytes_of(token))

    def flush(self) -> str:
        """Return what was held back."""
        return self._decoder.decode(b"", final=True)


class WindowStream:
    """A stream for decoders whose text for an id depends on the ids before it.

    The ids since the last certain character are decoded twice, without and with the new one: the difference is new.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._shown: list[int] = []
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """Take one id and return the text that is certain now."""
        self._held.append(token)
        return self._emit(final=False)

    def flush(self) -> str:
        """Return what was held back."""
        return self._emit(final=True)

    def _emit(self, final: bool) -> str:
        before = self._decode(self._shown)
        text = self._decode(self._shown + self._held)
        if len(text) <= len(before) or (text.endswith(HALF) and not final):
            return ""
        self._shown, self._held = self._held, []
        return text[len(before) :]
