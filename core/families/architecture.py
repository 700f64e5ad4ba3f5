"""Architecture: a model's sizes and features, from the shapes of its tensors or else from its config."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .claims import Claims
from .family import Family, Shape, parse
from .match import Match
from .tie import is_tied

VOCABULARIES = {50257: "GPT-2", 32000: "Llama 2", 100277: "cl100k", 128256: "Llama 3", 200019: "o200k"}
"""Vocabularies that are often padded: number of tokens, and name."""

WHOLE = {32768: "Mistral", 65536: "nanochat"}
"""Vocabularies whose size could be mistaken for a padded one."""

PADDINGS = (128, 64, 256, 512, 1024, 2048, 4096, 8192)
"""Multiples to which programs pad a vocabulary, the most common first; from 256 on, 128 times the ranks."""


@dataclass(slots=True, repr=False)
class Architecture:
    """The sizes of a model; None for those that neither shapes nor config show."""

    n_layer: int | None
    n_head: int | None
    n_kv_head: int | None  # groups of query heads that share a key and a value
    head_size: int | None
    n_embd: int | None
    n_ffn: int | None
    vocab_size: int | None  # rows of the token table
    head_rows: int | None  # rows of the head
    padding: str  # how many of the rows are padding; "" without evidence
    block_size: int | None
    positions: str  # "learned", "rotary", "none" or "unknown"
    norm: str
    activation: str
    gated: bool
    qk_norm: bool
    tied_head: bool | None  # None: both tensors exist, and it is unknown whether they share storage
    biases: dict[str, bool]  # of qkv, proj, mlp, norm, head
    parameters: int  # a tied head once; no buffers
    parameters_without_embeddings: int  # without the tables of tokens, positions and values; an untied head counts
    from_config: tuple[str, ...] = ()  # fields that the shapes do not show
    notes: list[str] = field(default_factory=list)


def describe(
    found: Match,
    shapes: Mapping[str, Shape],
    config: Mapping[str, Any] | None,
    shared: Mapping[str, str] | None,
    same: Callable[[str, str], bool | None] = lambda head, table: False,
) -> tuple[Architecture, list[str]]:
    """Derive the architecture from a match; also report where the config contradicts it."""
    family, on = found.family, found.switches
    sizes = {word: measure.value for word, measure in found.measures.items()}
    n_embd = sizes.get("n_embd")
    n_ffn = sizes.get("n_ffn", None if n_embd is None else 4 * n_embd)
    q_size = sizes.get("q_size", n_embd)
    kv_size = sizes.get("kv_size", None if "kv_size" in found.words else q_size)
    claims = Claims(found, config or {})
    learned, tied = family.positions in found.rows.values(), _tied(found, claims.says_tied(), shared, same)
    tied = claims.tied() if tied is None else tied
    heads = claims.heads(q_size, kv_size)
    claims.compare(learned=learned, gated=found.gated, tied=tied)
    total, tables, notes = _count(found, shapes, tied)
    rows = sizes.get("vocab_size")
    result = Architecture(
        n_layer=sizes.get("n_layer"),
        **heads,
        n_embd=n_embd,
        n_ffn=n_ffn,
        vocab_size=rows,
        head_rows=sizes.get("head_rows", rows),
        padding=padding(rows, claims.number("vocab_size") if family.pads else None),
        block_size=sizes["block_size"] if "block_size" in sizes else claims.context(),
        positions="learned" if learned else claims.positions() or _positions(family),
        norm=claims.norm() or (family.norm_without_bias if not on.get("norm_bias") else "") or family.norm,
        activation=_activation(claims.activation(), found),
        gated=found.gated,
        qk_norm=on.get("qk_norm", False) or on.get("qk_norm_wide", False),
        tied_head=tied,
        biases={part: on.get(f"{part}_bias", False) for part in ("qkv", "proj", "mlp", "norm", "head")},
        parameters=total,
        parameters_without_embeddings=total - tables,
        from_config=tuple(claims.used),
        notes=notes,
    )
    return result, claims.conflicts


def _activation(said: str, found: Match) -> str:
    """The activation that the config names, or else the family's; that of a gate has another name."""
    if not said:
        return found.family.gated if found.gated else found.family.activation
    return said.replace("GELU", "GeGLU") if found.gated else said


def _positions(family: Family) -> str:
    """The positions of a model without a table of them, of which no config tells."""
    return "rotary" if family.rotary else "unknown" if "pos_encoding" in family.switches else "none"


def padding(rows: int | None, vocab_size: int | None = None) -> str:
    """Describe how many rows of a token table are padding: certain given the vocabulary's size, otherwise likely."""
    if rows is None or (vocab_size is None and rows in {**VOCABULARIES, **WHOLE}):
        return ""
    sizes = VOCABULARIES if vocab_size is None else {vocab_size: ""}
    for size, whose in sizes.items():
        if size < rows and (multiple := next((p for p in PADDINGS if -size % p == rows - size), None)):
            likely = f"probably the {size} tokens of {whose}" if whose else f"{size} tokens"
            return f"{likely} + {rows - size} padding rows (a multiple of {multiple})"
    return ""


def _tied(
    found: Match, said: bool | None, shared: Mapping[str, str] | None, same: Callable[[str, str], bool | None]
) -> bool | None:
    names = {row: name for name, row in found.rows.items()}
    table, head = names.get(found.family.embedding), names.get(found.family.head)
    if table is None:
        return None
    if head is None:
        return True if "head" in found.family.switches else None
    rows = found.measures.get("head_rows")
    if rows and rows.value != found.measures["vocab_size"].value:
        return False
    if shared is None:
        return None
    return is_tied(said, shares=shared[table] == shared[head], same=lambda: same(head, table))


def _count(found: Match, shapes: Mapping[str, Shape], tied: bool | None) -> tuple[int, int, list[str]]:
    """Count parameters, and those in tables; notes list tensors that were not counted, or counted once."""
    family, tables, total, notes = found.family, 0, 0, list[str]()
    known = {word: measure.value for word, measure in found.measures.items()}
    for name in (*found.rows, *found.unplaced):
        row, count = found.rows.get(name, ""), math.prod(shapes[name])
        if row == family.head and tied:
            notes.append(f"{name} is the token table again and counted once")
            continue
        if row == family.head and tied is None:
            notes.append(f"{name} may be the token table again, and is counted as a tensor of its own")
        least = parse(family.tensors[row][0]) if row and family.tensors[row] else None
        if least and least.least and (needed := least.value(known)) is not None and count > needed:
            notes.append(f"{name}: {count - needed} of {count} are padding to a multiple of the ranks, not counted")
            count = needed
        total += count
        tables += count if row in (family.embedding, family.positions, *family.tables) else 0
    for reason in dict.fromkeys(found.buffers.values()):
        names = [name for name, why in found.buffers.items() if why == reason]
        size = sum(math.prod(shapes[name]) for name in names)
        notes.append(f"{len(names)} buffers ({size:,} numbers) are not counted, such as {names[0]}: {reason}")
    if found.unplaced:
        size = sum(math.prod(shapes[name]) for name in found.unplaced)
        notes.append(f"{len(found.unplaced)} tensors without a place ({size:,} numbers) are counted")
    return total, tables, notes
