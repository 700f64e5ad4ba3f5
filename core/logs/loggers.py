"""Loggers: csv, tensorboard, wandb, and a function of the caller's; each gets the values of committed steps."""

from __future__ import annotations

import csv
import heapq
import importlib
import importlib.util
import io
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..bundle.storage import DISK
from ..console.files import open_regular
from ..errors import InputError

Values = dict[str, Any]
Opening = Callable[[Path, str, int], "Logger"]
"""Opens a logger: with the folder of the model, the id of the run or of its branch, and the first step that it gets."""


class Logger:
    """What gets values. Opened at a step, it drops what it holds from that step on: those come again."""

    keeps_at = "flush"
    """The method after which what it was given is not lost when this process is killed: add, flush or close."""

    def __init__(self, folder: Path, run: str, step: int) -> None:
        pass

    @classmethod
    def has_lost(cls, folder: Path, run: str, known_run: str | None) -> bool:
        """Whether it holds nothing of what it was given: then it gets everything."""
        return False

    def add(self, step: int, values: Values) -> None:
        """Take the values of a step."""
        raise NotImplementedError

    def flush(self) -> None:
        """Keep what was added."""

    def close(self) -> None:
        """Keep what was added, and end."""


class CsvLogger(Logger):
    """`metrics.csv`: a row a step, a column a value; one that appears later makes a new file with that column."""

    def __init__(self, folder: Path, run: str, step: int) -> None:
        self._path = folder / "metrics.csv"
        self._rows: dict[int, Values] = {}
        self._columns: dict[str, None] = {}
        self._last = -1
        self._kept_up_to: int | None = step - 1  # of the file of an earlier process

    @classmethod
    def has_lost(cls, folder: Path, run: str, known_run: str | None) -> bool:
        """Whether the file is gone."""
        return not (folder / "metrics.csv").exists()

    def add(self, step: int, values: Values) -> None:
        """Take the values of a step; those of one step make one row."""
        self._rows.setdefault(step, {"step": step}).update(values)

    def flush(self) -> None:
        """Append the new rows; write the file anew where a column is new, or a row is not at the end."""
        if not self._rows:
            return
        rows = [self._rows[step] for step in sorted(self._rows)]
        columns = dict.fromkeys(["step", *itertools.chain(*rows)])
        if self._kept_up_to is None and rows[0]["step"] > self._last and columns.keys() <= self._columns.keys():
            with DISK.append(self._path) as file:
                file.write("".join(_csv_lines(rows, self._columns)).encode())
                DISK.sync(file)
        else:
            self._write_anew(rows, columns)
        self._last = max(self._last, rows[-1]["step"])
        self._rows.clear()

    def _write_anew(self, rows: list[Values], columns: dict[str, None]) -> None:
        most = self._kept_up_to if self._kept_up_to is not None else sys.maxsize
        self._columns = dict.fromkeys([*_header(self._path), *columns])
        merged = heapq.merge(_rows_of(self._path, most), rows, key=lambda row: row["step"])
        steps = itertools.groupby(merged, key=lambda row: row["step"])
        joined = ({name: value for row in same for name, value in row.items()} for _, same in steps)
        new = self._path.with_name(f".{self._path.name}.new")
        new.unlink(missing_ok=True)  # of a process that was killed here
        with DISK.create(new) as output:
            for line in _csv_lines(joined, self._columns, header=True):
                output.write(line.encode())
        DISK.rename(new, self._path)
        self._kept_up_to = None


def _header(path: Path) -> list[str]:
    return next(csv.reader(_lines(path)), [])


def _rows_of(path: Path, most: int) -> Iterator[Values]:
    """The rows of whole lines, up to a step, with the texts of their values."""
    for row in csv.DictReader(_lines(path)):
        step = row.get("step") or ""
        if step.isdecimal() and int(step) <= most:
            yield {**{name: text for name, text in row.items() if name and text}, "step": int(step)}


def _lines(path: Path) -> Iterator[str]:
    if path.exists():
        with io.TextIOWrapper(io.BufferedReader(open_regular(path)), "utf-8", "replace", newline="") as file:
            yield from (line for line in file if line.endswith("\n"))


def _csv_lines(rows: Iterable[Values], columns: Iterable[str], header: bool = False) -> Iterator[str]:
    line = io.StringIO()
    writer = csv.DictWriter(line, [*columns], lineterminator="\n")
    if header:
        writer.writeheader()
    for row in rows:
        writer.writerow(row)
        yield line.getvalue()
        line.seek(0)
        line.truncate()


