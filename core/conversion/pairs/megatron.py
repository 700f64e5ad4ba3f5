"""Megatron's models and those of transformers: conversion of the config in both directions, and its limits."""

from __future__ import annotations

from typing import Any

from ...containers.tensors.computed import ComputedTensors, mean, plus_one
from ...families import megatron_tables
from ..plan import Options, Pair, Source
from .gpt import GPT2_SHAPE, add_zero_biases, hf_config, is_tied, refuse_other_scales
from .megatron_settings import LLAMA3, TO_HF, ids, refuse_other_models, rope_scaling, setting, sizes_of
from .megatron_source import localize

TABLE, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
HF_TABLE, HF_HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = "decoder.layers.0."

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

FEWER = 0.5
"""Norm weights are near 1 at first; those of a model that stores gamma - 1 average below this."""


def _ready(model: Source, options: Options) -> None:
    """Give tensors the names of the local layers, and norm weights their values."""
    localize(model)
    refuse_other_models(model, options)
    _norms(model, options)


def _norms(model: Source, options: Options) -> None:
    norms = [name for name in model.tensors if name.endswith("layernorm.weight")]
    if setting(model, options, "layernorm_1p", False):
        into = ComputedTensors(f"{model.path.name}, plus 1")
        for name in norms:
            made = plus_one(model.tensors[name], into, model.tensors[name].names[0])
            model.sources[name] = made
            model.replace(name, made, "add 1")
        model.notes.append(f"layernorm_1p: 1 was added to {len(norms)} norm weights, which are {made.dtype} now")
        return
    low = [name for name in norms if mean(model.tensors[name]) < FEWER]
    if 2 * len(low) > len(norms):
        model.notes.append(
            f"warning: {len(low)} of {len(norms)} norm weights average below {FEWER}, such as {low[0]} "
            f"({mean(model.tensors[low[0]]):.3g}): a model trained with --apply-layernorm-1p needs --layernorm_1p here"
        )


def _is_tied(model: Source, options: Options, head: str, table: str, said: bool | None = None) -> bool:
    """Whether the head is tied to the token table; a head that was stored although the program ties it is left out.

    Raises: CheckpointMismatch for a head of other values than the table, which the program would not use.
    """
    if head not in model.tensors:
        return options.tied is not False
    if is_tied(model, head, table, said) and options.tied is not False:
        model.drop(head, f"tied to {table}")
        return True
    return False


def to_hf(model: Source, options: Options) -> dict[str, Any]:
    """Write a config of Llama, Qwen2 or Qwen3; refuse biases that these do not have."""
    style = model.family.removeprefix("megatron_")
    _ready(model, options)
    if "embedding.position_embeddings.weight" in model.tensors:
        raise model.refuse("it has a table of positions (position_embeddings), and Llama and Qwen have rotary ones.")
    qkv, proj, mlp = (model.biases[part] for part in ("qkv", "proj", "mlp"))
    if not model.sizes["n_ffn"] * 2 == model.tensors[f"{LAYER}mlp.linear_fc1.weight"].shape[0]:
        raise model.refuse("its feed-forward part has no gate (fc1 has the rows of fc2's columns), and Qwen3's has.")
    if model.config.get("swiglu") is False:
        raise model.refuse("swiglu is false in its config, and it has a gate: of another activation than Llama's silu.")
    if mlp and style != "llama":
        raise model.refuse(f"its feed-forward part has biases, and {CLASSES[style]} has none.")
    if qkv != proj and style != "qwen2":
        raise model.refuse(f"only one of linear_qkv and linear_proj has a bias, and {CLASSES[style]} has both or none.")
    model.ask()
    size = sizes_of(model, "n_layer", "n_head", "n_kv_head", "head_size", "n_embd", "n_ffn", "vocab_size")
    context = setting(model, options, "max_position_embeddings", None)
    if context is None:
        raise model.refuse("the longest text that it was trained for is unknown. Add --max_position_embeddings N.")
    _say_padding(model)
    theta = float(model.choice("rope_theta"))
    scaling = rope_scaling(model, options)
    config = {
        "architectures": [CLASSES[style]],
        "model_type": style,
        "hidden_size": size["n_embd"],
        "intermediate_size": size["n_ffn"],
        "num_hidden_layers": size["n_layer"],
        "num_attention_heads": size["n_head"],
        "num_key_value_heads": size["n_kv_head"],
        "head_dim": size["head_size"],
        "vocab_size": size["vocab_size"],
        "max_position_embeddings": context,
        "rms_norm_eps": model.choice("norm_eps"),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": theta},
        **({"rope_scaling": scaling} if scaling else {}),
        "hidden_act": "silu",
        "attention_bias": qkv,
        "mlp_bias": mlp,
        "attention_dropout": 0.0,
        "tie_word_embeddings": _is_tied(model, options, HEAD, TABLE),
        "use_cache": True,
        **ids(options, model.config),
    }
    return config | ({} if style == "llama" else {"use_sliding_window": False})


def _say_padding(model: Source) -> None:
    said, rows = model.config.get("vocab_size"), model.sizes["vocab_size"]
    if isinstance(said, int) and 0 < said < rows:
        model.notes.append(
            f"{rows} rows of the vocabulary: {said} tokens and {rows - said} of padding, kept "
            f"(--vocab_size {said} crops them)"
        )


