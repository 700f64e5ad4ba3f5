"""Sizes: the bytes of a checkpoint by part and module, weights apart from the optimizer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ...console.words import printable, size_text
from ...containers.spec import TensorSpec
from ...families.family import WRAPPERS, plain_name
from ..inspect import Inspection
from .markup import escaped

_SMALLEST, _DEEPEST, _PARTS = 0.002, 8, 200
"""Modules that are listed: by their share of all bytes, their depth, and how many within one."""

PARTS = (
    ("norms", r"norm|(^|[._])ln(_?\w)?([._]|$)|ln_?\d|layernorm"),
    ("embeddings", r"embed|wte|wpe|(^|\.)tok_|value_emb|\bemb\b"),
    ("head", r"lm_head|output_layer|(^|\.)head\b"),
    ("attention", r"attn|attention|(^|\.)sa\.|[qkv]_proj|qkv|c_attn"),
    ("feed-forward", r"mlp|ffn|fwd|feed_forward|expert|c_fc|gate_proj|up_proj|down_proj|fc[12_]"),
)
"""Parts of a model in words, by what names of tensors contain, in any program's spelling."""


@dataclass
class Module:
    """A module of a model: its bytes, and the modules in it."""

    size: int = 0
    tensors: int = 0
    inner: dict[str, Module] = field(default_factory=dict)


def part_of(name: str) -> str:
    """The part of a model that a tensor is of, in words."""
    return next((part for part, pattern in PARTS if re.search(pattern, name.lower())), "other")


def sizes_of(found: Inspection) -> dict[str, Module]:
    """The modules of the weights and of what else there is; tensors that share their bytes count once."""
    tops = {"weights": Module(), "optimizer": Module(), "other tensors": Module()}
    seen = set()
    wrapped = {name: plain_name(name, WRAPPERS) for name in found.weights}
    for name, tensor in found.container.tensors.items():
        place = (tensor.file, tensor.storage, tensor.offset, tensor.shape, tensor.chunks)
        if place in seen:
            continue
        seen.add(place)
        plain = name.removeprefix(found.key) if name.startswith(found.key) else name
        if plain in found.weights:
            top, names = "weights", wrapped[plain].split(".", _DEEPEST)
        else:
            top = "optimizer" if re.match(r"optim|optimizers?\b|exp_avg", name) else "other tensors"
            names = name.removeprefix("optimizer.").split(".", _DEEPEST)
        module, size = tops[top], min(tensor.nbytes, found.size)
        for part in ["", *names]:
            module = module.inner.setdefault(part, Module()) if part else module
            module.size += size
            module.tensors += 1
    return {name: module for name, module in tops.items() if module.size}


def parts_table(weights: Mapping[str, TensorSpec]) -> list[tuple[str, int, int]]:
    """Bytes and tensors of each part of a model, the largest first."""
    found: dict[str, tuple[int, int]] = {}
    seen = set()
    for name, tensor in weights.items():
        place = (tensor.file, tensor.storage, tensor.offset, tensor.shape)
        if place not in seen:
            seen.add(place)
            size, count = found.get(part_of(name), (0, 0))
            found[part_of(name)] = size + tensor.nbytes, count + 1
    return sorted(((part, *sums) for part, sums in found.items()), key=lambda row: -row[1])


def tree(tops: Mapping[str, Module]) -> str:
    """The modules as bars, each opening into those in it."""
    total = sum(module.size for module in tops.values())
    bars = "".join(_bar(name, module, total, total, opened=name == "weights") for name, module in tops.items())
    return f'<div class="sizes">{bars}</div>'


def _bar(name: str, module: Module, total: int, whole: int, opened: bool = False) -> str:
    while len(module.inner) == 1 and total:
        (part, module), *_ = module.inner.items()
        name = f"{name}.{part}" if name not in ("weights", "optimizer", "other tensors") else f"{name}: {part}"
    line = bar(name, module.size, whole)
    inside = "".join(_inside(module, whole))
    return f"<details{' open' * opened}><summary>{line}</summary>{inside}</details>" if inside else f"<p>{line}</p>"


def bar(name: str, size: int, whole: int) -> str:
    """One line with a bar as long as its share of the whole."""
    share = size / whole if whole else 0.0
    return (
        f'<span class="name">{escaped(name)}</span><span class="bar"><i style="width:{100 * share:.3g}%"></i></span>'
        f"<small>{size_text(size)}, {_percent(share)}</small>"
    )


def _inside(module: Module, whole: int) -> Iterator[str]:
    layers = {name: inner for name, inner in module.inner.items() if name.isdigit()}
    rest = {name: inner for name, inner in module.inner.items() if name not in layers}
    sizes = sorted({inner.size for inner in layers.values()})
    if len(layers) > 2 or (len(layers) == 2 and len(sizes) == 1):
        each = size_text(sizes[0]) if len(sizes) == 1 else f"{size_text(sizes[0])} to {size_text(sizes[-1])}"
        size = sum(inner.size for inner in layers.values())
        lines = bar(f"{len(layers)} numbered, {each} each", size, whole)
        yield f"<details><summary>{lines}</summary>{''.join(_inside(_sum(layers), whole))}</details>"
    else:
        rest = module.inner
    shown = sorted(rest.items(), key=lambda item: -item[1].size)
    kept = [(name, inner) for name, inner in shown if inner.size >= whole * _SMALLEST][:_PARTS]
    for name, inner in kept:
        yield _bar(printable(name), inner, whole, whole)
    if small := len(shown) - len(kept):
        size = sum(inner.size for _, inner in shown) - sum(inner.size for _, inner in kept)
        yield f"<p>{bar(f'{small} smaller', size, whole)}</p>"


def _sum(layers: Mapping[str, Module]) -> Module:
    """Layers of one size as one module, their modules of one name together."""
    made = Module()
    for layer in layers.values():
        made.size += layer.size
        made.tensors += layer.tensors
        for name, inner in layer.inner.items():
            before = made.inner.get(name)
            made.inner[name] = inner if before is None else _sum({"0": before, "1": inner})
    return made


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 or not share else "< 0.1 %"
