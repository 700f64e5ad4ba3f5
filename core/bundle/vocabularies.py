"""Vocabularies of tiktoken: what no file of ranks holds, the pattern and the special tokens, by the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Vocabulary:
    """What a program makes of a file of so many ranks."""

    name: str  # in tokenizer.json
    whose: str  # for people
    count: int  # of ranks; the special tokens follow them
    pattern: str  # of the pieces of a text that are encoded one by one
    special: tuple[str, ...]
    begin: str  # the special token before a text, and the one behind it
    end: str

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.count + len(self.special)

    @property
    def ids(self) -> dict[str, int]:
        """The ids of the special tokens."""
        return {token: self.count + number for number, token in enumerate(self.special)}


LLAMA3 = Vocabulary(
    "llama3",
    "Llama 3",
    128_000,
    _PATTERN.format(digits=r"\p{N}{1,3}"),
    (
        *("<|begin_of_text|>", "<|end_of_text|>"),
        *(f"<|reserved_special_token_{i}|>" for i in range(4)),
        *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
        *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
    ),
    "<|begin_of_text|>",
    "<|end_of_text|>",
)

QWEN = Vocabulary(
    "qwen",
    "Qwen",
    151_643,
    _PATTERN.format(digits=r"\p{N}"),
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))),
    "<|endoftext|>",
    "<|endoftext|>",
)

VOCABULARIES = {one.name: one for one in (LLAMA3, QWEN)}
"""Those that are known, by name."""


def vocabulary_of_size(count: int) -> Vocabulary | None:
    """The vocabulary with so many ranks, if one is known."""
    return next((one for one in VOCABULARIES.values() if one.count == count), None)
