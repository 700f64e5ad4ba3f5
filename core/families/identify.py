"""Identify the program that a model is from, by the names and shapes of its tensors."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ..console.words import listed
from ..errors import CheckpointMismatch
from . import hf_gpt2, hf_llama, hf_neox, litgpt, megatron, meta_llama, modded, nanochat, nanogpt, ours
from .architecture import Architecture, describe
from .family import Family, Shape, Style, plain_name, plain_names
from .match import Match, index, match, numbered, skeleton
from .parts import is_of_optimizer

MODULES = (ours, nanogpt, hf_gpt2, hf_llama, hf_neox, modded, megatron, litgpt, meta_llama, nanochat)
FAMILIES: tuple[Family, ...] = tuple(family for module in MODULES for family in module.FAMILIES)

UNKNOWN = "unknown"
_DEEP = 6  # words that may precede the names of a model's weights
_LONG = 1000  # characters: no family has longer names


@dataclass(slots=True, repr=False)
class Identity:
    """The identity of a model: its family, and how well its tensors match that family."""

    family: str
    program: str
    prefix: str  # prefix that wrappers add to the names
    reason: str
    architecture: Architecture | None = None
    places: dict[str, str] = field(default_factory=dict)  # name in the file: the family's own name
    buffers: dict[str, str] = field(default_factory=dict)  # name in the file: its meaning
    unplaced: list[str] = field(default_factory=list)  # empty where the family is unknown
    missing: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)


def identify(
    shapes: Mapping[str, Shape],
    config: Mapping[str, Any] | None = None,
    shared: Mapping[str, str] | None = None,
    same: Callable[[str, str], bool | None] = lambda head, table: False,
    entries: Collection[str] = (),
) -> Identity:
    """Recognise a model by the names and shapes of its tensors.

    `config` is the one beside it (model_args, config.json, model_config); `shared` names the storage of each tensor,
    to detect a tied head, and `same` compares the values of two. `entries` are the names at the top of the file.
    Tensors of an optimizer are left out.
    """
    names = [name for name in shapes if not is_of_optimizer(name)]
    try:
        plain = plain_names(name for name in names if len(name) <= _LONG)
    except CheckpointMismatch as error:
        return Identity(UNKNOWN, "", "", f"{error}: there are two models in it, or one saved twice")
    numbers_of = {name: numbered(name) for name in plain}
    skeletons = {name for name, _ in numbers_of.values()}
    matches = [match(family, plain, numbers_of, shapes) for family in FAMILIES if _signature(family) & skeletons]
    told = {id(m): _told(m.family, plain, shared or {}, entries) for m in matches}
    best = max(matches, key=lambda m: (m.placed - m.unfit, m.placed, -len(m.missing), told[id(m)]), default=None)
    if best is None or best.placed <= len(best.unplaced) or (best.lost and best.extra):
        return Identity(UNKNOWN, "", "", _why_unknown(plain, best))
    config = config if isinstance(config, Mapping) else None
    architecture, conflicts = describe(best, shapes, config, shared, same)
    kind = (config or {}).get("model_type")
    style = _style(best, kind)
    name, program = style.name, style.program + (", with tensors of its own" if best.extra else "")
    architecture.norm = style.norm or architecture.norm
    if name.startswith("hf_") and isinstance(kind, str) and kind != name.removeprefix("hf_"):
        conflicts.append(f"model_type is {reprlib.repr(kind)} in the config, but names and shapes are of {program}")
    return Identity(
        family=name,
        program=program,
        prefix=best.prefix,
        reason=_why(best, len(shapes) - len(names)),
        architecture=architecture,
        places=best.places,
        buffers=best.buffers,
        unplaced=best.unplaced + [name for name in names if len(name) > _LONG],
        missing=best.missing,
        conflicts=best.conflicts + conflicts,
    )


def _told(family: Family, plain: Mapping[str, str], shared: Mapping[str, str], entries: Collection[str]) -> int:
    """Whether a family whose names another has too is told, by the file's entries or a tied head: 1 or -1; else 0."""
    if not family.entries:
        return 0
    head, table = (shared.get(plain.get(name, "")) for name in (family.head, family.embedding))
    return 1 if family.entries <= set(entries) or (head is not None and head == table) else -1


def weights_key(names: Iterable[str]) -> str:
    """Find the prefix of a model's weights in a flat list: "model.", "state_dict.", or "" for the top.

    Prefixes of wrappers (`_orig_mod.`, `module.`) are left to `identify`.
    """
    counts: dict[str, int] = {}
    depths: dict[str, int | None] = {}
    for name in names:
        if len(name) > _LONG:
            continue
        shape = skeleton(name)
        if shape not in depths:
            depths[shape] = _depth(shape)
        if (depth := depths[shape]) is not None:
            words = name.split(".")[:depth]
            while words and words[-1] in ("_orig_mod", "module"):
                words.pop()
            key = "".join(f"{word}." for word in words)
            counts[key] = counts.get(key, 0) + 1
    return max(counts, key=lambda key: (counts[key], -key.count(".")), default="")


def _depth(shape: str) -> int | None:
    """The number of words before a name that only a model has."""
    words = shape.split(".")
    for depth in range(min(len(words), _DEEP)):
        if plain_name(".".join(words[depth:])) in _decisive():
            return depth
    return None


@cache
def _decisive() -> frozenset[str]:
    """Skeletons of the names that distinguish families, with and without the family's prefix."""
    rows = {(row, family.base) for family in FAMILIES for row in family.signature}
    full = {row for row, _ in rows} | {row.removeprefix(base) for row, base in rows}
    return frozenset(skeleton(re.sub(r"\{[ijn]\}", "0", row)) for row in full)


def _signature(family: Family) -> set[str]:
    return set(index(family.name, family.signature, family.base))


def _style(found: Match, model_type: Any) -> Style:
    """The first style of a family that has the switches, and the model_type where it needs one."""
    switches = {**found.switches, "gated": found.gated}
    for style in found.family.styles:
        same_type = style.model_type in ("", model_type)
        if same_type and all(switches[switch] is wanted for switch, wanted in style.switches.items()):
            return style
    return Style(found.family.name, found.family.program, {})


def _why(found: Match, aside: int) -> str:
    decisive = next(row for row in found.rows.values() if row in found.family.signature)
    total = found.placed + len(found.unplaced)
    words = [f"{decisive} is decisive; {found.placed} of {total} tensors have a place"]
    if found.unfit:
        words.append(f"{found.unfit} of them another shape")
    if aside:
        words.append(f"{aside} tensors of an optimizer were left out")
    return ", ".join(words)


def _why_unknown(plain: Mapping[str, str], nearest: Match | None) -> str:
    if later := [word for word in modded.LATER if any(word in name for name in plain)]:
        return f"{later[0]} is of modded-nanogpt after 2025-06, whose versions are another model each"
    if not plain:
        return "there are no tensors of a model"
    if nearest and nearest.lost and nearest.extra:
        words = f"in no layer is {nearest.lost[0]}, and {nearest.extra[0]} has no place in it"
        return f"the nearest is {nearest.family.program}, but {words}"
    if nearest:
        total = nearest.placed + len(nearest.unplaced)
        return (
            f"the nearest is {nearest.family.program}, but only {nearest.placed} of {total} tensors have a place in it"
        )
    looked = {family.signature[0]: family.program.split(",")[0] for family in reversed(FAMILIES)}
    wanted = listed([f"{name} ({program})" for name, program in reversed(looked.items())], limit=20)
    return f"none of its {len(plain)} names is decisive. Looked for {wanted}"
