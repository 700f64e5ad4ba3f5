"""llama2.c's checkpoints become our GPT: the config of its model_args, and its limits.

As in karpathy/llama2.c, model.py (ModelArgs) and train.py, whose checkpoints are those of nanoGPT besides.
"""

from __future__ import annotations

from typing import Any

from ...config.gpt import GPTConfig
from ...families.fused import FUSED
from ...families.meta_llama import HEAD, META_LLAMA, TABLE
from ...inspection.marks import ARGUMENTS
from ..plan import Options, Pair, Source
from .decoders import shown_sizes
from .gpt import head_of

KNOWN = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim"}
KNOWN |= {"multiple_of", "norm_eps", "max_seq_len", "dropout"}
"""Fields of its ModelArgs; sizes are those of the tensors."""


def to_ours(model: Source, options: Options) -> dict[str, Any]:
    """Read model_args; the head is the token table.

    Raises: CheckpointMismatch for files of other programs with these names, and for fields that llama2.c does not have.
    """
    content = model.container.content
    if not isinstance(content, dict) or ARGUMENTS not in content or "max_seq_len" not in model.config:
        raise model.refuse(
            "it has the names of Meta's Llama, but no model_args of llama2.c, and what it computes is not in the "
            "tensors. --to safetensors keeps them."
        )
    model.ask()
    if other := [name for name in model.config if name not in KNOWN]:
        said = f"{other[0]} is {model.config[other[0]]!r}"
        raise model.refuse(
            f"{said} in model_args, which llama2.c does not compute. --to safetensors keeps the tensors."
        )
    tied = head_of(model, HEAD, TABLE)
    fields = shown_sizes(model) | {
        "block_size": model.config["max_seq_len"],
        "dropout": model.config.get("dropout", 0.0),
        "pos_encoding": "rotary",
        "rope_theta": float(model.choice("rope_theta")),
        "norm_type": "rmsnorm",
        "norm_eps": model.choice("norm_eps"),
        "mlp_type": "swiglu",
        "tied_head": tied,
        **dict.fromkeys(("bias", "mlp_bias", "norm_bias", "head_bias"), False),
    }
    return GPTConfig.from_dict(fields, str(model.path)).to_dict()


PAIRS = (Pair("meta_llama", FUSED, META_LLAMA, to_ours, shape="llama"),)
