from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT
from tests.faults import kill_points

CHANGES = (
    "mkdir,mkdirat,open,openat,creat,write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,link,linkat,"
    "unlink,unlinkat,rmdir,ftruncate,truncate,fallocate,symlink,symlinkat,copy_file_range"
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*command) -> subprocess.CompletedProcess:
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


@pytest.mark.slow
@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.full)])
def test_killed_at_any_storage_call_a_reader_finds_old_or_new_and_the_next_run_finishes_the_job(every, tmp_path, tell):
    tally = kill_points.run(tmp_path, every=every)
    tell(f"kill points: {tally}")
    assert tally.losses == []
    assert tally.counts["kill points"] >= 900 // every


def can_trace() -> bool:
    return bool(shutil.which("strace")) and subprocess.run(["strace", "-o", os.devnull, "true"]).returncode == 0


@pytest.mark.skipif(not can_trace(), reason="strace is not installed or not allowed, so its count cannot be compared")
def test_the_storage_calls_we_count_are_those_that_the_kernel_sees(tmp_path):
    log = tmp_path / "strace.log"
    script = (sys.executable, "-W", "ignore", "-m", "tests.faults.kill_points", tmp_path / "run", "--traced")
    (tmp_path / "run").mkdir()
    done = run("strace", "-f", "-y", "-e", f"trace={CHANGES}", "-o", log, *script)
    seen, name = {}, None
    for line in whole_lines(log.read_text().splitlines()):
        if mark := re.search(r'mkdir\(".*/(begin|end)(\d+)"', line):
            name = mark[2] if mark[1] == "begin" else None
        elif name is not None and f"/traced{name}/" in line and "/.lock" not in line and _changes_something(line):
            seen[name] = seen.get(name, 0) + 1
    assert list(seen.values()) == list(json.loads(done.stdout).values())


def whole_lines(lines: list[str]) -> Iterator[str]:
    """Join the two lines of a call during which another thread made one."""
    begun: dict[str, str] = {}
    for line in lines:
        thread = line.split(maxsplit=1)[0]
        if line.endswith(" <unfinished ...>"):
            begun[thread] = line.removesuffix(" <unfinished ...>")
        elif end := re.search(r"<\.\.\. \w+ resumed>(.*)", line):
            yield begun.pop(thread) + end[1]
        else:
            yield line


def _changes_something(line: str) -> bool:
    only_reads = re.search(r"open(at)?\(", line) and "O_CREAT" not in line
    return not only_reads and " = -1 E" not in line
