"""The README.md of a converted model: what it is, what it came from, and what was changed on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...bundle.commit import CONFIG
from ...containers.hf_folder import BESIDE
from ...containers.json_files import dump_json
from ..plan import Options, Plan, Source, folded
from ..vocabulary import definition_of
from .safetensors import add_weights, beside


def card(plan: Plan) -> str:
    """Write the model card of a plan."""
    model = plan.model
    shape = model.sizes
    numbers = sum(target.view.numel for target in plan.targets)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        f"# {plan.target.name}",
        "",
        f"Converted from `{model.path.name}` ({model.program}) by `convert_checkpoints.py --to {plan.format}`.",
        "",
        f"- {shape.get('n_layer', '?')} layers, {shape.get('n_head', '?')} heads, width {shape.get('n_embd', '?')}, "
        f"context {shape.get('block_size', '?')}, vocabulary {shape.get('vocab_size', '?')}; {numbers:,} parameters",
    ]
    if model.step is not None:
        lines.append(f"- trained for {model.step} steps")
    lines += [f"- {note}" for note in model.notes]
    lines += [f"- not in it: `{name}`, {reason}" for name, reason in folded(model.dropped).items()]
    lines += [f"- not from the source: `{name}` is {what}" for name, what in folded(plan.filled).items()]
    if model.tokenizer is not None:
        lines.append(f"- tokenizer: {_tokenizer(model.tokenizer)}")
    return "\n".join(lines) + "\n"


def _tokenizer(state: dict[str, object]) -> str:
    kind = state.get("token_kind")
    if kind == "gpt2":
        return "GPT-2 BPE (`AutoTokenizer.from_pretrained('openai-community/gpt2')`)"
    if kind == "char":
        return "one token for each character; one that is not in the vocabulary is an error"
    return "`tokenizer.json`"


def plan_hf(model: Source, options: Options, target: Path) -> Plan:
    """Plan a folder that transformers opens: weights, config.json, generation_config.json, tokenizer, model card."""
    if "model_type" not in model.config:
        raise model.refuse(
            "no config was found with it, and transformers needs one. Name the folder with its config.json."
        )
    plan = Plan(model, target, "hf", [])
    add_weights(plan, options)
    stored_as = {one.dtype for one in plan.targets}
    dtype = next(iter(stored_as)) if len(stored_as) == 1 else "float32"
    plan.copies = beside(model, BESIDE)
    config = {**model.config, "torch_dtype": dtype, "dtype": dtype}
    ids: dict[str, Any] = {
        name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config
    }
    plan.texts[CONFIG] = dump_json(config)
    if "generation_config.json" not in plan.copies:
        plan.texts["generation_config.json"] = dump_json({"_from_model_config": True, **ids})
    if model.tokenizer is not None and "tokenizer.json" not in plan.copies:
        _refuse_half_characters(model)
        plan.texts |= _tokenizer_for_hf(model.tokenizer, model.sizes.get("block_size"))
    plan.texts["README.md"] = card(plan).encode(errors="backslashreplace")
    return plan


def _refuse_half_characters(model: Source) -> None:
    """Refuse half of a surrogate pair as a character: the library `tokenizers` reads no JSON that has one."""
    for index, char in enumerate((model.tokenizer or {}).get("chars") or ()):
        if "\ud800" <= char <= "\udfff":
            raise model.refuse(
                f"chars[{index}] of its tokenizer is {char!r}, half of a surrogate pair, which a tokenizer.json of "
                "Hugging Face cannot hold. --to bundle keeps it."
            )


def _tokenizer_for_hf(state: dict[str, Any], context: int | None) -> dict[str, bytes]:
    """The files of a tokenizer, with which AutoTokenizer opens it; GPT-2's is named in the card instead."""
    definition = state.get("definition")
    if state.get("token_kind") == "char":
        definition = definition_of(state["chars"])
    if not isinstance(definition, dict):
        return {}
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {"model_max_length": context} if context else {}
    text = json.dumps(definition, ensure_ascii=False, indent=1).encode()
    return {"tokenizer.json": text, "tokenizer_config.json": dump_json(settings)}
