"""GPTConfig: the architecture of a model; its config.json is read and checked here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import CheckpointMismatch
from .fields import BOOLEAN, DEVICE, ConfigFields, Rule, is_positive, one_of, whole_number

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")
NORM_PLACEMENTS = ("before", "after")
ATTENTION_SCALES = ("head_size", "n_embd")
EDITABLE = ("batch_size", "dropout", "device")
"""Fields of config.json that a person may change at any time: they touch no tensor."""


def _computed(*values: str) -> Rule:
    return lambda value: value in (None, *values), f"which this model does not compute, expected {', '.join(values)}"


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
    activation: str = "gelu"
    tied_head: bool = False
    head_bias: bool = True
    norm_bias: bool = True
    mlp_bias: bool = True
    proj_bias: bool | None = None
    attention_scale: str | float = "head_size"  # of the scores: D ** -0.5, C ** -0.5 with n_embd, or a number itself
    norm_placement: str = "before"  # of attention and feed-forward, or after each of the two sums
    norm_eps: float = 1e-5

    NEUTRAL: ClassVar[dict[str, Any]] = {"attention_scale": "head_size", "norm_placement": "before", "norm_eps": 1e-5}
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
        "proj_bias": (lambda value: value is None or isinstance(value, bool), BOOLEAN[1]),
        "attention_scale": (
            lambda value: value in ATTENTION_SCALES or is_positive(value),
            f"expected {', '.join(ATTENTION_SCALES)} or a number above 0",
        ),
        "norm_placement": one_of(*NORM_PLACEMENTS),
        "norm_eps": (is_positive, "expected a number above 0"),
        # fields of other programs that change the computation with the same tensors
        "pos_encoding": _computed("learned"),
        "norm_type": _computed("layernorm"),
        "mlp_type": _computed("mlp", *ACTIVATIONS),
    }

    def contradictions(self) -> list[str]:
        """Describe fields that do not fit together."""
        if self.n_embd % self.n_head == 0:
            return []
        near = ", ".join(str(h) for h in range(1, min(self.n_embd, 64) + 1) if self.n_embd % h == 0)
        return [f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; n_head may be {near}"]

    def architecture(self) -> dict[str, Any]:
        """The fields that determine tensors and mathematics: everything that must not be edited."""
        values = {name: getattr(self, name) for name in self.names() if name not in EDITABLE}
        return {**values, "proj_bias": self.has_proj_bias}

    @property
    def has_proj_bias(self) -> bool:
        """Whether the attention's output projection has a bias."""
        return self.bias if self.proj_bias is None else self.proj_bias

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def score_scale(self) -> float:
        """The factor of the attention scores."""
        if isinstance(self.attention_scale, str):
            return (self.head_size if self.attention_scale == "head_size" else self.n_embd) ** -0.5
        return self.attention_scale


def same_architecture(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two config.json describe the same tensors and mathematics, whatever else a person edited."""
    if all(values.get("model_class", "GPT") == "GPT" for values in (a, b)):
        try:
            return GPTConfig.from_dict(a).architecture() == GPTConfig.from_dict(b).architecture()
        except CheckpointMismatch:
            return False
    return all(a.get(name) == b.get(name) for name in a.keys() | b.keys() if name not in EDITABLE)
