"""GPT-2's shape in four programs: conversion of the config from one to another, and its limits.

The hub is our GPT, whose config has the most settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config.gpt import ACTIVATIONS, MLP_TYPES, GPTConfig
from ...console.commands import typed
from ...containers.tensors.views import filled
from ...families import hf_gpt2, lecture, nanogpt
from ...families.choices import ACTIVATIONS as SPELLINGS
from ...families.fused import FUSED, LECTURE
from ...families.gpt import PLAIN, TENSORS, row_of
from ..plan import Options, Pair, Source
from ..run import Run

TABLE, HEAD, HEAD_BIAS = "token_embedding_table.weight", "lm_head.weight", "lm_head.bias"
HF_TABLE = "transformer.wte.weight"

NEW_HEAD = "python train.py --tied_head starts a model that GPT-2 and nanoGPT compute"
"""The way out for a model whose head neither GPT-2 of transformers nor nanoGPT computes."""

TO_HF = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}

GPT2_SHAPE = "gpt2"
"""The shape of its models."""

GPT2_END = 50256
"""GPT-2's end of text, with which transformers also begins one."""

_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
_CHOICES = ("activation", "attention_scale", "norm_placement", "norm_eps")


def biases(model: Source) -> dict[str, bool]:
    """Which biases exist, as fields of our config."""
    return {"bias" if part == "qkv" else f"{part}_bias": on for part, on in model.biases.items()}


def head_of(model: Source, head: str, table: str) -> bool:
    """Give a model its head, which is the token table unless it has other values; whether it is the token table."""
    tied = model.is_tied(head, table)
    if tied:
        if head in model.tensors and model.tensors[head].place != model.tensors[table].place:
            model.tie(head, table)  # one parameter, which was saved twice
        model.tensors.setdefault(head, model.tensors[table])
    else:
        model.notes.append("its head has other values than its token table: kept as a head of its own")
    return tied


def _ours(model: Source, **fields: Any) -> dict[str, Any]:
    """Our config of a model: its sizes and choices, none of them a default of ours.

    Raises: CheckpointMismatch when one is not known, or is none that our GPT computes.
    """
    model.ask()
    known = {name: model.sizes[name] for name in _SIZES if name in model.sizes}
    known |= {name: value for name in _CHOICES if (value := model.choice(name)) is not None}
    if lost := [name for name in (*_SIZES, *_CHOICES) if name not in known]:
        raise model.refuse(f"{', '.join(lost)} cannot be told from it, and a bundle records them.")
    made = {**known, **fields}
    if made.get("mlp_type") in MLP_TYPES:
        del made["activation"]  # said by mlp_type
    return GPTConfig.from_dict(made, str(model.path)).to_dict()


def complete(model: Source, options: Options) -> dict[str, Any]:
    """Complete the config, which is already that of our GPT where the file has one."""
    others = [name for name in model.tensors if row_of(name) in TENSORS and row_of(name) not in PLAIN]
    if others and "n_layer" not in model.config:
        raise model.refuse(f"{others[0]} is none of GPT-2's shape, and no config.json tells what is computed with it.")
    tied = model.is_tied(HEAD, TABLE, model.config.get("tied_head") is True)
    said = {name: value for name, value in model.config.items() if name not in ("format_version", "model_class")}
    chosen = {name: model.choice(name) for name in _CHOICES}
    return _ours(model, **{"dropout": 0.0, **said, **biases(model), "tied_head": tied, **chosen})


def nanogpt_to_ours(model: Source, options: Options) -> dict[str, Any]:
    """Read model_args; the head is the token table, and has no bias."""
    tied = head_of(model, HEAD, HF_TABLE)
    dropout = model.config.get("dropout", 0.0)
    dropout = dropout if isinstance(dropout, (int, float)) else 0.0
    return _ours(model, dropout=dropout, **biases(model), tied_head=tied)


def hf_to_ours(model: Source, options: Options) -> dict[str, Any]:
    """Read config.json, and refuse settings that our GPT does not compute."""
    config = model.config
    model.ask()
    if model.choice("activation") not in ACTIVATIONS:
        raise model.refuse(
            f"activation_function is {model.choice('activation')!r}; our GPT computes {', '.join(SPELLINGS)}. "
            "--to safetensors keeps it."
        )
    refuse_other_scales(model, "our GPT")
    tied = is_tied(model, HEAD, HF_TABLE, config.get("tie_word_embeddings", True) is not False)
    if tied:
        model.tensors.setdefault(HEAD, model.tensors[HF_TABLE])
    dropout = config.get("resid_pdrop", 0.1)
    dropout = dropout if isinstance(dropout, (int, float)) and 0 <= dropout < 1 else 0.0
    n_ffn = model.sizes.get("n_ffn")
    return _ours(model, dropout=dropout, bias=True, head_bias=False, tied_head=tied, n_ffn=n_ffn)


def refuse_other_scales(model: Source, target: str) -> None:
    """Refuse a config of GPT2LMHeadModel that scales its attention in another way than a target."""
    for name, value in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if model.config.get(name, value) is not value:
            raise model.refuse(
                f"{name} is {model.config[name]!r}; {target} computes {value}. --to safetensors keeps it."
            )


def is_tied(model: Source, head: str, table: str, said: bool | None) -> bool:
    """Whether the head of a model of transformers is its token table; `said` is what its config says.

    Raises: CheckpointMismatch for a head of other values than the table, which transformers would not use.
    """
    tied = model.is_tied(head, table, said)
    if said and not tied:
        raise model.refuse(
            f"its config ties head and token table, but {head} has other values than {table}: transformers would leave "
            "it out. Set tie_word_embeddings to false if the model was trained with a head of its own."
        )
    return tied


