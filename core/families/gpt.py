"""Our own GPT: the names and shapes of its tensors, and the architecture that the shapes show."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING

from ..console.words import differences
from .family import Shape, Sides, linear, norm
from .rules import Table, each

if TYPE_CHECKING:
    from ..config.gpt import GPTConfig

TENSORS: dict[str, Sides] = {
    "token_embedding_table.weight": ("vocab_size", "n_embd"),
    "position_embedding_table.weight": ("block_size", "n_embd"),
    **norm("blocks.{i}.ln1"),
    **linear("blocks.{i}.sa.qkv", "q_size + 2 kv_size", "n_embd"),
    **norm("blocks.{i}.sa.q_norm", "head_size"),
    **norm("blocks.{i}.sa.k_norm", "head_size"),
    **norm("blocks.{i}.sa.q_norm_wide", "q_size"),
    **norm("blocks.{i}.sa.k_norm_wide", "kv_size"),
    **linear("blocks.{i}.sa.proj", "n_embd", "q_size"),
    **norm("blocks.{i}.ln1_post"),
    **norm("blocks.{i}.ln2"),
    **linear("blocks.{i}.fwd.gate", "n_ffn", "n_embd"),
    **linear("blocks.{i}.fwd.net.0", "n_ffn", "n_embd"),
    **linear("blocks.{i}.fwd.net.2", "n_embd", "n_ffn"),
    **norm("blocks.{i}.ln2_post"),
    **norm("ln_f"),
    **linear("lm_head", "vocab_size", "n_embd"),
}
"""Every tensor of a GPT and the config fields that are its sides, in the order of the module."""

FIXED = {"q_size + 2 kv_size": "3 n_embd", "q_size": "n_embd", "n_ffn": "4 n_embd"}
"""The sides of the same tensors in GPT-2 and the lecture, which have no fields for them."""

DROPPED: dict[str, str] = {"blocks.{i}.sa.tril": "the causal mask, which our attention has in its kernel"}
"""Buffers of older versions of the model."""

NORMS = [
    *(f"blocks.{{i}}.{name}" for name in ("ln1", "ln2", "ln1_post", "ln2_post")),
    *(f"blocks.{{i}}.sa.{part}_{name}" for name in ("norm", "norm_wide") for part in "qk"),
    "ln_f",
]


def _both(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{part}" for name in names for part in ("weight", "bias"))


SWITCHES: dict[str, tuple[str, ...]] = {
    "bias": ("blocks.{i}.sa.qkv.bias",),
    "proj_bias": ("blocks.{i}.sa.proj.bias",),
    "mlp_bias": tuple(f"blocks.{{i}}.fwd.{part}.bias" for part in ("net.0", "net.2", "gate")),
    "norm_bias": tuple(f"{name}.bias" for name in NORMS),
    "head_bias": ("lm_head.bias",),
}
"""The tensors that are there only when a field is true."""

PARTS: dict[str, tuple[str, ...]] = {
    "pos_encoding": ("position_embedding_table.weight",),
    "mlp_type": _both("blocks.{i}.fwd.gate"),
    "qk_norm": _both("blocks.{i}.sa.q_norm", "blocks.{i}.sa.k_norm"),
    "qk_norm_wide": _both("blocks.{i}.sa.q_norm_wide", "blocks.{i}.sa.k_norm_wide"),
    "norm_placement": _both("blocks.{i}.ln1_post", "blocks.{i}.ln2_post"),
    "norm_before": _both("blocks.{i}.ln1"),
    "shared_attention_norm": _both("blocks.{i}.ln2"),
    "norm_type": tuple(f"{name}.weight" for name in NORMS),
}
"""The tensors that are there only with some values of a field: see `present`."""

FIELD_OF = {"qk_norm_wide": "qk_norm", "norm_before": "norm_placement"}
"""The field of those of `PARTS` that are not named by it."""

OPTIONAL = ("mlp_type", "qk_norm", "qk_norm_wide", "norm_placement")
PLAIN = [name for name in TENSORS if not any(name in PARTS[part] for part in OPTIONAL)]
"""The tensors of a model of GPT-2's shape."""

EVERYBODYS = {"lm_head.weight", "lm_head.bias"}
"""Names that do not distinguish programs."""

MEASURED = {
    "vocab_size": ("token_embedding_table.weight", 0, "rows"),
    "n_embd": ("token_embedding_table.weight", 1, "columns"),
    "block_size": ("position_embedding_table.weight", 0, "rows"),
}
"""Fields that can be read from a shape: tensor, axis, and the name of the axis."""


def sides_of(table: Table) -> dict[str, Sides]:
    """Give the names of a table's left side the sides of our tensors beside them."""
    rows = ((name, TENSORS[each(ours)[0]]) for theirs, ours, _ in table for name in each(theirs))
    return {name: tuple(FIXED.get(side, side) for side in sides) for name, sides in rows}


