"""Match the table of a family with the names and shapes of a file, and measure sizes from the shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import islice

from ..console.words import listed_names
from .family import WRAPPERS, Family, Shape, Sides, parse, plain_names

_NUMBER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]{0,5})(?![^.])")
_VARIABLE = re.compile(r"\{[ijn]\}")
_MANY = 20  # numbers listed in a sentence
_MOST = 10_000  # missing names listed: names of a few layers and heads ask for their product


@dataclass(eq=False, repr=False)
class Measure:
    """The value of a word of the table, and the tensor that shows it."""

    value: int
    name: str
    shape: Shape


@dataclass(eq=False, repr=False)
class Match:
    """The row of a family's table for each tensor of a file, and the tensors that do not fit."""

    family: Family
    rows: dict[str, str] = field(default_factory=dict)  # name in the file: row of the table
    places: dict[str, str] = field(default_factory=dict)  # name in the file: the family's name for it
    buffers: dict[str, str] = field(default_factory=dict)  # name in the file: what it is
    unplaced: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    measures: dict[str, Measure] = field(default_factory=dict)
    switches: dict[str, bool] = field(default_factory=dict)
    layers: set[int] = field(default_factory=set)
    lost: list[str] = field(default_factory=list)  # required rows that no layer has
    extra: list[str] = field(default_factory=list)  # tensors in layers that the table lacks
    unfit: int = 0  # tensors whose shape differs from the table's
    gated: bool = False
    prefix: str = ""

    @property
    def words(self) -> set[str]:
        """Words in the shapes of the existing tensors."""
        sides = (parse(text) for row in set(self.rows.values()) for text in self.family.tensors[row])
        return {word for side in sides for word in (side.symbol, side.more) if word}

    @property
    def placed(self) -> int:
        """Number of tensors that have a place, buffers too."""
        return len(self.rows) + len(self.buffers)


def skeleton(name: str) -> str:
    """Write `#` for every number of a name: `h.11.ln_1.weight` becomes `h.#.ln_1.weight`."""
    return _NUMBER.sub("#", name.replace("#", "##"))


def in_order(names: Iterable[str], family: Family) -> list[str]:
    """Sort the names of a family as in its table: those before the layers, those of each layer, those after."""
    rows = [(skeleton(row.replace("{i}", "0").replace("{j}", "0")), "{i}" in row) for row in family.tensors]
    first = next((k for k, (_, is_layer) in enumerate(rows) if is_layer), len(rows))
    place = {row: (1 if is_layer else 0 if k < first else 2, k) for k, (row, is_layer) in enumerate(rows)}

    def key(name: str) -> tuple[int, int, int]:
        part, k = place.get(skeleton(name), (2, len(rows)))
        layer = re.search(r"(?<![^.])\d+(?![^.])", name)
        return part, int(layer[0]) if part == 1 and layer else 0, k

    return sorted(names, key=key)


@cache
def index(family: str, rows: tuple[str, ...], base: str) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """Map the skeleton of each row, without what wrappers add, to the rows and the meaning of their numbers."""
    found: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    plain = plain_names(rows)
    plain |= {name.removeprefix(base): row for name, row in plain.items()}
    for name, row in plain.items():
        numbers = re.findall(r"(?<![^.])(?:\{[ijn]\}|[0-9]+)(?![^.])", name)
        found.setdefault(skeleton(_VARIABLE.sub("0", name)), []).append((row, tuple(numbers)))
    return found


Numbered = tuple[str, list[str]]
"""The skeleton of a name, and its numbers."""


def numbered(name: str) -> Numbered:
    """Take the numbers out of a name."""
    return skeleton(name), _NUMBER.findall(name)


def find(name: Numbered, rows: Mapping[str, list[tuple[str, tuple[str, ...]]]]) -> tuple[str, dict[str, int]] | None:
    """Find the row of a plain name, with its numbers `{i}`, `{j}`, `{n}`."""
    numbers = name[1]
    for row, wanted in rows.get(name[0], ()):
        if all(w in ("{i}", "{j}", "{n}", n) for w, n in zip(wanted, numbers, strict=True)):
            return row, {w: int(n) for w, n in zip(wanted, numbers, strict=True) if w[0] == "{"}
    return None


def _rows(family: Family) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    return index(family.name, tuple(family.tensors), family.base)


