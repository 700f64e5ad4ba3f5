"""Tokenizers: text to ids and back, and their description in tokenizer.json.

char   one id for each character of the training text
gpt2   GPT-2's byte pairs through tiktoken, 50,257 ids; the ranks are loaded when text is first encoded or decoded
hf     a Hugging Face `tokenizers` JSON file, embedded whole in tokenizer.json
tiktoken  byte pairs of a known vocabulary (Llama 3's, Qwen's), whose ranks are in tokenizer.json
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..bundle.tokenizer_state import (
    State,
    char_fingerprint,
    checked_chars,
    checked_ranks,
    checked_symbols,
    definition_fingerprint,
    ranks_fingerprint,
    symbols_fingerprint,
)
from ..console.files import read_regular
from ..errors import CheckpointMismatch, InputError
from . import gpt2_ranks as ranks
from .decoding import ByteStream, Stream, WindowStream
from .definition import sound_definition

Ids = Sequence[int] | np.ndarray
CODE_POINTS = 0x110000
END_OF_TEXT = "<|endoftext|>"
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""GPT-2's pattern for the pieces of text that are encoded one by one, in a form that never backtracks far."""


class Place(NamedTuple):
    """Where a piece of text begins: characters before it, its line, its column (both from 1)."""

    position: int = 0
    line: int = 1
    column: int = 1

    def after(self, text: str) -> Place:
        """The place after `text`, when `text` begins here."""
        newline = text.rfind("\n")
        column = self.column + len(text) if newline < 0 else len(text) - newline
        return Place(self.position + len(text), self.line + text.count("\n"), column)


START = Place()
"""The first character of a text."""


class Tokenizer(Protocol):
    """The interface of every tokenizer."""

    kind: str

    @property
    def vocab_size(self) -> int:
        """Number of ids that can occur; a model may have more rows, which are never sampled."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary, in hexadecimal."""

    def state(self) -> State:
        """The content of tokenizer.json."""

    def encode(self, text: str, unknown: str = "error", where: str = "text", start: Place = START) -> np.ndarray:
        """Turn text into ids, uint16 or uint32 by the size of the vocabulary.

        `unknown="skip"` drops characters that the vocabulary lacks. `where` and `start` locate the text in errors.

        Raises: InputError with the first unknown character and its place.
        """

    def decode(self, ids: Ids) -> str:
        """Turn ids into text; bytes that do not form a character become U+FFFD.

        Raises: InputError for an id outside the vocabulary.
        """

    def stream(self) -> Stream:
        """Begin decoding ids one by one."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


class CharTokenizer:
    """One id per character, in the order of `chars`."""

    kind = "char"

    def __init__(self, chars: Sequence[str]) -> None:
        self.chars = list(chars)
        self._codes = np.array([ord(c) for c in self.chars], dtype="<u4")
        # One entry more than the highest character: np.take's mode "clip" sends everything above it there.
        self._unknown = np.iinfo(token_dtype(len(self.chars) + 1)).max
        self._ids = np.full(int(self._codes.max()) + 2, self._unknown, dtype=token_dtype(len(self.chars) + 1))
        self._ids[self._codes] = np.arange(len(self.chars))

    @property
    def vocab_size(self) -> int:
        """Number of characters."""
        return len(self.chars)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the characters in order, as UTF-8 behind `char` and a zero byte."""
        return char_fingerprint(self.chars)

    def state(self) -> State:
        """The content of tokenizer.json."""
        return {"token_kind": "char", "chars": self.chars, "fingerprint": self.fingerprint}

    def encode(self, text: str, unknown: str = "error", where: str = "text", start: Place = START) -> np.ndarray:
        """Turn text into ids (see Tokenizer.encode)."""
        ids = self._ids.take(_code_points(text), mode="clip")
        strange = ids == self._unknown
        if not strange.any():
            return ids
        if unknown == "skip":
            return ids[~strange]
        index = int(strange.argmax())
        place = start.after(text[:index])
        raise InputError(
            f"{where}: {text[index]!r} (U+{ord(text[index]):04X}) at position {place.position:,} (line {place.line:,}, "
            f"column {place.column:,}) is not among the {len(self.chars):,} characters of the vocabulary. "
            "Change the text, or drop such characters with --unknown skip."
        )

    def decode(self, ids: Ids) -> str:
        """Turn ids into text (see Tokenizer.decode)."""
        return self._codes[_checked(ids, self)].tobytes().decode("utf-32-le", "surrogatepass")

    def stream(self) -> Stream:
        """Begin decoding ids one by one."""
        return ByteStream(lambda token: self.decode([token]).encode("utf-8", "replace"))


