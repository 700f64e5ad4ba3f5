"""One HTML page about a checkpoint: a single file that needs no network, and runs nothing from the checkpoint."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...bundle.storage import DISK
from ...console.files import open_regular
from ...console.words import printable, size_text
from ...containers.pickles.inert import as_text
from ...containers.spec import TensorSpec
from ...errors import CheckpointError, InputError
from ..inspect import Inspection
from ..report import Facts, tensors_in
from ..report_text import age, architecture_lines
from ..statistics import Histogram, Stat, histogram, statistics
from .curve import Curve, curve_beside

Progress = Callable[[int], object]

BINS = 60
"""Bins of a histogram."""

_KINDS, _LAYERS, _TILES = 300, 200, 1500
"""Limits of the plots: kinds of tensors, layers of each, and tiles in the plot of sizes."""

_START = b"<!doctype html>\n<!-- made by inspect_model.py -->"
"""The mark of a page of ours: no other file is ever replaced."""


def write_page(
    file: Path, found: Inspection, facts: Facts, *, overwrite: bool = False, progress: Progress = lambda size: None
) -> None:
    """Write everything known about a checkpoint as a page; its weights are read twice, for statistics and histograms.

    `progress` receives the number of bytes read. The page appears complete or not at all.

    Raises: InputError when the file exists and must not be replaced, is not such a page, or cannot be written, and when
        plotly is missing.
    """
    library = _plotly()
    _refuse(file, overwrite)
    data = page(found, facts, library, progress).encode(errors="backslashreplace")
    try:
        with DISK.published(file, replace=overwrite) as part:
            DISK.write(part, data)
            _refuse(file, overwrite)  # again: it may have appeared in the meantime
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror}). Nothing was changed.") from error


def _refuse(file: Path, overwrite: bool) -> None:
    """Refuse to replace a file that is not a page of ours, or, without `overwrite`, one that is."""
    try:
        if not file.parent.is_dir():
            raise InputError(f"{file}: there is no folder {file.parent}. Create it first.")
        if not file.exists() and not file.is_symlink():
            return
        if not file.is_file() or not _begins_as_page(file):
            raise InputError(f"{file}: exists and is not a page of this program, so it stays. Give another name.")
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{printable(str(file))}: cannot be written ({reason}). Give another name.") from error
    if not overwrite:
        raise InputError(f"{file}: already exists. Give another name, or --overwrite to replace it.")


def _begins_as_page(file: Path) -> bool:
    with open_regular(file) as there:
        return there.read(len(_START)) == _START


def _plotly() -> str:
    """The JavaScript of plotly, from the Python package that contains it.

    Raises: InputError when it is not installed.
    """
    try:
        return importlib.import_module("plotly.offline").get_plotlyjs()
    except ImportError as error:
        raise InputError(
            "--html draws with plotly, which is not installed. Run `pip install plotly` (or `pip install '.[html]'`)."
        ) from error


def page(found: Inspection, facts: Facts, library: str, progress: Progress = lambda size: None) -> str:
    """The page as text; `library` is the JavaScript of plotly."""
    weights = _Weights(found, progress)
    curve = curve_beside(found.path) if found.bundle is not None else None
    tree = _tree(found.container.tensors, found.size)
    data = {
        "curve": curve.points() if curve else None,
        "tree": tree,
        "kinds": weights.kinds,
        "table": weights.rows(facts["tensors"], "" if found.bundle else found.key),
        "step": facts["step"],
    }
    here = Path(__file__)
    scripts = [library.replace("\r", ""), here.with_suffix(".js").read_text("utf-8")]
    allowed = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    title = Path(facts["location"]).absolute().name or facts["location"]
    return "\n".join(
        [
            _START.decode(),
            '<html lang="en">',
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_e(title)}</title>",
            f"<style>\n{here.with_suffix('.css').read_text('utf-8')}</style>",
            *_summary(title, facts, weights),
            *_details(facts),
            *_curve_section(curve, found),
            *_size_section(tree),
            *weights.section(),
            *_table_section(data["table"]),
            "<footer>Written by <code>inspect_model.py --html</code>, drawn by "
            '<a href="https://plotly.com/javascript/">plotly.js</a> (MIT license), which is part of this file. '
            "Nothing of the checkpoint was executed.</footer>",
            f'<script type="application/json" id="data">{_json(data)}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</html>\n",
        ]
    )


def _e(value: Any) -> str:
    """Escape any text of a checkpoint as text of a page."""
    return html.escape(printable(str(value)))


def _json(value: Any) -> str:
    """JSON that cannot end the script element that contains it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _number(value: float | None) -> float | None:
    """A number rounded to six digits; None for one that JSON lacks."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def _rows(pairs: Iterable[tuple[str, Any]]) -> str:
    texts = [(str(key), value if isinstance(value, str) else as_text(value, 400)) for key, value in pairs]
    return "".join(
        f'<div class="{"wide" if len(key + text) > 30 else ""}"><dt>{_e(key)}</dt><dd>{_e(text)}</dd></div>'
        for key, text in texts
    )


def _summary(title: str, facts: Facts, weights: _Weights) -> Iterator[str]:
    """The header: what it is, and its faults."""
    program = facts["program"] or (f"family {facts['family']}" if facts["family"] != "unknown" else "program unknown")
    yield f"<header><h1>{_e(title)}</h1><p>{_e(facts['script'] or program)} · {_e(facts['format'])}</p>"
    yield f'<p class="path">{_e(facts["location"])}</p></header>'
    state, count, health = facts.get("training_state") or {}, facts["parameters"], facts["health"]
    loss, saved = state.get("val_loss"), state.get("saved_at")
    recorded = health["recorded_bytes"]
    bare = count["without_embeddings"]
    verified = facts.get("verification") or {}
    damaged = [*facts["damaged"], *verified.get("damaged", [])]
    health_text = "headers read; " + (f"checksums for {size_text(recorded)}" if recorded else "no checksums recorded")
    if verified:
        health_text = f"{size_text(verified['checked_bytes'])} compared with checksums"
    bad = f"{len(damaged)} fault{'s' * (len(damaged) > 1)}" if damaged else "NaN or Inf" if weights.not_finite else ""
    tiles = [
        ("step", f"{facts['step']:,}" if facts["step"] is not None else "unknown", age(saved) if saved else ""),
        ("validation loss", f"{loss:.4f}" if isinstance(loss, (int, float)) else "", ""),
        ("parameters", _short(count["total"]), f"{_short(bare)} without embeddings" if bare != count["total"] else ""),
        ("size", size_text(facts["bytes"]), f"{len(facts['files'])} files" if len(facts["files"]) > 1 else "1 file"),
        ("dtype", next(iter(facts["dtypes"]), "none"), ", ".join(list(facts["dtypes"])[1:4])),
        ("health", bad or "no faults", health_text),
    ]
    yield '<div class="tiles">'
    for label, value, more in tiles:
        if value:
            kind = "bad" if value == bad else ""
            yield f'<div class="{kind}"><small>{label}</small><b>{_e(value)}</b><small>{_e(more)}</small></div>'
    yield "</div>"
    yield _box("red", "Not only data: what loading it with pickle would run. Nothing was executed.", facts["foreign"])
    yield _box("red", "Damaged", damaged)
    yield _box("red", "NaN or Inf among the weights", weights.not_finite)
    yield _box("amber", "Contradictions", facts["contradictions"])
    yield _box("note", "Notes", [*facts["notes"], *weights.notes])


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.{1 if count >= 100 * size else 2}f} {unit}"
    return str(count)


def _box(kind: str, title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{_e(line)}</li>" for line in lines[:20])
    more = f"<li>and {len(lines) - 20} more</li>" if len(lines) > 20 else ""
    return f'<aside class="{kind}"><strong>{_e(title)}</strong><ul>{items}{more}</ul></aside>'


def _details(facts: Facts) -> Iterator[str]:
    """Architecture, config and the other content of the files."""
    yield "<section><h2>What it is</h2>"
    if facts["architecture"] is not None:
        yield "".join(f"<p>{_e(line)}</p>" for line in architecture_lines(facts["architecture"]))
    else:
        yield f"<p>Family unknown: {_e(facts['reason'])}</p>"
    state = {k: v for k, v in (facts.get("training_state") or {}).items() if k != "integrity"}
    content = {k: _content_line(v) for k, v in (facts.get("content") or {}).items()}
    files = [(name, size_text(size)) for name, size in facts["files"].items()]
    kept = [
        (f"step {k['step']}", f"val_loss {as_text(k['val_loss'])}, {size_text(k['bytes'])}, {age(k['saved_at'])}")
        for k in facts.get("history") or []
    ]
    groups: list[tuple[str, Iterable[tuple[str, Any]]]] = [
        ("Config", (facts["config"] or {}).items()),
        ("Tokenizer", (facts.get("tokenizer") or {}).items()),
        ("Training state", state.items()),
        ("Content", content.items()),
        ("Files", files),
        ("Kept steps", kept),
    ]
    for title, pairs in groups:
        if pairs := list(pairs):
            opened = " open" if title == "Config" and len(pairs) <= 16 else ""
            yield f"<details{opened}><summary>{title} <small>{len(pairs)}</small></summary>"
            yield f"<dl>{_rows(pairs[:500])}</dl></details>"
    yield "</section>"


def _content_line(value: Any) -> str:
    tensors = list(tensors_in(value))
    if isinstance(value, TensorSpec) or not tensors:
        return as_text(value, 200)
    return f"{len(tensors)} tensors, {size_text(sum(t.nbytes for t in tensors))}"


def _curve_section(curve: Curve | None, found: Inspection) -> Iterator[str]:
    if curve is not None:
        plot = '<div id="curve" class="plot"></div>' if len(curve.loss.x) or len(curve.val_loss.x) else ""
        yield f'<section><h2>Training</h2>{plot}<p class="said">{_e(curve.said)}</p></section>'
    elif found.bundle is not None:
        yield '<section><h2>Training</h2><p class="said">No metrics.jsonl lies beside it.</p></section>'


def _size_section(tree: list[list[Any]]) -> Iterator[str]:
    if tree[0][2]:
        yield '<section><h2>Size by module</h2><div id="tree" class="plot"></div>'
        yield '<p class="said">A click goes into a module. Tensors that share their bytes count once.</p></section>'


def _tree(tensors: Mapping[str, TensorSpec], size: int) -> list[list[Any]]:
    """Modules by bytes: rows of label, parent's row (-1: none), bytes, and the full name."""
    root: dict[str, Any] = {"size": 0, "parts": {}}
    seen = set()
    for name, tensor in tensors.items():
        place = (tensor.file, tensor.storage, tensor.offset, tensor.shape, tensor.chunks)
        if place in seen:
            continue
        seen.add(place)
        node, nbytes = root, min(tensor.nbytes, size)
        node["size"] += nbytes
        for part in name.split(".", 8):
            node = node["parts"].setdefault(part, {"size": 0, "parts": {}})
            node["size"] += nbytes
    rows: list[list[Any]] = [["all tensors", -1, root["size"], "all tensors"]]
    pending = [(root, 0, "")]
    while pending:
        node, row, prefix = pending.pop()
        small = [0, 0]
        for part, inner in node["parts"].items():
            if inner["size"] * _TILES < root["size"]:
                small = [small[0] + 1, small[1] + inner["size"]]
                continue
            name, label = prefix + part, f"{rows[row][0]}.{part}" if part.isdigit() and row else part
            while len(inner["parts"]) == 1:
                (part, inner), *_ = inner["parts"].items()
                name, label = f"{name}.{part}", f"{label}.{part}"
            rows.append([label, row, inner["size"], name])
            pending.append((inner, len(rows) - 1, f"{name}."))
        if small[1]:
            rows.append([f"{small[0]} smaller", row, small[1], f"{prefix}*"])
    return rows


