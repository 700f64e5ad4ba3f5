"""Inspect any checkpoint without loading it: its format, its contents, its integrity, and what changed."""

from __future__ import annotations

import argparse
import atexit
import gc
import io
import itertools
import math
import shutil
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from core.bundle.names import model_names
from core.console.commandline import DONE, FAILED, WRONG_USE, rules_given, run, tell_json
from core.console.progress import byte_bar, token_bar
from core.console.words import printable, size_text, tell
from core.containers.open import is_checkpoint_folder
from core.containers.plain import Room, plain, write_plain
from core.errors import CheckpointError, CheckpointNotFound
from core.inspection.flags import parse
from core.inspection.inspect import Inspection, inspect_path
from core.inspection.report import Facts, facts_of
from core.inspection.report_text import models_text, not_finite, text_of, views_text

_FEW = 3
"""Records of other programs' values that are named on stderr; what may act on a reader is always."""


def main(argv: list[str]) -> int:
    """Print what checkpoints hold; returns the exit code."""
    args = parse(argv)
    if args.diff:
        return diff(args)
    if args.curve:
        return draw(args.places)
    if args.watch:
        return watch(args.places[0], args)
    shown, faults = [], []
    for place in args.places:
        facts, found = look(place, args)
        shown.append(facts)
        faults += found
    return show(shown, faults, args)


def look(place: Path, args: argparse.Namespace) -> tuple[Facts, list[str]]:
    """Collect the facts of one checkpoint, or of all models in a folder of them, and its faults.

    Raises: CheckpointError when nothing there can be read.
    """
    if args.step is not None and place.is_dir():
        from core.bundle.step_place import is_ours, step_place

        if args.step == "newest" or not is_ours(place):
            place = step_place(place, args.step)
            args = argparse.Namespace(**{**vars(args), "step": None})
    try:
        names = model_names(place) if place.is_dir() and args.step is None else []
        if names and not is_checkpoint(place) and not is_checkpoint_folder(place):
            from core.inspection.report_ours import model_facts

            if args.check_text is not None:
                raise CheckpointError(f"{place}: holds {len(names)} models, and --check_text computes one. Name one.")
            models = [model_facts(place / name) for name in names]
            if args.html is not None:
                from core.inspection.html.runs import write_runs

                write_runs(args.html, place, models, overwrite=args.overwrite)
                say_written(args.html)
            opens = any("error" not in one and not ("legacy" in one and one["step"] is None) for one in models)
            none = f"{place}: none of its {len(models)} models opens; each is listed with the reason."
            return {"root": str(place), "models": models}, [] if opens else [none]
        if args.history:
            return look_back(place, args)
        try:
            opened = inspect_path(place, args.step)
        except CheckpointNotFound:
            from core.inspection.below import checkpoints_below

            below = checkpoints_below(place) if place.is_dir() and args.step is None else []
            if not below:
                raise
            return {"root": str(place), "models": below}, []
        with opened as found:
            say_chosen(found)
            facts = facts_of(found, args.tensors)
            faults = list(facts["damaged"])
            if args.verify:
                from core.inspection.verification import verify_container

                with byte_bar("verifying", found.size) as bar:
                    verification = verify_container(found.container, bar.update)
                facts["verification"] = asdict(verification)
                faults += verification.damaged
            if args.stats is not None:
                from core.inspection.statistics import statistics

                names = [name for name in found.container.tensors if fnmatchcase(name, args.stats)]
                with byte_bar("reading", sum(found.container.tensors[name].nbytes for name in names)) as bar:
                    facts["stats"] = [asdict(stat) for stat in statistics(found.container, names, bar.update)]
                faults += not_finite(facts["stats"])
            if args.check_text is not None:
                from core.loading.check_text import TOKENS, check_text

                with token_bar("computing", TOKENS) as bar:
                    check = check_text(place, args.check_text, args.check_loss, step=args.step, progress=bar.update)
                facts["check"] = {**asdict(check), "line": check.line, "faults": check.faults}
                faults += check.faults
            if args.html is not None:
                faults += [fault for fault in write_checked_page(place, found, facts, args) if fault not in faults]
            return facts, faults
    except OSError as error:
        raise CheckpointError(f"{error.filename or place}: cannot be read ({error.strerror}).") from error


def write_checked_page(place: Path, found: Inspection, facts: Facts, args: argparse.Namespace) -> list[str]:
    """Write the page of a checkpoint, and return the faults of its bytes, all of which that reads."""
    from core.inspection.html.page import write_page

    sample = sample_of(place, args) if args.sample is not None else ""
    with byte_bar("reading", 2 * sum(t.nbytes for t in found.weights.values()) + found.size) as bar:
        faults = write_page(args.html, found, facts, overwrite=args.overwrite, progress=bar.update, sample=sample)
    say_written(args.html)
    return faults


def sample_of(place: Path, args: argparse.Namespace) -> str:
    """A text that the checkpoint at a path writes after a prompt; empty, and said, where it cannot write."""
    from core.bundle.step_place import step_place
    from core.pretrained import open_checkpoint

    try:
        model = open_checkpoint(place if args.step is None else step_place(place, args.step), say=tell)
        return str(model.generate(args.sample, max_new_tokens=300, temperature=0.8, top_k=200, seed=1))
    except CheckpointError as error:
        tell(f"no sample: {error}")
        return ""


