"""Watch: the page of a checkpoint from a server on this machine alone, newer whenever the files are."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...errors import CheckpointError, InputError
from ..inspect import Inspection, inspect_path
from ..report import facts_of
from .document import document
from .markup import box
from .page import page
from .runs import runs_page
from .weights import Weights

HOST, PORT = "127.0.0.1", 8000
"""Where the page is served: this machine alone."""

_LOCAL = {"127.0.0.1", "localhost", "::1"}
_PORTS = 100
"""Ports that are tried, from the given one on."""

_DEEP = 2
"""Folders within each other whose files make a version: a model of ours has steps and states in folders."""


class Watch:
    """The newest page of a path, made again only when its files have changed; weights only when theirs have.

    `models` lists the models of a folder of them; it is None for one checkpoint.
    """

    def __init__(self, path: Path, step: int | None = None, models: Callable[[], list[Any]] | None = None) -> None:
        self.path, self.step, self.models = path, step, models
        self._lock = threading.Lock()
        self._page: tuple[str, bytes] = "", b""
        self._weights: tuple[str, Weights | None] = "", None

    @property
    def version(self) -> str:
        """A digest of the names, sizes and times of all files."""
        return _digest(_files(self.path, _DEEP))

    def page(self) -> bytes:
        """The newest page; while it cannot be made, the one before it, or the reason."""
        with self._lock:
            version = self.version
            if self._page[0] != version:
                try:
                    self._page = version, self._made(version).encode(errors="backslashreplace")
                except (CheckpointError, OSError) as error:  # a save may be replacing the files: the next look is soon
                    said = document("waiting", [box("amber", "Nothing to show yet", [str(error)])], live="waiting")
                    return self._page[1] or said.encode(errors="backslashreplace")
            return self._page[1]

    def _made(self, version: str) -> str:
        if self.models is not None:
            return runs_page(self.path, self.models(), live=version)
        with inspect_path(self.path, self.step) as found:
            return page(found, facts_of(found), weights=self._weights_of(found), live=version)

    def _weights_of(self, found: Inspection) -> Weights:
        own = [found.path / name if found.path.is_dir() else found.path for name in found.container.files]
        key = f"{found.step} {_digest(line for path in own for line in _files(path, 0))}"
        if self._weights[0] != key or self._weights[1] is None:
            self._weights = key, Weights.of(found, lambda size: None)
        assert self._weights[1] is not None
        return self._weights[1]


def _files(path: Path, deep: int) -> Iterator[str]:
    """Name, size and time of a file, or of each file in a folder."""
    with contextlib.suppress(OSError):
        if path.is_dir():
            for inner in sorted(path.iterdir()) if deep >= 0 else []:
                if not inner.name.startswith("."):  # locks, which a reader may touch
                    yield from _files(inner, deep - 1)
        else:
            stat = path.stat()
            yield f"{path} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"


def _digest(lines: Iterator[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="backslashreplace")).hexdigest()[:16]


def serve(watch: Watch, port: int, say: Callable[[str], object]) -> None:
    """Serve the page until Ctrl-C; `say` gets the address. A taken port is followed by the next free one.

    Raises: InputError when no port is free.
    """
    with _server(watch, port) as server:
        taken = f"port {port} is taken; " if port not in (0, server.server_address[1]) else ""
        say(f"{taken}watching {watch.path} at http://{HOST}:{server.server_address[1]}/ (Ctrl-C ends)")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever(poll_interval=0.2)


def _server(watch: Watch, port: int) -> ThreadingHTTPServer:
    for number in range(port, min(port + _PORTS, 1 << 16)):
        with contextlib.suppress(OSError):
            server = ThreadingHTTPServer((HOST, number), _handler(watch))
            server.daemon_threads = True
            return server
    raise InputError(f"--port {port}: neither it nor any of the {_PORTS} after it is free. Give another one.")


def is_local(host: str | None) -> bool:
    """Whether a Host header names this machine; through another name a page of elsewhere could read the checkpoint."""
    try:
        return urlsplit(f"//{host}").hostname in _LOCAL if host else False
    except ValueError:
        return False


def _handler(watch: Watch) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Two addresses: the page, and its version."""

        server_version, sys_version = "inspect_model", ""

        def do_GET(self) -> None:
            if not is_local(self.headers.get("Host")):
                self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"This page is for this machine alone.\n")
            elif self.path == "/":
                self._answer(HTTPStatus.OK, "text/html", watch.page())
            elif self.path == "/version":
                self._answer(HTTPStatus.OK, "text/plain", watch.version.encode())
            else:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"Only / is here.\n")

        def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the browser has left
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: a page asks every three seconds."""

    return Handler
