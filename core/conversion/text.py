"""The output of a conversion: its plan for people and for programs, and the matrix of possible conversions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from ..console.commands import typed
from ..console.words import columns, listed_names, printable, size_text
from ..families.fused import FUSED
from ..inspection.report import choice_facts
from ..inspection.report_text import choice_lines
from .pairs import PAIRS, ways
from .pairs.gpt import GPT2_SHAPE
from .plan import Plan, folded
from .sharded import REASONS
from .targets import FORMATS, formats_of


def plan_facts(plan: Plan) -> dict[str, Any]:
    """The JSON document of a plan."""
    model = plan.model
    return {
        "source": str(model.path),
        "program": model.program,
        "target": str(plan.target),
        "format": plan.format,
        "bytes": plan.nbytes,
        "tensors": [
            {
                "source": list(target.view.names),
                "rule": target.rule,
                "target": target.name,
                "file": target.file,
                "shape": list(target.view.shape),
                "dtype": target.dtype,
                "bytes": target.nbytes,
            }
            for target in plan.targets
        ],
        "choices": choice_facts(model.choices),
        "dropped": {**model.dropped, **plan.aside},
        "filled": plan.filled,
        "files": [*(file.name for file in plan.files), *plan.texts, *plan.copies, *plan.texts_beside],
        "notes": model.notes,
    }


def plan_text(plan: Plan) -> Iterable[str]:
    """Write a plan for people: every tensor, those left out, and those filled in."""
    rows: list[tuple[str, ...]] = [("source", "rule", "target", "shape", "dtype", "bytes")]
    rows += [
        (_sources(t.view.names), t.rule, printable(t.name), str(t.view.shape), t.dtype, str(t.nbytes))
        for t in plan.targets
    ]
    yield from columns(rows)
    for name, reason in folded(plan.model.dropped).items():
        yield f"left out: {printable(name)} ({reason})"
    for name, what in folded(plan.filled).items():
        yield f"not from the source: {printable(name)} = {printable(what)}"
    yield from _totals(plan)


def summary(plan: Plan) -> Iterable[str]:
    """Summarize what is written, in a few lines."""
    parts = Counter(reason for reason in plan.model.dropped.values() if reason in REASONS.values())
    yield from (f"left out: {count} tensor{'s' * (count != 1)}: {reason}" for reason, count in parts.items())
    yield from _totals(plan)


def _totals(plan: Plan) -> Iterable[str]:
    model = plan.model
    for note in model.notes:
        yield printable(note if note.startswith(("contradiction: ", "WARNING: ")) else f"note: {note}")
    yield from choice_lines(choice_facts(model.choices))
    for name, what in plan.aside.items():
        yield f"left out: {printable(name)} ({printable(what)})"
    weights = [target for target in plan.targets if target.is_weight]
    moments = len(plan.targets) - len(weights)
    dtypes = dict.fromkeys(target.dtype for target in weights)
    files = [*(file.name for file in plan.files), *plan.texts, *plan.copies]
    what = f"{len(weights)} tensors" + (f" and {moments} of the optimizer" if moments else "")
    left = f"{len(model.dropped)} left out"
    if plan.aside:
        left += f", and {len(plan.aside)} other entr{'y' if len(plan.aside) == 1 else 'ies'}"
    yield f"{printable(str(model.path))}: {model.program}, {len(model.sources)} tensors, {left}"
    yield ", ".join([f"{printable(str(plan.target))}: {plan.format}", what, *dtypes, size_text(plan.nbytes)])
    if plan.is_folder:
        shown = [*files, "training_state.json"] if plan.seal is not None else files
        yield f"files: {listed_names(shown, 8)}"


def _sources(names: tuple[str, ...]) -> str:
    if len(names) > 2:
        return f"{printable(names[0])} ... {printable(names[-1])} ({len(names)})"
    return " + ".join(map(printable, names)) or "-"


def matrix() -> dict[str, list[str]]:
    """The formats to which each family can be converted."""
    families = dict.fromkeys(name for pair in PAIRS for name in (pair.theirs, pair.ours))
    made = {family: formats_of(ways(family)) for family in families}
    made[FUSED] = formats_of(ways(FUSED, lambda pair, back: pair.shape != GPT2_SHAPE))
    made[f"{FUSED}, a decoder"] = formats_of(ways(FUSED, lambda pair, back: pair.shape == GPT2_SHAPE))
    return made | {"any other tensors": formats_of(())}


def matrix_text() -> Iterable[str]:
    """Write the matrix for people."""
    names = [one.name for one in FORMATS]
    rows = [("from", *names)]
    rows += [(family, *("yes" if name in there else "-" for name in names)) for family, there in matrix().items()]
    yield from columns(rows)
    yield ""
    yield from columns([(f"--to {one.name}", typed(one.what)) for one in FORMATS])
