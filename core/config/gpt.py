"""GPTConfig: the architecture of a model; its config.json is read and checked here."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import CheckpointMismatch

FORMAT_VERSION = 2
"""The bundle format this program writes; a file without a version is version 1."""

CHOICES_VERSION = 3
"""The format of a model with a choice that programs of version 2 do not know and would compute without: `NEUTRAL`."""

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")
NORM_PLACEMENTS = ("before", "after")
ATTENTION_SCALES = ("head_size", "n_embd")
EDITABLE = ("batch_size", "dropout", "device")
"""Fields of config.json that a person may change at any time: they touch no tensor."""


@dataclass
class GPTConfig:
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
    unknown: dict[str, Any] = field(default_factory=dict)  # fields of other programs, kept as they are

    def __post_init__(self) -> None:
        self.check("config")

    def check(self, where: str) -> None:
        """Raise unless every field has its type and a possible value.

        Raises: CheckpointMismatch naming each field, its value and what is allowed.
        """
        faults = [fault for name, rule in _RULES.items() if (fault := rule(name, getattr(self, name)))]
        faults += [
            f"{name} is {self.unknown[name]!r}, which this model does not compute, expected {', '.join(computed)}"
            for name, computed in _COMPUTED.items()
            if self.unknown.get(name) not in (None, *computed)
        ]
        if not faults and self.n_embd % self.n_head:
            near = ", ".join(str(h) for h in range(1, min(self.n_embd, 64) + 1) if self.n_embd % h == 0)
            faults.append(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; n_head may be {near}")
        if faults:
            raise CheckpointMismatch(f"{where}: " + "; ".join(faults) + ".")

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config.json") -> GPTConfig:
        """Read a config.json; fields this program does not know are kept in `unknown`.

        Raises: CheckpointMismatch when a field has a wrong type or an impossible value.
        """
        known = {f.name for f in fields(cls)} - {"unknown"}
        version = values.get("format_version")
        if isinstance(version, int) and version > CHOICES_VERSION:
            raise CheckpointMismatch(
                f"{where}: format_version {version}, this program reads up to {CHOICES_VERSION}. Update the program."
            )
        config = cls.__new__(cls)
        defaults = cls()
        for name in known:
            setattr(config, name, values.get(name, getattr(defaults, name)))
        config.unknown = {k: v for k, v in values.items() if k not in known and k != "format_version"}
        config.check(where)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json, with the unknown fields of the file it came from."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "unknown"}
        return {**without_neutral(known), "format_version": self.format_version, **self.unknown}

    @property
    def format_version(self) -> int:
        """The lowest format whose programs compute this model, rather than one without a field they do not know."""
        is_neutral = all(getattr(self, name) == value for name, value in NEUTRAL.items())
        return FORMAT_VERSION if is_neutral else CHOICES_VERSION

    def architecture(self) -> dict[str, Any]:
        """The fields that determine tensors and mathematics: everything that must not be edited."""
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        values = {k: v for k, v in known.items() if k not in EDITABLE and k != "unknown"}
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


NEUTRAL: dict[str, Any] = {"attention_scale": "head_size", "norm_placement": "before", "norm_eps": 1e-5}
"""Fields that models had no choice about before the field existed, and what all of them did; not written then."""


def without_neutral(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out the fields of `NEUTRAL` that have their neutral value."""
    return {name: value for name, value in values.items() if name not in NEUTRAL or value != NEUTRAL[name]}


def same_architecture(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two config.json describe the same tensors and mathematics, whatever else a person edited."""
    if all(values.get("model_class", "GPT") == "GPT" for values in (a, b)):
        try:
            return GPTConfig.from_dict(a).architecture() == GPTConfig.from_dict(b).architecture()
        except CheckpointMismatch:
            return False
    return all(a.get(name) == b.get(name) for name in a.keys() | b.keys() if name not in EDITABLE)


def _positive_int(name: str, value: Any) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31:
        return None
    return f"{name} is {value!r}, expected a whole number of at least 1"


def _fraction(name: str, value: Any) -> str | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1:
        return None
    return f"{name} is {value!r}, expected a number of at least 0 and below 1"


def _boolean(name: str, value: Any) -> str | None:
    return None if isinstance(value, bool) else f"{name} is {value!r}, expected true or false"


def _optional_boolean(name: str, value: Any) -> str | None:
    return None if value is None else _boolean(name, value)


def _device(name: str, value: Any) -> str | None:
    if isinstance(value, str) and value:
        return None
    return f"{name} is {value!r}, expected auto, cpu, cuda or cuda:N"


def _activation(name: str, value: Any) -> str | None:
    return None if value in ACTIVATIONS else f"{name} is {value!r}, expected {', '.join(ACTIVATIONS)}"


def _attention_scale(name: str, value: Any) -> str | None:
    if value in ATTENTION_SCALES or _is_positive(value):
        return None
    return f"{name} is {value!r}, expected {', '.join(ATTENTION_SCALES)} or a number above 0"


def _norm_placement(name: str, value: Any) -> str | None:
    return None if value in NORM_PLACEMENTS else f"{name} is {value!r}, expected {', '.join(NORM_PLACEMENTS)}"


def _positive(name: str, value: Any) -> str | None:
    return None if _is_positive(value) else f"{name} is {value!r}, expected a number above 0"


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


_COMPUTED = {
    "pos_encoding": ("learned",),
    "norm_type": ("layernorm",),
    "mlp_type": ("mlp", *ACTIVATIONS),
}
"""Fields of other programs that change the computation with the same tensors, and the values computed here."""

_RULES = {
    "batch_size": _positive_int,
    "block_size": _positive_int,
    "vocab_size": _positive_int,
    "n_embd": _positive_int,
    "n_head": _positive_int,
    "n_layer": _positive_int,
    "dropout": _fraction,
    "bias": _boolean,
    "device": _device,
    "activation": _activation,
    "tied_head": _boolean,
    "head_bias": _boolean,
    "norm_bias": _boolean,
    "mlp_bias": _boolean,
    "proj_bias": _optional_boolean,
    "attention_scale": _attention_scale,
    "norm_placement": _norm_placement,
    "norm_eps": _positive,
}
