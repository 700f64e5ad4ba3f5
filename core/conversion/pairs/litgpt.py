"""litgpt's models and our GPT: conversion of the config in both directions, and its limits.

Fields and their defaults as in Lightning-AI/litgpt, litgpt/config.py; what they compute is in litgpt/model.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...config.gpt import GPTConfig
from ...families.fused import FUSED
from ...families.litgpt import OLD, TABLES
from ..plan import Options, Pair, Source
from .decoder_settings import Unfit
from .decoders import hf_family, shown, shown_sizes
from .gpt import HEAD, TABLE, biases

CONFIG = "model_config.yaml"
FAMILIES = ("litgpt", "litgpt_neox", "litgpt_olmo2")
"""Those that are written."""

LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len")
CONTEXT = "original_max_position_embeddings"
"""What Hugging Face and we call the last of them."""

DEFAULTS: dict[str, Any] = {
    "block_size": 4096,
    **dict.fromkeys(("name", "n_layer", "n_embd", "vocab_size", "padded_vocab_size", "n_head")),
    **dict.fromkeys(("hf_config", "padding_multiple", "head_size", "n_query_groups", "intermediate_size")),
    "norm_class_name": "LayerNorm",
    "norm_eps": 1e-5,
    "norm_qk": False,
    "norm_qk_type": "default",
    "norm_1": True,
    "norm_2": True,
    "post_attention_norm": False,
    "post_mlp_norm": False,
    "parallel_residual": True,
    "shared_attention_norm": False,
    "bias": True,
    "attn_bias": False,
    "lm_head_bias": False,
    "attention_scores_scalar": None,
    "sliding_window_size": None,
    "sliding_window_indices": None,
    "attention_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_base": 10000,
    "rotary_percentage": 0.25,
    "rope_condense_ratio": 1,
    "rope_adjustments": None,
    "rope_interleave": False,
    "mlp_class_name": "GptNeoxMLP",
    "gelu_approximate": "none",
    "scale_embeddings": False,
}
"""Fields that decide what is computed, with their defaults; None where shapes show it, or where there is none."""

ONLY: dict[str, tuple[Any, ...]] = {
    "latent_attention": (None,),
    "rope_local_base_freq": (None,),
    "rope_indices": (None,),
    "first_k_dense_replace": (None,),
    "n_expert": (0, None),
    "n_shared_expert": (0, None),
}
"""Fields of which our GPT computes only these values."""

OF_EXPERTS: tuple[str, ...] = ("moe_intermediate_size", "n_expert_groups", "n_topk_groups", "n_topk_scores_per_group")
OF_EXPERTS += ("n_expert_per_token", "routed_scaling_factor", "norm_topk_prob")
"""Fields that mean nothing without experts."""

OF_WINDOWS = ("sliding_window_layer_placing", "sliding_window_layer_stride", "sliding_window_offset")
"""Fields that said before 2025-04 which layers have a window."""

KNOWN = {*DEFAULTS, *ONLY, *OF_EXPERTS, *OF_WINDOWS}

PLACEMENTS = {
    "before": (True, True, False, False),
    "both": (True, True, True, True),
    "after_sublayer": (False, False, True, True),
}
"""Which norms a layer has: norm_1, norm_2, post_attention_norm, post_mlp_norm."""

MLPS = {
    "swiglu": ("LLaMAMLP", None),
    "geglu": ("GemmaMLP", "tanh"),
    "gelu": ("GptNeoxMLP", "none"),
    "gelu_tanh": ("GptNeoxMLP", "tanh"),
}
"""The class of each feed-forward, and the form of its GELU; None where it has none."""

NAMES = {"hf_gemma": "Gemma", "hf_gemma2": "Gemma-2", "hf_olmo2": "OLMo-2", "hf_qwen3": "Qwen3", "hf_phi": "phi"}
"""What a model is called for litgpt's own ways out, by the family of transformers that computes the same."""


def litgpt_family(values: Mapping[str, Any]) -> str:
    """The family as which a config of ours is written."""
    config = GPTConfig.from_dict(dict(values))
    return "litgpt_neox" if not config.is_gated else "litgpt_olmo2" if config.qk_norm == "width" else "litgpt"


