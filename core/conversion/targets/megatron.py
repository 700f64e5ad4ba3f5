"""Plan a conversion to Megatron: the export layout, `{"model_state_dict", "model_config"}` in one torch file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..pairs.megatron_settings import NAMES, ONLY, sizes_of
from ..pairs.megatron_source import localize
from ..plan import TORCH_ENDINGS, Options, Plan, Ref, Source, WeightFile, target_of

FILE, STATE, SETTINGS = "exported_model.pt", "model_state_dict", "model_config"
HEAD, UNTIED = "output_layer.weight", "untie_embeddings_and_output_weights"

KEPT = (
    *dict.fromkeys(name for names in NAMES.values() for name in names if name != "max_position_embeddings"),
    *ONLY,
    *("normalization", "swiglu", "add_qkv_bias", "add_bias_linear", "qk_layernorm", "bias_gelu_fusion", "openai_gelu"),
    *("bos_token_id", "eos_token_id", "rope_scaling", "rope_scaling_factor", UNTIED),
)
"""Settings that go into model_config where they are known, by the names of Megatron's arguments."""


def plan_megatron(model: Source, options: Options, target: Path) -> Plan:
    """Plan the file of an export, under the names of the local layers; in a folder where the target is no .pt."""
    if options.include_optimizer:
        raise model.refuse("an export of Megatron has no optimizer. Leave out --include_optimizer.")
    localize(model)
    is_folder = target.suffix not in TORCH_ENDINGS
    file = FILE if is_folder else target.name
    model.config = export_config(model, options)
    targets = [target_of(model, name, file, options, f"{STATE}.{name}") for name in model.tensors]
    content = {STATE: {one.name: Ref(one.path) for one in targets}, SETTINGS: model.config}
    return Plan(model, target, "megatron", [WeightFile(file, targets, content)], is_folder=is_folder)


def export_config(model: Source, options: Options) -> dict[str, Any]:
    """Write the config of an export: the eight fields it always has, as the tensors show them, and what else is known.

    Raises: CheckpointMismatch when neither the tensors nor a config say what the heads are.
    """
    size = sizes_of(model, "n_layer", "n_embd", "n_head", "n_ffn", "n_kv_head", "head_size", "vocab_size")
    said = model.config.get("vocab_size")
    config = {
        "num_layers": size["n_layer"],
        "hidden_size": size["n_embd"],
        "num_attention_heads": size["n_head"],
        "vocab_size": said if isinstance(said, int) and 0 < said < size["vocab_size"] else size["vocab_size"],
        "max_position_embeddings": model.sizes.get("block_size"),
        "ffn_hidden_size": size["n_ffn"],
        "num_query_groups": size["n_kv_head"],
        "kv_channels": size["head_size"],
        **{name: model.config[name] for name in KEPT if name in model.config},
    }
    if UNTIED in config:
        config[UNTIED] = HEAD in model.tensors
    asked = {**options.more, **options.choices}
    config |= {NAMES[flag][0]: value for flag, value in asked.items() if flag in NAMES}
    config |= {flag: options.more[flag] for flag in ("bos_token_id", "eos_token_id") if flag in options.more}
    if "rope_scaling_factor" in options.more:
        config["use_rope_scaling"] = True
        config.pop("rope_scaling", None)
    if "activation" in asked:
        config["bias_gelu_fusion"] = asked["activation"] == "gelu_tanh"
    return config
