"""The README.md of a converted model: what it is, what it came from, and what was changed on the way."""

from __future__ import annotations

from ..plan import Plan, folded


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
