"""Programs: what each computes where its files do not show it, and how its files are told from those of others.

The dates are those of commits in karpathy/nanoGPT (model.py: f08abb45 of GELU, cc5444e1 of the biases, 7fe4a099 of the
optimizer's groups) and karpathy/ng-video-lecture (988848a, of the scale).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config.variants import VARIANTS
from . import litgpt
from .fused import FUSED, LECTURE


@dataclass(eq=False, repr=False)
class Row:
    """One setting of a program: its value, and since when; without a value a person has to choose."""

    value: Any
    when: str = "always"
    other: str = ""  # the value that the file could have been trained with instead
    doubt: str = ""  # and who computed that
    fits: tuple[str, ...] = ()  # without a value: the candidates, each with the programs that compute it


@dataclass(eq=False, repr=False)
class Marks:
    """What a file shows about the program that wrote it, besides its tensors."""

    entries: frozenset[str] = frozenset()  # names at the top of its content
    config: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""  # of the config: `model_args`, `config.json`; "" without one
    is_object: bool = False  # whether the config was pickled as an instance of a class
    first_group: int | None = None  # parameters in the first of the two groups of its optimizer
    n_layer: int = 0
    is_gated: bool = False  # whether the feed-forward part has a gate


@dataclass(eq=False, repr=False)
class Program:
    """One way in which a family's files are written: how they are told, and what the program computes."""

    name: str
    rows: Mapping[str, Row]
    tells: Callable[[Marks], bool] = lambda marks: True


MODULES = "its modules"
"""The place of what only the modules of a pickled model show: it is no config that a program wrote."""


def _has_config(marks: Marks) -> bool:
    return bool(marks.place) and marks.place != MODULES


def _has_arguments(marks: Marks) -> bool:
    return "model_args" in marks.entries


def _has_sorted_groups(marks: Marks) -> bool:
    """Whether only the four matrices of each layer decay: later versions of nanoGPT have both tables among them."""
    return _has_arguments(marks) and marks.first_group == 4 * marks.n_layer


def _gpt2(activation: Row, when: str = "always", **others: Row) -> dict[str, Row]:
    """What programs of GPT-2's shape compute, with what differs among them."""
    usual = {
        "attention_scale": Row("head_size", when),
        "norm_placement": Row("before", when),
        "norm_eps": Row(1e-5, when),
    }
    return usual | {"activation": activation} | others


_GELUS = (
    "gelu (nanoGPT since 2023-06-14)",
    "gelu_tanh (nanoGPT before, minGPT, build-nanogpt, OpenAI's GPT-2)",
    "relu",
)
_OLDER = "nanoGPT computed gelu_tanh before that date"
_AS_ALL = "as every known program of GPT-2's shape"
_UNTOLD = Program("", _gpt2(Row(None, fits=_GELUS), _AS_ALL))

_NANOGPT = (
    Program(
        "nanoGPT",
        _gpt2(Row("gelu_tanh", "before 2023-06-14, told by the groups of its optimizer")),
        _has_sorted_groups,
    ),
    Program(
        "nanoGPT",
        _gpt2(Row("gelu_tanh", "before 2023-06-14, told by model_args without bias")),
        lambda marks: _has_arguments(marks) and "bias" not in marks.config,
    ),
    Program(
        "nanoGPT",
        _gpt2(Row("gelu", "since 2023-06-14")),
        lambda marks: _has_arguments(marks) and marks.first_group is not None,
    ),
    Program("nanoGPT", _gpt2(Row("gelu", "since 2023-06-14", "gelu_tanh", _OLDER)), _has_arguments),
    Program(
        "build-nanogpt",
        _gpt2(Row("gelu_tanh", "told by its keys")),
        lambda marks: marks.is_object and {"model", "config", "step"} <= marks.entries,
    ),
    Program(
        "",
        _gpt2(Row("gelu", "as nanoGPT since 2023-06-14", "gelu_tanh", f"{_OLDER}, and others do"), _AS_ALL),
        _has_config,
    ),
    _UNTOLD,
)

_OF_GPT2 = "default of GPT2Config"
_HF_GPT2 = (
    Program("transformers", _gpt2(Row("gelu_tanh", _OF_GPT2), norm_eps=Row(1e-5, _OF_GPT2)), _has_config),
    _UNTOLD,
)

