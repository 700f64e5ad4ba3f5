"""The jobs of docs/jobs.md, typed as the page says, in its order; what is printed is what the page says."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.conftest import ROOT
from tests.makers.clones import cloned, environment

PAGE = (ROOT / "docs/jobs.md").read_text(encoding="utf-8")
TYPED = [
    one.partition("\n")[::2]
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    for one in block.split("$ ")[1:]
]
"""Each command, and what is printed after it."""


def without_numbers(text: str) -> str:
    """A text in which each number, id, date and unit of size or time is #: they differ from machine to machine."""
    text = re.sub(r"_[0-9a-f]{16}\b|fingerprint [0-9a-f]{12}|in \d+\.\d\d s( \(.*?\))?", "#", text)
    text = re.sub(r"\d[\d,.:-]*( bytes| [KMG]B| M|GB| (second|minute)s?)?", "#", text)
    text = re.sub(r"older: #( #)*( and # more)?", "older: #", text)  # how many depends on when the run was stopped
    return re.sub(r" {2,}", " ", text)


def test_there_are_twenty_jobs_in_order():
    assert re.findall(r"^## (\d+)\.", PAGE, re.MULTILINE) == [str(i) for i in range(1, 21)]


@pytest.mark.full
def test_each_job_prints_what_the_page_says(shared, tmp_path, tell):
    folder = cloned(tmp_path / "clone")
    for name in ("ckpt.pt", "meta.pkl"):
        shutil.copyfile(shared / "fixtures/nanogpt_char_biasFalse" / name, folder / name)
    for command, expected in TYPED:
        words = ["bash", "-c", command]
        done = subprocess.run(
            words,
            cwd=folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        shown = "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())
        lines = without_numbers(expected).splitlines()
        pattern = "".join("(?:.*\n)*?" if line == "..." else re.escape(line) + "\n" for line in lines)
        assert re.fullmatch(pattern, without_numbers(shown)), f"{command} prints:\n{shown}"
        fails = "error: " in expected or "--diff" in command
        assert (done.returncode != 0) is fails, f"{command} ended with {done.returncode}"
    tell(f"jobs: {len(TYPED)} commands, typed in their order")
