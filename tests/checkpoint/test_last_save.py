"""The last save of a program that ends is committed, or reported: in flight, in atexit, and where no thread starts."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import zlib

import pytest

from core.checkpoint import CheckpointManager
from core.containers import checksum
from tests.conftest import ROOT

MODEL = """
import atexit, sys, threading
import torch
from core.checkpoint import CheckpointManager
module = torch.nn.Linear(300, 300)
optimizer = torch.optim.AdamW(module.parameters())
"""

NO_THREAD_AT_THE_END = """
start = threading.Thread.start
def refuse(thread):
    if not threading.main_thread().is_alive():
        raise RuntimeError("can't create new thread at interpreter shutdown")
    start(thread)
threading.Thread.start = refuse
"""

BEGUN_AT_THE_END = """
begin, ended = made._saver._run, threading.main_thread()
def late(*args):
    ended.join()  # the writer begins when the program ends
    begin(*args)
made._saver._run = late
"""


def ended(tmp_path, code):
    script = MODEL + f"made = CheckpointManager('m', {str(tmp_path)!r})\n" + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL
    )


def saved_step(tmp_path):
    return CheckpointManager("m", tmp_path).saved_step()


@pytest.mark.parametrize("before", ["", NO_THREAD_AT_THE_END], ids=["", "3.12"])
def test_a_save_in_an_atexit_handler_is_committed(tmp_path, before):
    done = ended(tmp_path, f"{before}atexit.register(lambda: made.save(module, optimizer, step=9))")
    assert (done.returncode, saved_step(tmp_path)) == (0, 9)
    assert "saved step 9 to " in done.stderr and "Traceback" not in done.stderr


def test_a_save_in_an_atexit_handler_that_fails_is_reported(tmp_path):
    (tmp_path / "m").write_text("a file in the place of the folder")
    done = ended(tmp_path, "atexit.register(lambda: made.save(module, optimizer, step=9))")
    assert "SaveFailed: " in done.stderr and f"{tmp_path / 'm'}: " in done.stderr


def test_a_save_in_flight_is_committed_where_no_thread_starts_at_the_end(tmp_path):
    saves = [f"made.save(module, optimizer, step={step})\n" for step in (1, 2)]
    done = ended(tmp_path, f"{saves[0]}made.wait()\n{NO_THREAD_AT_THE_END}{BEGUN_AT_THE_END}{saves[1]}")
    assert (done.returncode, saved_step(tmp_path)) == (0, 2), done.stderr
    assert "saved step 2 to " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("refused", [True, False])
def test_the_checksum_of_a_large_file_needs_no_threads(tmp_path, monkeypatch, refused):
    data = bytes(range(256)) * 200
    (tmp_path / "file").write_bytes(data)
    monkeypatch.setattr(checksum, "CHUNK", 256)
    monkeypatch.setattr(checksum.os, "cpu_count", lambda: 4)

    def refuse(thread):
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    if refused:
        monkeypatch.setattr("threading.Thread.start", refuse)
    with (tmp_path / "file").open("rb") as file:
        assert checksum.crc32_file(file.fileno(), len(data)) == zlib.crc32(data)