_OF_1E6 = ("hf_llama", "hf_mistral", "hf_qwen2", "hf_qwen3", "hf_gemma", "hf_gemma2")
"""Decoders of transformers whose norms have an epsilon of 1e-6 by default; the others have 1e-5."""


def _decoder(eps: float) -> tuple[Program, ...]:
    """A decoder of transformers: what its config does not say is the default of its class."""
    default = "default of its config"
    return (Program("transformers", {"rope_theta": Row(10000.0, default), "norm_eps": Row(eps, default)}, _has_config),)


def _litgpt() -> tuple[Program, ...]:
    default = "default of its Config"
    return (Program("litgpt", {"rope_theta": Row(10000.0, default), "norm_eps": Row(1e-5, default)}, _has_config),)


_LLAMA2C = Program("llama2.c", {"rope_theta": Row(10000.0), "norm_eps": Row(1e-5, "its default")}, _has_arguments)

_SCALES = ("head_size (the lecture since 2023-01-25)", "n_embd (before)")
_PLACES = ("before (the lecture)", "after (the course before it)")

_LECTURE = (
    Program(
        "our GPT",
        _gpt2(Row("relu", "in its first generation")),
        lambda marks: _has_config(marks) and "tokenizer" in marks.entries,
    ),
    Program(
        "the lecture's code",
        _gpt2(
            Row("relu"),
            attention_scale=Row("head_size", "since 2023-01-25", "n_embd", "before that date it was n_embd"),
            norm_placement=Row("before", "in the lecture", "after", "the course before it has them after the sums"),
        ),
        _has_config,
    ),
    Program(
        "the lecture's code",
        _gpt2(Row("relu"), attention_scale=Row(None, fits=_SCALES), norm_placement=Row(None, fits=_PLACES)),
    ),
)

_FIRST = "a model converted from the lecture's first code has another"
_ACTIVATIONS = ("gelu (new models)", "gelu_tanh (from OpenAI's GPT-2)", "relu (lecture style)")
_OURS = (
    Program("our GPT", _gpt2(Row("gelu", "before the field existed")), _has_config),
    Program(
        "our GPT",
        _gpt2(
            Row(None, fits=_ACTIVATIONS),
            attention_scale=Row("head_size", "in new models", "n_embd", _FIRST),
            norm_placement=Row("before", "in new models", "after", _FIRST),
        ),
    ),
)

_THETA = Row(None, fits=("10000 (Megatron's default, Llama 2)", "500000 (Llama 3)", "1000000 (Qwen)"))


def _megatron(eps: float, rows: Mapping[str, Row]) -> tuple[Program, ...]:
    when = "its default" if eps == 1e-5 else "its default for Qwen"
    return (Program("Megatron", {**rows, "norm_eps": Row(eps, when)}),)


_FUSED_BIAS = "a model trained with bias_gelu_fusion computes gelu_tanh"
_MODDED = {"attention_scale": Row(0.12), "activation": Row("relu squared")}

PROGRAMS: dict[str, tuple[Program, ...]] = {
    "nanogpt": _NANOGPT,
    "hf_gpt2": _HF_GPT2,
    **dict.fromkeys(_OF_1E6, _decoder(1e-6)),
    **dict.fromkeys(("hf_olmo2", "hf_phi", "hf_gpt_neox"), _decoder(1e-5)),
    **dict.fromkeys(litgpt.TABLES, _litgpt()),
    "meta_llama": (_LLAMA2C,),
    LECTURE: _LECTURE,
    FUSED: _OURS,
    "megatron_gpt2": _megatron(1e-5, _gpt2(Row("gelu", "without bias_gelu_fusion", "gelu_tanh", _FUSED_BIAS))),
    "megatron_llama": _megatron(1e-5, {"rope_theta": _THETA}),
    **dict.fromkeys(("megatron_qwen2", "megatron_qwen3"), _megatron(1e-6, {"rope_theta": _THETA})),
    **{
        f"modded_{variant.name}": (Program("modded-nanogpt", _MODDED | {"logit_cap": Row(variant.cap)}),)
        for variant in VARIANTS.values()
    },
}
"""The programs of each family, the most particular first: the first that the marks tell of wrote the file."""


def program_of(family: str, marks: Marks) -> Program | None:
    """The program that wrote a file of a family; None where nothing is known beyond its tensors and config."""
    return next((program for program in PROGRAMS.get(family, ()) if program.tells(marks)), None)
