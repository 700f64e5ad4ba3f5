"""Claims: the config beside a model, compared with its tensors."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from .match import Match

NAMES: dict[str, tuple[str, ...]] = {
    "n_layer": ("n_layer", "num_layers", "num_hidden_layers"),
    "n_head": ("n_head", "num_attention_heads"),
    "n_kv_head": ("n_kv_head", "num_key_value_heads", "num_query_groups", "n_query_groups"),
    "head_size": ("head_size", "head_dim", "kv_channels"),
    "n_embd": ("n_embd", "hidden_size"),
    "n_ffn": ("n_ffn", "ffn_hidden_size", "intermediate_size", "n_inner"),
    "vocab_size": ("vocab_size",),
    "padded_vocab_size": ("padded_vocab_size",),
    "block_size": ("block_size", "n_positions", "max_position_embeddings", "sequence_len"),
}
"""Names of our fields in other programs: nanoGPT, Hugging Face, Megatron, litgpt, nanochat."""

TIED = {"tied_head": True, "tie_word_embeddings": True, "untie_embeddings_and_output_weights": False}
"""Fields that tell whether the head is the token table, and the value that means it is."""

ACTIVATIONS = {
    "gelu": "GELU",
    "gelu_new": "GELU, tanh form",
    "gelu_tanh": "GELU, tanh form",
    "gelu_pytorch_tanh": "GELU, tanh form",
    "relu": "ReLU",
    "silu": "SwiGLU",
    "swish": "SwiGLU",
    "swiglu": "SwiGLU",
    "geglu": "GeGLU, tanh form",
    "relu_squared": "ReLU squared",
}
"""Activations by their spelling in configs; silu is the gate of a SwiGLU."""

NORMS = {
    "LayerNorm": "LayerNorm",
    "RMSNorm": "RMSNorm",
    "layernorm": "LayerNorm",
    "layernorm_1p": "LayerNorm with 1 + weight",
    "rmsnorm": "RMSNorm",
    "rmsnorm_1p": "RMSNorm with 1 + weight",
    "rmsnorm_no_weight": "RMSNorm without weights",
}
"""Norms by their spelling in configs."""

HEADS = ("n_head", "n_kv_head", "head_size")
PADDING_AT_MOST = 8192
"""Padding rows that a program adds to a vocabulary: fewer than this."""


class Claims:
    """The config beside a model: it fills in what the shapes do not show, and is checked against what they do."""

    def __init__(self, found: Match, config: Mapping[str, Any]) -> None:
        self.found, self.config = found, config
        self.conflicts: list[str] = []
        self.used: list[str] = []  # fields that the shapes do not show
        self._names = {field: name for field, names in NAMES.items() for name in names if config.get(name) is not None}
        self._names |= {field: name for name, field in found.family.fields.items() if config.get(name) is not None}
        if config.get("group_query_attention") is False:  # Megatron then records 1 group, but has one for each head
            self._names.pop("n_kv_head", None)

    def number(self, field: str) -> int | None:
        """The config's number for a field; None where it has none, or it is not a number of at least 1."""
        value = self.config.get(self._names.get(field, ""))
        return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63 else None

    def activation(self) -> str:
        """The config's activation in our terms, "" if it has none."""
        said = activation_of(self.config)
        return "" if said is None else ACTIVATIONS.get(said, _text(said))

    def norm(self) -> str:
        """The kind of norm that the config names, "" if it names none."""
        for name in ("normalization", "norm_class_name", "norm_type"):
            if isinstance(said := self.config.get(name), str) and said in NORMS:
                self.used += ["norm_type"] if name != "normalization" else []
                is_gemma = name == "norm_class_name" and "Gemma" in str(self.config.get("name"))
                return NORMS["rmsnorm_1p" if is_gemma and said == "RMSNorm" else said]
        return ""

    def positions(self) -> str:
        """The kind of positions that a config of ours names, "" if it names none."""
        said = self.config.get("pos_encoding")
        if said not in ("rotary", "none"):
            return ""
        self.used.append("pos_encoding")
        return str(said)

    def says_tied(self) -> bool | None:
        """Whether the config ties the head to the token table."""
        return next((tied for _, tied in tied_fields(self.config)), None)

    def tied(self) -> bool | None:
        """The same, where the tensors do not show it."""
        said = self.says_tied()
        self.used += [] if said is None else ["tied_head"]
        return said

    def context(self) -> int | None:
        """The context length, if no table of positions shows it."""
        if context := self.number("block_size"):
            self.used.append("block_size")
        return context

    def heads(self, q_size: int | None, kv_size: int | None) -> dict[str, int | None]:
        """Derive n_head, n_kv_head and head_size from shapes, from the program, or from the config."""
        unknown: dict[str, int | None] = dict.fromkeys(HEADS)
        if not q_size or not kv_size:
            return unknown
        shown = self._head_size(q_size, kv_size)
        count, width = self.number("n_head"), self._shown("n_embd")
        size = shown or self.number("head_size") or (width // count if count and width else None)
        if not size:
            return unknown
        source = "head_size" if shown or self.number("head_size") else "n_head"
        for word, rows, what in (("q_size", q_size, "queries"), ("kv_size", kv_size, "keys")):
            if rows % size or (source == "n_head" and what == "queries" and rows % (count or 1)):
                whose = "it" if source in self._names else f"a head of {size}"
                self._contradict(source, f"the tensors have {rows} rows of {what}, no multiple of {whose}", word)
                return unknown
        result: dict[str, int | None] = dict(zip(HEADS, (q_size // size, kv_size // size, size), strict=True))
        for field, value in result.items():
            if self.number(field) not in (None, value):
                whose = "" if field == "head_size" else f" of size {size}"
                self._contradict(field, f"the tensors have {value}{whose}", "kv_size" if "kv" in field else "q_size")
        if not shown:
            if count not in (None, q_size // size):
                return unknown  # the config contradicts itself
            self.used += list(result)
        return result

    def _head_size(self, q_size: int, kv_size: int) -> int | None:
        """The size of a head from the shapes, or fixed by the program."""
        if size := self._shown("head_size") or self.found.family.head_size:
            return size
        for field, rows in (("n_kv_head", kv_size), ("n_head", q_size)):
            if (count := self._shown(field)) and rows % count == 0:
                return rows // count
        return None

    def compare(self, learned: bool, gated: bool, tied: bool | None) -> None:
        """Report where the config contradicts the measured sizes, field by field."""
        family = self.found.family
        for field, name in self._names.items():
            if (said := self.number(field)) is None:
                self.conflicts.append(f"{name} is {_text(self.config[name])} in the config, not a number of at least 1")
                continue
            value = self._shown("vocab_size" if field == "padded_vocab_size" else field)
            if field == "n_ffn" and value is None and (width := self._shown("n_embd")):
                value = 4 * width
            if value in (None, said) or field in HEADS or (field == "block_size" and not learned):
                continue
            if field == "vocab_size" and said < value == self.number("padded_vocab_size"):
                continue
            if field == "vocab_size" and family.pads and 0 < value - said < PADDING_AT_MOST and value % 64 == 0:
                continue
            self._contradict(field, f"the tensors have {value}", field)
        switches = {**self.found.switches, "gated": gated}
        for name, switch in family.claims.items():
            if isinstance(said := self.config.get(name), bool) and said is not switches[switch]:
                what = family.switches[switch][0] if switch in family.switches else "a gate"
                there = "is there" if switches[switch] else "is not there"
                self.conflicts.append(f"{name} is {str(said).lower()} in the config, but {what} {there}")
        for name, says_tied in tied_fields(self.config):
            if tied not in (None, says_tied):
                what = "absent or the token table itself" if tied else "a tensor of its own"
                shown = str(self.config[name]).lower()
                self.conflicts.append(f"{name} is {shown} in the config, but {family.head} is {what}")

    def _shown(self, field: str) -> int | None:
        measure = self.found.measures.get(field)
        return measure.value if measure else None

    def _contradict(self, field: str, what: str, measured: str) -> None:
        """Report both numbers, and the tensor that shows the second."""
        name, measures = self._names.get(field, field), self.found.measures
        measure = measures.get(measured) or (measures.get("n_embd") if field in HEADS else None)
        said = f"{name} is {self.number(field)} in the config, but " if field in self._names else ""
        witness = f" ({measure.name} is {measure.shape})" if measure and measure.shape else ""
        self.conflicts.append(f"{said}{what}{witness}")


def tied_fields(config: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yield each field of a config that tells whether the head is the token table, and what it tells."""
    for name, meaning in TIED.items():
        if isinstance(said := config.get(name), bool):
            yield name, said is meaning


def activation_of(config: Mapping[str, Any]) -> str | None:
    """The activation that a config names, in its own words; litgpt names a class, and the form of its GELU."""
    if isinstance(kind := config.get("mlp_class_name"), str):
        gelu = "gelu_tanh" if config.get("gelu_approximate") == "tanh" else "gelu"
        return {"LLaMAMLP": "swiglu", "GemmaMLP": "geglu" if gelu == "gelu_tanh" else gelu}.get(kind, gelu)
    names = ("activation_function", "hidden_activation", "hidden_act", "activation", "mlp_type")
    said = (config.get(name) for name in names)
    return next((value for value in said if isinstance(value, str) and value != "mlp"), None)


def _text(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # an int of more digits than Python prints
        return "too large to be shown"
