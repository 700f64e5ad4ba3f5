"""Hugging Face GPT-2: its Conv1D weights are [in, out]; `transformer.` is absent where GPT2Model was saved by itself.

Names as in huggingface/transformers, src/transformers/models/gpt2/modeling_gpt2.py; the buffers as in its versions
before 4.31.
"""

from __future__ import annotations

from dataclasses import replace

from . import nanogpt
from .family import Sides
from .rules import TRANSPOSE, Table

TRANSPOSED = {name for name, sides in nanogpt.TENSORS.items() if "{i}" in name and len(sides) == 2}
"""The Conv1D weights: the transpose of a Linear's."""

TENSORS: dict[str, Sides] = {
    name: tuple(side.replace("4 n_embd", "n_ffn") for side in (sides[::-1] if name in TRANSPOSED else sides))
    for name, sides in nanogpt.TENSORS.items()
}
"""Those of nanoGPT; the width of the feed-forward part is a field of its own."""

HF_GPT2: Table = tuple(
    (theirs, ours, TRANSPOSE if theirs in TRANSPOSED else rule) for theirs, ours, rule in nanogpt.NANOGPT
)
"""Hugging Face GPT-2: nanoGPT's names, and Conv1D weights [in, out]."""

FAMILIES = (
    replace(
        nanogpt.FAMILIES[0],
        name="hf_gpt2",
        program="Hugging Face GPT-2",
        tensors=TENSORS,
        switches={"head": ("lm_head.weight",)},
        always=tuple(nanogpt.BIASES),
        buffers={
            **nanogpt.FAMILIES[0].buffers,
            "transformer.h.{i}.attn.masked_bias": (None, "what masked places are filled with"),
        },
        base="transformer.",
        claims={},
    ),
)
