"""Our own GPT: what its tensors are called, their shapes, and what the shapes say of the architecture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from core.config import GPTConfig
from core.differences import differences

TENSORS: dict[str, tuple[str, ...]] = {
    "token_embedding_table.weight": ("vocab_size", "n_embd"),
    "position_embedding_table.weight": ("block_size", "n_embd"),
    "blocks.{i}.ln1.weight": ("n_embd",),
    "blocks.{i}.ln1.bias": ("n_embd",),
    "blocks.{i}.sa.qkv.weight": ("3 n_embd", "n_embd"),
    "blocks.{i}.sa.qkv.bias": ("3 n_embd",),
    "blocks.{i}.sa.proj.weight": ("n_embd", "n_embd"),
    "blocks.{i}.sa.proj.bias": ("n_embd",),
    "blocks.{i}.ln2.weight": ("n_embd",),
    "blocks.{i}.ln2.bias": ("n_embd",),
    "blocks.{i}.fwd.net.0.weight": ("4 n_embd", "n_embd"),
    "blocks.{i}.fwd.net.0.bias": ("4 n_embd",),
    "blocks.{i}.fwd.net.2.weight": ("n_embd", "4 n_embd"),
    "blocks.{i}.fwd.net.2.bias": ("n_embd",),
    "ln_f.weight": ("n_embd",),
    "ln_f.bias": ("n_embd",),
    "lm_head.weight": ("vocab_size", "n_embd"),
    "lm_head.bias": ("vocab_size",),
}
"""Every tensor of a GPT and the config fields that are its sides, in the order of the module."""

SWITCHES: dict[str, tuple[str, ...]] = {
    "bias": ("blocks.{i}.sa.qkv.bias",),
    "proj_bias": ("blocks.{i}.sa.proj.bias",),
    "mlp_bias": ("blocks.{i}.fwd.net.0.bias", "blocks.{i}.fwd.net.2.bias"),
    "norm_bias": ("blocks.{i}.ln1.bias", "blocks.{i}.ln2.bias", "ln_f.bias"),
    "head_bias": ("lm_head.bias",),
}
"""The tensors that are there only when a field is true."""

MEASURED = {
    "vocab_size": ("token_embedding_table.weight", 0, "rows"),
    "n_embd": ("token_embedding_table.weight", 1, "columns"),
    "block_size": ("position_embedding_table.weight", 0, "rows"),
}
"""Where a field can be read from a shape: tensor, axis, and what a person calls it."""


def shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Name every tensor of a model with its shape; a tied head is listed like any other."""
    fields = {**config.architecture(), "3 n_embd": 3 * config.n_embd, "4 n_embd": 4 * config.n_embd}
    absent = {name for switch, names in SWITCHES.items() if not fields[switch] for name in names}
    found: dict[str, tuple[int, ...]] = {}
    for name, sides in TENSORS.items():
        layers = range(config.n_layer) if "{i}" in name else (0,)
        if name not in absent:
            found.update({name.replace("{i}", str(i)): tuple(fields[s] for s in sides) for i in layers})
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def _order(name: str) -> tuple[int, int]:
    layer = re.match(r"blocks\.(\d+)\.", name)
    key = list(TENSORS).index(re.sub(r"^blocks\.\d+\.", "blocks.{i}.", name))
    if layer:
        return 2 + int(layer[1]), key
    return (0 if key < 2 else 10**9), key


def contradictions(config: GPTConfig, found: Mapping[str, Any]) -> list[str]:
    """Say where a config and the tensors of a model (name to anything with a `shape`) do not fit.

    Each sentence names the field, both values, and the value that would fit.
    """
    faults: list[str] = []
    fields = config.architecture()
    for field, (name, axis, side) in MEASURED.items():
        shape = found[name].shape if name in found else ()
        if len(shape) == 2 and shape[axis] != fields[field]:
            faults.append(
                f"{field} is {fields[field]}, but {name} has {shape[axis]} {side}. Set {field} to {shape[axis]}"
            )
    layers = {int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", name) for name in found) if m}
    count = max(layers, default=-1) + 1
    if count not in (0, config.n_layer):
        faults.append(f"n_layer is {config.n_layer}, but the tensors have {count} layers. Set n_layer to {count}")
    for field, names in SWITCHES.items():
        here = [name for name in (n.replace("{i}", "0") for n in names) if name in found]
        if bool(here) != fields[field]:
            wanted = str(bool(here)).lower()
            what = f"{here[0]} is there" if here else f"{names[0].replace('{i}', '0')} is not there"
            faults.append(f"{field} is {str(fields[field]).lower()}, but {what}. Set {field} to {wanted}")
    if faults:
        return faults
    expected = shapes(config)
    if config.tied_head and "lm_head.weight" not in found:
        del expected["lm_head.weight"]
    return differences(expected, {name: spec.shape for name, spec in found.items()})
