"""GPTConfig: the architecture of a model; its config.json is read and checked here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ..errors import CheckpointMismatch
from . import rope
from .fields import BOOLEAN, DEVICE, ConfigFields, Rule, is_positive, is_whole, one_of, whole_number

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")
GATED = ("swiglu", "geglu")
MLP_TYPES = (*ACTIVATIONS, "relu_squared", *GATED)
POS_ENCODINGS = ("learned", "rotary", "none")
ROTARY_LAYOUTS = ("halves", "pairs")
NORM_TYPES = ("layernorm", "layernorm_1p", "rmsnorm", "rmsnorm_1p", "rmsnorm_no_weight")
PLACEMENTS_OF_OLD = ("before", "after")
"""Places of the same two norms, which no name of a tensor shows."""
NORM_PLACEMENTS = (*PLACEMENTS_OF_OLD, "after_sublayer", "both")
QK_NORMS = ("head", "width")
ATTENTION_SCALES = ("head_size", "n_embd")
EDITABLE = ("batch_size", "dropout", "device")
"""Fields of config.json that a person may change at any time: they touch no tensor."""


FOREIGN = ("pos_encoding", "norm_type", "mlp_type", "rope_theta")
"""Fields that were other programs' before they were ours: where they say what is implied, they stay as they are."""


def _optional(rule: Rule) -> Rule:
    """Make the rule for a field that may be absent."""
    return lambda value: value is None or rule[0](value), rule[1]


POSITIVE: Rule = (is_positive, "expected a number above 0")


