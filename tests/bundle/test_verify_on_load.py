"""What a load compares with its checksums before use, and how it calls what it finds."""

from __future__ import annotations

import itertools
import json
import re

import pytest
import torch

from core.bundle.bundle import open_bundle
from core.bundle.training_state import seal
from core.bundle.verify import verify
from core.checkpoint import CheckpointManager
from core.containers.torch_files.file import open_torch_file
from core.errors import CheckpointDamaged
from tests.makers.models import equal, flip, manager, save_steps, state_of, weights


@pytest.fixture
def saved(tmp_path):
    """Three steps, and the weights of the last."""
    model, _ = save_steps(tmp_path, 3, keep=9)
    return tmp_path / "dante", weights(model)


def said(folder):
    with open_bundle(folder) as bundle:
        return verify(bundle)


def padding_of(path):
    """A byte of a torch file that belongs to no record."""
    with path.open("rb") as file:
        records = sorted(open_torch_file(file, str(path)).records.values(), key=lambda record: record.offset)
    gaps = [(after.offset - before.offset - before.size, after.offset) for before, after in itertools.pairwise(records)]
    return max(gaps)[1] - 2


def replace(path, data):
    """Write a file as a new one: a kept step may share the old one."""
    path.unlink()
    path.write_bytes(data)


def test_a_bit_flipped_in_padding_is_said_to_be_that_and_the_step_is_used(saved):
    folder, expected = saved
    path = folder / "model.pt"
    before = path.read_bytes()
    flip(path, padding_of(path))
    assert path.read_bytes() != before
    (line,) = said(folder)
    assert re.fullmatch(
        rf"{path}: every tensor is bit for bit what was saved, but a byte in its headers or its padding is not "
        r"\(CRC32 \w{8}, recorded \w{8}\)\. It is used as it is\.",
        line,
    )
    assert equal(CheckpointManager.load_for_inference("dante", folder.parent).state_dict(), expected)


def test_the_same_flip_in_a_bundle_that_recorded_no_digest_is_said_with_what_it_may_be(saved):
    folder, _ = saved
    state = state_of(folder)
    del state["integrity"]["files"]["model.pt"]["tensors"]
    replace(folder / "training_state.json", seal(state))
    flip(folder / "model.pt", padding_of(folder / "model.pt"))
    (line,) = said(folder)
    assert (
        "whole, but not the file that was saved: it was replaced, or a bit flipped between its tensors (CRC32" in line
    )


def test_the_same_tensors_in_a_file_of_another_program_are_said_to_be_the_same(saved):
    folder, expected = saved
    content = torch.load(folder / "model.pt", weights_only=True)
    (folder / "model.pt").unlink()
    torch.save(content, folder / "model.pt")
    (line,) = said(folder)
    assert re.search(
        r"model\.pt: written again since it was saved, with every tensor bit for bit the same \(\d+ bytes; recorded",
        line,
    )
    assert equal(CheckpointManager.load_for_inference("dante", folder.parent).state_dict(), expected)


@pytest.mark.parametrize("name", ["model.pt", "optimizer.pt"])
def test_files_exchanged_between_steps_are_each_said_by_name_and_walked_back_from(saved, name):
    folder, _ = saved
    kept = folder / "step_00000001"
    newest, older = (folder / name).read_bytes(), (kept / name).read_bytes()
    assert len(newest) == len(older)
    replace(folder / name, older)
    replace(kept / name, newest)
    for place in (folder, kept):
        (line,) = said(place)
        assert line.startswith(f"{place / name}: whole, but not the file that was saved: it was replaced (CRC32 ")
    lines = []
    made = CheckpointManager("dante", folder.parent, say=lines.append)
    with made, made.newest_intact() as bundle:
        assert bundle.step == 2
    (line,) = lines
    assert f"{folder / name}: is the file of step 1 (step_00000001), beside a training_state.json of step 3: " in line
    assert "Continuing from step 2, the newest intact one." in line


def test_a_tokenizer_that_was_only_formatted_anew_is_replaced_not_damaged(saved):
    folder, _ = saved
    path = folder / "tokenizer.json"
    replace(path, json.dumps(json.loads(path.read_text())).encode())
    (line,) = said(folder)
    replaced = r"whole, but not the file that was saved: it was replaced \(\d+ bytes; recorded \d+\)"
    assert re.match(rf"{path}: {replaced}", line)
    assert CheckpointManager.load_for_inference("dante", folder.parent).tokenizer is not None