class SymbolTokenizer:
    """Ids of a vocabulary of nanoGPT that is not one of characters: words, or ids without a text.

    Text is encoded as its sample.py does, a character at a time, and decoded by joining the symbols.
    """

    kind = "symbols"

    def __init__(self, vocab_size: int, symbols: list[str] | None = None) -> None:
        self.vocab_size, self.symbols = vocab_size, symbols
        self._ids = {symbol: index for index, symbol in enumerate(symbols or ())}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the number of ids and the symbols."""
        return symbols_fingerprint(self.vocab_size, self.symbols)

    def state(self) -> State:
        """The content of tokenizer.json."""
        symbols = {} if self.symbols is None else {"symbols": self.symbols}
        return {"token_kind": self.kind, "vocab_size": self.vocab_size, **symbols, "fingerprint": self.fingerprint}

    def encode(self, text: str, unknown: str = "error", where: str = "text", start: Place = START) -> np.ndarray:
        """Turn text into ids (see Tokenizer.encode)."""
        strange = next((index for index, char in enumerate(text) if char not in self._ids), None)
        if strange is not None and unknown != "skip":
            place = start.after(text[:strange])
            what = "ids without symbols" if self.symbols is None else "symbols, by which text is encoded one by one"
            raise InputError(
                f"{where}: {text[strange]!r} at position {place.position:,} (line {place.line:,}, column "
                f"{place.column:,}) is no symbol of the vocabulary of {self.vocab_size:,} {what}. Leave the text out, "
                "or drop such characters with --unknown skip."
            )
        return np.array([self._ids[c] for c in text if c in self._ids], dtype=token_dtype(self.vocab_size))

    def decode(self, ids: Ids) -> str:
        """Turn ids into text (see Tokenizer.decode); ids without symbols become numbers, each before a blank."""
        checked = _checked(ids, self).tolist()
        return "".join(f"{i} " if self.symbols is None else self.symbols[i] for i in checked)

    def stream(self) -> Stream:
        """Begin decoding ids one by one."""
        return ByteStream(lambda token: self.decode([token]).encode("utf-8", "replace"))


class BytePairs:
    """Byte pairs of tiktoken; special tokens in a text are ordinary text: only a program can insert a special id."""

    kind = "tiktoken"
    vocab_size: int

    def __init__(self, state: State, where: str = "tokenizer.json") -> None:
        self._state = {name: state.get(name) for name in ("vocabulary", "ranks")}
        self.vocabulary, self._ranks = checked_ranks(state, where)
        self.vocab_size = self.vocabulary.size
        self.end_of_text = self.vocabulary.ids[self.vocabulary.end]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the name of the vocabulary and its ranks."""
        return ranks_fingerprint(self._state)

    @functools.cached_property
    def encoding(self) -> Any:
        """The tiktoken.Encoding."""
        import tiktoken

        known = self.vocabulary
        return tiktoken.Encoding(
            known.name, pat_str=known.pattern, mergeable_ranks=self._ranks, special_tokens=known.ids
        )

    def state(self) -> State:
        """The content of tokenizer.json."""
        return {"token_kind": self.kind, **self._state, "fingerprint": self.fingerprint}

    def encode(self, text: str, unknown: str = "error", where: str = "text", start: Place = START) -> np.ndarray:
        """Turn text into ids; byte pairs know every character."""
        ids = self.encoding.encode_to_numpy(_sound(text), disallowed_special=())
        return ids.astype(token_dtype(self.vocab_size))

    def decode(self, ids: Ids) -> str:
        """Turn ids into text (see Tokenizer.decode)."""
        return self.encoding.decode_bytes(_checked(ids, self).tolist()).decode("utf-8", "replace")

    def stream(self) -> Stream:
        """Begin decoding ids one by one."""
        return ByteStream(lambda token: self.encoding.decode_bytes(_checked([token], self).tolist()))


class Gpt2Tokenizer(BytePairs):
    """GPT-2's byte pairs: 50,256 ranks, which lie on the machine, and one special id for the end of a text."""

    kind = "gpt2"
    vocab_size = ranks.COUNT + 1
    fingerprint = ranks.FINGERPRINT
    end_of_text = ranks.COUNT

    def __init__(self, bpe_file: Path | None = None) -> None:
        self._bpe_file = bpe_file
        if bpe_file is not None:
            self.encoding  # noqa: B018  check a file that was given at once

    @functools.cached_property
    def encoding(self) -> Any:
        """The tiktoken.Encoding.

        Raises: InputError when the ranks cannot be found, or are not GPT-2's.
        """
        import tiktoken

        return tiktoken.Encoding(
            "gpt2",
            pat_str=PATTERN,
            mergeable_ranks=ranks.find_ranks(self._bpe_file),
            special_tokens={END_OF_TEXT: self.end_of_text},
        )

    def state(self) -> State:
        """The content of tokenizer.json."""
        return {"token_kind": "gpt2", "fingerprint": self.fingerprint}