def match(
    family: Family, plain: Mapping[str, str], numbers_of: Mapping[str, Numbered], shapes: Mapping[str, Shape]
) -> Match:
    """Match the table of a family with plain names (each with its name in the file) and their shapes."""
    found = Match(family)
    rows = _rows(family)
    buffers = index(family.name, tuple(n for n in family.buffers if n[0] != "*"), family.base)
    endings = {name[1:]: reason for name, (_, reason) in family.buffers.items() if name[0] == "*"}
    sides: dict[str, Sides] = {}
    heads: set[int] = set()
    for name, original in plain.items():
        if place := find(numbers_of[name], rows):
            row, numbers = place
            found.rows[original] = row
            found.places[original] = _filled(row, numbers)
            sides[original] = family.tensors[row]
            if "{i}" in numbers:
                found.layers.add(numbers["{i}"])
            if "{j}" in numbers:
                heads.add(numbers["{j}"])
        elif place := find(numbers_of[name], buffers):
            wanted, reason = family.buffers[place[0]]
            found.buffers[original] = reason
            if wanted:
                sides[original] = wanted
        elif ending := next((e for e in endings if name.endswith(e)), None):
            found.buffers[original] = endings[ending]
        else:
            found.unplaced.append(original)
    present = set(found.rows.values())
    found.switches = {switch: bool(present & set(names)) for switch, names in family.switches.items()}
    found.switches |= dict.fromkeys(family.always, True)
    found.prefix = _prefix(found, plain)
    _count(found, "{j}", heads, "n_head", "heads")
    extra = _extra(found, plain)
    found.extra = list(extra)
    found.layers |= set(extra.values())
    _count(found, "{i}", found.layers, "n_layer", "layers")
    alike: dict[tuple[Sides, Shape], list[str]] = {}  # there are many tensors, and few kinds of them
    for name, wanted in sides.items():
        alike.setdefault((wanted, tuple(shapes[name])), []).append(name)
    _measure(found, alike)
    told = _compare(found, alike)
    found.conflicts += [told[name] for name in sides if name in told]
    found.unfit = len(told)
    _gate(found)
    _complete(found)
    return found


def _filled(row: str, numbers: Mapping[str, int]) -> str:
    for letter, number in numbers.items():
        row = row.replace(letter, str(number))
    return row


def _extra(found: Match, plain: Mapping[str, str]) -> dict[str, int]:
    """Tensors in layers that the table lacks, and the layer of each: the last layers may be of another kind."""
    layered = (name for name, rows in _rows(found.family).items() if any("{i}" in row for row, _ in rows))
    starts = [re.escape(stem) for stem in {name.split("#")[0] for name in layered}]
    pattern = re.compile(f"(?:{'|'.join(sorted(starts))})(0|[1-9][0-9]{{0,5}})\\.")
    names, wanted = {original: name for name, original in plain.items()}, found.unplaced if starts else ()
    return {original: int(m[1]) for original in wanted if (m := pattern.match(names[original]))}


def _prefix(found: Match, plain: Mapping[str, str]) -> str:
    """The prefix that most names have before the family's own names."""
    seen: dict[str, int] = {}
    for original, place in found.places.items():
        prefix = _before(original, place)
        seen[prefix] = seen.get(prefix, 0) + 1
    return max(seen, key=lambda prefix: (seen[prefix], len(prefix)), default="")


def _before(name: str, place: str) -> str:
    if name.endswith(place) and (name == place or name[-len(place) - 1] == "."):
        return name[: len(name) - len(place)]
    words = name.split(".")
    wrapped = next((k for k, word in enumerate(words) if word not in WRAPPERS), 0)
    own = next((k for k, word in enumerate(place.split(".")) if word not in WRAPPERS), 0)
    return "".join(f"{word}." for word in (words[: wrapped - own] if own <= wrapped else words[:wrapped]))


def _count(found: Match, letter: str, numbers: set[int], word: str, plural: str) -> None:
    """Measure a size that names count, if no number in between is absent."""
    if not numbers:
        return
    if len(numbers) == max(numbers) + 1:
        name = next((name for name, row in found.rows.items() if letter in row), "")
        found.measures[word] = Measure(len(numbers), name, ())
    else:
        there = sorted(numbers)
        shown = listed_names(there, _MANY)
        found.conflicts.append(f"{plural} {shown} are there, {max(numbers) + 1 - len(numbers)} in between are not")