class _Weights:
    """Statistics and histograms of a model's tensors, those of all layers of a kind together."""

    def __init__(self, found: Inspection, progress: Progress) -> None:
        self.stats: dict[str, Stat] = {}
        self.kinds: list[dict[str, Any]] = []
        self.not_finite: list[str] = []
        self.notes: list[str] = []
        kinds: dict[str, list[list[Any]]] = {}
        for name in found.weights:
            try:
                stat = next(statistics(found.container, [found.key + name], progress))
                self.stats[name] = stat
                if stat.nan or stat.inf:
                    self.not_finite.append(f"{name}: {stat.nan:,} NaN, {stat.inf:,} Inf of {stat.count:,}")
                kind, layer = _kind(name)
                layers = kinds.setdefault(kind, []) if kind in kinds or len(kinds) < _KINDS else None
                if layers is None or len(layers) >= _LAYERS or stat.note:
                    continue
                shape = histogram(found.container, found.container.tensors[found.key + name], BINS, stat)
                progress(found.container.tensors[found.key + name].nbytes)
                layers.append([layer, _rms(stat), _number(stat.norm), *_bins(shape)])
            except CheckpointError as error:
                self.notes.append(str(error))
        self.kinds = [
            {"name": name, "layers": sorted(layers, key=lambda item: (item[0] is not None, item[0]))}
            for name, layers in kinds.items()
            if layers
        ]

    def section(self) -> Iterator[str]:
        """The elements for the plots of the weights."""
        if self.kinds:
            yield '<section><h2>Weights</h2><div id="norms" class="plot"></div>'
            yield '<p><label>Histograms of <select id="kind"></select></label></p>'
            yield '<div id="histograms" class="plot"></div>'
            yield '<p class="said">Each layer is drawn to the height of its own peak.</p></section>'

    def rows(self, tensors: list[Facts], key: str) -> list[list[Any]]:
        """The rows of the table; `key` precedes the names of the weights there."""
        rows = []
        for t in tensors:
            shape = " x ".join(str(n) for n in t["shape"])
            row = [printable(t["name"]), shape, math.prod(t["shape"]), t["dtype"], t["bytes"]]
            stat = self.stats.get(t["name"].removeprefix(key)) if t["name"].startswith(key) else None
            if stat is not None:
                numbers = [_number(v) for v in (stat.mean, stat.std, stat.min, stat.max)]
                row += [*numbers, _rms(stat), _number(stat.zero_fraction), stat.nan + stat.inf]
            rows.append(row)
        return rows


