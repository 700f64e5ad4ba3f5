"""What each logger has got of the log of a run, and the thread in which it gets the rest after a commit."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..bundle.folder import LOG, FolderReader, top_state
from ..bundle.storage import DISK
from ..bundle.training_state import TrainingState
from ..bundle.writing import explained
from ..console.files import read_regular
from ..containers.json_files import NUMBER, dump_json, parse_json, with_infinities, without_infinities
from ..errors import CheckpointError, InputError
from .loggers import Logger, Opening, openings
from .metrics import Metrics

LIMIT = 10.0
"""Seconds that the end of a run waits for its loggers."""

AT_ONCE = 10_000
"""Events that a logger gets before it has to keep them: its memory is bounded."""

Say = Callable[[str], None]


class Record:
    """`.logs.json`: how many events each logger has got, and of which run or branch."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Any] = {}
        with contextlib.suppress(OSError, CheckpointError):  # without it everything is handed over again
            self._known = parse_json(read_regular(path), path.name)

    def of(self, name: str) -> tuple[int, str | None]:
        """How many events a logger has got, and of which run; 0 and None where that is not known."""
        match self._known.get(name):
            case {"events": int(events), "run": str(run)} if events >= 0:
                return events, run
        return 0, None

    def set(self, name: str, events: int, run: str) -> None:
        """Record what a logger keeps now, durably."""
        self._write({**self._known, name: {"events": events, "run": run}})

    def cut(self, events: int) -> None:
        """No logger has got more than the events that the log has left."""
        cut = {name: {"events": min(self.of(name)[0], events), "run": self.of(name)[1] or ""} for name in self._known}
        with contextlib.suppress(OSError):  # a disk that takes nothing fails the next save, which says so
            self._write(cut)

    def _write(self, known: dict[str, Any]) -> None:
        if known != self._known:
            self._known = known
            new = self._path.with_name(f"{self._path.name}.new")
            new.unlink(missing_ok=True)  # of a process that was killed here
            DISK.write(new, dump_json(known))
            DISK.rename(new, self._path)


class Feed:
    """One logger: where it is in the log. What fails is reported once, and tried again after the next commit."""

    def __init__(self, name: str, kind: type[Logger], opening: Opening, record: Record) -> None:
        self.name = name
        self._kind, self._opening, self._record = kind, opening, record
        self._logger: Logger | None = None
        self._run = ""
        self._events = self._byte = 0  # how many it has got, and where they end
        self._has_failed = False

    def hand_over(self, log: Metrics, step: int, run: str, say: Say) -> None:
        """Hand over what the log has up to a committed step."""
        try:
            if self._run != run:
                self._end()
            self._logger = self._logger or self._open(log, step, run)
            if self._logger is None:
                return
            for end, values in log.events(self._byte, step):
                values = {name: value for name, value in with_infinities(values).items() if value is not None}
                self._logger.add(values.pop("step"), values)
                self._events, self._byte = self._events + 1, end
                if self._events % AT_ONCE == 0:
                    self._keep()
            self._keep()
        except (Exception, SystemExit) as error:
            self._failed(error, say)

    def _open(self, log: Metrics, step: int, run: str) -> Logger | None:
        """Open the logger at the first step of which it lacks something; None where it lacks nothing."""
        assert log.path is not None
        events, known_run = self._record.of(self.name)
        if self._kind.has_lost(log.path.parent, run, known_run):
            events = 0
        before, first, of = 0, (0, 0), -1
        for number, (end, values) in enumerate(log.events(0, step)):
            if values["step"] != of:
                first, of = (number, before), values["step"]
            before = end
            if number == events:
                self._events, self._byte = first
                self._run = run
                return self._opening(log.path.parent, run, of)
        return None

    def _keep(self) -> None:
        assert self._logger
        self._logger.flush()
        if self._kind.keeps_at != "close":
            self._record.set(self.name, self._events, self._run)

    def _end(self) -> None:
        if self._logger is not None:
            logger, self._logger = self._logger, None
            logger.close()
            self._record.set(self.name, self._events, self._run)

    def close(self, say: Say) -> None:
        """End the logger; it is opened again where more comes."""
        try:
            self._end()
        except Exception as error:
            self._failed(error, say)

    def _failed(self, error: BaseException, say: Say) -> None:
        """Give the logger up; it is opened again where it kept what it was given."""
        logger, self._logger = self._logger, None
        with contextlib.suppress(Exception):
            if logger is not None:
                logger.close()
                if self._kind.keeps_at == "add":
                    self._record.set(self.name, self._events, self._run)
        if not self._has_failed:
            self._has_failed = True
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            say(
                f"WARNING: --log {self.name}: {what}. Training continues; {LOG} has every value, and what this logger "
                "lacks is handed over again after the next save."
            )


