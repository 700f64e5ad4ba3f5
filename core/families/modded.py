"""modded-nanogpt: the three versions that can be told apart, of KellerJordan/modded-nanogpt.

Names as in train_gpt.py of 2025-06 (commit 16e2da07) and of 2025-02 (587b45fb), and in train_gpt_medium.py (06743860).
Block 7 has no attention. The head size is fixed in the program; embedding and head may have different rows.
"""

from __future__ import annotations

from core.families.family import Family, Sides

HEAD_SIZE = 128
WITHOUT = {7: "blocks.{i}.attn."}
VALUES = tuple(f"value_embeds.{n}.weight" for n in range(3))

EMBEDDINGS: dict[str, Sides] = {
    "embed.weight": ("vocab_size", "n_embd"),
    "value_embeds.0.weight": ("vocab_size", "n_embd"),
    "value_embeds.1.weight": ("vocab_size", "n_embd"),
    "value_embeds.2.weight": ("vocab_size", "n_embd"),
}

SMALL: dict[str, Sides] = {
    **EMBEDDINGS,
    "blocks.{i}.attn.qkv_w": ("3", "q_size", "n_embd"),
    "blocks.{i}.attn.c_proj.weight": ("n_embd", "q_size"),
    "blocks.{i}.mlp.c_fc.weight": ("4 n_embd", "n_embd"),
    "blocks.{i}.mlp.c_proj.weight": ("n_embd", "4 n_embd"),
    "lm_head.weight": ("head_rows", "n_embd"),
}

SMALL_2025_06: dict[str, Sides] = {**SMALL, "scalars": ("5 n_layer +",)}

SMALL_2025_02: dict[str, Sides] = {
    **SMALL,
    "blocks.{i}.attn.lambdas": ("2",),
    "blocks.{i}.lambdas": ("2",),
    "skip_weights": ("n_layer / 2",),
}

MEDIUM: dict[str, Sides] = {
    **EMBEDDINGS,
    "blocks.{i}.attn.qkvo_w": ("4", "q_size", "n_embd"),
    "blocks.{i}.mlp.fc_w": ("4 n_embd", "n_embd"),
    "blocks.{i}.mlp.proj_w": ("n_embd", "4 n_embd"),
    "lm_head_w": ("head_rows", "n_embd"),
    "scalars": ("5 n_layer",),
}


def _family(name: str, program: str, tensors: dict[str, Sides], signature: str, head: str) -> Family:
    return Family(
        name=name,
        program=program,
        tensors=tensors,
        signature=(signature,),
        embedding="embed.weight",
        head=head,
        tables=VALUES,
        always=("qk_norm",),
        without=WITHOUT,
        rotary=True,
        norm="RMSNorm without weights",
        activation="ReLU squared",
        head_size=HEAD_SIZE,
    )


FAMILIES = (
    _family(
        "modded_small",
        "modded-nanogpt train_gpt.py, 2025-06",
        SMALL_2025_06,
        "blocks.{i}.attn.qkv_w",
        "lm_head.weight",
    ),
    _family(
        "modded_small_2025_02",
        "modded-nanogpt train_gpt.py, 2025-02",
        SMALL_2025_02,
        "blocks.{i}.attn.qkv_w",
        "lm_head.weight",
    ),
    _family("modded_medium", "modded-nanogpt train_gpt_medium.py", MEDIUM, "blocks.{i}.attn.qkvo_w", "lm_head_w"),
)

LATER = ("qk_bank", "vo_bank", "attn_bank", "mlp_bank")
"""Names of versions after 2025-06, which are another model each."""