@pytest.mark.parametrize("change", [{"chars": ["x", "y"]}, {"fingerprint": "00"}, {"token_kind": "nothing"}])
def test_a_tokenizer_that_does_not_fit_its_fingerprint_is_damaged(saved, change):
    folder, _ = saved
    path = folder / "tokenizer.json"
    replace(path, json.dumps(json.loads(path.read_text()) | change).encode())
    with pytest.raises(CheckpointDamaged, match=r"tokenizer\.json is damaged \("):
        said(folder)


def test_a_tokenizer_without_a_fingerprint_is_damaged_by_any_change(saved):
    folder, _ = saved
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    del values["fingerprint"]
    replace(path, json.dumps(values).encode())
    with pytest.raises(CheckpointDamaged, match=r"tokenizer\.json is damaged \("):
        said(folder)


def test_generation_reads_no_optimizer_state(saved):
    folder, expected = saved
    flip(folder / "optimizer.pt", 4000)
    assert equal(CheckpointManager.load_for_inference("dante", folder.parent).state_dict(), expected)
    replace(folder / "optimizer.pt", b"")
    assert equal(CheckpointManager.load_for_inference("dante", folder.parent).state_dict(), expected)
    with pytest.raises(CheckpointDamaged, match=r"optimizer\.pt"):
        said(folder)


def test_generation_from_a_single_file_checks_the_weights_and_training_all(tmp_path):
    from tests.faults.scenarios import single_file

    single_file(tmp_path)
    folder = tmp_path / "dante"
    path = folder / "latest.pt"
    content = torch.load(path, weights_only=True)
    moment = content["optimizer_state_dict"]["state"][0]["exp_avg"]
    at = path.read_bytes().index(moment.numpy().tobytes())
    flip(path, at + 2)
    assert CheckpointManager.load_for_inference("dante", tmp_path).step == 3
    with manager(tmp_path) as made, pytest.raises(CheckpointDamaged, match=r"optimizer_state_dict\S+ is damaged"):
        made.newest_intact()
    weight = content["model_state_dict"]["lm_head.weight"]
    flip(path, path.read_bytes().index(weight.numpy().tobytes()) + 2)
    with pytest.raises(CheckpointDamaged, match=r"model_state_dict\S+ is damaged"):
        CheckpointManager.load_for_inference("dante", tmp_path)


def test_without_verification_damaged_bytes_are_loaded_because_that_was_asked(saved):
    folder, expected = saved
    data = (folder / "model.pt").read_bytes()
    at = data.index(expected["lm_head.weight"].numpy().tobytes())
    flip(folder / "model.pt", at, 1)
    with pytest.raises(CheckpointDamaged, match=r"lm_head\.weight is damaged"):
        CheckpointManager.load_for_inference("dante", folder.parent)
    model = CheckpointManager.load_for_inference("dante", folder.parent, verify=False)
    assert (model.lm_head.weight != expected["lm_head.weight"]).sum() == 1
    lines = []
    made = CheckpointManager("dante", folder.parent, say=lines.append, verify=False)
    with made, made.newest_intact() as bundle:
        assert bundle.step == 3 and lines == []


def test_without_verification_a_file_cut_short_is_still_not_loaded(saved):
    folder, _ = saved
    replace(folder / "model.pt", (folder / "model.pt").read_bytes()[:-40])
    with pytest.raises(CheckpointDamaged, match=r"model\.pt"):
        CheckpointManager.load_for_inference("dante", folder.parent, verify=False)


def test_a_walk_back_is_one_paragraph(saved):
    folder, expected = saved
    at = (folder / "model.pt").read_bytes().index(expected["ln_f.bias"].numpy().tobytes())
    flip(folder / "model.pt", at, 1)
    flip(folder / "step_00000002/optimizer.pt", 4000)
    lines = []
    made = CheckpointManager("dante", folder.parent, say=lines.append)
    with made, made.newest_intact() as bundle:
        assert bundle.step == 1
    (paragraph,) = lines
    third, second = (next(folder.glob(f"aside_0000000{n}_damaged_*")) for n in (3, 2))
    crcs = re.findall(r"CRC32 (\w{8}), recorded (\w{8})", paragraph)
    moment = re.search(r"step_00000002/optimizer\.pt: (\S+) is damaged", paragraph)[1]
    assert paragraph == (
        f"WARNING: {folder}/model.pt: ln_f.bias is damaged (CRC32 {crcs[0][0]}, recorded {crcs[0][1]}). "
        f"{folder}/step_00000002/optimizer.pt: {moment} is damaged (CRC32 {crcs[1][0]}, recorded {crcs[1][1]}). "
        "Continuing from step 1, the newest intact one. "
        f"What is damaged was not deleted: {third}, {second}."
    )
    assert state_of(third)["step"] == 3 and state_of(second)["step"] == 2
    assert state_of(folder)["went_back"]["why"] == "damaged"