def to_ours(model: Source, options: Options) -> dict[str, Any]:
    """Read model_config.yaml: what it leaves out is the default of litgpt's Config; sizes are those of the tensors.

    Raises: CheckpointMismatch for a model without its config, and for settings that our GPT does not compute.
    """
    if "n_head" not in model.config:
        raise model.refuse(
            f"no {CONFIG} beside it was read, and what it computes is not in the tensors. Put the model's own there."
        )
    said = {**DEFAULTS, **model.config}
    try:
        fields = _read(said, model)
    except Unfit as error:
        raise model.refuse(f"{error}. --to safetensors keeps the tensors.") from error
    tied = model.is_tied("lm_head.weight", "transformer.wte.weight")
    fields |= biases(model) | {"tied_head": tied, "dropout": 0.0}
    return GPTConfig.from_dict(fields, str(model.path)).to_dict()


def _read(said: Mapping[str, Any], model: Source) -> dict[str, Any]:
    """Our fields. Raises: Unfit."""
    for name in said:
        if name not in KNOWN:
            raise Unfit(f"{name} is {said[name]!r}, which is no known field of litgpt's Config")
        if name in ONLY and said[name] not in ONLY[name]:
            raise Unfit(f"{name} is {said[name]!r}; our GPT computes {ONLY[name][0]!r}")
    sizes = shown_sizes(model)
    scalar = said["attention_scores_scalar"] or sizes.get("head_size")
    return {
        **sizes,
        "block_size": said["block_size"],
        **_norms(said, model),
        **_mlp(said),
        **_rotary(said, sizes),
        "parallel_residual": said["parallel_residual"],
        "shared_attention_norm": said["shared_attention_norm"],
        "attention_scale": "head_size"
        if scalar == sizes.get("head_size")
        else _number(scalar, "attention_scores_scalar") ** -0.5,
        "attention_cap": said["attention_logit_softcapping"],
        "logit_cap": said["final_logit_softcapping"],
        "embedding_scale": sizes["n_embd"] ** 0.5 if said["scale_embeddings"] else 1.0,
        "sliding_window": _windows(said, sizes["n_layer"]),
    }


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise Unfit(f"{name} is {value!r}, expected a number above 0")
    return value


def _norms(said: Mapping[str, Any], model: Source) -> dict[str, Any]:
    """The norms; their class has another meaning in models whose name has Gemma or OLMo in it."""
    upstream = said["hf_config"] if isinstance(said["hf_config"], Mapping) else {}
    name = said["name"] or upstream.get("name") or ""
    if not isinstance(name, str):
        raise Unfit(f"name is {name!r}, expected a text: it decides what norms compute")
    kind = {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}.get(str(said["norm_class_name"]))
    if kind is None:
        raise Unfit(f"norm_class_name is {said['norm_class_name']!r}; our GPT computes LayerNorm and RMSNorm")
    if kind == "layernorm" and "OLMo" in name:
        raise Unfit(f"norm_class_name is LayerNorm in {name}, which has no weights there; our GPT has them")
    places = tuple(said[one] for one in ("norm_1", "norm_2", "post_attention_norm", "post_mlp_norm"))
    placement = next((place for place, norms in PLACEMENTS.items() if norms == places), None)
    if placement is None:
        raise Unfit(
            f"norm_1, norm_2, post_attention_norm and post_mlp_norm are {places}; our GPT computes no such four"
        )
    qk = {"default": "head", "olmo2": "width"}.get(str(said["norm_qk_type"])) if said["norm_qk"] else None
    by_shape = "width" if model.family == "litgpt_olmo2" else "head"
    if by_shape == "width" and not said["norm_qk"]:
        raise Unfit(f"norm_qk is {said['norm_qk']!r}, but norms of queries and keys are there")
    if said["norm_qk"] and qk != by_shape and model.sizes.get("n_head") != 1:
        raise Unfit(f"norm_qk_type is {said['norm_qk_type']!r}, but norms of queries and keys are of a {by_shape}")
    return {
        "norm_type": "rmsnorm_1p" if kind == "rmsnorm" and "Gemma" in name else kind,
        "norm_eps": said["norm_eps"],
        "norm_placement": placement,
        "qk_norm": by_shape if said["norm_qk"] else None,
    }


