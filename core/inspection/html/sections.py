"""Sections: what the page says of one checkpoint, in the order in which people ask for it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...console.commands import typed
from ...console.words import size_text
from ...containers.pickles.inert import as_text
from ...containers.spec import TensorSpec
from ..inspect import Facts, Inspection
from ..report import tensors_in
from ..report_text import architecture_lines
from .curve import Curve
from .markup import box, count_text, duration_text, escaped, finite, fold, moment, pairs, table
from .sizes import bar, parts_table, sizes_of, tree
from .weights import Weights

_SHOWN = 500
"""Entries of one list."""


def header(title: str, facts: Facts) -> str:
    """What it is, and where."""
    program = facts["program"] or (f"family {facts['family']}" if facts["family"] != "unknown" else "program unknown")
    return (
        f"<header><h1>{escaped(title)}</h1><p>{escaped(facts['script'] or program)} · {escaped(facts['format'])}</p>"
        f'<p class="path">{escaped(facts["location"])}</p></header>'
    )


def summary(facts: Facts, weights: Weights, curve: Curve | None) -> Iterator[str]:
    """The numbers that matter, as tiles, and then what is wrong."""
    verified = facts.get("verification") or {}
    damaged = list(dict.fromkeys([*facts["damaged"], *verified.get("damaged", [])]))
    bad = f"{len(damaged)} fault{'s' * (len(damaged) > 1)}" if damaged else "NaN or Inf" if weights.not_finite else ""
    yield '<div class="tiles">'
    for label, value, more in [*_tiles(facts, curve), ("health", bad or "no faults", _checked(facts, weights))]:
        if value:
            kind = ' class="bad"' if value == bad else ""
            yield f"<div{kind}><small>{label}</small><b>{escaped(value)}</b><small>{more}</small></div>"
    yield "</div>"
    yield box("red", "Not only data: what loading it with pickle would run. Nothing was executed.", facts["foreign"])
    yield box("red", "Damaged", damaged)
    yield box("red", "NaN or Inf among the weights", weights.not_finite)
    yield box("amber", "Contradictions", facts["contradictions"])
    yield box("note", "Notes", [*facts["notes"], *weights.notes])


def _tiles(facts: Facts, curve: Curve | None) -> list[tuple[str, str, str]]:
    """Label, value and a note (which is markup) of each tile."""
    state, count = facts.get("training_state") or {}, facts["parameters"]
    loss, tokens, seconds = (finite(state.get(name)) for name in ("val_loss", "tokens_seen", "elapsed_seconds"))
    bare = count["without_embeddings"]
    speed = f"{count_text(tokens / seconds)} tokens a second" if tokens and seconds else ""
    step = f"{facts['step']:,}" if isinstance(facts["step"], int) else "unknown"
    return [
        ("step", step, moment(state.get("saved_at"))),
        ("validation loss", f"{loss:.4f}" if loss is not None else "", _loss_said(loss, facts, curve)),
        ("tokens", count_text(tokens) if tokens else "", "seen in training"),
        ("time", duration_text(seconds) if seconds else "", speed),
        ("parameters", count_text(count["total"]), f"{count_text(bare)} without embeddings" * (bare != count["total"])),
        ("size", size_text(facts["bytes"]), f"{len(facts['files'])} files" if len(facts["files"]) > 1 else "1 file"),
        ("dtype", escaped(next(iter(facts["dtypes"]), "none")), escaped(", ".join(list(facts["dtypes"])[1:4]))),
    ]


def _loss_said(loss: float | None, facts: Facts, curve: Curve | None) -> str:
    """What a loss means: perplexity, the loss of a uniform guess, and the best step."""
    said = [f"perplexity {math.exp(loss):,.4g}"] if loss is not None and loss < 50 else []
    vocabulary = vocabulary_of(facts)
    said += [f"a uniform guess: {math.log(vocabulary):.2f}"] if vocabulary else []
    best = (facts.get("training_state") or {}).get("best")
    value, step = (best.get("val_loss"), best.get("step")) if isinstance(best, dict) else (None, None)
    if finite(value) is None or type(step) is not int:
        step, value = curve.best if curve and curve.best else (None, None)
    if value is not None and step is not None:
        said.append("the best so far" if step == facts["step"] else f"best: {value:.4f} at step {step:,.0f}")
    return " · ".join(said)


def vocabulary_of(facts: Facts) -> int:
    """How many tokens there are to guess from; 0 where nothing says."""
    tokenizer = facts.get("tokenizer")
    if isinstance(tokenizer, dict) and isinstance(tokenizer.get("chars"), list):
        return len(tokenizer["chars"])
    for place in (tokenizer, facts.get("architecture")):
        size = place.get("vocab_size") if isinstance(place, dict) else None
        if type(size) is int and 1 < size < 1 << 31:
            return size
    return 0


def _checked(facts: Facts, weights: Weights) -> str:
    """What was checked of it."""
    verified = facts.get("verification") or {}
    if verified.get("checked_bytes"):
        return f"{size_text(verified['checked_bytes'])} compared with checksums; {len(weights.stats)} tensors read"
    recorded = facts["health"]["recorded_bytes"]
    said = f"checksums for {size_text(recorded)}, not compared" if recorded else "no checksums are recorded"
    return f"{len(weights.stats)} tensors read; {said}"


def size_section(found: Inspection) -> Iterator[str]:
    """Bytes by part of the model, and by module."""
    tops = sizes_of(found)
    if not tops:
        return
    yield '<section id="sizes"><h2>Size by module</h2><div class="sizes">'
    parts = parts_table(found.weights)
    whole = sum(size for _, size, _ in parts)
    yield "".join(f"<p>{bar(part, size, whole)}</p>" for part, size, _ in parts if size)
    yield f'</div><p class="said">By part of the model, of {size_text(whole)} of weights; by module, of everything:</p>'
    yield f'{tree(tops)}<p class="said">Tensors that share their bytes count once.</p></section>'


def weights_sections(weights: Weights) -> Iterator[str]:
    """Norms by layer, and histograms."""
    if norms := weights.norms():
        yield f'<section id="norms"><h2>Norms by layer</h2>{norms}</section>'
    if shapes := "".join(weights.histograms()):
        yield f'<section id="histograms"><h2>Histograms</h2>{shapes}'
        yield '<p class="said">Each is drawn to the height of its own peak; the line marks zero.</p></section>'


def origin_section(facts: Facts) -> Iterator[str]:
    """How it was trained: data, seed, settings, versions, and the commands to go on."""
    state = facts.get("training_state") or {}
    groups = {
        "Data": state.get("data"),
        "Settings": state.get("training"),
        "Learning rate": state.get("schedule"),
        "Versions and device": state.get("environment"),
    }
    content = [
        fold(title, pairs(list(values.items())[:_SHOWN]), note=str(len(values)), opened=title != "Learning rate")
        for title, values in groups.items()
        if isinstance(values, dict) and values
    ]
    if "training_state" not in facts:
        return
    folder = Path(facts["location"])
    if folder.is_dir() and not folder.name.startswith("step_"):
        root = "" if str(folder.parent) == "checkpoints" else f" --checkpoint_root {shlex.quote(str(folder.parent))}"
        name = f"--model_name {shlex.quote(folder.name)}{root}"
        more = 2 * facts["step"] if isinstance(facts["step"], int) else 1000
        lines = (f"{typed('python generate.py')} {name}", f"{typed('python train.py')} {name} --max_iters {more}")
        content.insert(0, f"<p>To go on:</p><pre>{escaped(lines[0])}\n{escaped(lines[1])}</pre>")
    if command := state.get("command"):
        line = f"{typed('python train.py')} {shlex.join(command[1:])}"
        content.insert(0, f"<p>The command that saved this step:</p><pre>{escaped(line)}</pre>")
    seed = state.get("seed")
    said = f"<p>Seed {escaped(as_text(seed, 40))}, run {escaped(state.get('run') or 'unknown')}.</p>"
    yield f'<section id="origin"><h2>How it was trained</h2>{said}{"".join(content)}</section>'


def details_section(facts: Facts) -> Iterator[str]:
    """Architecture, config and the other content of the files, behind folds."""
    yield '<section id="config"><h2>What it is</h2>'
    if facts["architecture"] is not None:
        yield "".join(f"<p>{escaped(line)}</p>" for line in architecture_lines(facts["architecture"]))
    else:
        yield f"<p>Family unknown: {escaped(facts['reason'])}</p>"
    state = {k: v for k, v in (facts.get("training_state") or {}).items() if k != "integrity"}
    groups: list[tuple[str, Iterable[tuple[str, Any]]]] = [
        ("Config", (facts["config"] or {}).items()),
        ("Tokenizer", (facts.get("tokenizer") or {}).items()),
        ("Training state", state.items()),
        ("Content", ((k, _content_line(v)) for k, v in (facts.get("content") or {}).items())),
        ("Files", ((name, size_text(size)) for name, size in facts["files"].items())),
    ]
    for title, values in groups:
        if listed := list(values):
            yield fold(title, pairs(listed[:_SHOWN]), note=str(len(listed)))
    if kept := facts.get("history"):
        rows = (
            (f"{k['step']:,}", escaped(as_text(k["val_loss"])), size_text(k["bytes"]), moment(k["saved_at"]))
            for k in kept[:_SHOWN]
        )
        yield fold(
            "Kept steps", table(("step", "validation loss", "size", "saved"), rows, "kept steps"), note=str(len(kept))
        )
    yield "</section>"


def _content_line(value: Any) -> str:
    tensors = list(tensors_in(value))
    if isinstance(value, TensorSpec) or not tensors:
        return as_text(value, 200)
    return f"{len(tensors)} tensors, {size_text(sum(t.nbytes for t in tensors))}"


def tensor_section(count: int) -> Iterator[str]:
    """The place of the table of tensors, which the page's script fills."""
    if count:
        yield f'<section id="table"><h2>Tensors <small>{count:,}</small></h2><input id="search" type="search" '
        yield 'placeholder="search: words of a name, a dtype, a shape" aria-label="search tensors">'
        yield '<p class="said" id="found" role="status"></p><div class="scroll" tabindex="0" role="region" '
        yield 'aria-label="tensors"><table id="tensors"></table></div>'
        yield '<button id="more" type="button" hidden>Show more</button>'
        listing = escaped(typed("inspect_model.py --tensors"))
        yield f"<noscript><p>The table needs JavaScript; `{listing}` lists it.</p></noscript></section>"
