"""Tokenizers as Hugging Face's libraries read them: tokenizer.json, and the settings with which it is opened.

Characters and symbols are a WordLevel vocabulary, GPT-2's byte pairs a BPE one. Every special token has a row in the
model: GPT-2's end of text, and for characters and symbols those on the rows of padding behind them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from ..bundle.tokenizer_state import State, checked_ranks, checked_symbols
from ..bundle.vocabularies import Vocabulary
from ..containers.json_files import dump_json
from ..data.gpt2_ranks import COUNT, URL, local_ranks, printable_bytes
from .plan import Source

END, UNKNOWN, PADDING = "<|endoftext|>", "<unk>", "<pad>"

SPECIAL = (END, UNKNOWN, PADDING)
"""Special tokens of a vocabulary of characters or symbols, in the order in which they take the free rows."""

GPT2_ROLES = {"bos_token": END, "eos_token": END, "unk_token": END}
"""What GPT-2's only special token stands for, as in the tokenizer that OpenAI published."""

_EACH_CHARACTER = {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False}


def add_tokenizer_files(model: Source, bpe_file: Path | None) -> tuple[dict[str, bytes], dict[str, int]]:
    """Make the tokenizer files of a model in a folder of transformers; returns them, and its config's ids of tokens.

    A note tells which special tokens were added, or what is missing.
    """
    state = model.tokenizer or {}
    kind, definition = state.get("token_kind"), state.get("definition")
    roles: Mapping[str, str] = {}
    vocab: Mapping[str, int] = {}
    rows = model.sizes.get("vocab_size", 0)
    if kind in ("char", "symbols"):
        words = words_of(state)
        special = [token for token in SPECIAL if token not in words][: max(0, rows - len(words))]
        definition, roles = definition_of(words, special), roles_of([*words, *special])
        vocab = definition["model"]["vocab"]
        model.notes.append(_said_of(vocab, special, roles, str(kind)))
    elif kind == "gpt2":
        vocab, roles = {END: COUNT}, GPT2_ROLES
        if (ranks := local_ranks(bpe_file)) is None:
            model.notes.append(
                "WARNING: the folder has no tokenizer, because GPT-2's ranks are not on this machine: AutoTokenizer "
                f"turns every text into no tokens. Fetch {URL} and convert again with --bpe_file FILE, or copy "
                "tokenizer.json of openai-community/gpt2 into the folder"
            )
            return {}, _ids(vocab, roles)
        definition = gpt2_definition(ranks)
    elif kind == "tiktoken":
        known, found = checked_ranks(state, "tokenizer.json")
        vocab, roles = known.ids, {"bos_token": known.begin, "eos_token": known.end}
        definition = tiktoken_definition(known, found)
    if not isinstance(definition, dict):
        return {}, {}
    if kind == "hf" and (end := _end_of(definition)) in range(rows):
        vocab, roles = {END: end}, {"eos_token": END}
    settings: dict[str, Any] = {
        "tokenizer_class": "GPT2Tokenizer" if kind == "gpt2" else "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **roles,
    }
    if context := model.sizes.get("block_size"):
        settings["model_max_length"] = context
    text = json.dumps(definition, ensure_ascii=False, indent=1).encode()
    return {"tokenizer.json": text, "tokenizer_config.json": dump_json(settings)}, _ids(vocab, roles)


def _ids(vocab: Mapping[str, int], roles: Mapping[str, str]) -> dict[str, int]:
    """What config.json says of special tokens; it has no field for an unknown one."""
    return {f"{role}_id": vocab[token] for role, token in roles.items() if role != "unk_token"}


def _end_of(definition: Mapping[str, Any]) -> Any:
    """The id of the end of text, if somebody else's tokenizer has it as a special token."""
    ends = [token for token in added_tokens(definition) if token.get("content") == END and token.get("special")]
    return ends[0].get("id") if ends else None


