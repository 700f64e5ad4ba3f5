"""The command line that the scripts share: flags, settings from a file, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from .. import __version__
from ..errors import CheckpointError, InputError, Unspecified
from .commands import PROGRAM, typed
from .files import read_regular
from .streams import guard_terminal
from .synonyms import PATH, suggested
from .words import Output, printable, tell

N = TypeVar("N", int, float)

DONE, FAILED, WRONG_USE, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130
"""Exit codes: 75 is EX_TEMPFAIL, which batch queues read as "run me again"; 130 is the shell's 128 + SIGINT."""


def _wide(prog: str) -> argparse.HelpFormatter:
    """A help page on which even the longest flag has its help beside it."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=118)


class Parser(argparse.ArgumentParser):
    """An argument parser with the flags every script has; an unknown flag names the one that is meant.

    A script that does not work on a model passes `model=False`. `common` are the flags of --help, which fits one
    screen; --help_all shows every flag. What stands after the first empty line of `epilog` is left to --help_all, too.
    """

    def __init__(
        self, prog: str, description: str, epilog: str = "", model: bool = True, common: tuple[str, ...] = ()
    ) -> None:
        super().__init__(
            prog=typed(prog),
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=_wide,
            add_help=False,
        )
        self.common = common
        self.add_argument("-h", "--help", action="help", help="the flags people use" if common else "every flag")
        self.add_argument("--help_all", action=_HelpAll, nargs=0, help="every flag, and more examples")
        shared = self.add_argument_group("model") if model else self
        if model:
            shared.add_argument("--model_name", metavar="NAME", help="folder of the model below the checkpoint root")
            root = "folder of all models (default: checkpoints)"
            shared.add_argument("--checkpoint_root", metavar="DIR", default="checkpoints", help=root)
        settings = "flags by name from a JSON file; the command line wins"
        shared.add_argument("--config_file", metavar="FILE.json", help=settings)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Parse flags; those of --config_file stand in front, so that the command line wins."""
        # Added after the flags of the script, whose usage line begins with those.
        self.add_argument("--quiet", action="store_true", help="print only results, warnings and errors")
        self.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, formatter_class=_wide)
        early.add_argument("--config_file")
        self._choose_output(argv)
        config_file = early.parse_known_args(argv)[0].config_file
        from_file = self._from_file(Path(config_file)) if config_file else []
        self._choose_output(from_file + argv)
        args, unknown = self.parse_known_args(from_file + argv)
        if unknown:
            if not unknown[0].startswith("-"):
                self.error(f"unexpected word {unknown[0]!r}")
            self._refuse(unknown[0].split("=")[0])
        return args

    def _choose_output(self, words: list[str]) -> None:
        Output.as_json = "--json" in words and "--json" in self._flags()
        Output.quiet = "--quiet" in words

    def format_help(self) -> str:
        """The page of --help: the flags people use, on one screen; every flag where none were chosen."""
        if not self.common:
            return typed(super().format_help())
        page = self._get_formatter()
        page.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        page.add_text((self.description or "").partition("\n\n")[0])
        page.start_section("the flags people use (--help_all shows every one)")
        page.add_arguments([a for a in self._actions if not a.option_strings or a.dest in self.common])
        page.end_section()
        page.add_text((self.epilog or "").partition("\n\n")[0])
        return typed(page.format_help())

    def format_all(self) -> str:
        """The page of --help_all."""
        return typed(super().format_help())

    def error(self, message: str) -> NoReturn:
        """Exit with one line; the usage of thirty flags would hide it."""
        tell_json(message)
        self.exit(WRONG_USE, f"{self.prog}: error: {printable(message)} (--help shows the flags)\n")

    def _refuse(self, flag: str, where: str = "") -> NoReturn:
        from difflib import get_close_matches  # only when a flag is wrong

        names = {name.lstrip("-") for name in self._flags()}
        takes_path = any(not action.option_strings for action in self._actions)
        meant = suggested(flag, names | {PATH} if takes_path else names)
        if meant is None:
            spelling = flag.replace("-", "_").replace("__", "--", 1)
            meant = next(iter(get_close_matches(spelling, self._flags(), n=1, cutoff=0.5)), None)
        self.error(f"{where}unknown flag {flag}" + (f"; did you mean {meant}?" if meant else ""))

    def _flags(self) -> dict[str, argparse.Action]:
        return self._option_string_actions

    def _from_file(self, path: Path) -> list[str]:
        words: list[str] = []
        settings = read_settings(path)
        for name, value in settings.items():
            action = self._flags().get(f"--{name}")
            if action is None or name in ("help", "help_all", "version", "config_file"):
                if what := _known_file(settings):
                    self.error(f"{path}: {what}, and --config_file takes flags by name")
                self._refuse(f"--{name}", f"{path}: ")
            if isinstance(value, bool):
                negative = f"--no_{name}"
                if value or negative in self._flags():
                    words.append(f"--{name}" if value else negative)
            elif value is not None:
                words.append(f"--{name}={_sayable(value, f'{path}: {name}')}")
        return words