class HfTokenizer:
    """A tokenizer of the Hugging Face library `tokenizers`; its special tokens are not added to text automatically."""

    kind = "hf"

    def __init__(self, definition: dict[str, Any], where: str = "tokenizer.json") -> None:
        self.definition = definition
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise InputError(
                f"{where}: a Hugging Face tokenizer needs the optional library `tokenizers`: pip install tokenizers"
            ) from error
        self._where = where
        self._library = Library.from_str(sound_definition(definition, where))
        self._library.no_truncation()
        self._library.no_padding()
        self.vocab_size = 1 + max(self._library.get_vocab(with_added_tokens=True).values(), default=-1)
        if not self.vocab_size:
            raise InputError(f"{where}: this Hugging Face tokenizer has no tokens.")
        self.end_of_text: int | None = self._library.token_to_id(END_OF_TEXT)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the definition in canonical JSON."""
        return definition_fingerprint(self.definition)

    def state(self) -> State:
        """The content of tokenizer.json."""
        return {"token_kind": "hf", "definition": self.definition, "fingerprint": self.fingerprint}

    def encode(self, text: str, unknown: str = "error", where: str = "text", start: Place = START) -> np.ndarray:
        """Turn text into ids; the definition determines how unknown text is handled."""
        ids = self._used(lambda: self._library.encode(_sound(text), add_special_tokens=False).ids)
        return np.array(ids, dtype=token_dtype(self.vocab_size))

    def decode(self, ids: Ids) -> str:
        """Turn ids into text (see Tokenizer.decode)."""
        checked = _checked(ids, self).tolist()
        return self._used(lambda: self._library.decode(checked, skip_special_tokens=False))

    def _used(self, call: Callable[[], Any]) -> Any:
        """Call the library, which raises bare Exception, and for a panic what is no Exception."""
        try:
            return call()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise InputError(f"{self._where}: this Hugging Face tokenizer fails on the text ({error}).") from error

    def stream(self) -> Stream:
        """Begin decoding ids one by one."""
        return WindowStream(self.decode)


def make_char(texts: Iterable[str], where: str = "text") -> CharTokenizer:
    """Make a char tokenizer of every character that occurs in the pieces of a text, in code point order.

    Raises: InputError when the text is empty.
    """
    seen = np.zeros(CODE_POINTS, dtype=bool)
    for text in texts:
        seen[_code_points(text)] = True
    if not seen.any():
        raise InputError(f"{where}: empty, expected at least one character. Name another with --input_file.")
    return CharTokenizer([chr(code) for code in np.flatnonzero(seen)])


def tokenizer_from_state(state: State, bpe_file: Path | None = None, where: str = "tokenizer.json") -> Tokenizer:
    """Build the tokenizer that a tokenizer.json describes, and check its fingerprint where one is recorded.

    Raises: CheckpointMismatch naming the field that is wrong; InputError for a missing library or rank file.
    """
    kind = state.get("token_kind")
    tokenizer: Tokenizer
    if kind == "char":
        tokenizer = CharTokenizer(checked_chars(state.get("chars"), where))
    elif kind == "gpt2":
        tokenizer = Gpt2Tokenizer(bpe_file)
    elif kind == "symbols":
        tokenizer = SymbolTokenizer(*checked_symbols(state, where))
    elif kind == "tiktoken":
        tokenizer = BytePairs(state, where)
    elif kind == "hf":
        definition = state.get("definition")
        if not isinstance(definition, dict):
            raise CheckpointMismatch(f"{where}: definition is {type(definition).__name__}, expected an object.")
        tokenizer = HfTokenizer(definition, where)
    else:
        raise CheckpointMismatch(f"{where}: token_kind is {kind!r}, expected char, gpt2 or hf, or symbols or tiktoken.")
    recorded = state.get("fingerprint", tokenizer.fingerprint)
    if recorded != tokenizer.fingerprint:
        raise CheckpointMismatch(
            f"{where}: the {kind} vocabulary has fingerprint {tokenizer.fingerprint[:12]}, recorded is "
            f"{str(recorded)[:12]}. The file was changed after it was written; restore it."
        )
    return tokenizer


def tokenizer_from_file(path: Path, bpe_file: Path | None = None) -> Tokenizer:
    """Build a tokenizer from a JSON file: Hugging Face's, or the tokenizer.json of one of our checkpoints.

    Raises: InputError when the file is missing or neither; CheckpointMismatch when it contradicts itself.
    """
    try:
        values = json.loads(read_regular(path))
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}. --tokenization takes char, gpt2 or a tokenizer's JSON file."
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}), expected a Hugging Face tokenizer.") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: a JSON {type(values).__name__}, expected a Hugging Face tokenizer (an object).")
    return (
        tokenizer_from_state(values, bpe_file, str(path)) if "token_kind" in values else HfTokenizer(values, str(path))
    )


def named_tokenizer(name: str, bpe_file: Path | None = None) -> Tokenizer:
    """Make the tokenizer that a flag names, one that needs no text: gpt2, or a tokenizer's JSON file."""
    return Gpt2Tokenizer(bpe_file) if name == "gpt2" else tokenizer_from_file(Path(name), bpe_file)


def _code_points(text: str) -> np.ndarray:
    """The code points of a text, uint32 [T]; lone surrogates (from broken command lines) are code points too."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _sound(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which UTF-8 cannot hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _checked(ids: Ids, tokenizer: Tokenizer) -> np.ndarray:
    array = np.asarray(ids, dtype=np.int64).reshape(-1)
    wrong = (array < 0) | (array >= tokenizer.vocab_size)
    if wrong.any():
        raise InputError(
            f"token id {array[wrong][0]} is not in the {tokenizer.kind} vocabulary of {tokenizer.vocab_size:,} ids."
        )
    return array
