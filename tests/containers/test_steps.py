"""The step of a checkpoint: under every name, in every form, in every container; and never a wrong one in silence."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.bundle.legacy import open_legacy
from core.containers.open import open_container
from core.containers.steps import HOLDERS, NAMES, step_of
from core.errors import CheckpointDamaged, CheckpointMismatch
from core.inspection.inspect import inspect_path
from tests.makers.conversions import converted
from tests.makers.dcp_folders import save
from tests.makers.generations import SIZES, TOKENIZER
from tests.makers.nanogpt_files import TODAY, ckpt


def forms(n: int) -> list:
    """Every way in which programs write a count."""
    made = [n, float(n), *(torch.tensor(n, dtype=d) for d in (torch.int64, torch.int32, torch.float32, torch.float64))]
    return [*made, torch.tensor([n]), torch.tensor([[float(n)]])]


holders = st.lists(st.sampled_from(HOLDERS), max_size=3)
nested = st.builds(lambda name, inside: [*inside, name], st.sampled_from(NAMES), holders)


@settings(max_examples=40, deadline=None)
@given(nested, st.integers(0, 100_000), st.integers(0, 7), st.booleans())
def test_every_name_and_form_is_found_in_torch_files_old_and_new(tmp_path_factory, path, n, form, new):
    content = forms(n)[form]
    for name in reversed(path):
        content = {name: content, "other": "text"}
    file = tmp_path_factory.mktemp("step") / "x.pt"
    torch.save({"model": {"w": torch.ones(2)}, **content}, file, _use_new_zipfile_serialization=new)
    assert step_of(open_container(file)) == (n, [])
    assert inspect_path(file).step == n


@pytest.mark.parametrize("form", range(8))
def test_a_step_in_a_dcp_folder_is_found_nested_and_flat(tmp_path, form):
    value = forms(7)[form]
    assert inspect_path(save({"model": {"w": torch.ones(3)}, "train_state": {"step": value}}, tmp_path / "a")).step == 7
    assert inspect_path(save({"w": torch.ones(3), "train_state.step": value}, tmp_path / "b")).step == 7


@pytest.mark.parametrize("value", [True, -1, 2.5, "7", None, torch.tensor([1, 2]), torch.tensor(-3), torch.tensor(0.5)])
def test_what_is_no_count_is_not_taken_for_one(tmp_path, value):
    optimizer = {"state": {0: {"step": 9}}}
    torch.save({"model": {"w": torch.ones(2)}, "step": value, "optimizer": optimizer}, tmp_path / "x.pt")
    assert inspect_path(tmp_path / "x.pt").step is None


def test_counts_that_differ_are_all_reported(tmp_path):
    counts = {"iter_num": 80, "step_count": torch.tensor(20), "trainer": {"step": 20}}
    torch.save({"model": {}, **counts}, tmp_path / "x.pt")
    assert step_of(open_container(tmp_path / "x.pt")) == (20, ["step 20 is its step_count; its iter_num is 80"])


def test_a_damaged_count_is_reported_and_nothing_is_converted(tmp_path):
    ckpt(tmp_path / "ckpt.pt", order=TODAY, step=torch.tensor(40))
    offset = open_container(tmp_path / "ckpt.pt").tensors["iter_num"].offset
    data = bytearray((tmp_path / "ckpt.pt").read_bytes())
    data[offset] ^= 1
    (tmp_path / "ckpt.pt").write_bytes(data)
    found = inspect_path(tmp_path / "ckpt.pt")
    assert found.step is None and re.search(r"ckpt\.pt: iter_num is damaged \(CRC32 \w{8}, recorded", found.damage[0])
    with pytest.raises(CheckpointDamaged, match="iter_num is damaged"):
        converted(tmp_path / "ckpt.pt", tmp_path / "b", "bundle")


ITER = [("iter_num", torch.tensor(40)), ("global_step", 40), ("iter", torch.tensor([40]))]


@pytest.mark.parametrize(("name", "step"), ITER)
def test_the_step_of_nanogpt_and_its_relatives_reaches_the_bundle(tmp_path, name, step):
    ckpt(tmp_path / "ckpt.pt", order=TODAY, step=step, step_name=name)
    converted(tmp_path / "ckpt.pt", tmp_path / "b", "bundle")
    state = json.loads((tmp_path / "b/training_state.json").read_text())
    assert state["step"] == 40 and state["best"]["step"] == 40


@pytest.mark.parametrize(("name", "step"), [("step", torch.tensor(40)), *ITER])
def test_a_single_file_of_the_past_resumes_at_its_step_under_any_name(tmp_path, name, step):
    content = {"model_state_dict": {"w": torch.ones(2)}, "config": SIZES, "tokenizer": TOKENIZER}
    torch.save({**content, name: step}, tmp_path / "latest.pt")
    with open_legacy(tmp_path / "latest.pt") as bundle:
        assert bundle.step == 40
    torch.save({**content, "step": torch.tensor([1, 2])}, tmp_path / "latest.pt")
    with pytest.raises(CheckpointMismatch, match=r"its step is .*, expected a whole number of at least 0"):
        open_legacy(tmp_path / "latest.pt")


def test_an_object_of_another_program_holds_its_count(tmp_path):
    torch.save({"model": {"w": torch.ones(1)}, "trainer": SimpleNamespace(global_step=5)}, tmp_path / "x.pt")
    assert inspect_path(tmp_path / "x.pt").step == 5