def _kind(name: str) -> tuple[str, int | None]:
    """A name with {i} in place of its first number, and that number."""
    match = re.search(r"(?<![^.])\d{1,9}(?![^.])", name)
    if match is None:
        return printable(name), None
    return printable(f"{name[: match.start()]}{{i}}{name[match.end() :]}"), int(match[0])


def _rms(stat: Stat) -> float | None:
    """The root mean square: a norm that is comparable between tensors of different sizes."""
    finite = stat.count - stat.nan - stat.inf
    return _number(stat.norm / math.sqrt(finite)) if finite else None


def _bins(shape: Histogram | None) -> list[Any]:
    return [_number(shape.low), _number(shape.high), shape.counts] if shape is not None else [None, None, None]


def _table_section(rows: list[list[Any]]) -> Iterator[str]:
    if rows:
        yield f'<section><h2>Tensors <small>{len(rows):,}</small></h2><input id="search" type="search" '
        yield 'placeholder="search: words of a name, a dtype, a shape" aria-label="search tensors">'
        yield '<p class="said" id="found" role="status"></p><div class="scroll"><table id="tensors"></table></div>'
        yield '<button id="more" type="button" hidden>Show more</button>'
        yield "<noscript><p>The table and the plots need JavaScript.</p></noscript></section>"
