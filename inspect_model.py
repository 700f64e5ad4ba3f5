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

from core.bundle.find import add_legacy_flag, choose_model, legacy_path
from core.bundle.names import model_names
from core.console.commandline import (
    DONE,
    FAILED,
    WRONG_USE,
    Parser,
    add_check_flags,
    add_rule_flags,
    rules_given,
    run,
    step,
    tell_json,
)
from core.console.commands import typed
from core.console.progress import byte_bar, token_bar
from core.console.words import printable, size_text, tell
from core.containers.open import is_checkpoint_folder
from core.containers.plain import Room, plain, write_plain
from core.errors import CheckpointError, CheckpointNotFound
from core.inspection.inspect import Inspection, inspect_path
from core.inspection.report import Facts, facts_of
from core.inspection.report_text import models_text, not_finite, text_of, views_text

COMMON = (
    *("model_name", "checkpoint_root", "config_file", "step", "tensors", "history", "verify", "stats"),
    *("diff", "curve", "html", "watch", "check_text", "json", "quiet"),
)
"""The flags of --help."""

EPILOG = """examples:
  python inspect_model.py                                 every model below checkpoints/, or the only one
  python inspect_model.py --model_name dante              one model
  python inspect_model.py --model_name dante --history    its history: every step, its branch, why it is kept
  python inspect_model.py old.pt                          a file of any program: .pt, .safetensors, .bin
  python inspect_model.py --diff latest.pt checkpoints/dante    what changed, whatever the formats

more examples:
  python inspect_model.py runs/llama --tensors '*norm*'   a folder of any program; some of its tensors, one by one
  python inspect_model.py dante/model.pt --verify         compare every record with its checksum
  python inspect_model.py ckpt.pt --stats '*.weight'      smallest, largest, mean, NaN and Inf of tensors
  python inspect_model.py --model_name dante --html dante.html  a page to look at; of checkpoints/, of all models
  python inspect_model.py --model_name dante --watch      the same page in a browser, newer while training goes on

Nothing is loaded and nothing in a file is executed. Exit code 0 when all is well (with --diff: equal), 1 when
something is damaged, cannot be read or holds NaN or Inf (with --diff: different), 2 for wrong use and for a --diff
that cannot be made.
"""


_FEW = 3
"""Records of other programs' values that are named on stderr; what may act on a reader is always."""


def main(argv: list[str]) -> int:
    """Print what checkpoints hold; returns the exit code."""
    parser = make_parser()
    args = parser.parse(argv)
    if args.diff:
        return diff(parser, args)
    if not args.history and (rules := [f"--{name}" for name, value in rules_given(args).items() if value is not None]):
        parser.error(f"{' and '.join(rules)} need --history, which shows what they would remove")
    if args.history and args.check_text is not None:
        parser.error("--check_text computes one step; leave out --history, or name the step with --step")
    if args.history and args.step is not None:
        parser.error("--history shows every step; leave out --step")
    if args.check_loss is not None and args.check_text is None:
        parser.error("--check_loss needs --check_text, the text whose loss it is")
    refuse_clashes_of_page(parser, args)
    if args.curve and args.json:
        parser.error("--curve draws in the terminal; leave out --json")
    places = find_places(parser, args)
    if args.curve:
        return draw(places)
    if args.watch:
        return watch(places[0], args)
    shown, faults = [], []
    for place in places:
        facts, found = look(place, args)
        shown.append(facts)
        faults += found
    return show(shown, faults, args)


def refuse_clashes_of_page(parser: Parser, args: argparse.Namespace) -> None:
    """End with a message where flags of the page do not fit each other."""
    if args.sample is not None and args.html is None:
        parser.error(typed("--sample needs --html, the page that shows it; generate.py writes texts"))
    if args.port is not None and not args.watch:
        parser.error("--port needs --watch, which serves the page there")
    others = ("html", "history", "verify", "tensors", "stats", "check_text", "json")
    if args.watch and (wrong := next((name for name in others if getattr(args, name) not in (None, False)), None)):
        parser.error(f"--watch serves the page and does nothing else; leave out --{wrong}")


