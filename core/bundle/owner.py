"""Which process something unfinished belongs to, and whether that process still runs."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path

STAGE = ".stage-"
"""How the names of what is unfinished begin."""

_unfinished: set[str] = set()
"""Names that this process is working under."""


@functools.cache
def boot() -> str | None:
    """Identify the run of this kernel, which containers share and a reboot ends; None where the system does not say."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


@functools.cache
def namespace() -> str | None:
    """Identify the numbering of processes that this one is in; None where the system has a single one."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115
    return None


def _process(pid: int) -> tuple[str, int] | None:
    """The state of a process, and when it began, in clock ticks since the boot; None where that cannot be read."""
    try:
        # The name of the program, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


def began() -> int:
    """When this process began, in clock ticks since the boot; 0 where the system does not say."""
    found = _process(os.getpid())
    return found[1] if found else 0


def runs(pid: int, since: int) -> bool:
    """Whether a process of this system, numbered as here, still runs; one that cannot be asked does.

    A number that another process has been given since is no process that began at `since`; 0 is unknown.
    """
    found = _process(pid)
    if found is not None:
        return found[0] not in "ZX" and since in (0, found[1])
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


@functools.cache
def _machine() -> str:
    return f"{zlib.crc32(f'{boot() or socket.gethostname()} {namespace()}'.encode()):08x}"


@contextlib.contextmanager
def stage_name() -> Iterator[str]:
    """Lend a new name for something unfinished; it is left alone while this block and its process last."""
    name = new_stage_name()
    _unfinished.add(name)
    try:
        yield name
    finally:
        _unfinished.discard(name)


def new_stage_name() -> str:
    """A new name that tells the process it belongs to: where it runs, its number, and when it began."""
    return f"{STAGE}{_machine()}.{os.getpid()}.{began()}-{secrets.token_hex(8)}"


def is_left_over(name: str) -> bool:
    """Whether nobody works any more under a name that begins with STAGE; the caller holds the writer's lock.

    What another machine left counts as left over: its process would have the lock.
    """
    told = re.fullmatch(rf"{re.escape(STAGE)}([0-9a-f]{{8}})\.(\d+)\.(\d+)-[0-9a-f]+", name)
    if told is None or told[1] != _machine():
        return True
    pid = int(told[2])
    return name not in _unfinished if pid == os.getpid() else not runs(pid, int(told[3]))
