"""Names and shapes written out from the tables of families."""

from __future__ import annotations

from core.families.family import parse
from core.families.identify import FAMILIES

SIZES = {
    "n_embd": 256, "vocab_size": 50304, "head_rows": 50432, "block_size": 64, "q_size": 512, "kv_size": 128,
    "head_size": 64, "n_kv_head": 2, "n_ffn": 704, "fc1_rows": 704, "ve_gate_channels": 12, "smear_channels": 24,
    "classes": 3,
}  # fmt: skip
"""Eight heads of 64 in two groups: sizes that no family could take for one another."""

IDS = [f"{family.name}: {family.program}" for family in FAMILIES]


def build(family, n_layer=9, n_head=4, off=(), **sizes):
    """Names and shapes of a model, written out from a family's table."""
    known = {**SIZES, "n_layer": n_layer, **sizes}
    absent = {name for switch in off for name in family.switches[switch]}
    made = {}
    for row, sides in family.tensors.items():
        shape = tuple(parse(side).value(known) for side in sides)
        for i in range(n_layer) if "{i}" in row else (0,):
            if row in absent or (i in family.without and row.startswith(family.without[i])):
                continue
            for j in range(n_head) if "{j}" in row else (0,):
                made[row.replace("{i}", str(i)).replace("{j}", str(j)).replace("{n}", "1")] = shape
    return made


def named(program):
    return next(family for family in FAMILIES if family.program == program)