def make_parser() -> Parser:
    """Describe the flags."""
    parser = Parser("inspect_model.py", __doc__ or "", EPILOG, common=COMMON)
    parser.usage = "inspect_model.py [PATH ...] [--FLAG VALUE ...]"
    parser.add_argument("paths", metavar="PATH", nargs="*", help="a checkpoint folder or file, or a folder of models")
    steps = "a kept step instead of the newest; of another program's run the step N, or newest"
    parser.add_argument("--step", type=step, metavar="N", help=steps)
    add_legacy_flag(parser)
    views = parser.add_argument_group("views")
    views.add_argument(
        "--tensors", metavar="GLOB", nargs="?", const="*", help="list the tensors that match a pattern, one by one"
    )
    views.add_argument(
        "--history", action="store_true", help="every step, kept and aside, with its health and the reason it is kept"
    )
    add_rule_flags(views, "with --history: what this would remove")
    views.add_argument("--verify", action="store_true", help="compare every record with its checksum")
    views.add_argument(
        "--stats", metavar="GLOB", nargs="?", const="*", help="read tensors: min, max, mean, std, zeros, NaN and Inf"
    )
    add_check_flags(parser)
    views.add_argument(
        "--diff", metavar=("A", "B"), nargs=2, help="compare two checkpoints of any formats, or steps of one model"
    )
    views.add_argument("--moments", action="store_true", help="with --diff: the tensors of the optimizers as well")
    views.add_argument("--curve", action="store_true", help="draw the losses of the run here, in plain characters")
    views.add_argument("--html", metavar="FILE", type=Path, help="write a page to look at, in one file")
    views.add_argument(
        "--sample", metavar="PROMPT", nargs="?", const="", help="with --html: a text that the model writes, on the page"
    )
    views.add_argument(
        "--watch", action="store_true", help="serve the page here, newer whenever training saves or logs"
    )
    views.add_argument("--port", metavar="N", type=port, help="with --watch: the port, 8000 unless given")
    views.add_argument("--overwrite", action="store_true", help="with --html: replace an existing file")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text (docs/inspect.md)")
    return parser


def find_places(parser: Parser, args: argparse.Namespace) -> list[Path]:
    """Find the checkpoints that the command line names."""
    named = [flag for flag in ("model_name", "legacy_checkpoint") if getattr(args, flag)]
    for flag in ("tensors", "stats"):
        if Path(getattr(args, flag) or "*").exists():
            parser.error(f"--{flag} {getattr(args, flag)}: is a path, and would be taken as a pattern; put it first")
    if args.paths and named:
        parser.error(f"PATH and --{named[0]} name two checkpoints; give only one of them")
    root = Path(args.checkpoint_root)
    single = legacy_path(parser, args)
    if single is not None:
        places = [single]
    elif args.paths:
        places = [Path(path) for path in args.paths]
    elif args.model_name or len(model_names(root)) < 2:
        places = [root / choose_model(args)]
    else:
        places = [root]
    for flag in ("step", "html", "watch"):
        if getattr(args, flag) not in (None, False) and len(places) != 1:
            parser.error(f"--{flag} is for one checkpoint; give one PATH")
    return places


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


def port(text: str) -> int:
    """A number of a port, for argparse."""
    number = int(text)
    if not 0 <= number < 1 << 16:
        raise ValueError
    return number


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


def diff(parser: Parser, args: argparse.Namespace) -> int:
    """Compare two checkpoints; returns 0 when they are equal, 1 when not, 2 when they cannot be compared."""
    if args.legacy_checkpoint or args.step is not None or len(args.paths) > 1 or (args.paths and args.model_name):
        parser.error("--diff A B names both checkpoints, or with one PATH or --model_name two of its steps")
    model = Path(args.paths[0]) if args.paths else Path(args.checkpoint_root, args.model_name or "")
    steps = [step_of(parser, word) for word in args.diff] if args.paths or args.model_name else None
    from core.inspection.diff.comparison import compare
    from core.inspection.diff.side import Side
    from core.inspection.diff.text import comparison_facts, comparison_lines

    try:
        with ExitStack() as held:
            a, b = (
                held.enter_context(inspect_path(model, steps[i]) if steps else inspect_path(Path(args.diff[i])))
                for i in range(2)
            )
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


def step_of(parser: Parser, word: str) -> int | None:
    """The step that a word of --diff names; None for the newest."""
    try:
        found = step(word)
    except argparse.ArgumentTypeError as error:
        parser.error(f"--diff of the steps of one model: {error}; without PATH and --model_name they are paths")
    return found if isinstance(found, int) else None


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
