"""litgpt: one model for many, with q | k | v concatenated; files before 2025 have them interleaved group by group.

Names as in Lightning-AI/litgpt, litgpt/model.py; `attn.attn` has the rows as they were before commit fabf765b.
"""

from __future__ import annotations

from .family import Family, linear, norm
from .hf_llama import QKV
from .rules import RENAME, Chain, Interleave, Inverse, Rule, Table, layer

LAYER = "transformer.h.{i}."

NORMS = {"ln1": "norm_1", "ln1_post": "post_attention_norm", "ln2": "norm_2", "ln2_post": "post_mlp_norm"}
"""Norms of a layer, ours and theirs, any of which a model may lack."""

CONCATENATED, INTERLEAVED = "attn.qkv", "attn.attn"
GATE, UP, ALONE = "mlp.fc_1", "mlp.fc_2", "mlp.fc"
HEAD, WIDTH = ("head_size", "head_size"), ("q_size", "kv_size")
"""Sides of the norms of queries and keys."""


def _switches(qkv: str, up: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Tensors that come together or not at all."""
    groups = {
        "first_norm": ("norm_1",),
        "second_norm": ("norm_2",),
        "qk_norm": ("attn.norm_q", "attn.norm_k"),
        "norm_after_attention": ("post_attention_norm",),
        "norm_after_mlp": ("post_mlp_norm",),
    }
    parts = {"qkv": (qkv,), "proj": ("attn.proj",), "mlp": (*up, "mlp.proj"), **groups}
    return {
        **{name: tuple(f"{LAYER}{one}.weight" for one in names) for name, names in groups.items()},
        **{f"{name}_bias": tuple(f"{LAYER}{one}.bias" for one in names) for name, names in parts.items()},
        "norm_bias": ("transformer.ln_f.bias",),
        "head_bias": ("lm_head.bias",),
    }


def _family(
    name: str, program: str, up: tuple[str, ...], qk: tuple[str, str] = HEAD, qkv: str = CONCATENATED
) -> Family:
    always = ("qk_norm",) if qk is WIDTH else ()
    return Family(
        name=name,
        program=program,
        tensors={
            "transformer.wte.weight": ("vocab_size", "n_embd"),
            **norm(f"{LAYER}norm_1"),
            **linear(LAYER + qkv, "q_size + 2 kv_size", "n_embd"),
            **norm(f"{LAYER}attn.norm_q", qk[0]),
            **norm(f"{LAYER}attn.norm_k", qk[1]),
            **linear(f"{LAYER}attn.proj", "n_embd", "q_size"),
            **norm(f"{LAYER}post_attention_norm"),
            **norm(f"{LAYER}norm_2"),
            **{tensor: sides for one in up for tensor, sides in linear(LAYER + one, "n_ffn", "n_embd").items()},
            **linear(f"{LAYER}mlp.proj", "n_embd", "n_ffn"),
            **norm(f"{LAYER}post_mlp_norm"),
            **norm("transformer.ln_f"),
            **linear("lm_head", "vocab_size", "n_embd"),
        },
        signature=(f"{LAYER}{qkv}.weight",),
        embedding="transformer.wte.weight",
        head="lm_head.weight",
        switches={switch: names for switch, names in _switches(qkv, up).items() if switch not in always},
        always=always,
        rotary=True,
        norm_without_bias="RMSNorm",
        activation="gated" if GATE in up else "GELU",
        gated="gated" if GATE in up else "",
        pads=True,
        claims={
            **({} if always else {"norm_qk": "qk_norm"}),
            "bias": "proj_bias",
            "lm_head_bias": "head_bias",
            "norm_1": "first_norm",
            "post_attention_norm": "norm_after_attention",
            "post_mlp_norm": "norm_after_mlp",
        },
    )


OLD = "_interleaved"
"""Behind the name of a family: its files before 2025."""

_OLD = "litgpt, with interleaved q, k and v"
FAMILIES = (
    _family("litgpt_olmo2", "litgpt", (GATE, UP), WIDTH),  # before those whose only head may be as wide
    _family("litgpt", "litgpt", (GATE, UP)),
    _family("litgpt_neox", "litgpt", (ALONE,)),
    _family(f"litgpt{OLD}", _OLD, (GATE, UP), qkv=INTERLEAVED),
    _family(f"litgpt_neox{OLD}", _OLD, (ALONE,), qkv=INTERLEAVED),
)

_BY_GROUP = Chain((Inverse(Interleave(), "split group by group"), QKV))


def _table(up: str, qkv: str = CONCATENATED, rule: Rule = RENAME, wide: str = "") -> Table:
    """Make a table to our names."""
    return (
        ("transformer.wte.weight", "token_embedding_table.weight", RENAME),
        *(row for ours, theirs in NORMS.items() for row in layer(LAYER + theirs, f"blocks.{{i}}.{ours}")),
        *layer(LAYER + qkv, "blocks.{i}.sa.qkv", rule, rule),
        *layer(f"{LAYER}attn.norm_q", f"blocks.{{i}}.sa.q_norm{wide}"),
        *layer(f"{LAYER}attn.norm_k", f"blocks.{{i}}.sa.k_norm{wide}"),
        *layer(f"{LAYER}attn.proj", "blocks.{i}.sa.proj"),
        *layer(LAYER + GATE, "blocks.{i}.fwd.gate"),
        *layer(LAYER + up, "blocks.{i}.fwd.net.0"),
        *layer(f"{LAYER}mlp.proj", "blocks.{i}.fwd.net.2"),
        *layer("transformer.ln_f", "ln_f"),
        *layer("lm_head", "lm_head"),
    )


TABLES: dict[str, Table] = {
    "litgpt": _table(UP),
    "litgpt_neox": _table(ALONE),
    "litgpt_olmo2": _table(UP, wide="_wide"),
    f"litgpt{OLD}": _table(UP, INTERLEAVED, _BY_GROUP),
    f"litgpt_neox{OLD}": _table(ALONE, INTERLEAVED, _BY_GROUP),
}
"""The tensors of each as ours."""
