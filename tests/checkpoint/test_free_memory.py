"""What a process may still allocate, as the machine and its control groups say it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.containers.free_memory import free_memory
from tests.conftest import ROOT

MB = 1 << 20
V2 = "35 31 0:32 {within} {mounted} rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 {within} {mounted} rw,relatime - cgroup cgroup rw,memory"
CPU = "33 31 0:30 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"
HERE = "/sys/fs/cgroup"


def system(root, own, mounts, groups, available=4000):
    """Write the files of a system; `groups` has limit, use and idle page cache of each folder, in MB."""
    files = {"proc/self/cgroup": own, "proc/self/mountinfo": "\n".join([CPU, *mounts]) + "\n"}
    files["proc/meminfo"] = f"MemTotal: 9000000 kB\nMemAvailable: {available * 1024} kB\n"
    for folder, (limit, used, *idle) in groups.items():
        v2 = any("cgroup2" in mount for mount in mounts) and "memory" not in folder
        names = ("memory.max", "memory.current") if v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        for name, value in zip(names, (limit, used), strict=True):
            files[f"{folder}/{name}"] = f"{value * MB if isinstance(value, int) else value}\n"
        if idle:
            name = "inactive_file" if v2 else "total_inactive_file"
            files[f"{folder}/memory.stat"] = f"anon 5\n{name} {idle[0] * MB}\nactive_file 9\n\n"
    for name, text in files.items():
        if text is not None:
            path = root / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return free_memory(root) / MB


def v2(within="/", mounted=HERE):
    return V2.format(within=within, mounted=mounted)


def v1(within="/", mounted=f"{HERE}/memory"):
    return V1.format(within=within, mounted=mounted)


JOB = f"{HERE}/user.slice/job"
CASES = {
    "no group": ("0::/\n", [v2()], {}, 4000),
    "own group": ("0::/user.slice/job\n", [v2()], {JOB: (900, 200)}, 700),
    "idle page cache is free": ("0::/user.slice/job\n", [v2()], {JOB: (900, 600, 250)}, 550),
    "all of the use is idle": ("0::/user.slice/job\n", [v2()], {JOB: (900, 600, 700)}, 900),
    "over its limit": ("0::/user.slice/job\n", [v2()], {JOB: (900, 950)}, 0),
    "no limit": ("0::/user.slice/job\n", [v2()], {JOB: ("max", 950)}, 4000),
    "tighter around it": (
        "0::/user.slice/job\n",
        [v2()],
        {JOB: (900, 100), f"{HERE}/user.slice": (1000, 700, 50)},
        350,
    ),
    "the limit is around it": ("0::/user.slice/job\n", [v2()], {JOB: ("max", 1), f"{HERE}/user.slice": (300, 60)}, 240),
    "tighter within": ("0::/user.slice/job\n", [v2()], {JOB: (200, 60), f"{HERE}/user.slice": (5000, 60)}, 140),
    "in a namespace": ("0::/\n", [v2()], {HERE: (800, 300)}, 500),
    "out of the namespace": ("0::/../other\n", [v2()], {HERE: (800, 300)}, 500),
    "a mount of a part": ("0::/docker/abc/x\n", [v2("/docker/abc")], {HERE: (800, 300), f"{HERE}/x": (90, 10)}, 80),
    "a mount of another part": ("0::/docker/abc\n", [v2("/docker/def")], {HERE: (800, 300)}, 500),
    "a mount with a space": ("0::/\n", [v2("/", "/sys/my\\040groups")], {"/sys/my groups": (800, 300)}, 500),
    "more than the machine": ("0::/\n", [v2()], {HERE: (8000, 300)}, 4000),
    "v1": ("4:memory:/job\n1:cpu:/\n", [v1()], {f"{HERE}/memory/job": (900, 200, 100)}, 800),
    "v1 with a controller beside": ("4:cpu,memory:/job\n", [v1()], {f"{HERE}/memory/job": (900, 200)}, 700),
    "v1, tighter around it": (
        "4:memory:/slurm/job\n",
        [v1()],
        {f"{HERE}/memory/slurm/job": (8796093022207, 5), f"{HERE}/memory/slurm": (600, 100)},
        500,
    ),
    "v1 in a container": ("4:memory:/docker/abc\n", [v1("/docker/abc")], {f"{HERE}/memory": (700, 100)}, 600),
    "v1 beside v2": (
        "4:memory:/job\n0::/\n",
        [v1(), v2("/", f"{HERE}/unified")],
        {f"{HERE}/memory/job": (900, 200)},
        700,
    ),
    "another group's limit": ("0::/a\n", [v2()], {f"{HERE}/a": ("max", 1), f"{HERE}/b": (10, 5)}, 4000),
}


@pytest.mark.parametrize(("own", "mounts", "groups", "expected"), CASES.values(), ids=CASES)
def test_the_tightest_group_decides(tmp_path, own, mounts, groups, expected):
    assert system(tmp_path, own, mounts, groups) == expected


@pytest.mark.parametrize("missing", ["proc/meminfo", "proc/self/cgroup", "proc/self/mountinfo"])
def test_what_is_missing_limits_nothing(tmp_path, missing):
    system(tmp_path, "0::/\n", [v2()], {HERE: (800, 300)}, available=600)
    (tmp_path / missing).unlink()
    assert free_memory(tmp_path) == (500 if missing == "proc/meminfo" else 600) * MB
    assert free_memory(tmp_path / "nothing") == 0


SAVE = """
import sys, torch
from core.checkpoint import CheckpointManager
made = torch.nn.Linear(7000, 7000, bias=False)
optimizer = torch.optim.SGD(made.parameters(), momentum=0.9)
made.weight.grad = torch.zeros(1).expand(7000, 7000)
optimizer.step()
with CheckpointManager("m", sys.argv[1]) as manager:
    manager.save(made, optimizer, step=1)
"""


@pytest.mark.full
def test_a_save_of_392_mb_fits_into_a_group_of_900_mb(tmp_path):
    group = Path(f"/sys/fs/cgroup/memory/memory_test_{os.getpid()}")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no group of cgroup v1 can be made here: {error}")
    try:
        (group / "memory.limit_in_bytes").write_text(str(900 * MB))
        enter = f"import os, pathlib; pathlib.Path({str(group / 'cgroup.procs')!r}).write_text(str(os.getpid()))\n"
        command = [sys.executable, "-c", enter + SAVE, str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert (done.returncode, "saved step 1" in done.stderr) == (0, True), done.stderr
    finally:
        group.rmdir()
