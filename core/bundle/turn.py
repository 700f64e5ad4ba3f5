"""One write at a time in a model's folder among the threads of this process; lock.py keeps other processes out."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Self

_ended = threading.Condition()
"""Notified when a turn ends."""

_turns: dict[Path, list[Turn]] = {}
"""The turns that are under way in each folder, each begun inside the one before it."""


class Turn(contextlib.ExitStack):
    """The right to change a folder, until it is closed; what else a write holds is entered into it.

    It belongs to the thread that enters it: a save takes it in the loop and goes on in a thread of its own.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.thread: int | None = None
        self.callback(self._end, folder)

    def __enter__(self) -> Self:
        self.thread = threading.get_ident()
        return super().__enter__()

    def _end(self, folder: Path) -> None:
        with _ended:
            under_way = _turns.get(folder, [])  # a process forked meanwhile has none
            if self in under_way:
                under_way.remove(self)
            if not under_way:
                _turns.pop(folder, None)
            _ended.notify_all()


def take(folder: Path) -> Turn:
    """Wait until no other thread, and no save, changes a folder; then take the turn. Blocks of one thread nest."""
    key, me = folder.resolve(), threading.get_ident()

    def is_free() -> bool:
        under_way = _turns.get(key)
        return not under_way or under_way[-1].thread == me

    with _ended:
        _ended.wait_for(is_free)
        turn = Turn(key)
        _turns.setdefault(key, []).append(turn)
    return turn


def _forget() -> None:
    """In a forked process: the threads that had a turn are not here."""
    global _ended
    _ended = threading.Condition()
    _turns.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
