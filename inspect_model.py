"""Look inside any checkpoint without loading it: what it is, what it holds, whether it is whole, what changed."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from core.commandline import (
    DONE,
    FAILED,
    WRONG_USE,
    Parser,
    add_legacy_flag,
    choose_model,
    legacy_path,
    model_names,
    run,
)
from core.errors import CheckpointError
from core.inspection import Inspected, inspect_path
from core.plain import plain
from core.report import Facts, facts_of, model_facts
from core.report_text import models_text, text_of

EPILOG = """examples:
  python inspect_model.py                            every model below checkpoints/, or the only one
  python inspect_model.py --model_name dante         one model
  python inspect_model.py old.pt                     a file of any program: .pt, .safetensors, .bin
  python inspect_model.py runs/llama --tensors '*norm*'   a folder of any program; some of its tensors, one by one

Nothing is loaded and nothing in a file is executed. Exit code 1 when something is damaged or cannot be read.
"""


def main(argv: list[str]) -> int:
    """Print what checkpoints hold; returns the exit code."""
    parser = Parser(prog="inspect_model.py", description=__doc__ or "", epilog=EPILOG)
    parser.add_argument("paths", metavar="PATH", nargs="*", help="a checkpoint folder or file, or a folder of models")
    parser.add_argument("--step", type=int, metavar="N", help="a kept step instead of the newest")
    add_legacy_flag(parser)
    parser.add_argument(
        "--tensors", metavar="GLOB", nargs="?", const="*", help="list tensors one by one, those that a pattern fits"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text (docs/inspect.md)")
    args = parser.parse(argv)
    named = [flag for flag in ("model_name", "legacy_checkpoint") if getattr(args, flag)]
    if args.paths and named:
        parser.error(f"PATH and --{named[0]} name two checkpoints; give one of them")
    root = Path(args.checkpoint_root)
    single = legacy_path(parser, args)
    if single is not None:
        places = [single]
    elif args.paths:
        places = [Path(path) for path in args.paths]
    elif args.model_name or len(model_names(root)) < 2:
        name = choose_model(args)
        if name is None:
            return WRONG_USE
        places = [root / name]
    else:
        places = [root]
    if args.step is not None and len(places) != 1:
        parser.error("--step is a step of one checkpoint; give one PATH")
    return show([look(place, args.step, args.tensors) for place in places], args.tensors is not None, args.json)


def look(place: Path, step: int | None, pattern: str | None) -> Facts:
    """Collect the facts of one checkpoint, or of all models in a folder of them.

    Raises: CheckpointError when nothing there can be read.
    """
    try:
        names = model_names(place) if place.is_dir() and step is None else []
        if names and not is_checkpoint(place):
            return {"root": str(place), "models": [model_facts(place / name) for name in names]}
        with inspect_path(place, step) as found:
            say_chosen(found)
            return facts_of(found, pattern)
    except OSError as error:
        raise CheckpointError(f"{error.filename or place}: cannot be read ({error.strerror}).") from error


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a model of its own, rather than one of models."""
    return folder.name in model_names(folder.absolute().parent)


def say_chosen(found: Inspected) -> None:
    """Say which of several checkpoints is shown, and why."""
    for line in found.chosen:
        print(line, file=sys.stderr)


def show(shown: list[Facts], all_tensors: bool, as_json: bool) -> int:
    """Print facts, and what is wrong on stderr; returns the exit code."""
    if as_json:
        document: Any = shown[0] if len(shown) == 1 else shown
        print(json.dumps(plain(document), indent=2, allow_nan=False))
    else:
        print("\n\n".join("\n".join(lines(facts, all_tensors)) for facts in shown))
    damaged = [problem for facts in shown for problem in facts.get("damaged", [])]
    for problem in damaged:
        print(f"error: {problem}", file=sys.stderr)
    for call in (call for facts in shown for call in facts.get("foreign", [])):
        print(f"WARNING: {call}; nothing was executed", file=sys.stderr)
    return FAILED if damaged else DONE


def lines(facts: Facts, all_tensors: bool) -> Iterable[str]:
    """Write facts for people."""
    if "models" in facts:
        return models_text(facts["root"], facts["models"])
    return text_of(facts, all_tensors)


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks is no failure
    run(main)