def _export_config(model: Source, **more: Any) -> dict[str, Any]:
    """Settings that an export leaves out, by Megatron's names, to be written with its eight fields."""
    model.notes.append(
        "model_config also has what an export leaves out, by the names of Megatron's arguments: " + ", ".join(more)
    )
    return more


def to_megatron(model: Source, options: Options) -> dict[str, Any]:
    """Write the config of an export from that of Llama, Qwen2 or Qwen3."""
    config, style = model.config, model.family.removeprefix("hf_")
    if not config:
        raise model.refuse_without_config("the heads are")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise model.refuse(f"hidden_act is {config['hidden_act']!r}; a gate of Megatron's export is silu (SwiGLU).")
    if HF_TABLE not in model.tensors:
        raise model.refuse(f"{HF_TABLE} is missing.")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise model.refuse(f"rope_parameters is {rope!r}, expected names and values.")
    more = {name: config[name] for name in ("bos_token_id", "eos_token_id") if config.get(name) is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if LLAMA3.items() <= rope.items() and isinstance(rope.get("factor"), (int, float)):
        more |= {"use_rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    elif kind != "default":
        more["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
        model.notes.append(f"warning: its positions are scaled ({kind}): set that in Megatron by hand")
    if config.get("use_sliding_window") is True:
        more["window_size"] = [config.get("sliding_window"), 0]
        model.notes.append("warning: some of its layers see a sliding window only: set that in Megatron by hand")
    tied = _is_tied(model, options, HF_HEAD, HF_TABLE, bool(config.get("tie_word_embeddings")))
    return _export_config(
        model,
        normalization="RMSNorm",
        norm_epsilon=model.choice("norm_eps"),
        position_embedding_type="rope",
        rotary_base=model.choice("rope_theta"),
        rotary_percent=config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)),
        swiglu=True,
        add_qkv_bias=model.biases["qkv"],
        add_bias_linear=model.biases["proj"] or model.biases["mlp"],
        qk_layernorm=style == "qwen3",
        untie_embeddings_and_output_weights=not tied,
        **more,
    )


GPT2_TABLE, POSITIONS = "transformer.wte.weight", "embedding.position_embeddings.weight"


def to_gpt2(model: Source, options: Options) -> dict[str, Any]:
    """Write a config of GPT2LMHeadModel; a missing bias becomes zeros."""
    if POSITIONS in model.tensors:
        for flag in ("rotary_percent", "rope_scaling_factor"):
            if flag in options.more:
                raise model.refuse(f"--{flag} has no effect: its positions are a table. Leave it out.")
    _ready(model, options)
    model.ask()
    size = sizes_of(model, "n_layer", "n_head", "n_kv_head", "head_size", "n_embd", "n_ffn", "vocab_size", "q_size")
    if POSITIONS not in model.tensors:
        raise model.refuse("its norms have biases and it has no table of positions: neither Llama nor GPT-2.")
    if f"{LAYER}self_attention.q_layernorm.weight" in model.tensors:
        raise model.refuse("it has a norm on q and k, and HF GPT-2 has none.")
    if size["n_kv_head"] != size["n_head"]:
        raise model.refuse(
            f"{size['n_head']} heads share {size['n_kv_head']} keys and values, and in HF GPT-2 each has its own."
        )
    if size["q_size"] != size["n_embd"]:
        raise model.refuse(f"its heads are {size['q_size']} wide in all, HF GPT-2's as the model: {size['n_embd']}.")
    positions = model.tensors[POSITIONS].shape[0]
    if options.more.get("max_position_embeddings", positions) != positions:
        raise model.refuse(f"its table of positions has {positions} rows. Leave out --max_position_embeddings.")
    gelu = model.choice("activation")
    if gelu not in TO_HF:
        raise model.refuse(f"activation is {gelu}; the GPT-2 style of Megatron has {' or '.join(TO_HF)}.")
    add_zero_biases(model, HEAD)
    _say_padding(model)
    return hf_config(size | {"block_size": positions}, model.choice("norm_eps"), 0.0, size["n_ffn"]) | {
        "activation_function": TO_HF[gelu],
        "tie_word_embeddings": _is_tied(model, options, HEAD, TABLE),
        **ids(options, model.config),
    }


def gpt2_to_megatron(model: Source, options: Options) -> dict[str, Any]:
    """Write the config of an export from that of GPT2LMHeadModel."""
    config = model.config
    model.ask()
    gelu = model.choice("activation")
    if gelu not in TO_HF:
        raise model.refuse(f"activation_function is {gelu!r}; Megatron has gelu, and with a fused bias gelu_new.")
    refuse_other_scales(model, "Megatron")
    tied = _is_tied(model, options, HF_HEAD, GPT2_TABLE, config.get("tie_word_embeddings", True) is not False)
    return _export_config(
        model,
        normalization="LayerNorm",
        norm_epsilon=model.choice("norm_eps"),
        position_embedding_type="learned_absolute",
        swiglu=False,
        bias_gelu_fusion=gelu == "gelu_tanh",
        add_bias_linear=True,
        untie_embeddings_and_output_weights=not tied,
    )


PAIRS = (
    *(
        Pair(f"megatron_{style}", f"hf_{style}", megatron_tables.LLAMA, to_hf, to_megatron, "llama")
        for style in CLASSES
    ),
    Pair("megatron_gpt2", "hf_gpt2", megatron_tables.GPT2, to_gpt2, gpt2_to_megatron, GPT2_SHAPE),
)
