"""nanochat, and modded-nanogpt of 2024 with its names: no biases, no weights in the norms, some value embeddings.

Names as in karpathy/nanochat, nanochat/gpt.py; its first versions have none of the lambdas, gates and value embeddings.
"""

from __future__ import annotations

from .family import Family, Sides

TENSORS: dict[str, Sides] = {
    "transformer.wte.weight": ("vocab_size", "n_embd"),
    "transformer.h.{i}.attn.c_q.weight": ("q_size", "n_embd"),
    "transformer.h.{i}.attn.c_k.weight": ("kv_size", "n_embd"),
    "transformer.h.{i}.attn.c_v.weight": ("kv_size", "n_embd"),
    "transformer.h.{i}.attn.c_proj.weight": ("n_embd", "q_size"),
    "transformer.h.{i}.attn.ve_gate.weight": ("n_kv_head", "ve_gate_channels"),
    "transformer.h.{i}.mlp.c_fc.weight": ("4 n_embd", "n_embd"),
    "transformer.h.{i}.mlp.c_proj.weight": ("n_embd", "4 n_embd"),
    "lm_head.weight": ("vocab_size", "n_embd"),
    "resid_lambdas": ("n_layer",),
    "x0_lambdas": ("n_layer",),
    "smear_gate.weight": ("1", "smear_channels"),
    "smear_lambda": ("1",),
    "backout_lambda": ("1",),
    "value_embeds.{n}.weight": ("vocab_size", "kv_size"),
}

SPEEDRUN: dict[str, Sides] = {
    **{name: sides for name, sides in TENSORS.items() if name[0] in "tl" and "ve_gate" not in name},
    "transformer.h.{i}.attn.lamb": (),
    "transformer.h.{i}.lambdas": ("2",),
    "skip_weights": ("n_layer / 2",),
}
"""KellerJordan/modded-nanogpt, train_gpt2.py of 2024-10-14 to 2024-12: the last three came in November."""

FAMILIES = (
    Family(
        name="nanochat",
        program="nanochat",
        tensors=TENSORS,
        signature=("transformer.h.{i}.attn.c_q.weight",),
        embedding="transformer.wte.weight",
        head="lm_head.weight",
        tables=("value_embeds.{n}.weight",),
        switches={
            "lambdas": ("resid_lambdas", "x0_lambdas"),
            "smear": ("smear_gate.weight", "smear_lambda"),
            "backout": ("backout_lambda",),
        },
        buffers={"cos": (None, "the rotary embedding"), "sin": (None, "the rotary embedding")},
        always=("qk_norm",),
        some=frozenset({"transformer.h.{i}.attn.ve_gate.weight", "value_embeds.{n}.weight"}),
        rotary=True,
        norm="RMSNorm without weights",
        activation="ReLU squared",
        pads=True,
    ),
    Family(
        name="modded_2024",
        program="modded-nanogpt train_gpt2.py, 2024-10 and 2024-11",
        tensors=SPEEDRUN,
        signature=("transformer.h.{i}.attn.c_q.weight", "transformer.h.{i}.attn.lamb"),
        embedding="transformer.wte.weight",
        head="lm_head.weight",
        switches={
            "value_residual": ("transformer.h.{i}.attn.lamb",),
            "blends": ("transformer.h.{i}.lambdas",),
            "skips": ("skip_weights",),
        },
        always=("qk_norm",),
        entries=frozenset({"step", "code", "model"}),
        rotary=True,
        norm="RMSNorm without weights",
        activation="ReLU squared",
        pads=True,
    ),
)
