"""Tokenizers as Hugging Face's libraries read them: tokenizer.json, and the settings with which it is opened.

Characters are a WordLevel vocabulary, GPT-2's byte pairs a BPE one. Every special token has a row in the model: GPT-2's
end of text, and for characters those on the rows of padding behind them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..containers.json_files import dump_json
from ..data.gpt2_ranks import COUNT, URL, local_ranks, printable_bytes
from .plan import Source

END, UNKNOWN, PADDING = "<|endoftext|>", "<unk>", "<pad>"

SPECIAL = (END, UNKNOWN, PADDING)
"""Special tokens of a vocabulary of characters, in the order in which they take the free rows."""

GPT2_ROLES = {"bos_token": END, "eos_token": END, "unk_token": END}
"""What GPT-2's only special token stands for, as in the tokenizer that OpenAI published."""

_EACH_CHARACTER = {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False}
_NO_TOKEN = ""
"""The unknown token of a vocabulary without one: the format requires a text, and an unknown character is an error."""


def add_tokenizer_files(model: Source, bpe_file: Path | None) -> tuple[dict[str, bytes], dict[str, int]]:
    """Make the tokenizer files of a model in a folder of transformers; returns them, and its config's ids of tokens.

    A note tells which special tokens were added, or what is missing.
    """
    state = model.tokenizer or {}
    kind, definition = state.get("token_kind"), state.get("definition")
    roles: Mapping[str, str] = {}
    if kind == "char":
        chars = state["chars"]
        special = SPECIAL[: max(0, model.sizes["vocab_size"] - len(chars))]
        definition, roles = definition_of(chars, special), roles_of(special)
        model.notes.append(_said_of(len(chars), special, roles))
    elif kind == "gpt2":
        ranks = local_ranks(bpe_file)
        if ranks is None:
            model.notes.append(
                "WARNING: the folder has no tokenizer, because GPT-2's ranks are not on this machine: AutoTokenizer "
                f"turns every text into no tokens. Fetch {URL} and convert again with --bpe_file FILE, or copy "
                "tokenizer.json of openai-community/gpt2 into the folder"
            )
            return {}, {}
        definition, roles = gpt2_definition(ranks), GPT2_ROLES
    if kind == "symbols":
        model.notes.append("WARNING: the folder has no tokenizer: none of transformers joins symbols as nanoGPT does")
    if not isinstance(definition, dict):
        return {}, {}
    settings: dict[str, Any] = {
        "tokenizer_class": "GPT2Tokenizer" if kind == "gpt2" else "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **roles,
    }
    if context := model.sizes.get("block_size"):
        settings["model_max_length"] = context
    text = json.dumps(definition, ensure_ascii=False, indent=1).encode()
    ids = {f"{role}_id": definition["model"]["vocab"][token] for role, token in roles.items() if role != "unk_token"}
    return {"tokenizer.json": text, "tokenizer_config.json": dump_json(settings)}, ids


def roles_of(special: Sequence[str]) -> dict[str, str]:
    """What each special token of a vocabulary of characters stands for; the end of text for those without a row."""
    if not special:
        return {}
    wanted = {"bos_token": END, "eos_token": END, "unk_token": UNKNOWN, "pad_token": PADDING}
    return {role: token if token in special else END for role, token in wanted.items()}


def _said_of(count: int, special: Sequence[str], roles: Mapping[str, str]) -> str:
    if not special:
        rows = -(-(count + len(SPECIAL)) // 8) * 8  # as many as a bundle may have, too
        return (
            "its tokenizer has no bos, eos, pad and unk token, because each row of the model is a character: another "
            f"character is an error, and no batch can be padded. --vocab_size {rows} adds rows of zeros for them"
        )
    said = [
        f"{token} (row {row}: {', '.join(role.removesuffix('_token') for role, t in roles.items() if t == token)})"
        for row, token in enumerate(special, count)
    ]
    return f"added to its tokenizer, on rows of padding: {', '.join(said)}; a character outside the vocabulary is unk"


def definition_of(chars: Sequence[str], special: Sequence[str] = ()) -> dict[str, Any]:
    """Write characters as a tokenizer.json: each is a token, and the special tokens follow them."""
    tokens = {token: number for number, token in enumerate([*chars, *special])}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(token, tokens[token]) for token in special],
        "normalizer": None,
        "pre_tokenizer": _EACH_CHARACTER,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": tokens, "unk_token": roles_of(special).get("unk_token", _NO_TOKEN)},
    }


def characters_of(definition: dict[str, Any]) -> list[str] | None:
    """Read the characters that `definition_of` wrote, today or before it had special tokens; None for others."""
    model = definition.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vocab, dict):
        return None
    chars = [token for token in vocab if len(token) == 1]
    special = [token for token in vocab if len(token) != 1]
    made = definition_of(chars, special)
    if not special and model.get("unk_token") == UNKNOWN:  # which was not there
        made["model"]["unk_token"] = UNKNOWN
    return chars if chars and tuple(special) == SPECIAL[: len(special)] and definition == made else None


def gpt2_definition(ranks: Mapping[bytes, int]) -> dict[str, Any]:
    """Write GPT-2's byte pairs as a tokenizer.json, with the ids of tiktoken.

    Ranks have no merges. That of a token is of the two parts to which the lower ranks take it.
    """
    printable = {byte: char for char, byte in printable_bytes().items()}
    shown = {token: "".join(printable[byte] for byte in token) for token in ranks}
    merges = [" ".join(shown[part] for part in _halves(token, ranks)) for token in ranks if len(token) > 1]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(END, COUNT)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {**{shown[token]: rank for token, rank in ranks.items()}, END: COUNT},
            "merges": merges,
        },
    }


def _halves(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The two parts that the last merge joins to a token."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        _, at = min((ranks.get(a + b, COUNT), i) for i, (a, b) in enumerate(pairwise(parts)))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _added(token: str, number: int) -> dict[str, Any]:
    sides = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **sides, "special": True}
