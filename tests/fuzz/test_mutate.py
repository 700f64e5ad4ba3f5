"""The bounded run of mutations, and that it would notice."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from core.errors import CheckpointDamaged
from tests.conftest import ROOT
from tests.fuzz.mutate import Example, Found, attempt, change, read_examples, report, write
from tests.fuzz.mutations import mutate
from tests.fuzz.seeds import MAKERS, write_seeds


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    write_seeds(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("count", [5_000, pytest.param(20_000, marks=pytest.mark.full)])
def test_mutations_give_only_checkpoint_errors_in_time_and_memory(seeds, count, tell):
    words = [sys.executable, "-m", "tests.fuzz.mutate", "--count", str(count), "--seed", "1", "--seeds", str(seeds)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    tell(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(re.findall(r"^(\w+) +(\d+) mutations", done.stdout, re.MULTILINE))
    assert int(counts.pop("all")) == count
    assert counts.keys() == MAKERS.keys()
    assert min(map(int, counts.values())) >= count // len(MAKERS)
    assert "findings: 0" in done.stdout


def test_every_example_opens_before_it_is_changed(seeds):
    from tests.fuzz.mutate import open_as_bundle, open_as_container

    examples = read_examples(seeds)
    assert [example.name for example in examples] == sorted(MAKERS)
    for example in examples:
        (open_as_bundle if example.name == "bundle" else open_as_container)(seeds / example.name)


def test_a_mutation_is_a_function_of_its_number(seeds, tmp_path):
    examples = read_examples(seeds)
    pool = [data for example in examples for data in example.files.values()]
    written = []
    for turn in ("a", "b"):
        for i, example in enumerate(examples):
            folder = tmp_path / turn / str(i)
            write(example, folder)
            change(example, folder, random.Random(f"7/{i}"), pool)
        files = sorted((tmp_path / turn).rglob("*"))
        written.append([(str(p.relative_to(tmp_path / turn)), p.is_file() and p.read_bytes()) for p in files])
    assert written[0] == written[1]


def test_mutations_differ_from_each_other_and_from_the_file(seeds):
    pool = [data for example in read_examples(seeds) for data in example.files.values()]
    assert len(pool) >= 10
    for data in pool:
        made = {mutate(data, random.Random(i), pool) for i in range(40)}
        assert len(made - {data}) > 20, data[:20]


def test_what_must_not_come_out_is_a_finding(tmp_path):
    def fail(error: BaseException):
        def open_it(path: Path) -> None:
            raise error

        return open_it

    assert attempt(lambda path: None, tmp_path) is None
    assert attempt(fail(CheckpointDamaged(f"{tmp_path}: cut off.")), tmp_path) == ""
    assert attempt(fail(CheckpointDamaged("cut\noff")), tmp_path) == ""  # printed as an escape
    assert attempt(fail(KeyError("w")), tmp_path).startswith("KeyError: 'w'")
    assert attempt(fail(RecursionError("too deep")), tmp_path).startswith("RecursionError: too deep")


def test_the_report_counts_each_container_and_lists_findings():
    found = Found()
    found.opened["dcp"], found.refused["dcp"], found.refused["zip"] = 2, 3, 4
    found.add("KeyError: 'w'", "dcp 3")
    found.add("KeyError: 'w'", "dcp 5")
    lines = list(report(found))
    assert [re.sub(" +", " ", line) for line in lines[:3]] == [
        "dcp 5 mutations 2 opened 3 refused",
        "zip 4 mutations 0 opened 4 refused",
        "all 9 mutations",
    ]
    assert lines[-2:] == ["findings: 1", "      2 x KeyError: 'w'  [dcp 3, dcp 5]"]


def test_nothing_is_written_through_a_link(tmp_path):
    example = Example("x", {"a.pt": b"a", "b.pt": b"b"})
    (tmp_path / "outside.pt").write_bytes(b"outside")
    for i in range(3000):
        folder = tmp_path / str(i)
        write(example, folder)
        change(example, folder, random.Random(i), [b"pool"])
    assert (tmp_path / "outside.pt").read_bytes() == b"outside"
