"""Common names: what the tensors of a file are called in the names that several programs' files can be compared by.

For GPT-2 these are ours: the fused qkv, Linear weights [out, in].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from . import gpt, hf_gpt2, lecture
from .claims import ACTIVATIONS, NAMES, TIED
from .family import plain_names
from .fused import FUSED, LECTURE, make_plan
from .identify import FAMILIES

NANOGPT: dict[str, str] = {
    "transformer.wte.weight": "token_embedding_table.weight",
    "transformer.wpe.weight": "position_embedding_table.weight",
    "transformer.h.{i}.ln_1.weight": "blocks.{i}.ln1.weight",
    "transformer.h.{i}.ln_1.bias": "blocks.{i}.ln1.bias",
    "transformer.h.{i}.attn.c_attn.weight": "blocks.{i}.sa.qkv.weight",
    "transformer.h.{i}.attn.c_attn.bias": "blocks.{i}.sa.qkv.bias",
    "transformer.h.{i}.attn.c_proj.weight": "blocks.{i}.sa.proj.weight",
    "transformer.h.{i}.attn.c_proj.bias": "blocks.{i}.sa.proj.bias",
    "transformer.h.{i}.ln_2.weight": "blocks.{i}.ln2.weight",
    "transformer.h.{i}.ln_2.bias": "blocks.{i}.ln2.bias",
    "transformer.h.{i}.mlp.c_fc.weight": "blocks.{i}.fwd.net.0.weight",
    "transformer.h.{i}.mlp.c_fc.bias": "blocks.{i}.fwd.net.0.bias",
    "transformer.h.{i}.mlp.c_proj.weight": "blocks.{i}.fwd.net.2.weight",
    "transformer.h.{i}.mlp.c_proj.bias": "blocks.{i}.fwd.net.2.bias",
    "transformer.ln_f.weight": "ln_f.weight",
    "transformer.ln_f.bias": "ln_f.bias",
    "lm_head.weight": "lm_head.weight",
}
"""nanoGPT's name: ours. The rows of `c_attn` are q | k | v, as those of our `qkv`."""

HF_GPT2: dict[str, str] = {**NANOGPT, **{name.removeprefix("transformer."): ours for name, ours in NANOGPT.items()}}
"""The names of Hugging Face are those of nanoGPT; without `transformer.` where GPT2Model was saved by itself."""

MEGATRON: dict[str, str] = {
    "decoder.layers.{i}.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.{i}.input_layernorm.weight",
    "decoder.layers.{i}.self_attention.linear_qkv.layer_norm_bias": "decoder.layers.{i}.input_layernorm.bias",
    "decoder.layers.{i}.mlp.linear_fc1.layer_norm_weight": "decoder.layers.{i}.pre_mlp_layernorm.weight",
    "decoder.layers.{i}.mlp.linear_fc1.layer_norm_bias": "decoder.layers.{i}.pre_mlp_layernorm.bias",
}
"""The name of Transformer Engine: that of the local layers; all others are the same."""

GPT2 = "gpt2"
TABLES: dict[str, tuple[str, Mapping[str, str]]] = {
    FUSED: (GPT2, {name: name for name in gpt.TENSORS}),
    LECTURE: (GPT2, lecture.TENSORS),
    "nanogpt": (GPT2, NANOGPT),
    "hf_gpt2": (GPT2, HF_GPT2),
    "megatron": ("megatron", MEGATRON),
}
"""Family: whose names its table leads to, and the table."""

TRANSPOSED = {HF_GPT2[name] for name in hf_gpt2.TRANSPOSED}
"""The common names of what Hugging Face GPT-2 stores as [in, out]."""

_OF_STYLE = {name: family for family in FAMILIES for name in (family.name, *(style.name for style in family.styles))}


@dataclass(frozen=True, slots=True)
class Place:
    """Where the numbers of one tensor lie in a file."""

    parts: tuple[str, ...]  # names in the file, which follow one another along its rows
    transposed: bool = False


def naming(family: str) -> str:
    """Say whose names a family's tensors are compared by: families of one naming can be compared tensor by tensor."""
    table = _table(family)
    return TABLES[table][0] if table in TABLES else table


def places(family: str, names: Iterable[str]) -> dict[str, Place]:
    """Find the place of each tensor by its common name; a name that no table has stays, without what wrappers add.

    Raises: CheckpointMismatch when two names become one.
    """
    table = _table(family)
    if table not in TABLES:
        return {plain: Place((name,)) for plain, name in plain_names(names).items()}
    turned = TRANSPOSED if family == "hf_gpt2" else set()
    sources = make_plan(family, TABLES[table][1], {}, names).sources
    return {common: Place(parts, _row(common) in turned) for common, parts in sources.items()}


def common_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that most programs have and that mean the same in all of them, by our names."""
    found = {field: config[name] for field, names in NAMES.items() for name in names if config.get(name) is not None}
    for name, tied in TIED.items():
        if isinstance(said := config.get(name), bool):
            found["tied_head"] = said is tied
    for name in ("activation_function", "hidden_act", "activation"):
        if isinstance(said := config.get(name), str):
            found.setdefault("activation", ACTIVATIONS.get(said, said))
    return found


def head_and_table(family: str) -> tuple[str, str] | None:
    """The common names of the head and of the token table, where the family may leave out the head as the same."""
    if naming(family) == GPT2:
        return "lm_head.weight", "token_embedding_table.weight"
    found = _OF_STYLE.get(family)
    if found is None or "head" not in found.switches:
        return None
    head, table = plain_names((found.head, found.embedding))
    return head, table


def _table(family: str) -> str:
    return _OF_STYLE[family].name if family in _OF_STYLE else family


def _row(name: str) -> str:
    return re.sub(r"^blocks\.\d+\.", "blocks.{i}.", name)