class Logs:
    """The log of a model's folder, and its loggers: they get events when the step that covers them is committed."""

    def __init__(self, folder: Path | None, wanted: str | Iterable[str | Callable[..., object]], say: Say) -> None:
        opened = openings(wanted)  # on every rank: what is missing is an error everywhere
        self._metrics = Metrics(folder / LOG if folder else None)
        self._folder, self._say = folder, say
        self._record = Record(folder / ".logs.json") if folder and opened else None
        self._feeds = [Feed(name, *how, self._record) for name, how in opened.items()] if self._record else []
        self._begins_at: int | None = None
        self._has_begun = False
        self._step = -1  # the newest committed one, as far as is known
        self._of = TrainingState()  # it, where there are loggers
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._is_due = self._ends = self._is_late = False

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Log values of a step: nothing but memory, until a save.

        Raises: InputError for a value that is no number and no text.
        """
        self.begin_if_due()
        self._metrics.add(step=step, **{name: _plain(name, value) for name, value in values.items()})
        if self._feeds and step <= self._step:
            self._wake()

    def goes_on_from(self, step: int) -> None:
        """Before anything else is logged or saved, drop what was logged after this step."""
        self._begins_at, self._has_begun = step, False

    def begin_if_due(self) -> None:
        """Begin at the step that was loaded, or else at the newest one."""
        if self._has_begun or self._folder is None:
            return
        said = None
        if self._record or (self._folder / LOG).exists():
            with explained(self._folder):
                newest = top_state(FolderReader(self._folder)).step or 0 if self._begins_at is None else 0
            said = self.begin(self._begins_at or newest)
        self._has_begun = True
        if said:
            self._say(f"WARNING: {said}")

    def begin(self, step: int) -> str | None:
        """Cut the log back to a step, and return what to report; later steps are handed over anew.

        Raises: InputError when the log cannot be read.
        """
        self._has_begun = True
        if self._feeds:
            self._wait()
        said, self._step = self._metrics.cut(step), min(step, self._step)
        if self._record:
            if not self._is_late:
                for feed in self._feeds:
                    feed.close(self._say)
            self._record.cut(sum(1 for _ in self._metrics.events(0, step)))
        return said

    def flush(self, step: int) -> None:
        """Make durable what was logged up to a step: before its commit.

        Raises: SaveFailed.
        """
        self._metrics.flush(step)

    def committed(self, step: int | None = None) -> None:
        """A step is committed, or the newest one is: hand over, in a thread, what the loggers lack up to it."""
        self._step = self._step if step is None else step
        if self._feeds and self._folder:
            self._of = top_state(FolderReader(self._folder))
            self._step = self._of.step if self._of.step is not None else -1
            self._wake()

    def settle(self, *, ends: bool = False) -> None:
        """Make durable what was logged of committed steps, and wait for the loggers, for at most LIMIT seconds in all.

        Raises: SaveFailed.
        """
        self._metrics.flush(self._step)
        if not self._feeds or self._step < 0:
            return
        self._ends = ends
        self._wake()
        self._wait()
        self._ends = False

    def _wake(self) -> None:
        with self._lock:
            self._is_due = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="loggers", daemon=True)
                if not _start(self._thread):
                    self._work()

    def _work(self) -> None:
        while self._has_work():
            with contextlib.suppress(CheckpointError):  # the next save reports it
                self._metrics.flush(self._step)
            run = (self._of.branch or {}).get("id") or self._of.run or self._of.commit_id or LOG
            for feed in self._feeds:
                feed.hand_over(self._metrics, self._step, run, self._say)
                if self._ends:
                    feed.close(self._say)

    def _has_work(self) -> bool:
        with self._lock:
            due, self._is_due = self._is_due, False
            if not due:
                self._thread = None
            return due

    def _wait(self) -> None:
        if (thread := self._thread) is None or self._is_late:
            return
        thread.join(LIMIT)
        if thread.is_alive():
            self._is_late = True
            names = ", ".join(feed.name for feed in self._feeds)
            self._say(
                f"WARNING: --log {names}: still at work after {LIMIT:g} s. {LOG} has every value, and what a logger "
                "lacks is handed over when the run starts again."
            )


def _start(thread: threading.Thread) -> bool:
    """Start a thread; False where there can be none, as at the end of the program."""
    if not threading.main_thread().is_alive():
        return False
    try:
        thread.start()
    except RuntimeError:
        return False
    return True


def _plain(name: str, value: Any) -> Any:
    """A value as JSON has it: a number, also of NumPy and torch, or a text.

    Raises: InputError for anything else.
    """
    if hasattr(value, "item"):
        try:
            value = value.item()
        except (RuntimeError, ValueError) as error:
            raise InputError(f"log: {name} has more than one number, expected one. Log each by a name.") from error
    if value is not None and not isinstance(value, (int, float, str)):
        raise InputError(f"log: {name} is of type {type(value).__name__}, expected a number or a text.")
    return without_infinities({NUMBER: value})[NUMBER]
