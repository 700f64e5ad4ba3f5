"""What every test may use: the fixtures folder beside the repository, a place for a model, models of old programs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Threads that wait for work in a loop take the cores of whoever else is at work: two training runs side by side took
# ten times as long. Read when torch is first imported, here and in the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # thousands of processes start here; each would compile every module

ROOT = Path(__file__).resolve().parent.parent

TIERS = ("ci", "full", "nightly")
"""What a test needs: an environment without extras; one with extras and other programs; much more time."""


def pytest_addoption(parser):
    """Add --tier."""
    text = "run the tests of this tier and of those before it: ci (default), full, nightly"
    parser.addoption("--tier", choices=TIERS, default="ci", help=text)


def pytest_collection_modifyitems(config, items):
    """Deselect the tests of higher tiers; a test without a mark is of tier ci."""
    above = TIERS[TIERS.index(config.getoption("--tier")) + 1 :]
    left_out = [item for item in items if any(item.get_closest_marker(tier) for tier in above)]
    config.hook.pytest_deselected(items=left_out)
    slow = {item for item in items if item.get_closest_marker("slow")}
    for item in slow:  # thousands of processes in one test: on a busy machine many minutes
        item.add_marker(pytest.mark.timeout(1800))
    first = {item.path for item in slow}  # else one worker would be alone with the last of them
    items[:] = sorted((item for item in items if item not in left_out), key=lambda item: item.path not in first)


@pytest.fixture
def tell(request):
    """Have a line shown at the end of the run, whichever process the test runs in."""
    return lambda line: request.node.user_properties.append(("told", line))


def pytest_terminal_summary(terminalreporter):
    """Show what tests told."""
    reports = [report for kind in terminalreporter.stats.values() for report in kind]
    told = [p for r in reports if getattr(r, "when", None) == "call" for p in r.user_properties if p[0] == "told"]
    if told:
        terminalreporter.section("counts")
    for _, line in told:
        terminalreporter.line(line)


@pytest.fixture
def shared() -> Path:
    """The folder of upstream fixtures and real text, which the repository does not carry."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        assert "REQUIRE_FIXTURES" not in os.environ, f"{folder} is required here and missing"
        pytest.skip("the folder ../shared with fixtures made by the upstream programs is not here")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where a model belongs, below a checkpoint root; nothing is there yet."""
    root = tmp_path / "checkpoints"
    root.mkdir()
    return root / "dante"


@pytest.fixture(scope="module")
def old():
    """A fused and a per-head model of old programs, with the state of their optimizers."""
    from tests.makers.doors import Old

    return Old()


@pytest.fixture
def one_thread():
    """Compute on one thread: small matrices gain nothing from more, and lose much where other processes compute too."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The folder in which a script was started."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
