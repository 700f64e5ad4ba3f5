"""When to stop and when to save: signals and a time limit, read by the training loop where its state is whole."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from .commandline import INTERRUPTED, STOPPED

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
"""Signals that ask to save and stop; SIGHUP comes when a terminal closes, SIGBREAK is Ctrl-Break of Windows."""

TIME_LIMIT = "stop_after_minutes"

SAVING = "SIGUSR1"
"""The signal that requests a save without stopping; Windows has none."""

SAVE_BY_CLOCK = "save_every_minutes"

WISHES = (*STOPPING, TIME_LIMIT, SAVING, SAVE_BY_CLOCK)
"""Requests to a run at the end of a step."""


def reason(wishes: set[str]) -> str | None:
    """The first of some requests that stops the run; None if none does."""
    return next((name for name in (*STOPPING, TIME_LIMIT) if name in wishes), None)


class StopSignal:
    """While the block runs, SIGINT, SIGTERM and SIGHUP request to save and stop, SIGUSR1 to save and continue.

    A SIGHUP that was ignored at the start (nohup) stays ignored. A second SIGINT ends at once; a second SIGTERM changes
    nothing, and from the third on they are not looked at. `after_minutes` from now on it asks to stop by itself. With
    `owns_process` (a script, not a notebook) "at once" is at once: no thread that writes a save is waited for, which
    loses nothing that is committed, and while there is nothing to save the first signal ends the process.
    """

    def __init__(self, after_minutes: float | None = None, *, owns_process: bool = False) -> None:
        self.signal: str | None = None
        self.work_to_save = False
        """Whether training has begun; the loop sets it."""
        self._ends = math.inf if after_minutes is None else time.monotonic() + 60 * after_minutes
        self._owns_process = owns_process
        self._interrupts = 0
        self._save = False
        self._before: dict[int, Any] = {}
        self._times = {name: itertools.count(1) for name in STOPPING}  # next() is one step, whatever interrupts

    @property
    def requested(self) -> str | None:
        """The request to stop: the name of a signal, or of the time limit after at least one step; None to continue."""
        over = self.work_to_save and time.monotonic() >= self._ends
        return self.signal or (TIME_LIMIT if over else None)

    def take(self) -> set[str]:
        """The pending requests; a request to save is returned once."""
        save, self._save = self._save, False
        return ({self.requested} if self.requested else set()) | ({SAVING} if save else set())

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for name in (*STOPPING, SAVING):
                number = getattr(signal, name, None)
                if number is None or (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                    continue
                if signal.getsignal(number) is not None:  # None: C code has taken it
                    self._before[number] = signal.signal(number, self._on_save if name == SAVING else self._on_stop)
        return self

    def __exit__(self, *_: object) -> None:
        if self._owns_process:
            _Script.is_over = True
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True
        _tell(f"{signal.Signals(number).name}: saving after this step, then continuing")

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            if self._owns_process:
                _tell("interrupted; what was saved is intact")
                os._exit(INTERRUPTED)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a third would only interrupt the exit
            raise KeyboardInterrupt
        if self._owns_process and not self.work_to_save:
            _tell(f"{name}: nothing new to save. Run the same command to continue.")
            os._exit(STOPPED)
        nth = next(self._times[name])
        if nth > 1 and number != signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)  # a storm of them would run handlers within handlers
            if nth > 2:  # and has, before this one came so far
                return
        doing = "already stopping" if self.signal else "finishing this step, then saving"
        self.signal = self.signal or name
        _tell(f"{name}: {doing} (a second Ctrl-C ends at once)")


class _Script:
    """What signals do before and after the StopSignal of a script."""

    is_over = False

    @classmethod
    def on_signal(cls, number: int, frame: FrameType | None) -> None:
        """Before: there is nothing to save. After: the exit code is decided."""
        name = signal.Signals(number).name
        if not cls.is_over and name in STOPPING:
            _tell(f"{name}: nothing new to save. Run the same command to continue.")
            os._exit(STOPPED)


def decide_exit_code() -> None:
    """Let no signal that StopSignal handles decide the exit code of a script, from here to its end."""
    for name in (*STOPPING, SAVING):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _Script.on_signal)


def _tell(line: str) -> None:
    # Past the buffer of sys.stderr, which the line that the signal interrupts may be holding.
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())