def watch(place: Path, args: argparse.Namespace) -> int:
    """Serve the page of a checkpoint, or of a folder of models, until Ctrl-C."""
    from core.inspection.html.watch import PORT, Watch, serve
    from core.inspection.report_ours import model_facts

    def models() -> list[Facts]:
        return [model_facts(place / name) for name in model_names(place)]

    is_root = place.is_dir() and bool(model_names(place)) and not is_checkpoint(place) and args.step is None
    if not is_root:
        inspect_path(place, args.step).__exit__()  # what does not open is said here, not in the browser
    serve(Watch(place, args.step, models if is_root else None), PORT if args.port is None else args.port, say_address)
    return DONE


def say_address(line: str) -> None:
    """Print the address of a page: it is the result, so --quiet leaves it."""
    print(printable(line), flush=True)


def say_written(file: Path) -> None:
    """Report the page that was written."""
    tell(f"wrote {file} ({size_text(file.stat().st_size)})")


def look_back(place: Path, args: argparse.Namespace) -> tuple[Facts, list[str]]:
    """Collect the history of one model, and its damage."""
    from core.inspection.history import past_facts, past_faults, past_of

    if not place.is_dir():
        raise CheckpointError(f"{place}: not a model folder, so there is no history to show.")
    total = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    with byte_bar("verifying", total, show=args.verify) as bar:
        past = past_of(place, checksums=args.verify, progress=bar.update)
    facts = past_facts(past, args.verify, rules_given(args))
    if args.html is not None:
        from core.inspection.html.past import write_past

        write_past(args.html, facts, overwrite=args.overwrite)
        say_written(args.html)
    return {"past": facts}, past_faults(facts)


def diff(args: argparse.Namespace) -> int:
    """Compare two checkpoints; returns 0 when they are equal, 1 when not, 2 when they cannot be compared."""
    from core.inspection.diff.comparison import compare
    from core.inspection.diff.side import Side
    from core.inspection.diff.text import comparison_facts, comparison_lines

    try:
        with ExitStack() as held:
            a, b = (held.enter_context(inspect_path(*side)) for side in zip(args.places, args.steps, strict=True))
            total = sum(t.nbytes for found in (a, b) for t in found.weights.values())
            with byte_bar("comparing", total) as bar:
                found = compare(Side(a), Side(b), args.moments, bar.update)
                room = Room(a.size + b.size)
            if args.html is not None:
                from core.inspection.html.difference import write_difference

                write_difference(args.html, found, overwrite=args.overwrite)
                say_written(args.html)
    except (CheckpointError, OSError) as error:
        tell_json(str(error))
        tell(f"error: {error}")
        return WRONG_USE
    if args.json:
        print_json(plain(comparison_facts(found), room=room))
    else:
        print("\n".join(comparison_lines(found)))
    return DONE if found.equal else FAILED


def draw(places: list[Path]) -> int:
    """Print the losses of runs as drawings as wide as the terminal; returns the exit code.

    Raises: CheckpointNotFound where no loss is logged.
    """
    from core.inspection.curve_text import curve_lines
    from core.inspection.html.curve import curve_beside

    for place in places:
        curve = curve_beside(place)
        if curve is None or not (curve.loss.x or curve.val_loss.x):
            why = curve.said if curve is not None else "no metrics.jsonl is here"
            raise CheckpointNotFound(f"{place}: {why.rstrip('.')}, so there is no loss to draw.")
        print(f"{printable(str(place))}: {printable(curve.said)}")
        print("\n".join(curve_lines(curve, shutil.get_terminal_size().columns)))
    return DONE


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a model itself, rather than a folder of models."""
    return folder.name in model_names(folder.absolute().parent)


def say_chosen(found: Inspection) -> None:
    """Report which of several checkpoints is shown, and why."""
    for line in found.chosen:
        tell(line)


def show(shown: list[Facts], faults: list[str], args: argparse.Namespace) -> int:
    """Print facts, and faults on stderr; returns the exit code."""
    if args.json:
        shown = [facts.get("past", facts) for facts in shown]
        documents = [plain(facts, room=Room(facts.get("bytes", math.inf))) for facts in shown]
        print_json(documents[0] if len(documents) == 1 else documents)
    else:
        print("\n\n".join("\n".join(lines(facts, args.tensors is not None)) for facts in shown))
    for fault in faults:
        print(f"error: {printable(fault)}", file=sys.stderr)
    for facts in shown:
        calls = facts.get("foreign", [])
        values = [call for call in calls if getattr(call, "is_record", False)]
        for call in (call for call in calls if call not in values[_FEW:]):
            print(f"WARNING: {call}; nothing was executed", file=sys.stderr)
        if values[_FEW:]:
            others = f"and {len(values) - _FEW} more records of classes and functions, which --json lists"
            print(f"WARNING: {printable(facts['location'])}: {others}; nothing was executed", file=sys.stderr)
    return FAILED if faults else DONE


def print_json(document: Any) -> None:
    """Print JSON values, indented; in blocks, because a stream takes as long for each text as the text itself."""
    parts: list[str] = []

    def write(text: str) -> None:
        parts.append(text)
        if len(parts) > 10_000:
            sys.stdout.write("".join(parts))
            parts.clear()

    write_plain(document, write)
    print("".join(parts))


def lines(facts: Facts, all_tensors: bool) -> Iterable[str]:
    """Write facts for people."""
    if "models" in facts:
        return models_text(facts["root"], facts["models"])
    if "past" in facts:
        from core.inspection.history import past_lines

        return past_lines(facts["past"])
    check = (facts["check"]["line"],) if "check" in facts else ()
    return itertools.chain(text_of(facts, all_tensors), views_text(facts), check)


if __name__ == "__main__":
    gc.disable()  # everything is kept until the end; searching it for cycles took a tenth of the time,
    atexit.register(gc.freeze)  # and as much again at exit
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # print names that the terminal's encoding lacks
    run(main)
