"""Look inside a checkpoint without loading it: config, tokenizer, step, tensors and history, from headers alone."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from core.bundle import Bundle, Kept, history, open_bundle
from core.choice import LEGACY_FILES, choose
from core.commandline import (
    DONE,
    FAILED,
    Parser,
    add_legacy_flag,
    choose_model,
    legacy_path,
    model_names,
    run,
)
from core.containers.foreign import foreign_calls
from core.containers.inert import Call, as_text
from core.containers.spec import TensorSpec
from core.containers.torch_file import open_torch_file
from core.errors import CheckpointDamaged, CheckpointError, CheckpointNotFound
from core.evolution import notes
from core.families.recognise import LECTURE
from core.fit import contradictions
from core.legacy import is_legacy, open_legacy
from core.plain import plain
from core.screen import columns, printable, size_text
from core.training_state import STATE

POSITIONS_AND_TOKENS = ("token_embedding_table.weight", "position_embedding_table.weight")
Facts = dict[str, Any]


def main(argv: list[str]) -> int:
    """Print what a checkpoint holds; returns the exit code."""
    parser = Parser(
        prog="inspect_model.py",
        description=__doc__ or "",
        epilog="examples:\n  python inspect_model.py --model_name dante\n  python inspect_model.py old.pt --json",
    )
    parser.add_argument("path", metavar="PATH", nargs="?", help="a model folder, a step folder in it, or a .pt file")
    parser.add_argument("--step", type=int, metavar="N", help="a kept step instead of the newest")
    add_legacy_flag(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")
    args = parser.parse(argv)
    if args.path and args.model_name:
        parser.error("PATH and --model_name name two checkpoints; give one of them")
    if args.path and args.legacy_checkpoint:
        parser.error("PATH and --legacy_checkpoint name two checkpoints; give one of them")
    root = Path(args.checkpoint_root)
    single = legacy_path(parser, args)
    try:
        if single is not None:
            facts = checkpoint_facts(single, args.step)
        elif args.path or args.model_name or len(names := model_names(root)) < 2:
            facts = checkpoint_facts(Path(args.path) if args.path else root / str(choose_model(args)), args.step)
        else:
            facts = {"root": str(root), "models": [model_facts(root / name) for name in names]}
    except OSError as error:
        raise CheckpointError(f"{error.filename or args.path}: cannot be read ({error.strerror}).") from error
    print(json.dumps(plain(facts), indent=2, allow_nan=False) if args.json else "\n".join(text_of(facts)))
    for problem in facts.get("damaged", []):
        print(f"error: {problem}", file=sys.stderr)
    for call in facts.get("foreign", []):
        print(f"WARNING: {call}; nothing was executed", file=sys.stderr)
    return FAILED if facts.get("damaged") else DONE


def checkpoint_facts(path: Path, step: int | None) -> Facts:
    """Collect what is known of a model folder, a step folder or a single file.

    Raises: CheckpointNotFound when nothing is there, CheckpointError when it is nothing that can be read.
    """
    if path.is_file():
        if step is not None:
            raise CheckpointError(f"{path}: a single file has no steps to choose from with --step.")
        return file_facts(path)
    if not path.exists():
        raise CheckpointNotFound(f"{path}: nothing here. Give a model folder, a step folder in it, or a .pt file.")
    chosen = ""
    if step is None:
        choice = choose(path)
        choice.refuse_none()
        for line in choice.lines():
            print(line, file=sys.stderr)
        chosen = choice.candidates[0].single or "" if choice.candidates else ""
    with open_legacy(path / chosen) if chosen else open_bundle(path, step) as bundle:
        return bundle_facts(bundle, history(path) if step is None else [])


def bundle_facts(bundle: Bundle, kept: list[Kept]) -> Facts:
    """What a checkpoint of ours says of itself, and what its tensors say of it."""
    facts: Facts = {
        "format": "Legacy single file" if bundle.single else "New JSON-based format",
        "location": str(bundle.path("") if bundle.single else bundle.folder),
        "config": bundle.config_values,
        "tokenizer": bundle.tokenizer,
        "training_state": bundle.state,
        "files": dict(bundle.sizes),
        "history": [_kept_facts(k) for k in kept],
        "contradictions": [],
        "notes": [],
        "damaged": [],
        "foreign": [],
    }
    if not bundle.single:
        with contextlib.suppress(OSError):
            facts["files"][STATE] = (bundle.folder / STATE).stat().st_size
    try:
        weights = bundle.weights.tensors
    except CheckpointError as error:
        facts["damaged"].append(str(error))
        return facts
    for part in (bundle.weights, bundle.optimizer):
        with contextlib.suppress(CheckpointError):  # a damaged optimizer state is named below
            if part is not None:
                facts["foreign"] += [f"{part.source.path}: its pickle names {call}" for call in part.source.foreign]
    facts["foreign"] = list(dict.fromkeys(facts["foreign"]))
    facts |= {"parameters": _parameters(weights), "tensors": _tensor_facts(weights)}
    try:
        if bundle.config is not None:
            dropped = bundle.evidence.plan.dropped
            facts["generation"] = bundle.evidence.plan.family
            facts["parameters"] = _parameters({name: t for name, t in weights.items() if name not in dropped})
            facts["contradictions"] = contradictions(bundle)
            facts["notes"] = notes(str(bundle.path("config.json")), bundle.config, bundle.state)
    except CheckpointDamaged as error:
        facts["damaged"].append(str(error))
    except CheckpointError as error:
        facts["contradictions"] = [str(error)]
    return facts


def file_facts(path: Path) -> Facts:
    """What a single file holds: as a checkpoint where it is one of ours, else its tensors and other content as text."""
    if is_legacy(path):
        with open_legacy(path) as bundle:
            return bundle_facts(bundle, [])
    with path.open("rb") as file:
        header = open_torch_file(file, str(path))
        size = file.seek(0, io.SEEK_END)
    return {
        "format": "PyTorch zip file" if header.container == "zip" else "PyTorch stream file (before torch 1.6)",
        "location": str(path),
        "content": header.content if isinstance(header.content, dict) else {"": header.content},
        "files": {path.name: size},
        "foreign": [f"{path}: its pickle names {call}" for call in foreign_calls([header.content, header.unused])],
        "parameters": _parameters(header.tensors),
        "tensors": _tensor_facts(header.tensors),
    }


def model_facts(folder: Path) -> Facts:
    """The line of one model in the list of all."""
    try:
        with open_bundle(folder) as bundle:
            return {
                "name": folder.name,
                "step": bundle.step,
                "val_loss": bundle.state.get("val_loss"),
                "bytes": sum(bundle.sizes.values()),
            }
    except CheckpointError as error:
        legacy = [folder / name for name in LEGACY_FILES if (folder / name).is_file()]
        if legacy:
            first = choose(folder).candidates[:1]
            step = first[0].step if first else None
            chosen = folder / first[0].single if first and first[0].single else legacy[0]
            return {"name": folder.name, "legacy": chosen.name, "step": step, "bytes": chosen.stat().st_size}
        return {"name": folder.name, "error": str(error)}


def _kept_facts(kept: Kept) -> Facts:
    return {
        "step": kept.step,
        "val_loss": kept.state.get("val_loss"),
        "bytes": sum(p.stat().st_size for p in kept.path.iterdir() if p.is_file()),
        "saved_at": kept.state.get("saved_at"),
        "path": str(kept.path),
    }


def _parameters(tensors: Mapping[str, TensorSpec]) -> Facts:
    """Count elements, tied ones once; the token and position tables also apart."""
    once = {(t.storage, t.offset, t.shape, t.strides): t for t in reversed(list(tensors.values()))}
    total = sum(t.numel for t in once.values())
    tables = sum(t.numel for t in once.values() if t.name.removeprefix("state_dict.") in POSITIONS_AND_TOKENS)
    return {"total": total, "without_embeddings": total - tables}


def _tensor_facts(tensors: Mapping[str, TensorSpec]) -> list[Facts]:
    return [{"name": n, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.nbytes} for n, t in tensors.items()]


def text_of(facts: Facts) -> Iterable[str]:
    """Write facts for people, line by line."""
    if "models" in facts:
        yield f"{facts['root']} holds {len(facts['models'])} models; choose one with --model_name:"
        yield from columns([_model_row(model) for model in facts["models"]])
        return
    yield "=== FORMAT ==="
    yield facts["format"]
    yield f"Location: {printable(facts['location'])}"
    if facts.get("generation") == LECTURE:
        yield "Lecture-style names, one layer per head: opens as it is, and gets our names at the next save"
    if "config" in facts:
        yield from _bundle_sections(facts)
    if "content" in facts:
        yield from ("", "=== CONTENT ===")
        yield from columns([(printable(str(k)), ":", _content_line(v)) for k, v in facts["content"].items()])
    if "parameters" in facts:
        count = facts["parameters"]
        yield from ("", "=== PARAMETERS ===")
        whole = "" if "config" in facts else " (elements of all tensors)"
        yield f"total              : {count['total']:,}{whole}"
        if count["total"] != count["without_embeddings"]:
            yield f"without embeddings : {count['without_embeddings']:,}"
    yield from ("", "=== FILES ===")
    yield from columns([(name, size_text(size)) for name, size in facts["files"].items()])
    if "tensors" in facts:
        yield from ("", "=== TENSORS ===")
        yield from columns(table(facts["tensors"]))
    if facts.get("history"):
        yield from ("", "=== HISTORY ===")
        yield from columns([_kept_row(kept) for kept in facts["history"]])


def _bundle_sections(facts: Facts) -> Iterable[str]:
    """The three sections that every version of this script has begun with."""
    yield from ("", "=== CONFIG ===", ", ".join(f"{k}:{_value(v)}" for k, v in facts["config"].items()))
    yield from (f"contradiction: {printable(sentence)}" for sentence in facts["contradictions"])
    tokenizer = facts["tokenizer"] or {}
    yield from ("", "=== TOKENIZER ===")
    yield f"kind      : {_value(tokenizer.get('token_kind', 'none'))}"
    yield f"vocab     : {_vocabulary(tokenizer)}"
    yield from ("", "=== TRAINING STATE ===")
    state = facts["training_state"]
    yield f"Last recorded training step: {state['step']}" if "step" in state else "No training step recorded"
    for name in ("val_loss", "best", "saved_at"):
        if state.get(name) is not None:
            yield f"{name:<10}: {_value(state[name])}"
    yield from (f"note: {printable(note)}" for note in facts["notes"])


def _vocabulary(tokenizer: Facts) -> str:
    chars = tokenizer.get("chars")
    if isinstance(chars, list):
        sample = printable("".join(str(c) for c in chars[:40]))
        return f"{len(chars)} characters: {sample}{'...' if len(chars) > 40 else ''}"
    if tokenizer.get("token_kind") == "gpt2":
        return "GPT-2 BPE (fixed ~50k tokens)"
    return _value(tokenizer.get("vocab_size", "unknown"))


def _content_line(value: Any) -> str:
    tensors = list(_tensors_in(value))
    if isinstance(value, TensorSpec):
        return f"{value.dtype} {value.shape}"
    if tensors:
        return f"{len(tensors)} tensors, {size_text(sum(t.nbytes for t in tensors))}"
    return as_text(value, 100)


def _tensors_in(value: Any) -> Iterable[TensorSpec]:
    if isinstance(value, TensorSpec):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, Call):
        yield from _tensors_in((value.args, value.items, value.state))


def _model_row(model: Facts) -> tuple[str, ...]:
    if "error" in model:
        return (model["name"], printable(model["error"]))
    if "legacy" in model:
        step = f"step {model['step']}" if model["step"] is not None else "unreadable"
        return (model["name"], step, model["legacy"], size_text(model["bytes"]))
    return (model["name"], f"step {model['step']}", _loss(model["val_loss"]), size_text(model["bytes"]))


def _kept_row(kept: Facts) -> tuple[str, ...]:
    return (f"step {kept['step']}", _loss(kept["val_loss"]), size_text(kept["bytes"]), _age(kept["saved_at"]))


def _loss(loss: Any) -> str:
    return f"val_loss {loss:.4f}" if isinstance(loss, (int, float)) else "val_loss unknown"


def _age(saved_at: Any) -> str:
    from datetime import datetime  # a millisecond that only a history pays

    try:
        seconds = datetime.now().astimezone().timestamp() - datetime.fromisoformat(saved_at).timestamp()
    except (TypeError, ValueError):
        return "age unknown"
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} old"
    return f"{max(seconds, 0):.0f} seconds old"


def table(tensors: list[Facts]) -> list[tuple[str, ...]]:
    """Group tensors that differ only in their numbers: `blocks.{0..5}.sa.qkv.weight`, `6 x (1152, 384)`, `float32`."""
    groups: dict[tuple[Any, ...], list[tuple[str, ...]]] = {}
    for tensor in tensors:
        parts = tuple(re.split(r"(?<![^.])(\d{1,9})(?![^.])", tensor["name"]))
        groups.setdefault((parts[::2], tuple(tensor["shape"]), tensor["dtype"]), []).append(parts[1::2])
    rows: list[tuple[str, ...]] = []
    for (words, shape, dtype), numbers in groups.items():
        for spans, count in _products(numbers):
            name = words[0] + "".join(_span(span) + word for span, word in zip(spans, words[1:], strict=True))
            rows.append((printable(name), f"{count} x {shape}" if count > 1 else str(shape), dtype))
    return rows


def _products(numbers: list[tuple[str, ...]]) -> list[tuple[list[list[str]], int]]:
    """Write a list of index tuples as few products of columns: all of it when it is one, else one for each tail."""
    columns = [list(dict.fromkeys(column)) for column in zip(*numbers, strict=True)]
    if math.prod(len(column) for column in columns) == len(numbers):
        return [(columns, len(numbers))]
    tails: dict[tuple[str, ...], list[str]] = {}
    for first, *tail in numbers:
        tails.setdefault(tuple(tail), []).append(first)
    return [([firsts, *([n] for n in tail)], len(firsts)) for tail, firsts in tails.items()]


def _span(column: list[str]) -> str:
    if len(column) == 1:
        return column[0]
    if column == [str(n) for n in range(int(column[0]), int(column[0]) + len(column))]:
        return f"{{{column[0]}..{column[-1]}}}"
    return "{" + ",".join(column if len(column) <= 6 else [*column[:3], "...", column[-1]]) + "}"


def _value(value: Any) -> str:
    return printable(value) if isinstance(value, str) else as_text(value, 400)


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks is no failure
    run(main)
