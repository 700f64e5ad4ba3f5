"""litgpt: one model for many, with q | k | v concatenated, gated or not; older files interleave them group by group.

Names as in Lightning-AI/litgpt, litgpt/model.py.
"""

from __future__ import annotations

from itertools import product

from .family import Family, Sides, linear, norm

COMMON: dict[str, Sides] = {
    "transformer.wte.weight": ("vocab_size", "n_embd"),
    **norm("transformer.h.{i}.norm_1"),
    "transformer.h.{i}.attn.norm_q.weight": ("head_size",),
    "transformer.h.{i}.attn.norm_k.weight": ("head_size",),
    **linear("transformer.h.{i}.attn.proj", "n_embd", "q_size"),
    "transformer.h.{i}.post_attention_norm.weight": ("n_embd",),
    **norm("transformer.h.{i}.norm_2"),
    **linear("transformer.h.{i}.mlp.proj", "n_embd", "n_ffn"),
    "transformer.h.{i}.post_mlp_norm.weight": ("n_embd",),
    **norm("transformer.ln_f"),
    **linear("lm_head", "vocab_size", "n_embd"),
}

CONCATENATED = linear("transformer.h.{i}.attn.qkv", "q_size + 2 kv_size", "n_embd")
INTERLEAVED = linear("transformer.h.{i}.attn.attn", "q_size + 2 kv_size", "n_embd")
PLAIN = linear("transformer.h.{i}.mlp.fc", "n_ffn", "n_embd")
GATED = {
    **linear("transformer.h.{i}.mlp.fc_1", "n_ffn", "n_embd"),
    **linear("transformer.h.{i}.mlp.fc_2", "n_ffn", "n_embd"),
}
"""fc_1 is the gate, fc_2 goes up."""


def _family(qkv: dict[str, Sides], up: dict[str, Sides]) -> Family:
    tensors = {**COMMON, **qkv, **up}
    return Family(
        name="litgpt",
        program="litgpt" if qkv is CONCATENATED else "litgpt, with interleaved q, k and v",
        tensors=tensors,
        signature=(next(iter(qkv)),),
        embedding="transformer.wte.weight",
        head="lm_head.weight",
        switches={
            "qkv_bias": tuple(name for name in qkv if name.endswith("bias")),
            "proj_bias": ("transformer.h.{i}.attn.proj.bias",),
            "mlp_bias": tuple(name for name in tensors if ".mlp." in name and name.endswith("bias")),
            "norm_bias": ("transformer.h.{i}.norm_1.bias", "transformer.ln_f.bias"),
            "second_norm": ("transformer.h.{i}.norm_2.weight",),
            "second_norm_bias": ("transformer.h.{i}.norm_2.bias",),
            "qk_norm": ("transformer.h.{i}.attn.norm_q.weight", "transformer.h.{i}.attn.norm_k.weight"),
            "norm_after_attention": ("transformer.h.{i}.post_attention_norm.weight",),
            "norm_after_mlp": ("transformer.h.{i}.post_mlp_norm.weight",),
            "head_bias": ("lm_head.bias",),
        },
        rotary=True,
        norm_without_bias="RMSNorm",
        activation="gated" if up is GATED else "GELU",
        gated="gated" if up is GATED else "",
        pads=True,
        claims={"lm_head_bias": "head_bias", "norm_qk": "qk_norm"},
    )


FAMILIES = tuple(_family(qkv, up) for qkv, up in product((CONCATENATED, INTERLEAVED), (PLAIN, GATED)))
