"""That the table of docs/versions.md is of what pyproject.toml allows, and how its rows are made."""

from __future__ import annotations

import re
import tomllib

from tests import matrix
from tests.conftest import ROOT
from tests.matrix import Cell


def test_the_first_python_meets_every_torch_and_the_others_both_ends():
    found = [*matrix.cells(["python3.11", "python3.12"], ["2.11", "2.12", "2.13"])]
    assert [cell.name for cell in found] == [
        "3.11 | 2.11, all lowest",
        "3.11 | 2.12",
        "3.11 | 2.13",
        "3.12 | 2.11",
        "3.12 | 2.13",
    ]
    assert [*matrix.cells(["python3.13"], ["2.15"])] == [Cell("python3.13", "2.15")]


def test_every_lower_bound_of_pyproject_is_run():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [f"{name}>={low}" for name, low in matrix.bounds().items()] == told["dependencies"]
    assert matrix.TORCH[0] == matrix.bounds()["torch"] and f">={matrix.PYTHONS[0][6:]}" == told["requires-python"]
    lowest = next(line for line in matrix.PAGE.read_text().splitlines() if line.startswith("| 3.11 | 2.11, all lowest"))
    ran = dict(zip(matrix.SHOWN, lowest.split(" | ")[2:6], strict=True))
    for name, low in matrix.bounds().items():
        assert re.fullmatch(rf"{low}(\.0)*(\+\w+)?", ran[name]), "another version than the lower bound was run"


def test_its_tests_are_there():
    listed = [(room, name) for room, names in matrix.TESTS.items() for name in names.split()]
    assert [pair for pair in listed if not (ROOT / f"tests/{pair[0]}/test_{pair[1]}.py").exists()] == []


def test_a_python_that_is_not_installed_is_left_out_with_the_reason(tmp_path):
    rest = matrix.run(Cell("python3.99", "2.11"), 1, whole=False)
    assert rest == "| | | | left out: python3.99 is not installed"


def test_a_row_takes_the_place_of_the_one_before_it(tmp_path, monkeypatch):
    page = tmp_path / "versions.md"
    page.write_text(
        "# Which\n\n| Python | ...\n|---|---|---|---|---|---|---|---|\n| 3.12 | 2.11 | old | 2026-01-01 |\n"
    )
    monkeypatch.setattr(matrix, "PAGE", page)
    for cell, rest in (
        (Cell("python3.9", "2.12"), "a"),
        (Cell("python3.12", "2.11"), "b"),
        (Cell("python3.12", "2.9"), "c"),
    ):
        matrix.write(cell, rest)
    found = page.read_text().splitlines()
    assert [line.rpartition(" | ")[0] for line in found[4:]] == [
        "| 3.9 | 2.12 | a",
        "| 3.12 | 2.9 | c",
        "| 3.12 | 2.11 | b",
    ]
    assert found[:4] == ["# Which", "", "| Python | ...", "|---|---|---|---|---|---|---|---|"]