class _HelpAll(argparse.Action):
    """Print every flag and exit."""

    def __call__(self, parser: Any, *_: Any) -> None:
        print(parser.format_all(), end="")
        parser.exit()


_FOREIGN = "the config of a Hugging Face model, which is read where it lies, beside the tensors"
_FILES = {
    "model_type": _FOREIGN,
    "architectures": _FOREIGN,
    "commit_id": "the training state of a model, which is found in its folder (--model_name)",
    "token_kind": "the tokenizer of a model, which is found in its folder (--model_name)",
    "vocab_size": "the config of a model, which is found in its folder (--model_name)",
}
"""Files of models, by a field that none of the others before it has."""


def _known_file(values: dict[str, Any]) -> str | None:
    """What a file is instead of settings, by its fields; None when that is not known."""
    return next((what for field, what in _FILES.items() if field in values), None)


def _sayable(value: Any, where: str) -> str:
    """A value from a file as a word; what no command line can hold, no flag is prepared for.

    Raises: InputError for a NUL, half a surrogate pair, and a number of thousands of digits.
    """
    try:
        word = str(value)
        os.fsencode(word)
    except ValueError as error:
        raise InputError(f"{where}: expected what a command line can hold ({error}).") from error
    if "\0" in word:
        raise InputError(f"{where} is {word[:80]!r}, expected what a command line can hold, without a NUL.")
    return word


def spelled(flag: str, value: object) -> str:
    """Spell a flag with its value as a shell takes it; a value that begins with a dash is joined to its flag."""
    word = shlex.quote(str(value))
    return f"{flag}={word}" if str(value).startswith("-") else f"{flag} {word}"


def add_check_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that prove a model by a text."""
    group = parser.add_argument_group("proof by a text")
    text = "compute the mean loss over the beginning of a text; exit code 1 when it is not that of the trained model"
    group.add_argument("--check_text", metavar="FILE", type=Path, help=text)
    loss = "with --check_text: the loss to expect; more than 0.5 above it is a failure"
    group.add_argument("--check_loss", metavar="X", type=positive, help=loss)


def step(text: str) -> int | str:
    """A flag's value that names a step: its number, or `newest`."""
    if text == "newest":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither the number of a step nor newest") from None


def add_rule_flags(group: argparse._ArgumentGroup, what: str = "") -> None:
    """Add the flags of the rules by which steps are kept; `what` replaces what each says of itself in --help."""
    group.add_argument("--keep", type=whole, metavar="N", help=what or "older steps to keep besides the best (1)")
    group.add_argument("--keep_every", type=count, metavar="N", help=what or "keep every step that N divides")
    group.add_argument("--keep_best", type=whole, metavar="N", help=what or "best steps to keep (1)")
    text = "save and keep these steps: 100,1000,5000, or log for 1, 2, 4, 8, ..., or none"
    group.add_argument("--keep_steps", type=_steps, metavar="STEPS", help=what or text)
    text = "of the kept steps only the N newest keep their optimizer state; older ones hold weights only"
    group.add_argument("--keep_optimizer", type=whole, metavar="N", help=what or text)
    text = "older steps at growing distances, while all take less (1GB, unless --keep is given)"
    group.add_argument("--keep_within", type=lambda word: size(word, least=0), metavar="SIZE", help=what or text)


