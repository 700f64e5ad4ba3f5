"""The decoders of transformers and our GPT: conversion of the config in both directions, and its limits."""

from __future__ import annotations

from typing import Any

from ...config.gpt import GPTConfig
from ...containers.tensors.views import filled
from ...errors import CheckpointMismatch
from ...families import hf_llama, hf_neox
from ...families.fused import FUSED
from ..plan import Options, Pair, Source
from .decoder_settings import DECODERS, ONLY, Decoder, Unfit
from .gpt import HEAD, HEAD_BIAS, TABLE, biases, drop_head_bias, is_tied

TABLES = hf_llama.TABLES | hf_neox.TABLES
NAMES = {family.name: family for family in (*hf_llama.FAMILIES, *hf_neox.FAMILIES)}

GPT2 = "hf_gpt2"

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Ids that say nothing of the model: they are kept among the fields of ours that nothing here reads."""

SIZES = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_ffn", "head_size", "vocab_size")


def _names(family: str) -> tuple[str, str]:
    """The head and the token table of a family."""
    known = NAMES.get(family, NAMES["hf_llama"])
    return known.head, known.embedding


def shown_sizes(model: Source) -> dict[str, int]:
    """The sizes of a decoder that its tensors show, as our fields."""
    return {name: model.sizes[name] for name in SIZES if name in model.sizes}


def to_ours(model: Source, options: Options) -> dict[str, Any]:
    """Read config.json: sizes are those of the tensors, and every choice is the config's or the default of its class.

    Raises: CheckpointMismatch for a model without its config, and for settings that our GPT does not compute.
    """
    if "model_type" not in model.config and "architectures" not in model.config:
        raise model.refuse_without_config("what it computes is")
    decoder = DECODERS[model.family]
    for name, values in ONLY.items():
        if model.config.get(name) not in values:
            raise model.refuse(f"{name} is {model.config[name]!r}; our GPT computes {values[0]!r}. {_KEEPS}.")
    fields = {
        **decoder.always,
        **shown_sizes(model),
    }
    try:
        for setting in decoder.settings:
            fields |= {name: value for name, value in setting.read(model.config).items() if name not in SIZES}
    except Unfit as error:
        raise model.refuse(f"{error}. {_KEEPS}.") from error
    head, table = _names(model.family)
    tied = is_tied(model, head, table, model.config.get("tie_word_embeddings", decoder.tied) is not False)
    if tied:
        model.tensors.setdefault(head, model.tensors[table])
    fields |= biases(model) | {"tied_head": tied, "dropout": 0.0}
    fields |= {name: value for name in SPECIAL if (value := model.config.get(name)) is not None}
    return GPTConfig.from_dict(fields, str(model.path)).to_dict()


_KEEPS = "--to safetensors keeps the tensors"


def unfit(config: GPTConfig, decoder: Decoder) -> list[str]:
    """Say what a model computes that a decoder does not; [] where it is one."""
    values, neutral = config.architecture(), {**GPTConfig().architecture(), **config.neutral}
    wanted = {"mlp_type": None, "head_bias": False, **neutral, **decoder.always}
    faults = [
        f"{name} is {shown(values[name])}, expected {shown(wanted[name])}"
        for name in values
        if name not in decoder.free and name != "qkv_bias" and values[name] != wanted[name]
    ]
    for setting in decoder.settings:
        try:
            setting.write(config)
        except Unfit as error:
            faults.append(str(error))
    return faults


def shown(value: Any) -> str:
    """A value as config.json spells it; none for null."""
    return str(value).lower() if isinstance(value, bool | None) else str(value)


def hf_family(values: dict[str, Any]) -> str:
    """The family of transformers that a config of ours is written as: the first that fits, else GPT-2."""
    config = GPTConfig.from_dict(values)
    return next((family for family, decoder in DECODERS.items() if not unfit(config, decoder)), GPT2)


def refuse_unknown(model: Source) -> CheckpointMismatch:
    """Make the error for a model that is none of transformers: the nearest, and what it does not compute."""
    config = GPTConfig.from_dict(model.config, str(model.path))
    nearest, faults = min(((d.model, unfit(config, d)) for d in DECODERS.values()), key=lambda pair: len(pair[1]))
    return model.refuse(
        f"no model of transformers computes it; the nearest is {nearest}: {'; '.join(faults)}. --to bundle keeps it."
    )


def to_theirs(model: Source, options: Options) -> dict[str, Any]:
    """Write the config.json of the family that `hf_family` chose; a tied head is left out."""
    family = hf_family(model.config)
    config, decoder = GPTConfig.from_dict(model.config, str(model.path)), DECODERS[family]
    if family != "hf_phi":
        drop_head_bias(model, decoder.model)
    elif HEAD_BIAS not in model.tensors:
        table = model.tensors[TABLE]
        model.replace(HEAD_BIAS, filled(table.dtype, table.shape[:1]), "zeros")
    tied = config.tied_head and options.tied is not False
    if tied and HEAD in model.tensors:
        model.drop(HEAD, f"tied to {TABLE}; {decoder.model} leaves it out")
    made = {key: value for setting in decoder.settings for key, value in setting.write(config).items()}
    return {
        "architectures": [decoder.model],
        "model_type": family.removeprefix("hf_"),
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "vocab_size": config.vocab_size,
        **made,
        "attention_dropout": 0.0,
        "tie_word_embeddings": tied,
        "use_cache": True,
        **{name: config.unknown.get(name) for name in SPECIAL},
    }


LLAMA = ("hf_llama", "hf_mistral", "hf_qwen2", "hf_qwen3")
"""Models of one shape: what sets them apart, a model may have at its neutral value."""

PAIRS = tuple(
    Pair(family, FUSED, TABLES[family], to_ours, to_theirs, "llama" if family in LLAMA else family)
    for family in DECODERS
)
