"""The facts of a checkpoint for people: one screen, line by line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..console.words import columns, listed_names, printable, size_text
from ..containers.pickles.inert import as_text
from ..containers.spec import TensorSpec
from ..containers.step_parents import steps_below
from ..families.fused import LECTURE
from .inspect import Facts
from .report import tensors_in
from .tensor_table import each, grouped

_NUMBERS = ("min", "max", "mean", "std")

_SHOWN = 60
"""Rows of tensors on the first screen; --tensors lists all."""


_ENTRIES = 500
"""Entries of a file's content on the first screen; a state dict has its tensors in another section."""


def text_of(facts: Facts, all_tensors: bool = False) -> Iterable[str]:
    """Write the facts of one checkpoint."""
    yield "=== FORMAT ==="
    if facts["script"]:
        yield f"Format: {facts['script']}"
    yield facts["format"]
    yield f"Location: {printable(facts['location'])}"
    if facts["family"] == LECTURE and "training_state" in facts:
        yield "Lecture-style names, one layer per head: opens as it is, and gets our names at the next save"
    if facts["program"] and "training_state" not in facts:
        yield f"Program: {facts['program']}"
    if facts["step"] is not None and "training_state" not in facts:
        yield f"Step: {facts['step']}"
    if facts["config"] is not None:
        fields = ", ".join(f"{printable(str(k))}:{_value(v)}" for k, v in facts["config"].items())
        yield from ("", "=== CONFIG ===", fields)
        yield from (f"contradiction: {printable(sentence)}" for sentence in facts["contradictions"])
    if "training_state" in facts:
        yield from _of_ours(facts)
    if "content" in facts:
        yield from ("", "=== CONTENT ===")
        shown = itertools.islice(facts["content"].items(), _ENTRIES)
        yield from columns([(printable(str(k)), ":", _content_line(v)) for k, v in shown])
        if (more := len(facts["content"]) - _ENTRIES) > 0:
            yield f"... and {more} more entries, which --json has too"
    yield from _parameters(facts)
    if facts["architecture"] is not None:
        yield from ("", "=== ARCHITECTURE ===", *architecture_lines(facts["architecture"]))
    if facts["choices"]:
        yield from ("", "=== CHOICES ===", *choice_lines(facts["choices"]))
    if facts["config"] is None:
        yield from (f"contradiction: {printable(sentence)}" for sentence in facts["contradictions"])
    if facts["family"] == "unknown" and facts["tensors"]:
        yield from ("", "=== FAMILY ===", f"unknown: {printable(facts['reason'])}")
    yield from ("", "=== FILES ===")
    yield from columns([(printable(name), size_text(size)) for name, size in facts["files"].items()])
    yield _health(facts)
    yield from (f"note: {printable(note)}" for note in facts["notes"])
    if facts["tensors"]:
        yield from ("", "=== TENSORS ===")
        rows = each(facts["tensors"]) if all_tensors else grouped(facts["tensors"])
        yield from columns(rows if all_tensors else rows[:_SHOWN])
        if not all_tensors and len(rows) > _SHOWN:
            yield f"... and {len(rows) - _SHOWN} more rows; --tensors lists every tensor"
    if facts.get("history"):
        yield from ("", "=== HISTORY ===")
        yield from columns([_kept_row(kept) for kept in facts["history"]])


def _of_ours(facts: Facts) -> Iterable[str]:
    """The sections that every version of this script has had."""
    tokenizer = facts["tokenizer"] or {}
    yield from ("", "=== TOKENIZER ===")
    yield f"kind      : {_value(tokenizer.get('token_kind', 'none'))}"
    yield f"vocab     : {_vocabulary(tokenizer)}"
    yield from ("", "=== TRAINING STATE ===")
    state = facts["training_state"]
    yield f"Last recorded training step: {state['step']}" if "step" in state else "No training step recorded"
    for name in ("val_loss", "best", "saved_at"):
        if state.get(name) is not None:
            yield f"{name:<10}: {_value(_rounded(state[name]))}"
    if skipped := (state.get("training") or {}).get("skip_steps"):
        yield f"{'skip_steps':<10}: the batches of steps {_value(skipped)} are left out"
    if state.get("optimizer_removed") is not None:
        yield f"{'optimizer':<10}: removed ({_value(state['optimizer_removed'])}); this step holds weights only"
    if frozen := state.get("frozen"):
        one = "" if len(frozen) == 1 else "s"
        yield f"{'frozen':<10}: {len(frozen)} tensor{one} of its base, known by checksum only, are not in model.pt"
    if "ema.pt" in facts["files"]:
        yield f"{'ema':<10}: an average of the weights, in ema.pt{_decay(state)}"
    if facts["also"]:
        states = ", ".join(f"{name} ({kind})" for name, kind in facts["also"].items())
        yield f"{'also':<10}: {printable(states)}, in also.pt"