def rules_given(args: argparse.Namespace) -> dict[str, Any]:
    """The rules that the command line gives, by name; None for the others."""
    return {name: getattr(args, name) for name in _RULES}


_RULES = ("keep", "keep_every", "keep_best", "keep_steps", "keep_optimizer", "keep_within")


def _steps(word: str) -> str | tuple[int, ...]:
    """Parse numbers of steps, as a flag's type."""
    if word in ("log", "none"):
        return "log" if word == "log" else ()
    if not re.fullmatch(r"[0-9]{1,18}(,[0-9]{1,18})*", word):
        raise argparse.ArgumentTypeError(f"found {word!r}, expected steps such as 100,1000,5000, or log, or none")
    return tuple(map(int, word.split(",")))


def size(word: str, least: int = 1) -> int:
    """Parse a number of bytes such as 5GB, as a flag's type."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", word.upper())
    if not match or (match[3] and not match[2]):
        raise argparse.ArgumentTypeError(f"found {word!r}, expected a size such as 5GB, 500MB or 2GiB")
    base = 1024 if match[3] else 1000
    number = float(match[1]) * base ** " KMGT".index(match[2] or " ")
    value = int(number) if number < sys.maxsize else -1
    if value < least:
        raise argparse.ArgumentTypeError(f"found {word!r}, expected a size of at least {least} byte")
    return value


def duration(word: str) -> float:
    """Parse a time such as 30s, 5m or 1h, or a number of seconds, as a flag's type: seconds above 0."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)([smh]?)", word)
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not seconds:
        raise argparse.ArgumentTypeError(f"found {word!r}, expected a time above 0 such as 30s, 5m or 1h")
    return seconds


def number(kind: Callable[[str], N], low: float, high: float, allowed: str) -> Callable[[str], N]:
    """Make a flag's type: a number from low to high, both included."""

    def parse(word: str) -> N:
        with contextlib.suppress(ValueError):
            value = kind(word)
            if low <= value <= high:
                return value
        raise argparse.ArgumentTypeError(f"found {word!r}, expected {allowed}")

    return parse


count = number(int, 1, 2**62, "a whole number of at least 1")
whole = number(int, 0, 2**62, "a whole number of at least 0")
seed_number = number(int, 0, 2**62, "a whole number from 0 to 2**62")
positive = number(float, math.nextafter(0.0, 1.0), sys.float_info.max, "a number above 0")
above_or_zero = number(float, 0, sys.float_info.max, "0 or a number above 0")
below_one = number(float, 0, math.nextafter(1.0, 0.0), "a number from 0 up to but not including 1")


def read_settings(path: Path) -> dict[str, Any]:
    """Read a JSON object of flags.

    Raises: InputError when the file is missing, is not valid JSON, or is not an object.
    """
    try:
        values = json.loads(read_regular(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}. --config_file takes a JSON file of flags by name.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise InputError(f'{path}: found a {type(values).__name__}, expected an object like {{"max_iters": 1000}}.')
    return values


def spin_briefly() -> None:
    """Make OpenMP's threads spin for microseconds, not milliseconds, while they wait; call it before torch is loaded.

    A save copies on a core that one of these threads needs. The others wait for it, and as long as they spin nothing
    else can use their cores.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def tell_json(message: str) -> None:
    """Print an error to stdout as an object, {"error": message}, where the command line asks for JSON."""
    if Output.as_json:
        print(json.dumps({"error": printable(message)}, ensure_ascii=False), flush=True)


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a script's main and exit: an error of ours, or of the file system, is one line on stderr and exit code 1.

    Under --json it is an object on stdout, too.
    """
    guard_terminal()
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except CheckpointError as error:
        tell_json(str(error))
        tell(f"error: {error}")
        code = WRONG_USE if isinstance(error, Unspecified) else FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has closed the pipe; Python would complain once more while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = DONE
    except OSError as error:
        message = f"{error.filename or 'input or output'}: {error.strerror}"
        tell_json(message)
        tell(f"error: {message}")
        code = FAILED
    import signal  # costs a millisecond, so not at the start

    # The work is over: neither an impatient Ctrl-C nor a queue's second SIGTERM must change the exit code.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.exit(code)
