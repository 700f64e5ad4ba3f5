"""A test runs in its tier and in those above it; what does not say a tier is of the lowest."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT

TESTS = """
import pytest

def test_a(): pass

@pytest.mark.full
def test_b(): pass

@pytest.mark.nightly
@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.full)])
def test_c(n): pass

@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.full)])
def test_d(n): pass
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["test_a", "test_d[1]"]),
        (["--tier", "full"], ["test_a", "test_b", "test_d[1]", "test_d[2]"]),
        (["--tier", "nightly"], ["test_a", "test_b", "test_c[1]", "test_c[2]", "test_d[1]", "test_d[2]"]),
        (["--tier", "nightly", "-m", "nightly"], ["test_c[1]", "test_c[2]"]),
    ],
)
def test_a_tier_has_its_tests_and_those_of_the_tiers_before_it(tmp_path, words, expected):
    (tmp_path / "conftest.py").write_bytes((ROOT / "tests/conftest.py").read_bytes())
    (tmp_path / "test_some.py").write_text(TESTS)
    settings = ["-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *settings, "-q", "--collect-only", *words, tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split("::")[1] for line in done.stdout.splitlines() if "::" in line] == expected