def _measure(found: Match, alike: Mapping[tuple[Sides, Shape], list[str]]) -> None:
    """Let every side of every tensor vote on the size it measures; most votes win, the first among equals."""
    # Two passes: a side such as `q_size + 2 kv_size` measures its second word only when the first is known, and in one
    # pass that would depend on the order of the names in the file. So plain sides vote first, sums afterwards.
    for sums in (False, True):
        votes: dict[str, dict[int, tuple[int, str]]] = {}
        shape_of: dict[str, Shape] = {}
        for (wanted, shape), names in alike.items():
            if len(shape) != len(wanted):
                continue
            shape_of[names[0]] = shape
            for text, size in zip(wanted, shape, strict=True):
                side = parse(text)
                word, value, times = side.symbol, size * side.over, side.times
                if bool(side.more) is not sums or side.least or not word:
                    continue
                if side.more:
                    if word not in found.measures:
                        continue
                    word, value, times = side.more, size - found.measures[word].value, 2
                if word not in found.measures and value >= 0 and value % times == 0:
                    count, first = votes.setdefault(word, {}).get(value // times, (0, names[0]))
                    votes[word][value // times] = count + len(names), first
        for word, values in votes.items():
            value = max(values, key=lambda v: values[v][0])
            found.measures[word] = Measure(value, values[value][1], shape_of[values[value][1]])


def _compare(found: Match, alike: Mapping[tuple[Sides, Shape], list[str]]) -> dict[str, str]:
    """What is wrong with the shapes that differ from those of the table for the measured sizes, by name."""
    told: dict[str, str] = {}
    known = {word: measure.value for word, measure in found.measures.items()}
    for (wanted, shape), names in alike.items():
        if len(shape) != len(wanted):
            sides = f"{len(wanted)} sides: {' x '.join(wanted)}"
            told |= {name: f"{name} is {shape}, expected {sides}" for name in names}
            continue
        expected, wrong = list[int | str](shape), ""
        for k, text in enumerate(wanted):
            side, value = parse(text), parse(text).value(known)
            if value is None and side.more and side.symbol in known:  # no size of the keys fits any of them
                expected[k], wrong = f"{known[side.symbol]} + an even number", wrong or side.symbol
            elif value is not None and value != shape[k] and not (side.least and shape[k] > value):
                expected[k], wrong = value, wrong or side.more or side.symbol or text
        if wrong:
            shown = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
            said = f"expected ({shown}){_because(found, wrong)}"
            told |= {name: f"{name} is {shape}, {said}" for name in names}
    return told


def _because(found: Match, word: str) -> str:
    if (measure := found.measures.get(word)) is None:
        return ""
    witness = f"{measure.name} {measure.shape}" if measure.shape else f"the layers of {measure.name} and similar names"
    return f", for {word} is {measure.value} by {witness}"


def _gate(found: Match) -> None:
    """Find out whether the feed-forward part is gated: gate and up in one tensor have twice its rows."""
    fused, n_ffn = found.measures.get("fc1_rows"), found.measures.get("n_ffn")
    found.gated = bool(found.family.gated) or found.switches.get("mlp_type", False)
    if fused and n_ffn:
        found.gated = fused.value == 2 * n_ffn.value
        if fused.value not in (n_ffn.value, 2 * n_ffn.value):
            expected = f"expected {n_ffn.value} rows, or {2 * n_ffn.value} where it is gated"
            found.conflicts.append(f"{fused.name} is {fused.shape}, {expected}{_because(found, 'n_ffn')}")


def _complete(found: Match) -> None:
    """List tensors of the table that the file lacks; tensors of one group may be absent together."""
    family, there = found.family, set(found.places.values())
    found.lost = [row for row in _needed(found) if "{i}" in row and row not in found.rows.values()]
    lacked = [name for i, start in family.without.items() for name in there if name.startswith(start.format(i=i))]
    found.conflicts += [f"{name} is there, but this program has none in that layer" for name in lacked]
    bare = bool(family.base) and not any(family.base in name for name in found.places)
    names = (name.removeprefix(family.base) if bare else name for name in _expected(found) if name not in there)
    found.missing = [found.prefix + name for name in islice(names, _MOST)]


def _expected(found: Match) -> Iterator[str]:
    family = found.family
    heads = range(found.measures["n_head"].value) if "n_head" in found.measures else range(1)
    for row in _needed(found):
        for i in sorted(found.layers) if "{i}" in row else (0,):
            if not (i in family.without and row.startswith(family.without[i])):
                name = row.replace("{i}", str(i))
                yield from (name.replace("{j}", str(j)) for j in heads) if "{j}" in row else (name,)


def _needed(found: Match) -> list[str]:
    family = found.family
    off = {name for switch, names in family.switches.items() if not found.switches[switch] for name in names}
    return [row for row in family.tensors if row not in off and row not in family.some]