@dataclass
class GPTConfig(ConfigFields):
    """Architecture of a GPT, and three preferences of the run that made it.

    A field that old files lack has the neutral value: the behaviour of every model before the field existed.
    """

    batch_size: int = 32
    block_size: int = 256
    vocab_size: int = 50304
    n_embd: int = 384
    n_head: int = 6
    n_layer: int = 6
    dropout: float = 0.2
    bias: bool = False  # of qkv, and of proj unless proj_bias is set
    device: str = "auto"  # a preference: "auto" is CUDA if available
    activation: str = "gelu"  # of a feed-forward without mlp_type
    tied_head: bool = False
    head_bias: bool = True
    norm_bias: bool = True  # of layernorms; the other norms have none
    mlp_bias: bool = True
    proj_bias: bool | None = None
    attention_scale: str | float = "head_size"  # of the scores: D ** -0.5, C ** -0.5 with n_embd, or a number itself
    norm_placement: str = "before"  # or after: each sum; after_sublayer: before the sum; both: before and that
    norm_eps: float = 1e-5
    pos_encoding: str = "learned"
    rope_theta: float = 10000.0  # of rotary positions, as the next three
    rope_scaling: dict[str, Any] | None = None  # rope_type linear, yarn or llama3, and its numbers
    rotary_percent: float = 1.0  # part of each head that turns, from 0 to 1
    rotary_layout: str = "halves"  # partners are D / 2 apart, or neighbours with pairs
    norm_type: str = "layernorm"  # with _1p, the weight is stored less 1
    mlp_type: str | None = None  # relu_squared, swiglu or geglu (of the tanh form); an activation is the field of old
    n_ffn: int | None = None  # width of the feed-forward: 4 n_embd
    n_kv_head: int | None = None  # heads of keys and values: n_head
    head_size: int | None = None  # n_embd / n_head
    qk_norm: str | None = None  # norm of queries and keys before they turn: of each head, or of the whole width
    qkv_bias: bool | None = None  # people's name for bias where proj has another: becomes bias and proj_bias
    parallel_residual: bool = False  # attention and feed-forward both read the layer's input
    shared_attention_norm: bool = False  # and through one norm
    sliding_window: int | list[int | None] | None = None  # positions a query sees, itself included; per layer in a list
    logit_cap: float | None = None  # no logit is larger: cap * tanh(logit / cap)
    attention_cap: float | None = None  # the same of attention's scores
    embedding_scale: float = 1.0  # of the token embeddings

    NEUTRAL: ClassVar[dict[str, Any]] = {
        "attention_scale": "head_size",
        "norm_placement": "before",
        "norm_eps": 1e-5,
        "pos_encoding": "learned",
        "rope_theta": 10000.0,
        "rotary_percent": 1.0,
        "rotary_layout": "halves",
        "norm_type": "layernorm",
        "parallel_residual": False,
        "shared_attention_norm": False,
        "embedding_scale": 1.0,
        **dict.fromkeys(("rope_scaling", "mlp_type", "n_ffn", "n_kv_head", "head_size", "qk_norm", "qkv_bias")),
        **dict.fromkeys(("sliding_window", "logit_cap", "attention_cap")),
    }
    RULES: ClassVar[dict[str, Rule]] = {
        **dict.fromkeys(("batch_size", "block_size", "vocab_size", "n_embd", "n_head", "n_layer"), whole_number(1)),
        "dropout": (
            lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1,
            "expected a number of at least 0 and below 1",
        ),
        "bias": BOOLEAN,
        "device": DEVICE,
        "activation": one_of(*ACTIVATIONS),
        **dict.fromkeys(("tied_head", "head_bias", "norm_bias", "mlp_bias"), BOOLEAN),
        **dict.fromkeys(("proj_bias", "qkv_bias"), _optional(BOOLEAN)),
        "attention_scale": (
            lambda value: value in ATTENTION_SCALES or is_positive(value),
            f"expected {', '.join(ATTENTION_SCALES)} or a number above 0",
        ),
        "norm_placement": one_of(*NORM_PLACEMENTS),
        **dict.fromkeys(("norm_eps", "rope_theta", "embedding_scale"), POSITIVE),
        **dict.fromkeys(("logit_cap", "attention_cap"), _optional(POSITIVE)),
        "pos_encoding": one_of(*POS_ENCODINGS),
        "rotary_percent": (lambda value: is_positive(value) and value <= 1, "expected a number above 0 and at most 1"),
        "rotary_layout": one_of(*ROTARY_LAYOUTS),
        "norm_type": one_of(*NORM_TYPES),
        "mlp_type": _optional(one_of(*MLP_TYPES)),
        **dict.fromkeys(("n_ffn", "n_kv_head", "head_size"), _optional(whole_number(1))),
        "qk_norm": _optional(one_of(*QK_NORMS)),
        **dict.fromkeys(("parallel_residual", "shared_attention_norm"), BOOLEAN),
        "sliding_window": (
            lambda value: all(
                one is None or is_whole(one, 1) for one in (value if isinstance(value, list) else [value])
            ),
            "expected a whole number of at least 1, or a list with one or null for each layer",
        ),
    }

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config.json") -> Self:
        """Read a config.json; see `ConfigFields.from_dict`. An activation may stand in mlp_type, as in old files."""
        kind, activation = values.get("mlp_type"), values.get("activation")
        if kind in ACTIVATIONS and activation not in (None, kind):
            raise CheckpointMismatch(f"{where}: mlp_type is {kind}, and activation is {activation}. Remove one.")
        config = super().from_dict(values, where)
        said = [name for name in FOREIGN if name in values and getattr(config, name) == cls.NEUTRAL[name]]
        config.unknown = {name: v for name, v in values.items() if name in config.unknown or name in said}
        return config

    def settle(self) -> None:
        """Give one spelling to values that have several in people's files."""
        self.pos_encoding = "learned" if self.pos_encoding is None else self.pos_encoding
        self.norm_type = "layernorm" if self.norm_type is None else self.norm_type
        self.rope_scaling = rope.settled(self.rope_scaling)
        if self.mlp_type in ACTIVATIONS:
            self.activation = self.mlp_type
        if self.mlp_type in (*ACTIVATIONS, "mlp"):
            self.mlp_type = None
        if isinstance(self.qkv_bias, bool):
            if self.qkv_bias is not self.bias:
                self.bias, self.proj_bias = self.qkv_bias, self.has_proj_bias
            self.qkv_bias = None
        if isinstance(self.qk_norm, bool):
            self.qk_norm = "head" if self.qk_norm else None
        if isinstance(self.sliding_window, list) and not any(self.sliding_window):
            self.sliding_window = None
        if isinstance(self.norm_type, str) and self.norm_type.startswith("rmsnorm"):
            self.norm_bias = False

    def contradictions(self) -> list[str]:
        """Describe fields that do not fit together."""
        faults = [fault for fault in (rope.fault(self.rope_scaling),) if fault]
        if self.head_size is None and self.n_embd % self.n_head:
            near = _divisors(self.n_embd)
            faults.append(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; n_head may be {near}")
        elif self.pos_encoding == "rotary" and (self.rotary_width < 2 or self.rotary_width % 2):
            what = f"rotary_percent {self.rotary_percent} of head_size {self.head_width}"
            faults.append(f"{what} is {self.rotary_width} numbers, expected an even number from 2")
        if self.n_head % self.kv_heads:
            near, groups = _divisors(self.n_head), self.kv_heads
            faults.append(f"n_head {self.n_head} is not divisible by n_kv_head {groups}; n_kv_head may be {near}")
        if self.pos_encoding != "rotary":
            rotary = ("rope_theta", "rope_scaling", "rotary_percent", "rotary_layout")
            faults += [
                f"{name} is {getattr(self, name)}, but pos_encoding is {self.pos_encoding}, expected rotary"
                for name in rotary
                if getattr(self, name) != self.NEUTRAL[name]
            ]
        if self.parallel_residual and self.norm_placement != "before":
            faults.append(f"parallel_residual is true, but norm_placement is {self.norm_placement}, expected before")
        if self.shared_attention_norm and not self.parallel_residual:
            faults.append("shared_attention_norm is true, but parallel_residual is false, expected true")
        if isinstance(self.sliding_window, list) and len(self.sliding_window) != self.n_layer:
            faults.append(f"sliding_window has {len(self.sliding_window)} layers, but n_layer is {self.n_layer}")
        return faults

    def to_dict(self, model_class: str | None = None) -> dict[str, Any]:
        """The content of config.json; see `ConfigFields.to_dict`. With an mlp_type there is no activation."""
        values = super().to_dict(model_class)
        return {name: value for name, value in values.items() if name != "activation" or self.mlp_type is None}

    def architecture(self) -> dict[str, Any]:
        """The fields that determine tensors and mathematics: all that must not be edited, with every size."""
        values = {name: getattr(self, name) for name in self.names() if name not in EDITABLE}
        if self.mlp_type is not None:
            del values["activation"]
        sizes = {"n_ffn": self.ffn_width, "n_kv_head": self.kv_heads, "head_size": self.head_width}
        return {**values, **sizes, "proj_bias": self.has_proj_bias, "qkv_bias": self.bias}

    @property
    def neutral(self) -> dict[str, Any]:
        """Fields that old files lack, with the value that the others implied."""
        sizes = {"n_ffn": 4 * self.n_embd, "n_kv_head": self.n_head, "head_size": self.n_embd // self.n_head}
        return {**self.NEUTRAL, **sizes, "qkv_bias": self.bias}

    @property
    def has_proj_bias(self) -> bool:
        """Whether the attention's output projection has a bias."""
        return self.bias if self.proj_bias is None else self.proj_bias

    @property
    def is_gated(self) -> bool:
        """Whether a third matrix of the feed-forward is a gate."""
        return self.mlp_type in GATED

    @property
    def ffn_width(self) -> int:
        """Width of the feed-forward part."""
        return self.n_ffn or 4 * self.n_embd

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, each of which n_head / kv_heads heads of queries share."""
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.head_size or self.n_embd // self.n_head

    @property
    def rotary_width(self) -> int:
        """How many numbers of each head turn with the position."""
        return int(self.head_width * self.rotary_percent)

    @property
    def windows(self) -> list[int | None]:
        """The sliding window of each layer; None where a query sees everything before it."""
        window = self.sliding_window
        return list(window) if isinstance(window, list) else [window] * self.n_layer

    @property
    def score_scale(self) -> float:
        """The factor of the attention scores."""
        if isinstance(self.attention_scale, str):
            return (self.head_width if self.attention_scale == "head_size" else self.n_embd) ** -0.5
        return self.attention_scale


def _divisors(number: int) -> str:
    return ", ".join(str(one) for one in range(1, min(number, 64) + 1) if number % one == 0)


def same_architecture(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two config.json describe the same tensors and mathematics, whatever else a person edited."""
    if all(values.get("model_class", "GPT") == "GPT" for values in (a, b)):
        try:
            return GPTConfig.from_dict(a).architecture() == GPTConfig.from_dict(b).architecture()
        except CheckpointMismatch:
            return False
    return all(a.get(name) == b.get(name) for name in a.keys() | b.keys() if name not in EDITABLE)