def added_tokens(definition: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tokens that a definition has besides those of its model."""
    added = definition.get("added_tokens")
    return [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []


def words_of(state: Mapping[str, Any]) -> list[str]:
    """The text of each id of a vocabulary of characters or symbols; ids without texts are numbers before a blank."""
    if state["token_kind"] == "char":
        return list(state["chars"])
    size, symbols = checked_symbols(dict(state), "tokenizer.json")
    return _numbers(size) if symbols is None else symbols


def _numbers(size: int) -> list[str]:
    return [f"{index} " for index in range(size)]


def roles_of(tokens: Collection[str]) -> dict[str, str]:
    """What the special tokens among these stand for; the end of text for what has none of its own."""
    wanted = {"bos_token": END, "eos_token": END, "unk_token": UNKNOWN, "pad_token": PADDING}
    found = {role: token if token in tokens else END for role, token in wanted.items()}
    return {role: token for role, token in found.items() if token in tokens}


def _said_of(vocab: Mapping[str, int], special: Sequence[str], roles: Mapping[str, str], kind: str) -> str:
    what = "character" if kind == "char" else "symbol"
    if not roles:
        rows = -(-(len(vocab) + len(SPECIAL)) // 8) * 8  # as many as a bundle may have, too
        return (
            f"its tokenizer has no bos, eos, pad and unk token, because each row of the model is a {what}: another "
            f"character is an error, and no batch can be padded. --vocab_size {rows} adds rows of zeros for them"
        )
    said = [
        f"{token} (row {vocab[token]}: {', '.join(r.removesuffix('_token') for r, t in roles.items() if t == token)})"
        for token in dict.fromkeys([*roles.values(), *special])
    ]
    where = "added to its tokenizer, on rows of padding" if special else "special tokens, which are symbols of its own"
    unknown = "is unk" if "unk_token" in roles else "is an error"
    return f"{where}: {', '.join(said)}; a character outside the vocabulary {unknown}"


def definition_of(words: Sequence[str], special: Sequence[str] = ()) -> dict[str, Any]:
    """Write characters or symbols as a tokenizer.json: each is a token, and the special tokens follow them.

    Text is encoded a character at a time, as nanoGPT does, and decoded by joining the tokens.
    """
    tokens = {token: number for number, token in enumerate([*words, *special])}
    # The format requires an unknown token; without one that is in the vocabulary an unknown character is an error.
    absent = next(text for length in count() if (text := "\0" * length) not in tokens)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(token, tokens[token]) for token in special],
        "normalizer": None,
        "pre_tokenizer": _EACH_CHARACTER,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": tokens, "unk_token": roles_of(tokens).get("unk_token", absent)},
    }


def state_of_words(definition: dict[str, Any]) -> State | None:
    """Read the characters or symbols that `definition_of` wrote, also before it had special tokens; None for others."""
    model = definition.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vocab, dict):
        return None
    behind = len(vocab) - len(added_tokens(definition))
    words, special = list(vocab)[:behind], list(vocab)[behind:]
    made = definition_of(words, special)
    if not special and model.get("unk_token") == UNKNOWN:  # which was not there
        made["model"]["unk_token"] = UNKNOWN
    if not words or not set(special) <= set(SPECIAL) or definition != made:
        return None
    if all(len(word) == 1 for word in words):
        return {"token_kind": "char", "chars": words}
    symbols = {} if words == _numbers(len(words)) else {"symbols": words}
    return {"token_kind": "symbols", "vocab_size": len(words), **symbols}


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


def tiktoken_definition(known: Vocabulary, ranks: Mapping[bytes, int]) -> dict[str, Any]:
    """Write another vocabulary of tiktoken as a tokenizer.json, with its ids: a piece that is a token is not merged."""
    made = gpt2_definition(ranks)
    pieces = {"type": "Split", "pattern": {"Regex": known.pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {**made["decoder"], "use_regex": False}
    made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [pieces, byte_level]}
    made["added_tokens"] = [_added(token, number) for token, number in known.ids.items()]
    del made["model"]["vocab"][END]
    made["model"] |= {"ignore_merges": True}
    return made


def _halves(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The two parts that the last merge joins to a token."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        _, at = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts)))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _added(token: str, number: int) -> dict[str, Any]:
    sides = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **sides, "special": True}
