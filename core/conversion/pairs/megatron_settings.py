"""Settings of a Megatron model that its tensors do not show: from flags, the config beside it, or defaults.

The config is that of an export, which has few settings, or the arguments of a run (common.pt), which have all.
"""

from __future__ import annotations

from typing import Any

from ...families.choices import FLAGS as CHOICES
from ..plan import Options, Source

NAMES: dict[str, tuple[str, ...]] = {
    "rope_theta": ("rotary_base",),
    "norm_eps": ("norm_epsilon", "layernorm_epsilon"),
    "rotary_percent": ("rotary_percent",),
    "layernorm_1p": ("apply_layernorm_1p", "layernorm_zero_centered_gamma"),
    "max_position_embeddings": ("max_position_embeddings",),
    "rope_scaling_factor": ("rope_scaling_factor",),
}
"""Flags, and Megatron's names of them."""

FLAGS = (*(name for name in NAMES if name not in CHOICES), "bos_token_id", "eos_token_id")
"""The flags for Megatron models alone; those of choices are for every family."""

TO_HF = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
"""Activations of the GPT-2 style, and what transformers calls them."""

ONLY: dict[str, tuple[Any, ...]] = {
    "rotary_interleaved": (False,),
    "use_rope_scaling": (False, True),
    "rotary_seq_len_interpolation_factor": (None, 1, False),
    "no_rope_freq": (None, False),
    "position_embedding_type": ("rope", "learned_absolute"),
    "apply_residual_connection_post_layernorm": (False,),
    "squared_relu": (False,),
    "quick_geglu": (False,),
    "qk_l2_norm": (False,),
    "window_size": (None,),
    "softmax_type": ("vanilla",),
    "attention_output_gate": (False,),
    "multi_latent_attention": (False,),
    "num_experts": (None,),
    "activation_func_clamp_value": (None,),
    "scale_embeddings": (False,),
    "softmax_scale": (None,),
    "glu_linear_offset": (0,),
    "use_mup": (False,),
    "linear_attention_freq": (None,),
}
"""Settings that change what a model computes, and their values in a model that transformers has."""

LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Megatron's --use-rope-scaling in transformers' terms: these are constants in Megatron, `factor` is not."""

FACTOR = 8.0
"""Its factor in versions without --rope-scaling-factor."""


def setting(model: Source, options: Options, flag: str, default: Any) -> Any:
    """Look up a setting: a flag, which overrides the config with a note, the config, or a default."""
    said = next((model.config[name] for name in NAMES[flag] if model.config.get(name) is not None), None)
    asked = options.more.get(flag)
    if asked is not None:
        if said is not None and said != asked:
            model.notes.append(f"{flag} is {said} in its config; --{flag} {asked} was specified, and overrides it")
        return asked
    return said if type(said) in ((bool,) if isinstance(default, bool) else (int, float)) else default


def rope_scaling(model: Source, options: Options) -> dict[str, Any]:
    """The scaling of a model's positions in transformers' terms; {} without scaling. A default factor becomes a note.

    Raises: CheckpointMismatch for a factor that is not a number of at least 1.
    """
    if options.more.get("rope_scaling_factor") is None and model.config.get("use_rope_scaling") is not True:
        said = model.config.get("rope_scaling")  # only where to_megatron wrote it
        return dict(said) if isinstance(said, dict) else {}
    factor = setting(model, options, "rope_scaling_factor", None)
    if factor is None:
        factor = FACTOR
        model.notes.append(
            f"rope_scaling_factor {factor}: a default, because no config beside the tensors has it "
            "(--rope_scaling_factor)"
        )
    if factor < 1:
        raise model.refuse(f"rope_scaling_factor is {factor}, expected a number of at least 1: it makes texts longer.")
    return {**LLAMA3, "factor": float(factor)}


def refuse_other_models(model: Source, options: Options) -> None:
    """Refuse settings that transformers does not compute, and that the tensors do not show.

    Raises: CheckpointMismatch.
    """
    for name, values in ONLY.items():
        if name in model.config and model.config[name] not in values:
            raise model.refuse(
                f"{name} is {model.config[name]!r}; Llama, Qwen and GPT-2 of transformers have {values[0]!r}."
            )
    percent = setting(model, options, "rotary_percent", 1.0)
    if percent != 1:
        raise model.refuse(
            f"rotary_percent is {percent}: only that part of a head is rotated, and Llama and Qwen rotate all of it. "
            "--to safetensors keeps the tensors."
        )


def sizes_of(model: Source, *needed: str) -> dict[str, int]:
    """The sizes of a model that have to be known.

    Raises: CheckpointMismatch naming those that neither tensors nor config show.
    """
    if lost := [word for word in needed if word not in model.sizes]:
        help_ = " Add --n_head N." if model.family.startswith("megatron_") else ""
        raise model.refuse(
            f"{', '.join(lost)} cannot be told from its tensors, and no config beside them has it.{help_}"
        )
    return {word: model.sizes[word] for word in needed}


def ids(options: Options, config: dict[str, Any]) -> dict[str, Any]:
    """The tokens that begin and end a text, from flags; None if unspecified."""
    return {name: options.more.get(name, config.get(name)) for name in ("bos_token_id", "eos_token_id")}
