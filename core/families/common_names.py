"""Common names: names for the tensors of a file under which several programs' files can be compared.

For GPT-2 these are ours: the fused qkv, Linear weights [out, in].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from . import lecture
from .claims import ACTIVATIONS, NAMES, activation_of, tied_fields
from .family import plain_names
from .fused import FUSED, LECTURE, SAME, fuse
from .gpt import row_of
from .hf_gpt2 import HF_GPT2
from .identify import FAMILIES
from .match import in_order
from .megatron_tables import TRANSFORMER_ENGINE
from .nanogpt import NANOGPT
from .rules import TRANSPOSE, Table, each

GPT2 = "gpt2"


def _with_bare(table: Table, base: str) -> Table:
    """Extend a table by the names of a body that was saved by itself, which lack the base."""
    return (*table, *((name.removeprefix(base), ours, rule) for names, ours, rule in table for name in each(names)))


TABLES: dict[str, tuple[str, Table]] = {
    FUSED: (GPT2, SAME),
    LECTURE: (GPT2, lecture.LECTURE),
    "nanogpt": (GPT2, NANOGPT),
    "hf_gpt2": (GPT2, _with_bare(HF_GPT2, "transformer.")),
    "megatron": ("megatron", TRANSFORMER_ENGINE),
}
"""By family: the family whose names its table leads to, and the table."""

_OF_STYLE = {name: family for family in FAMILIES for name in (family.name, *(style.name for style in family.styles))}


@dataclass(frozen=True, slots=True)
class Place:
    """The place of one tensor's data in a file."""

    parts: tuple[str, ...]  # names in the file, which follow one another along its rows
    transposed: bool = False


def naming(family: str) -> str:
    """The family whose names a family's tensors are compared by: with equal names, tensors can be compared."""
    table = _table(family)
    return TABLES[table][0] if table in TABLES else table


def places(family: str, names: Iterable[str]) -> dict[str, Place]:
    """Find the place of each tensor by its common name; a name that no table has stays, without what wrappers add.

    Raises: CheckpointMismatch when two names become one.
    """
    table = _table(family)
    if table not in TABLES:
        return {plain: Place((name,)) for plain, name in plain_names(names).items()}
    rows = TABLES[table][1]
    turned = {ours for _, ours, rule in rows if rule == TRANSPOSE}
    sources = fuse(family, rows, {}, names).sources
    return {common: Place(parts, row_of(common) in turned) for common, parts in sources.items()}


def common_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that have the same meaning in most programs, by our names."""
    found = {field: config[name] for field, names in NAMES.items() for name in names if config.get(name) is not None}
    for _, tied in tied_fields(config):
        found["tied_head"] = tied
    if (said := activation_of(config)) is not None:
        found["activation"] = ACTIVATIONS.get(said, said)
    return found


def head_and_table(family: str) -> tuple[str, str] | None:
    """The common names of the head and of the token table, if the family may leave out a tied head."""
    if naming(family) == GPT2:
        return "lm_head.weight", "token_embedding_table.weight"
    found = _OF_STYLE.get(family)
    if found is None or "head" not in found.switches:
        return None
    head, table = plain_names((found.head, found.embedding))
    return head, table


def in_module_order(family: str, places: Mapping[str, str]) -> list[str]:
    """Sort the tensors of a file, whose names in the family are `places`, as the modules of its program list them."""
    found = _OF_STYLE.get(family)
    if found is None:
        return list(places)
    raws = {place: raw for raw, place in places.items()}
    return [raws[name] for name in in_order(raws, found)]


def _table(family: str) -> str:
    return _OF_STYLE[family].name if family in _OF_STYLE else family
