"""The README.md of a converted model: what it is, what it came from, and what was changed on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...bundle.commit import CONFIG
from ...console.commands import PACKAGE, PROGRAM
from ...containers.hf_folder import BESIDE
from ...containers.json_files import dump_json
from ..hf_tokenizer import add_tokenizer_files
from ..plan import Options, Plan, Source, folded
from ..vocabulary import tokens_of
from .safetensors import add_weights, beside

TOKENIZER_FILES = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"}
"""Files of a tokenizer that lie beside the weights of another program's model, and go along."""


def card(plan: Plan) -> str:
    """Write the model card of a plan."""
    model = plan.model
    shape = model.sizes
    numbers = sum(target.view.numel for target in plan.targets)
    command = "convert_checkpoints.py" if PACKAGE == "core" else f"{PROGRAM} convert"  # no path of this machine
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        f"# {plan.target.name}",
        "",
        f"Converted from {_sources(model)} ({model.program}) by `{command} --to {plan.format}`.",
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
        lines.append(f"- tokenizer: {_KINDS.get(str(model.tokenizer.get('token_kind')), '`tokenizer.json`')}")
    return "\n".join(lines) + "\n"


_KINDS = {"gpt2": "GPT-2 BPE", "char": "one token for each character", "symbols": "one token for each symbol"}
"""What a card says about a tokenizer, by its kind."""


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
    files: dict[str, bytes] = {}
    config = {**model.config, "torch_dtype": dtype, "dtype": dtype}
    if model.tokenizer is not None and not plan.copies.keys() & TOKENIZER_FILES:
        _refuse_half_characters(model)
        files, ids = add_tokenizer_files(model, options.bpe_file)
        config |= {name: token for name, token in ids.items() if config.get(name) is None}  # what a flag says stays
    plan.texts[CONFIG] = dump_json(config)
    if "generation_config.json" not in plan.copies:
        plan.texts["generation_config.json"] = dump_json(_generation(model, config))
    plan.texts |= {name: text for name, text in files.items() if name not in plan.copies}
    plan.texts["README.md"] = card(plan).encode(errors="backslashreplace")
    return plan


def _generation(model: Source, config: dict[str, Any]) -> dict[str, Any]:
    """The settings of `generate` in transformers: the ids of its tokens, and never a row of padding, as here."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids: dict[str, Any] = {name: config[name] for name in names if name in config}
    padding = range(tokens_of(model.tokenizer), model.sizes.get("vocab_size", 0))
    if (model.tokenizer or {}).get("token_kind") in ("char", "gpt2", "symbols", "tiktoken") and padding:
        return {**ids, "suppress_tokens": list(padding)}
    return {"_from_model_config": True, **ids}


def _refuse_half_characters(model: Source) -> None:
    """Refuse half of a surrogate pair as a character: the library `tokenizers` reads no JSON that has one."""
    state = model.tokenizer or {}
    kind = "chars" if state.get("token_kind") == "char" else "symbols"
    for index, text in enumerate(state.get(kind) or ()):
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise model.refuse(
                f"{kind}[{index}] of its tokenizer is {text!r}, {'with ' if len(text) > 1 else ''}half of a surrogate "
                "pair, which a tokenizer.json of Hugging Face cannot hold. --to bundle keeps it."
            )


def _sources(model: Source) -> str:
    """What a model was made of, as Markdown."""
    if not model.averaged:
        return f"`{model.path.name}`"
    return f"the mean of {', '.join(f'`{path.name}`' for path in model.averaged)}"
