"""Llama with the names of Meta's own code, which llama2.c has: in each head, neighbours are turned together.

Names as in karpathy/llama2.c, model.py; the buffers as in its older versions, and in Meta's files.
"""

from __future__ import annotations

from .family import Family, linear
from .hf_llama import FREQUENCIES, QKV
from .rules import RENAME, Chain, Halves, Table

LAYER = "layers.{i}."
HEAD, TABLE = "output.weight", "tok_embeddings.weight"


def _weight(name: str, rows: str, columns: str) -> dict[str, tuple[str, ...]]:
    return {f"{name}.weight": linear(name, rows, columns)[f"{name}.weight"]}


FAMILIES = (
    Family(
        name="meta_llama",
        program="Llama with Meta's names",
        tensors={
            TABLE: ("vocab_size", "n_embd"),
            **_weight(f"{LAYER}attention.wq", "q_size", "n_embd"),
            **_weight(f"{LAYER}attention.wk", "kv_size", "n_embd"),
            **_weight(f"{LAYER}attention.wv", "kv_size", "n_embd"),
            **_weight(f"{LAYER}attention.wo", "n_embd", "q_size"),
            **_weight(f"{LAYER}feed_forward.w1", "n_ffn", "n_embd"),
            **_weight(f"{LAYER}feed_forward.w2", "n_embd", "n_ffn"),
            **_weight(f"{LAYER}feed_forward.w3", "n_ffn", "n_embd"),
            f"{LAYER}attention_norm.weight": ("n_embd",),
            f"{LAYER}ffn_norm.weight": ("n_embd",),
            "norm.weight": ("n_embd",),
            HEAD: ("vocab_size", "n_embd"),
        },
        signature=(f"{LAYER}attention.wq.weight",),
        embedding=TABLE,
        head=HEAD,
        switches={"head": (HEAD,)},
        buffers={
            **dict.fromkeys(("freqs_cos", "freqs_sin", "freqs_cis"), (None, "the angles of rotary positions")),
            "rope.freqs": (None, FREQUENCIES[1]),
            f"{LAYER}attention.mask": (None, "the causal mask"),
        },
        rotary=True,
        norm="RMSNorm",
        activation="SwiGLU",
        gated="SwiGLU",
        fields={
            "dim": "n_embd",
            "n_layers": "n_layer",
            "n_heads": "n_head",
            "n_kv_heads": "n_kv_head",
            "hidden_dim": "n_ffn",
            "max_seq_len": "block_size",
        },
    ),
)

META_LLAMA: Table = (
    (TABLE, "token_embedding_table.weight", RENAME),
    (
        tuple(f"{LAYER}attention.w{part}.weight" for part in "qkv"),
        "blocks.{i}.sa.qkv.weight",
        Chain((Halves(2), QKV)),
    ),
    (f"{LAYER}attention.wo.weight", "blocks.{i}.sa.proj.weight", RENAME),
    (f"{LAYER}feed_forward.w1.weight", "blocks.{i}.fwd.gate.weight", RENAME),
    (f"{LAYER}feed_forward.w3.weight", "blocks.{i}.fwd.net.0.weight", RENAME),
    (f"{LAYER}feed_forward.w2.weight", "blocks.{i}.fwd.net.2.weight", RENAME),
    (f"{LAYER}attention_norm.weight", "blocks.{i}.ln1.weight", RENAME),
    (f"{LAYER}ffn_norm.weight", "blocks.{i}.ln2.weight", RENAME),
    ("norm.weight", "ln_f.weight", RENAME),
    (HEAD, "lm_head.weight", RENAME),
)
"""Its tensors as ours, in which the partners of a turn are half a head apart."""
