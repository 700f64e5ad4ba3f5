"""What a notebook shows of a model."""

from __future__ import annotations

from ..bundle.tokenizer_state import describe
from ..inspection.notebook import table_html
from ..model import GPT


def model_html(model: GPT) -> str:
    """A model as a small table: its sizes, its step, its tokenizer, and where it lies."""
    config, table = model.config, model.token_embedding_table.weight
    rows = [
        ("step", f"{model.step:,}"),
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        ("layers, heads, width", f"{config.n_layer}, {config.n_head}, {config.n_embd}"),
        ("context", f"{config.block_size:,} tokens"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("tokenizer", describe(model.tokenizer.state()) if model.tokenizer else "none"),
        ("weights", f"{str(table.dtype).removeprefix('torch.')} on {table.device}"),
    ]
    return table_html(type(model).__name__, rows)