def _mlp(said: Mapping[str, Any]) -> dict[str, Any]:
    kind, form = said["mlp_class_name"], said["gelu_approximate"]
    found = next((ours for ours, (name, gelu) in MLPS.items() if name == kind and gelu in (None, form)), None)
    if found is None:
        what = " or ".join(f"{name} with {gelu}" if gelu else name for name, gelu in MLPS.values())
        raise Unfit(f"mlp_class_name is {kind!r} and gelu_approximate {form!r}; our GPT computes {what}")
    return {"mlp_type" if found in ("swiglu", "geglu") else "activation": found}


def _rotary(said: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Rotary positions; none where no number of a head turns."""
    part = said["rotary_percentage"]
    if part == 0 or int(_number(part, "rotary_percentage") * sizes.get("head_size", 1)) == 0:
        return {"pos_encoding": "none"}
    ratio = _number(said["rope_condense_ratio"], "rope_condense_ratio")
    scaling: dict[str, Any] | None = {"rope_type": "linear", "factor": ratio} if ratio != 1 else None
    if adjusted := said["rope_adjustments"]:
        if scaling or not isinstance(adjusted, Mapping) or set(adjusted) not in ({*LLAMA3}, {"factor"}):
            more = " with a rope_condense_ratio" if scaling else ""
            raise Unfit(f"rope_adjustments is {adjusted!r}{more}; our GPT computes {', '.join(LLAMA3)}, or a factor")
        kind = "llama3" if len(adjusted) > 1 else "linear"
        scaling = {"rope_type": kind, **{CONTEXT if name == LLAMA3[3] else name: v for name, v in adjusted.items()}}
    return {
        "pos_encoding": "rotary",
        "rope_theta": float(_number(said["rope_base"], "rope_base")),
        "rope_scaling": scaling,
        "rotary_percent": part,
        "rotary_layout": "pairs" if said["rope_interleave"] else "halves",
    }


def _windows(said: Mapping[str, Any], layers: int) -> Any:
    """The window of each layer, in the fields of today or in those before 2025-04."""
    window = said["sliding_window_size"]
    if window is None:
        return None
    placing, stride, offset = (said.get(name) for name in OF_WINDOWS)
    if placing not in (None, "all", "interleaved", 1, 2):
        raise Unfit(f"sliding_window_layer_placing is {placing!r}, expected all or interleaved")
    has = said["sliding_window_indices"]
    if has is None:
        step = _number(stride or (2 if placing in ("interleaved", 2) else 1), OF_WINDOWS[1])
        first = _number(offset, OF_WINDOWS[2]) if offset else 0
        has = [(i + first) % step == 0 for i in range(layers)]
    if not isinstance(has, list) or len(has) < layers or not set(has) <= {0, 1}:
        raise Unfit(f"sliding_window_indices is {has!r}, expected 0 or 1 for each of {layers} layers")
    return window if all(has[:layers]) else [window if one else None for one in has[:layers]]


def to_theirs(model: Source, options: Options) -> dict[str, Any]:
    """Write the fields of model_config.yaml; a tied head is written as a tensor of its own, as litgpt has it.

    Raises: CheckpointMismatch for what litgpt does not compute.
    """
    config = GPTConfig.from_dict(model.config, str(model.path))
    try:
        made = _written(config)
    except Unfit as error:
        raise model.refuse(f"{error}, and litgpt computes other logits. --to bundle keeps it.") from error
    model.tensors.setdefault(HEAD, model.tensors[TABLE])
    return {**made, "name": _name(config), "hf_config": {}, "vocab_size": config.vocab_size}


def _name(config: GPTConfig) -> str:
    """A name: litgpt adds 1 to the weights of norms where Gemma is in it."""
    return NAMES.get(hf_family(config.to_dict()), "Gemma" if config.norm_type == "rmsnorm_1p" else "")


def _written(config: GPTConfig) -> dict[str, Any]:
    """Their fields. Raises: Unfit."""
    kind = config.mlp_type or config.activation
    fitting = {
        "pos_encoding": ("rotary", "none"),
        "norm_type": ("layernorm", "rmsnorm", "rmsnorm_1p"),
        "norm_placement": tuple(PLACEMENTS),
        "norm_bias": (config.norm_type == "layernorm",),
        "mlp_bias": (config.has_proj_bias,),
        "bias": (True,) if config.has_proj_bias else (True, False),
        "mlp_type" if config.mlp_type else "activation": tuple(MLPS),
        "embedding_scale": (1.0, config.n_embd**0.5),
        "qk_norm": ("head", "width", None) if config.is_gated else ("head", None),
    }
    for name, values in fitting.items():
        if (value := getattr(config, name)) not in values:
            raise Unfit(f"{name} is {shown(value)}, expected {' or '.join(map(shown, values))}")
    first, second, behind, last = PLACEMENTS[config.norm_placement]
    return {
        "block_size": config.block_size,
        "n_layer": config.n_layer,
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_query_groups": config.kv_heads,
        "head_size": config.head_width,
        "intermediate_size": config.ffn_width,
        "norm_class_name": "LayerNorm" if config.norm_type == "layernorm" else "RMSNorm",
        "norm_eps": config.norm_eps,
        "norm_1": first,
        "norm_2": second,
        "post_attention_norm": behind,
        "post_mlp_norm": last,
        "norm_qk": config.qk_norm is not None,
        "norm_qk_type": "olmo2" if config.qk_norm == "width" else "default",
        "parallel_residual": config.parallel_residual,
        "shared_attention_norm": config.shared_attention_norm,
        "bias": config.has_proj_bias,
        "attn_bias": config.bias and not config.has_proj_bias,
        "lm_head_bias": config.head_bias,
        "mlp_class_name": MLPS[kind][0],
        "gelu_approximate": MLPS[kind][1] or "none",
        "scale_embeddings": config.embedding_scale != 1,
        "attention_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logit_cap,
        **_scores(config),
        **_turning(config),
    }


def _scores(config: GPTConfig) -> dict[str, Any]:
    """The factor of the scores, and the windows."""
    sizes = {window for window in config.windows if window is not None}
    if len(sizes) > 1:
        raise Unfit(f"sliding_window has {len(sizes)} different windows, expected one")
    number = config.score_scale**-2
    whole = round(number) if math.isclose(number, round(number), rel_tol=1e-9) else number
    return {
        "attention_scores_scalar": None if config.attention_scale == "head_size" else whole,
        "sliding_window_size": next(iter(sizes), None),
        "sliding_window_indices": [int(window is not None) for window in config.windows] if sizes else None,
    }


def _turning(config: GPTConfig) -> dict[str, Any]:
    """Rotary positions."""
    if config.pos_encoding == "none":
        return {"rotary_percentage": 0.0}
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "yarn":
        raise Unfit("rope_scaling is yarn, and litgpt's turns its ramp around")
    numbers = {LLAMA3[3] if name == CONTEXT else name: v for name, v in scaling.items() if name != "rope_type"}
    is_linear = scaling.get("rope_type") == "linear"
    return {
        "rotary_percentage": config.rotary_percent,
        "rope_base": int(config.rope_theta) if config.rope_theta == int(config.rope_theta) else config.rope_theta,
        "rope_condense_ratio": numbers["factor"] if is_linear else 1,
        "rope_adjustments": None if is_linear else numbers or None,
        "rope_interleave": config.rotary_layout == "pairs",
    }


SHAPES = {"litgpt": "llama hf_gemma hf_gemma2", "litgpt_neox": "hf_phi hf_gpt_neox", "litgpt_olmo2": "hf_olmo2"}
"""Which of the shapes of transformers each family may have."""

PAIRS = tuple(
    Pair(family, FUSED, table, to_ours, to_theirs if family in FAMILIES else None, SHAPES[family.removesuffix(OLD)])
    for family, table in TABLES.items()
)
