"""What the README says, done."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_loop_of_the_readme_saves_and_resumes(tmp_path):
    (loop,) = re.findall(r"```python\n(import torch.*?)```", README, re.DOTALL)
    assert len([line for line in loop.splitlines() if line.strip()]) <= 13
    shorter = loop.replace("300)", "200)")
    for code, step in ((shorter, 200), (loop, 300), (loop, 300)):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "checkpoints/linear/training_state.json").read_text())["step"] == step


def test_every_file_the_readme_names_is_there():
    named = set(re.findall(r"`((?:docs|tests|core|data|benchmarks)/[\w/.]+)`", README))
    named -= {"data/dante.txt"}  # the reader's own
    assert len(named) > 8 and [name for name in named if not (ROOT / name).exists()] == []


def test_every_script_and_flag_the_readme_names_exists():
    for script in ("train.py", "generate.py", "inspect_model.py", "convert_checkpoints.py"):
        shown = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True).stdout
        lines = re.findall(rf"python {re.escape(script)}([^\n`]*)", README)
        assert lines, script
        for line in lines:
            assert [flag for flag in re.findall(r"--\w+", line) if flag not in shown] == []