def present(config: GPTConfig) -> dict[str, bool]:
    """Whether a model has the tensors of each of `SWITCHES` and `PARTS`."""
    fields = config.architecture()
    return {
        **{name: fields[name] for name in SWITCHES},
        "pos_encoding": config.pos_encoding == "learned",
        "mlp_type": config.is_gated,
        "qk_norm": config.qk_norm == "head",
        "qk_norm_wide": config.qk_norm == "width",
        "norm_placement": config.norm_placement in ("after_sublayer", "both"),
        "norm_before": config.norm_placement != "after_sublayer",
        "shared_attention_norm": config.norm_placement != "after_sublayer" and not config.shared_attention_norm,
        "norm_type": config.norm_type != "rmsnorm_no_weight",
    }


def shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Name every tensor of a model with its shape; a tied head is listed like any other."""
    q_size, kv_size = config.n_head * config.head_width, config.kv_heads * config.head_width
    fields = {**config.architecture(), "q_size": q_size, "kv_size": kv_size, "q_size + 2 kv_size": q_size + 2 * kv_size}
    absent = {name for part, is_there in present(config).items() if not is_there for name in (PARTS | SWITCHES)[part]}
    found: dict[str, tuple[int, ...]] = {}
    for is_layer, rows in groupby((name for name in TENSORS if name not in absent), lambda name: "{i}" in name):
        sides = {name: tuple(fields[side] for side in TENSORS[name]) for name in rows}
        for i in range(config.n_layer if is_layer else 1):
            found |= {name.replace("{i}", str(i)): shape for name, shape in sides.items()}
    return found


def row_of(name: str) -> str:
    """The row of TENSORS for the name of a tensor: `{i}` in place of the layer."""
    return re.sub(r"^blocks\.\d+\.", "blocks.{i}.", name)


def contradictions(config: GPTConfig, found: Mapping[str, Shape]) -> list[str]:
    """Report where a config and the shapes of a model's tensors do not fit.

    Each sentence names the field, both values, and the value that would fit; where it is not a field, the tensors that
    are missing or have no place, behind the likely cause.
    """
    if not found:
        return ["it has no tensors"]
    if not found.keys() & (TENSORS.keys() - EVERYBODYS):
        cause = f"none of its {len(found)} tensors has a name of this model's own: they are another program's"
        return [cause, *differences({}, found)]
    fields = config.architecture()
    faults = [
        f"{field} is {fields[field]}, but {name} has {found[name][axis]} {side}. Set {field} to {found[name][axis]}"
        for field, (name, axis, side) in MEASURED.items()
        if len(found.get(name, ())) == 2 and found[name][axis] != fields[field]
    ]
    layers = {int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", name) for name in found) if m}
    count = len(layers)
    whole = 0 < count == max(layers, default=0) + 1  # else some are lost, and the tensors that are missing are listed
    if (whole and count != config.n_layer) or config.n_layer > len(found):
        remedy = f". Set n_layer to {count}" if whole else ""
        faults.append(f"n_layer is {config.n_layer}, but the tensors have {count} layers{remedy}")
    switches, rows = present(config), {name: row_of(name) for name in found}
    for switch, names in SWITCHES.items():
        here = [name for name, row in rows.items() if row in names]
        if here and not switches[switch] and switch == "norm_bias" and config.norm_type.startswith("rmsnorm"):
            faults.append(f"norm_type is {config.norm_type}, but {here[0]} is there")
        elif here and not switches[switch]:
            faults.append(f"{switch} is false, but {here[0]} is there. Set {switch} to true")
        if not here and switches[switch]:
            faults.append(f"{switch} is true, but {names[0].replace('{i}', '0')} is not there. Set {switch} to false")
    for part, names in PARTS.items():
        here = [name for name, row in rows.items() if row in names and not name.endswith(".bias")]
        field = FIELD_OF.get(part, part)
        if here and not switches[part]:
            faults.append(f"{field} is {fields[field]}, but {here[0]} is there")
        if not here and switches[part] and fields[field] != config.neutral[field]:
            faults.append(f"{field} is {fields[field]}, but {names[0].replace('{i}', '0')} is not there")
    if "lm_head.weight" not in found and not config.tied_head:
        faults.append(
            "tied_head is false, but lm_head.weight is not there. Set tied_head to true if the head was the token table"
        )
    if faults:
        return faults
    expected = shapes(config)
    if "lm_head.weight" not in found:
        del expected["lm_head.weight"]
    faults = differences(expected, found)
    missing, surplus = len(expected.keys() - found.keys()), len(found.keys() - expected.keys())
    if missing:
        faults.insert(0, f"{missing} of {len(expected)} tensors are not there: it was saved incompletely")
    elif surplus:
        faults.insert(0, f"{surplus} tensors are too many: something was added to the model that saved it")
    return faults