def drop_head_bias(model: Source, target: str) -> None:
    """Leave out the bias of the head, which a target does not have.

    Raises: CheckpointMismatch when it is not all zeros.
    """
    if HEAD_BIAS not in model.tensors:
        return
    if not model.is_zero(HEAD_BIAS):
        raise model.refuse(
            f"{HEAD_BIAS} has values other than 0, and {target} has no bias in its head: it would compute other "
            f"logits. --to safetensors and --to bundle keep it; {typed(NEW_HEAD)}."
        )
    model.drop(HEAD_BIAS, f"all zeros; {target} has no bias in its head")


def add_zero_biases(model: Source, head: str) -> None:
    """Add a bias of zeros to every linear layer and norm without one, except the head, which computes the same."""
    weights = [name for name in model.tensors if name.endswith(".weight") and "embedding" not in name and name != head]
    for name in weights:
        bias, view = name.removesuffix("weight") + "bias", model.tensors[name]
        if bias not in model.tensors:
            model.replace(bias, filled(view.dtype, view.shape[:1]), "zeros")


def _refuse_other_choices(model: Source, config: GPTConfig, target: str, *names: str) -> None:
    """Refuse choices for which a target has no setting: all but `names`."""
    neutral = config.neutral
    for name in config.without_neutral({name: getattr(config, name) for name in neutral}):
        if name not in names:
            raise model.refuse(
                f"{name} is {getattr(config, name)}, and {target} computes {neutral[name]}: other logits. "
                "--to bundle keeps it."
            )


def ours_to_hf(model: Source, options: Options) -> dict[str, Any]:
    """Write a config of GPT2LMHeadModel; a missing bias becomes zeros, a tied head is left out."""
    config = GPTConfig.from_dict(model.config, str(model.path))
    _refuse_other_choices(model, config, "HF GPT-2", "norm_eps", "n_ffn")
    tied = config.tied_head and options.tied is not False
    drop_head_bias(model, "HF GPT-2")
    if tied and HEAD in model.tensors:
        model.drop(HEAD, f"tied to {TABLE}; HF GPT-2 leaves it out")
    add_zero_biases(model, HEAD)
    end = GPT2_END if (model.tokenizer or {}).get("token_kind") == "gpt2" else None
    sizes = {name: getattr(config, name) for name in _SIZES}
    n_inner = None if config.n_ffn in (None, 4 * config.n_embd) else config.n_ffn
    return hf_config(sizes, config.norm_eps, config.dropout, n_inner) | {
        "activation_function": TO_HF[config.activation],
        "tie_word_embeddings": tied,
        "bos_token_id": end,
        "eos_token_id": end,
    }


def hf_config(sizes: Mapping[str, int], eps: float, dropout: float, n_inner: int | None) -> dict[str, Any]:
    """Write what every config of GPT2LMHeadModel has; `n_inner` None is 4 n_embd."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": sizes["vocab_size"],
        **dict.fromkeys(("n_positions", "n_ctx", "max_position_embeddings"), sizes["block_size"]),
        **dict.fromkeys(("n_embd", "hidden_size"), sizes["n_embd"]),
        **dict.fromkeys(("n_layer", "num_hidden_layers"), sizes["n_layer"]),
        **dict.fromkeys(("n_head", "num_attention_heads"), sizes["n_head"]),
        "n_inner": n_inner,
        "layer_norm_epsilon": eps,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), dropout),
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "use_cache": True,
    }


def ours_to_nanogpt(model: Source, options: Options) -> dict[str, Any]:
    """Write model_args; refuse a model that nanoGPT does not compute: another activation, an untied head."""
    config = GPTConfig.from_dict(model.config, str(model.path))
    _refuse_other_choices(model, config, "nanoGPT")
    if config.activation != "gelu":
        shown = {"gelu_tanh": "the tanh form of GELU (gelu_new)", "relu": "ReLU"}[config.activation]
        raise model.refuse(
            f"it computes {shown}, nanoGPT the exact GELU: other logits. --to bundle and --to hf keep it."
        )
    if options.tied is False or not model.is_tied(HEAD, TABLE):
        has_bias = HEAD_BIAS in model.tensors and not model.is_zero(HEAD_BIAS)
        keep = "--to bundle and --to safetensors" if has_bias else "--to bundle and --to hf"  # which has no bias there
        raise model.refuse(
            f"its head is not its token table, and nanoGPT has one tensor for both. {keep} keep two; {typed(NEW_HEAD)}."
        )
    drop_head_bias(model, "nanoGPT")
    model.tie(HEAD, TABLE)
    has_bias = config.bias or config.has_proj_bias or config.mlp_bias or config.norm_bias
    if has_bias:
        add_zero_biases(model, HEAD)
    if model.run is None and model.state.training:
        arithmetic = (model.state.environment or {}).get("dtype")  # of the machine, so no setting of the run
        model.run = Run({"dtype": arithmetic, **model.state.training}, batch_size=config.batch_size)
    return {
        **{name: getattr(config, name) for name in _SIZES},
        "bias": has_bias,
        "dropout": config.dropout,
    }


PAIRS = (
    Pair(LECTURE, FUSED, lecture.LECTURE, to_ours=complete, shape=GPT2_SHAPE),
    Pair("nanogpt", FUSED, nanogpt.NANOGPT, nanogpt_to_ours, ours_to_nanogpt, GPT2_SHAPE),
    Pair("hf_gpt2", FUSED, hf_gpt2.HF_GPT2, hf_to_ours, ours_to_hf, GPT2_SHAPE),
)
