"""The flags of inspect_model.py, and which checkpoints they name."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..bundle.find import add_legacy_flag, choose_model, legacy_path
from ..bundle.names import model_names
from ..console.commandline import Parser, add_check_flags, add_rule_flags, rules_given, step
from ..console.commands import typed

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

_BY_NAME = Path()
"""Stands for the name of a page that is not given: that of what it shows, in the current folder."""


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line of inspect_model.py; flags that contradict each other end the program, as wrong use.

    `places` are the checkpoints that it names. Those of --diff are two, each with its step in `steps`, or None there.
    """
    parser = make_parser()
    args = parser.parse(argv)
    if args.diff:
        args.places, args.steps = _sides(parser, args)
    else:
        _refuse_clashes(parser, args)
        args.places = _places(parser, args)
    if args.html == _BY_NAME:
        args.html = Path(_page_name(args))
    return args


def make_parser() -> Parser:
    """Describe the flags."""
    about = "Inspect any checkpoint without loading it: its format, its contents, its integrity, and what changed."
    parser = Parser("inspect_model.py", about, EPILOG, common=COMMON)
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
    views.add_argument(
        "--html", metavar="FILE", nargs="?", const=_BY_NAME, type=Path, help="write a page to look at, in one file"
    )
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


def port(text: str) -> int:
    """A number of a port, for argparse."""
    number = int(text)
    if not 0 <= number < 1 << 16:
        raise ValueError
    return number


def _page_name(args: argparse.Namespace) -> str:
    """The name of a page for which none is given: dante.html, dante_history.html, dante_250_and_500.html."""
    names = [place.absolute().name for place in args.places]
    if args.diff and args.places[0] == args.places[1]:
        return f"{names[0]}_{'_and_'.join(args.diff)}.html"
    if args.diff:
        return f"{'_and_'.join(names)}.html"
    kept = f"_{args.step}" if args.step is not None else ""
    return f"{names[0]}{kept}{'_history' * args.history}.html"


def _refuse_clashes(parser: Parser, args: argparse.Namespace) -> None:
    """End with a message where flags do not fit each other."""
    if not args.history and (rules := [f"--{name}" for name, value in rules_given(args).items() if value is not None]):
        parser.error(f"{' and '.join(rules)} need --history, which shows what they would remove")
    if args.history and args.check_text is not None:
        parser.error("--check_text computes one step; leave out --history, or name the step with --step")
    if args.history and args.step is not None:
        parser.error("--history shows every step; leave out --step")
    if args.check_loss is not None and args.check_text is None:
        parser.error("--check_loss needs --check_text, the text whose loss it is")
    if args.curve and args.json:
        parser.error("--curve draws in the terminal; leave out --json")
    if args.sample is not None and args.html is None:
        parser.error(typed("--sample needs --html, the page that shows it; generate.py writes texts"))
    if args.port is not None and not args.watch:
        parser.error("--port needs --watch, which serves the page there")
    others = ("html", "history", "verify", "tensors", "stats", "check_text", "json")
    if args.watch and (wrong := next((name for name in others if getattr(args, name) not in (None, False)), None)):
        parser.error(f"--watch serves the page and does nothing else; leave out --{wrong}")


def _places(parser: Parser, args: argparse.Namespace) -> list[Path]:
    """Find the checkpoints that the command line names."""
    named = [flag for flag in ("model_name", "legacy_checkpoint") if getattr(args, flag)]
    for flag in ("tensors", "stats"):
        if Path(getattr(args, flag) or "*").exists():
            parser.error(f"--{flag} {getattr(args, flag)}: is a path, and would be taken as a pattern; put it first")
    if args.html is not None and args.html != _BY_NAME and args.html.is_dir():
        parser.error(f"--html {args.html}: is a folder, and would be taken as the page; put it first")
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


def _sides(parser: Parser, args: argparse.Namespace) -> tuple[list[Path], list[int | None]]:
    """The two checkpoints of --diff, and which steps of theirs."""
    if args.legacy_checkpoint or args.step is not None or len(args.paths) > 1 or (args.paths and args.model_name):
        parser.error("--diff A B names both checkpoints, or with one PATH or --model_name two of its steps")
    if not args.paths and not args.model_name:
        return [Path(word) for word in args.diff], [None, None]
    model = Path(args.paths[0]) if args.paths else Path(args.checkpoint_root, args.model_name)
    return [model, model], [_step_of(parser, word) for word in args.diff]


def _step_of(parser: Parser, word: str) -> int | None:
    """The step that a word of --diff names; None for the newest."""
    try:
        found = step(word)
    except argparse.ArgumentTypeError as error:
        parser.error(f"--diff of the steps of one model: {error}; without PATH and --model_name they are paths")
    return found if isinstance(found, int) else None