def _rounded(value: Any) -> Any:
    """Round a number, or those of an object, as people read them; --json has every digit."""
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if not isinstance(value, float) or not math.isfinite(value):
        return value
    return round(value, 4) if abs(value) >= 0.01 else float(f"{value:.3g}")


def _decay(state: Facts) -> str:
    settings = (state.get("certificate") or {}).get("settings") or {}
    return f", of decay {_value(settings['ema'])}" if settings.get("ema") else ""


def _parameters(facts: Facts) -> Iterable[str]:
    count = facts["parameters"]
    whole = "" if facts["architecture"] is not None else " (elements of all tensors)"
    yield from ("", "=== PARAMETERS ===", f"total              : {count['total']:,}{whole}")
    if count["total"] != count["without_embeddings"]:
        yield f"without embeddings : {count['without_embeddings']:,}"
    if facts["dtypes"]:
        yield f"dtype              : {', '.join(facts['dtypes'])}"


def architecture_lines(a: Facts) -> Iterable[str]:
    """Describe a model by its tensors, in three lines."""
    several = "" if a["n_kv_head"] == 1 else "s"
    groups = f" in {a['n_kv_head']} group{several}" if a["n_kv_head"] not in (None, a["n_head"]) else ""
    one = "" if a["n_head"] == 1 else "s"
    heads = f"{_known(a['n_head'])} head{one}{groups}" + (f" of {a['head_size']}" if a["head_size"] else "")
    yield f"{_known(a['n_layer'])} layers, {heads}, width {_known(a['n_embd'])}, feed-forward {_known(a['n_ffn'])}"
    rows = f"vocabulary {_known(a['vocab_size'])}"
    if a["head_rows"] not in (None, a["vocab_size"]):
        rows += f" (head {a['head_rows']})"
    if a["padding"]:
        rows += f" ({a['padding']})"
    tied = {True: "tied head", False: "head of its own", None: "head perhaps tied"}[a["tied_head"]]
    context = f"context {a['block_size']}" if a["block_size"] else "context not recorded"
    yield f"{rows}, {tied}, {context}, positions {a['positions']}"
    biases = ", ".join(part for part, there in a["biases"].items() if there) or "none"
    gated = "gated " if a["gated"] and "gated" not in a["activation"] else ""
    qk = ", q and k normed" if a["qk_norm"] else ""
    yield f"{a['norm']}{qk}, {gated}{a['activation']}, biases: {biases}"
    if a["from_config"]:
        yield f"from the config, not the tensors: {', '.join(a['from_config'])}"


def choice_lines(made: Iterable[Facts]) -> Iterable[str]:
    """Write choices for people, one a line, and a warning behind a value that may be wrong."""
    for choice in made:
        yield printable(choice["text"])
        if choice["warning"]:
            yield f"WARNING: {printable(choice['warning'])}"


def _known(value: Any) -> str:
    return "?" if value is None else str(value)


def _health(facts: Facts) -> str:
    health = facts["health"]
    if facts["damaged"]:
        return f"health: DAMAGED, {len(facts['damaged'])} faults (below)"
    if not health["recorded_bytes"]:
        return "health: headers whole; no checksums are recorded in this format"
    return f"health: headers whole; checksums for {size_text(health['recorded_bytes'])}, which --verify compares"


def _vocabulary(tokenizer: Facts) -> str:
    chars = tokenizer.get("chars")
    if isinstance(chars, list):
        sample = printable("".join(str(c) for c in chars[:40]))
        return f"{len(chars)} characters: {sample}{'...' if len(chars) > 40 else ''}"
    if tokenizer.get("token_kind") == "gpt2":
        return "GPT-2 BPE (fixed ~50k tokens)"
    return _value(tokenizer.get("vocab_size", "unknown"))


