"""Try a Hugging Face tokenizer: a program of its own, which may be killed. It reads a definition from stdin.

It imports nothing of this project, takes the memory (bytes) and the CPU time (seconds) it may use as words, and prints
a line of JSON: `error` is null, or why the definition is none. A definition that takes the process down prints nothing.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

RUN = 3000
"""Characters of a run of one character, on which a bad pattern needs more time than anybody has."""

GROWTH = 64
"""Times as long as a text may get by normalization; Unicode's own need 18."""

_USUAL = "a0 \n\té!'\"_-.\u4e2d\U0001f600"
_IDS = 4096


def main(memory: int, seconds: int) -> None:
    """Make the tokenizer and use it; print what is wrong with it."""
    with contextlib.suppress(ImportError):  # Windows; the time that the parent waits is limited there as well
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from tokenizers import Tokenizer

    text = sys.stdin.buffer.read().decode()
    error = None
    try:
        library = Tokenizer.from_str(text)
        use(library, json.loads(text))
    except Exception as found:  # the library raises bare Exception
        error = str(found) or type(found).__name__
    except BaseException as found:  # a panic, which is no Exception
        error = f"the library panics: {found}"
    print(json.dumps({"error": error}))


def use(library: Any, definition: dict[str, Any]) -> None:
    """Encode and decode; what the library refuses in an orderly way, as an unknown character, is no fault."""
    library.no_truncation()
    library.no_padding()
    known = sorted(library.get_vocab(with_added_tokens=True).values())[:_IDS]
    for text in texts(definition):
        if library.normalizer is not None:
            length = len(library.normalizer.normalize_str(text))
            if length > GROWTH * max(len(text), RUN):
                raise ValueError(f"its normalizer makes {length:,} characters of {len(text):,}")
        with contextlib.suppress(Exception):
            library.decode(library.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
    for ids in (known, *([i] for i in known[:256])):
        with contextlib.suppress(Exception):
            library.decode(ids, skip_special_tokens=False)


def texts(definition: dict[str, Any]) -> Iterator[str]:
    """Texts that find bad patterns: runs of every character that the definition names, and its own texts."""
    named = set(_said({name: value for name, value in definition.items() if name not in ("model", "added_tokens")}))
    yield from ("", "".join(map(chr, range(0x20, 0x7F))), "".join(map(chr, range(0x100, 0x3000, 7))))
    yield from sorted(named)
    for char in sorted({*_USUAL, *(char for text in named for char in text[:200])})[:200]:
        yield char * RUN
        yield char * RUN + "\0"


def _said(value: Any) -> Iterator[str]:
    """The short texts in a value, whatever they mean."""
    if isinstance(value, str) and len(value) <= 2000:
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _said(inner)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
