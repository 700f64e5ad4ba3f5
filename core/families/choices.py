"""Choices: the settings that decide what a model computes, each with its value and the origin of the value.

Origins, the first that there is: the tensors, a config in the file or beside it, a row of the writing program's table,
a flag. Nothing else fills a choice in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .architecture import Architecture
from .claims import activation_of
from .identify import Identity
from .programs import Marks, Program, program_of

LABELS = {
    "n_head": "heads",
    "n_kv_head": "key and value heads",
    "attention_scale": "attention scale",
    "norm_placement": "norm placement",
    "norm_eps": "norm epsilon",
    "rope_theta": "rope base",
    "logit_cap": "logit cap",
    "tied_head": "tied head",
    "vocab_size": "vocabulary",
}
"""Choices by their fields, in words; others are called as their field."""

FIELDS = {
    "activation": (
        "activation_function",
        "hidden_activation",
        "hidden_act",
        "activation",
        "mlp_type",
        "mlp_class_name",
    ),
    "attention_scale": ("attention_scale",),
    "norm_placement": ("norm_placement",),
    "norm_eps": (
        "norm_eps",
        "layer_norm_epsilon",
        "layer_norm_eps",
        "rms_norm_eps",
        "norm_epsilon",
        "layernorm_epsilon",
    ),
    "rope_theta": ("rope_theta", "rotary_base", "rotary_emb_base", "rope_base"),
}
"""Fields of configs that make a choice which tensors never show."""

FLAGS = ("n_head", *FIELDS)
"""Choices that a person may make where no file shows them."""

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu": "relu",
}
"""Spellings of the activations that our GPT computes; gelu_fast and gelu_accurate have other constants of the same."""

GATES = {"silu": "swiglu", "swish": "swiglu", "gelu_tanh": "geglu"}
"""What an activation is called where it is that of a gate."""


@dataclass(eq=False, repr=False)
class Choice:
    """One setting; without a value a person has to make it, by its flag."""

    name: str  # a field of our config, or its word in `LABELS`
    value: Any
    origin: str
    other: str = ""  # a value that may be right instead
    doubt: str = ""  # and why
    fits: tuple[str, ...] = ()  # where there is no value: the candidates

    @property
    def label(self) -> str:
        """What it is called."""
        return LABELS.get(self.name, self.name)

    def __str__(self) -> str:
        value = "?" if self.value is None else _text(self.value)
        return f"{self.label} {value} ({self.origin})"

    @property
    def warning(self) -> str:
        """The sentence about a value that may be wrong; "" for a certain one."""
        if not self.doubt:
            return ""
        return f"{self}: {self.doubt}. If this file is of that kind, add --{self.name} {self.other}."


def choices_of(identity: Identity, marks: Marks, flags: Mapping[str, Any]) -> list[Choice]:
    """List the choices of a model of a known family, with their origins.

    `flags` are a person's, by names of `FLAGS`; the number of heads is already in the architecture, if it is a flag.
    """
    shape = identity.architecture
    if shape is None:
        return []
    program = program_of(identity.family, marks) or Program("", {})
    known = [name for name in FIELDS if name in program.rows or _said(name, marks) is not None]
    others = {name: row for name, row in program.rows.items() if name not in FIELDS}
    family = f"{identity.program.split(',')[0]}, always"
    biases = [part for part, has in shape.biases.items() if has]
    rows = f"{shape.vocab_size} rows" + (f", {shape.padding}" if shape.padding else "")
    is_export = identity.family.startswith("megatron_")
    positions = "from the tensors" if shape.positions == "learned" else family
    made = [
        _heads(shape, marks, flags),
        Choice("n_kv_head", shape.n_kv_head, _shown("n_kv_head", shape, marks)),
        *(_choice(name, program, marks, flags, is_export) for name in known),
        *(Choice(name, row.value, f"{program.name}, {row.when}") for name, row in others.items()),
        Choice("norm", shape.norm, _told("norm_type", shape, marks, family)),
        Choice("positions", shape.positions, _told("pos_encoding", shape, marks, positions)),
        Choice("tied_head", shape.tied_head, _shown("tied_head", shape, marks)),
        Choice("biases", ", ".join(biases) or "none", "from the tensors"),
        Choice("vocab_size", rows, "from the tensors"),
    ]
    untold = {"n_kv_head"} if shape.n_kv_head in (None, shape.n_head) else set()
    untold |= {"tied_head"} if shape.tied_head is None else set()
    return [choice for choice in made if choice.name not in untold]


def _heads(shape: Architecture, marks: Marks, flags: Mapping[str, Any]) -> Choice:
    if shape.n_head is None:
        return Choice("n_head", None, "not in the file", fits=_possible_heads(shape.n_embd))
    origin = "from --n_head" if "n_head" in flags and "n_head" in shape.from_config else _shown("n_head", shape, marks)
    return Choice("n_head", shape.n_head, origin)


def _possible_heads(width: int | None) -> tuple[str, ...]:
    """The numbers of heads into which a width can be divided; none for an unknown width."""
    return tuple(str(count) for count in range(1, min(width or 0, 64) + 1) if width and width % count == 0)


def _told(name: str, shape: Architecture, marks: Marks, otherwise: str) -> str:
    return _shown(name, shape, marks) if name in shape.from_config else otherwise


def _shown(name: str, shape: Architecture, marks: Marks) -> str:
    return f"from {marks.place or 'the config'}" if name in shape.from_config else "from the tensors"


def _choice(name: str, program: Program, marks: Marks, flags: Mapping[str, Any], is_export: bool) -> Choice:
    """Make a choice; the config of an export of Megatron is what the export was told, and a flag overrides it."""
    said = _said(name, marks)
    place = marks.place or "the config"
    if said is not None and not (is_export and name in flags):
        return Choice(name, said, f"from {place}")
    if name in flags:
        over = f", overriding {said} in {place}" if said not in (None, flags[name]) else ""
        return Choice(name, flags[name], f"from --{name}{over}")
    row = program.rows[name]
    if row.value is None:
        return Choice(name, None, "not in the file", fits=row.fits)
    return Choice(name, row.value, ", ".join(filter(None, (program.name, row.when))), row.other, row.doubt)


def _said(name: str, marks: Marks) -> Any:
    """The config's value of a choice, in our spelling; None where it has none."""
    rope = marks.config.get("rope_parameters") if name == "rope_theta" else None
    inner = rope if isinstance(rope, Mapping) else {}
    found = (config.get(field) for config in (inner, marks.config) for field in FIELDS[name])
    value = next((one for one in found if isinstance(one, (str, int, float)) and not isinstance(one, bool)), None)
    if name == "activation" and "mlp_class_name" in marks.config:
        return activation_of(marks.config)
    if name == "activation":
        if (fused := marks.config.get("bias_gelu_fusion")) is not None or marks.config.get("openai_gelu") is True:
            return "gelu" if fused is False and marks.config.get("openai_gelu") is not True else "gelu_tanh"
        value = ACTIVATIONS.get(value, value) if isinstance(value, str) and value != "mlp" else None
        return GATES.get(value, value) if marks.is_gated and value is not None else value
    return value


def _text(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def question(choices: Iterable[Choice]) -> str:
    """Say which choices a person has to make, with the flag and the candidates of each; "" when there are none."""
    open_ = [choice for choice in choices if choice.value is None]
    if not open_:
        return ""
    what = " and ".join(choice.label for choice in open_)
    how = (f"--{choice.name} {_either(choice.fits)}" for choice in open_)
    return f"nothing in the file shows its {what}, without which its logits are not known. Add {'; '.join(how)}."


def _either(values: tuple[str, ...]) -> str:
    return " or ".join(filter(None, (", ".join(values[:-1]), *values[-1:]))) or "X"