def _content_line(value: Any) -> str:
    if isinstance(value, TensorSpec):
        return f"{value.dtype} {value.shape}"
    tensors = list(tensors_in(value))
    if tensors:
        return f"{len(tensors)} tensors, {size_text(sum(t.nbytes for t in tensors))}"
    return as_text(value, 100)


def models_text(root: str, models: list[Facts]) -> Iterable[str]:
    """The list of all models below a root."""
    if any("program" in model for model in models):
        how = ", or by --step N or newest" if steps_below(Path(root)) else ""
        yield f"{root} holds {len(models)} checkpoint{'s' * (len(models) != 1)}; name one by its path{how}:"
    else:
        yield f"{root} holds {len(models)} models; choose one with --model_name:"
    yield from columns([_model_row(model) for model in models])


def _model_row(model: Facts) -> tuple[str, ...]:
    if "error" in model:
        return (model["name"], printable(model["error"]))
    if "program" in model:
        step = f"step {model['step']}" if model["step"] is not None else "step not recorded"
        return (printable(model["name"]), step, printable(model["program"]), size_text(model["bytes"]))
    if "legacy" in model:
        step = f"step {model['step']}" if model["step"] is not None else "unreadable"
        return (model["name"], step, model["legacy"], size_text(model["bytes"]))
    older = f"older: {listed_names(model['kept'][::-1], 6)}" if model["kept"] else ""
    return (model["name"], *_kept_row({**model, "bytes": model["total_bytes"]}), older)


def _kept_row(kept: Facts) -> tuple[str, ...]:
    return (f"step {kept['step']}", _loss(kept["val_loss"]), size_text(kept["bytes"]), age(kept["saved_at"]))


def _loss(loss: Any) -> str:
    return f"val_loss {loss:.4f}" if isinstance(loss, (int, float)) else "val_loss unknown"


def age(saved_at: Any) -> str:
    """How long ago something was saved, in its own unit."""
    from datetime import datetime  # costs a millisecond, only when a history is shown

    try:
        seconds = datetime.now().astimezone().timestamp() - datetime.fromisoformat(saved_at).timestamp()
    except (TypeError, ValueError):
        return "age unknown"
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} old"
    return f"{max(seconds, 0):.0f} seconds old"


def _value(value: Any) -> str:
    return printable(value) if isinstance(value, str) else as_text(value, 400)


def not_finite(stats: list[Facts]) -> list[str]:
    """A sentence for each tensor that holds NaN or Inf."""
    return [
        f"{stat['name']}: {stat['nan']:,} NaN and {stat['inf']:,} Inf among {stat['count']:,} numbers"
        for stat in stats
        if stat["nan"] or stat["inf"]
    ]


def views_text(facts: Facts) -> Iterable[str]:
    """Write verification and statistics for people."""
    if "verification" in facts:
        yield from ("", "=== VERIFICATION ===", *_verification_lines(facts["verification"]))
    if "stats" in facts:
        yield from ("", "=== STATISTICS ===")
        heading = ("tensor", "numbers", *_NUMBERS, "zeros", "NaN", "Inf", "")
        yield from columns([heading, *(_stat_row(stat) for stat in facts["stats"])])


def _verification_lines(found: Facts) -> Iterable[str]:
    speed = f" ({found['checked_bytes'] / found['seconds'] / 1e9:.2f} GB/s)" if found["seconds"] > 0.01 else ""
    faults = len(found["damaged"])
    whole = f"{faults} fault{'s' * (faults != 1)}" if faults else "nothing is damaged"
    size = size_text(found["checked_bytes"])
    if found["checked_bytes"] or faults:
        yield f"{size} compared with recorded checksums in {found['seconds']:.2f} s{speed}: {whole}"
    else:
        yield "no checksum is recorded, so nothing could be compared"
    for kind in ("damaged", "replaced", "unrecorded", "notes"):
        yield from (f"{kind.removesuffix('s')}: {printable(line)}" for line in found[kind])


def _stat_row(stat: Facts) -> tuple[str, ...]:
    numbers = tuple("-" if stat[name] is None else f"{stat[name]:.6g}" for name in _NUMBERS)
    zeros = f"{stat['zeros'] / stat['count']:.1%}" if stat["count"] else "-"
    name = printable(stat["name"])
    return (name, f"{stat['count']:,}", *numbers, zeros, str(stat["nan"]), str(stat["inf"]), printable(stat["note"]))
