"""Batches that a run leaves out: which it trains on instead, and what a resume knows of them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import inspect_model
import train as script
from core.data.dataloader import DataLoader
from core.errors import CheckpointMismatch
from core.training.flags import make_parser
from core.training.settings import Settings
from core.training.skips import Skips
from tests.makers.models import TEXT, state_of
from tests.makers.runs import bits, logged, same

SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 2, "eval_iters": 1, "device": "cpu"}

ranges = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)).map(lambda r: (r[0], r[0] + r[1])), max_size=6)


def text_of(some):
    return ",".join(f"{first}:{last}" for first, last in some) or None


@settings(max_examples=200, deadline=None)
@given(ranges)
def test_the_steps_train_on_the_batches_that_are_not_left_out_in_their_order(some):
    skips = Skips.parse(text_of(some))
    left_out = {n for first, last in some for n in range(first, last + 1)}
    there = [n for n in range(1, 200) if n not in left_out]
    assert [skips.batch_of(step) for step in range(1, 101)] == there[:100]
    assert Skips.parse(str(skips) or None) == skips
    assert all(a[1] + 1 < b[0] for a, b in zip(skips.ranges, skips.ranges[1:], strict=False))


@settings(max_examples=200, deadline=None)
@given(ranges, ranges, st.integers(0, 60))
def test_more_is_left_out_of_what_comes_and_never_of_what_was_trained_on(before, more, trained):
    old, new = Skips.parse(text_of(before)), Skips.parse(text_of(more))
    seen = [old.batch_of(step) for step in range(1, trained + 1)]
    if set(seen) & {n for first, last in more for n in range(first, last + 1)}:
        with pytest.raises(CheckpointMismatch, match=rf"this run is at step {trained} and has trained on the batches"):
            old.adding(new, trained)
        return
    both = old.adding(new, trained)
    assert [both.batch_of(step) for step in range(1, trained + 1)] == seen
    assert both == Skips.parse(text_of(before + more))
    assert both.adding(new, trained) == both == both.adding(old, trained), "the same command again"


def train(root, name, end, *words):
    given = {"checkpoint_root": root, "input_file": root / "text.txt", "model_name": name, "max_iters": end, **SIZES}
    return script.main([w for flag, value in given.items() for w in (f"--{flag}", str(value))] + [*words])


@pytest.fixture
def root(tmp_path, one_thread):
    (tmp_path / "text.txt").write_text(TEXT * 9)
    return tmp_path


def test_a_run_goes_on_with_the_batches_after_those_left_out_and_so_does_each_resume(root, monkeypatch, capsys):
    asked, batch = [], DataLoader.batch
    monkeypatch.setattr(DataLoader, "batch", lambda self, n, *more: (asked.append(n), batch(self, n, *more))[1])
    train(root, "once", 9, "--skip_steps", "4:6", "--skip_steps", "9:9")
    expected = [1, 2, 3, 7, 8, 10, 11, 12, 13]
    assert sorted({n + 1 for n in asked}) == [*expected, 14]  # the certificate of the last step looks ahead
    assert list(logged(root / "once")) == list(range(1, 10))
    assert logged(root / "once", "batch") == {step: n for step, n in enumerate(expected, 1) if step != n}

    train(root, "plain", 3)
    assert logged(root / "plain") == {step: loss for step, loss in logged(root / "once").items() if step <= 3}
    train(root, "parts", 2)
    capsys.readouterr()
    train(root, "parts", 5, "--skip_steps=9:9,4:6")
    said = capsys.readouterr().err
    assert "the batches of steps 4:6,9:9 are left out (--skip_steps)\n" in said
    assert "The next batches differ: skip_steps None then, 4:6,9:9 now.\n" in said
    train(root, "parts", 7)
    assert "resume is exact\n" in capsys.readouterr().err
    train(root, "parts", 9, "--skip_steps=4:6")
    assert "resume is exact\n" in capsys.readouterr().err
    assert same(bits(root / "once"), bits(root / "parts")) and logged(root / "once") == logged(root / "parts")
    assert state_of(root / "parts")["training"]["skip_steps"] == "4:6,9:9"

    inspect_model.main(["--checkpoint_root", str(root), "--model_name", "parts"])
    assert "skip_steps: the batches of steps 4:6,9:9 are left out\n" in capsys.readouterr().out


def test_a_range_that_was_trained_on_is_refused_and_nothing_changes(root, capsys):
    train(root, "dante", 4, "--skip_steps", "2:3")
    before = {path: path.read_bytes() for path in (root / "dante").glob("[!.]*.*")}
    with pytest.raises(CheckpointMismatch) as refused:
        train(root, "dante", 8, "--skip_steps", "9:10,5:7")
    assert str(refused.value) == (
        "--skip_steps 5:7: this run is at step 4 and has trained on the batches up to 6, expected steps from 7 on. "
        "Go back before step 5 with --resume_from."
    )
    assert {path: path.read_bytes() for path in (root / "dante").glob("[!.]*.*")} == before and len(before) == 6


def test_a_recorded_range_that_is_none_is_refused_by_its_name():
    with pytest.raises(CheckpointMismatch, match=r"training.skip_steps in the .* is '5', which is no such setting"):
        Settings.resolve({"skip_steps": "7:8"}, {"skip_steps": "5"})
    with pytest.raises(CheckpointMismatch, match=r"training.skip_steps in the .* is '5', which is no such setting"):
        Settings.resolve({}, {"skip_steps": 5})


def test_a_file_of_settings_names_ranges_as_the_command_line_does(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"skip_steps": "9:12"}))
    args = make_parser().parse(["--config_file", str(path), "--skip_steps", "3:4,5:6"])
    assert Skips.parse(args.skip_steps) == Skips(((3, 6), (9, 12)))