class TensorBoardLogger(Logger):
    """The folder `tensorboard/`: a scalar for each number."""

    def __init__(self, folder: Path, run: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    @classmethod
    def has_lost(cls, folder: Path, run: str, known_run: str | None) -> bool:
        """Whether the folder is gone."""
        return not (folder / "tensorboard").exists()

    def add(self, step: int, values: Values) -> None:
        """Take the numbers of a step; TensorBoard has no place for texts beside them."""
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write what was added."""
        self._writer.flush()

    def close(self) -> None:
        """Write what was added, and end."""
        self._writer.close()


class WandbLogger(Logger):
    """Weights & Biases, offline unless WANDB_MODE says otherwise: a run of theirs for a run, and one for each branch.

    Its own process buffers what it gets, and loses that when this one is killed.
    """

    keeps_at = "close"

    def __init__(self, folder: Path, run: str, step: int) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "gpt-checkpoints"),
            name=folder.name,
            id=run,
            dir=folder,
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(console="off", silent=True),
        )

    @classmethod
    def has_lost(cls, folder: Path, run: str, known_run: str | None) -> bool:
        """Whether this is another run or branch: it is a new one there, and begins with the steps before it."""
        return run != known_run or not (folder / "wandb").exists()

    def add(self, step: int, values: Values) -> None:
        """Take the values of a step."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Write what was added, and end."""
        self._run.finish()


KINDS: dict[str, tuple[type[Logger], str]] = {
    "csv": (CsvLogger, ""),
    "tensorboard": (TensorBoardLogger, "tensorboard"),
    "wandb": (WandbLogger, "wandb"),
}
"""Each logger by name, and the package that it needs."""


class _FunctionLogger(Logger):
    """Hands each event to a function, which is called as `function(step, **values)`."""

    keeps_at = "add"

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def add(self, step: int, values: Values) -> None:
        """Call the function."""
        self._function(step, **values)


def names_of(word: str) -> tuple[str, ...]:
    """The names of loggers in a text, separated by commas.

    Raises: InputError for what is none, and for one that is there twice.
    """
    names = tuple(word.split(","))
    for name in names:
        if name not in KINDS and not _is_function(name):
            raise InputError(f"found {name!r}, expected {', '.join(KINDS)} or a function as module:function.")
    _refuse_twice(names)
    return names


def _is_function(name: str) -> bool:
    module, colon, function = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *function.split(".")))


def _refuse_twice(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"{name} is given twice, expected each logger once.")
        seen.add(name)


def openings(wanted: str | Iterable[str | Callable[..., object]]) -> Mapping[str, tuple[type[Logger], Opening]]:
    """Make sure that each logger can be opened, and return how, by their names; the libraries are not imported yet.

    Raises: InputError naming what is not installed, not found, unknown, or there twice.
    """
    listed = [wanted] if isinstance(wanted, str) else [*wanted]
    named = [(one, name) for one in listed for name in (names_of(one) if isinstance(one, str) else [_name_of(one)])]
    _refuse_twice(name for _, name in named)
    found: dict[str, tuple[type[Logger], Opening]] = {}
    for one, name in named:
        if name in KINDS:
            kind, package = KINDS[name]
            spec = importlib.util.find_spec(package) if package else None
            if package and (spec is None or spec.origin is None):  # a folder that wandb made here is no package
                raise InputError(f"log: {package} is not installed: pip install {package}")
            found[name] = kind, kind
        else:
            function = _imported(name) if isinstance(one, str) else one
            found[name] = _FunctionLogger, lambda *_, function=function: _FunctionLogger(function)
    return found


def _name_of(function: Callable[..., object]) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '')}:{name}"


def _imported(name: str) -> Callable[..., object]:
    """The function that `module:function` names; the working folder is searched as well, as `python -m` does."""
    module, _, path = name.partition(":")
    here = os.fspath(Path.cwd())
    sys.path.append(here)
    try:
        function = importlib.import_module(module)
        for part in path.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"log: {name}: {error}. Expected module:function, with the module here or installed."
        ) from error
    finally:
        sys.path.remove(here)
    if not callable(function):
        raise InputError(f"log: {name} is of type {type(function).__name__}, expected a function (step, **values).")
    return function
