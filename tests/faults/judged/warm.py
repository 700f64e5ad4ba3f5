"""A process that has imported what trainers need, and forks one for each command that `ask.py` sends.

    python -m tests.faults.judged.warm SOCKET [MODULE ...]

A command starts in milliseconds instead of seconds, and is killed like any other process. The server ends, and its
commands with it, when its standard input is closed.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from pathlib import Path

SIZE = 1 << 20


def serve(address: str) -> tuple[dict, list[int]]:
    """Fork a process for each command; return, in that process, the command and its standard streams."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(address)
    server.listen(64)
    watched = selectors.DefaultSelector()
    watched.register(sys.stdin, selectors.EVENT_READ, "end")
    watched.register(server, selectors.EVENT_READ, "new")
    running: dict[int, tuple[socket.socket, int]] = {}
    print("ready", flush=True)
    while True:
        # Whoever went away is killed before anyone new begins.
        for key, _ in sorted(watched.select(), key=lambda found: found[0].data == "new"):
            if key.data == "end":
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                sys.exit()
            if key.data == "new":
                asked, _ = server.accept()
                message, streams, _, _ = socket.recv_fds(asked, SIZE, 3)
                if not message:
                    asked.close()
                    continue
                if (pid := os.fork()) == 0:
                    watched.close()
                    server.close()
                    return json.loads(message), streams
                for fd in streams:
                    os.close(fd)
                running[pid] = asked, os.pidfd_open(pid)
                watched.register(asked, selectors.EVENT_READ, ("gone", pid))
                watched.register(running[pid][1], selectors.EVENT_READ, ("ended", pid))
                continue
            what, pid = key.data
            if pid not in running:
                continue
            if what == "gone":
                os.kill(pid, signal.SIGKILL)
            asked, ended = running.pop(pid)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            watched.unregister(asked)
            watched.unregister(ended)
            os.close(ended)
            if what == "ended":
                asked.send(str(status if status >= 0 else 128 - status).encode())
            asked.close()


def become(job: dict, streams: list[int]) -> None:
    """Run a command in this process, armed by the referee where the environment says so."""
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.argv = job["argv"]
    if "CKPT_CHAOS_WATCH" in os.environ:
        import ckpt_chaos

        from .descriptors import see_descriptors

        runpy.run_path(str(Path(ckpt_chaos.__file__).parent / "_boot/sitecustomize.py"))
        see_descriptors()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    become(*serve(sys.argv[1]))
