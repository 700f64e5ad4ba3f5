"""What is damage, and what a person did: a resume walks back from the one and uses the other, whatever reading says."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import subprocess
import zlib

import pytest
import torch
from torch import nn

from core.bundle.bundle import open_bundle
from core.bundle.damage import edited
from core.bundle.training_state import seal
from core.checkpoint import CheckpointManager
from core.containers.checksum import flipped_bit
from core.containers.torch_files.zip_directory import read_directory
from core.errors import CheckpointError, CheckpointMismatch, NoneIntact
from core.loading import tensors
from tests.makers.models import SMALL, copy, equal, flip, manager, save_steps, state_of, update, weights

STATE = "training_state.json"
TINY = {**SMALL, "n_layer": 1, "n_embd": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Steps 1 to 3 of a GPT with a log, and the weights of step 2."""
    root = tmp_path_factory.mktemp("base")
    save_steps(root, 2, config=TINY, keep=9)
    second = torch.load(root / "dante/model.pt", weights_only=True)
    made = manager(root, keep=9)
    with made:
        model, optimizer, _ = made.initialize_for_training({}, "char", None, 1e-3)
        update(model, optimizer)
        made.save(model, optimizer, step=3, metrics={"val_loss": 2.0}, extra={"note": "an entry"})
    return root, second


def resumed(root):
    """Resume the model below a root; its weights, its step, and what was said."""
    lines = []
    with CheckpointManager("dante", root, say=lines.append) as made:
        model, _, step = made.initialize_for_training({}, "char", None, 1e-3)
    return weights(model), step, lines


def replace(path, data):
    """Write a file as a new one: a kept step may share the old one."""
    path.unlink()
    path.write_bytes(data)


def listed(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# Flips


def heads(path):
    """The bytes of a zip's directory that say how its records are kept: flags, method, disk."""
    with path.open("rb") as file:
        records, _ = read_directory(file, str(path), lambda *_: "")
    data, at = path.read_bytes(), 0
    for _ in records:
        at = data.index(b"PK\1\2", at) + 4
        yield from ((at + 4, 5), (at + 6, 5), (at + 30, 5))


def test_no_flip_in_the_directory_of_a_torch_file_stops_a_resume(tmp_path):
    module = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(module.parameters())
    made = CheckpointManager("dante", tmp_path / "base", say=lambda line: None)
    for step in (1, 2):
        module(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        made.save(module, optimizer, step=step)
        made.wait()
    ends = set()
    for name in ("model.pt", "optimizer.pt"):
        for byte, bit in heads(tmp_path / "base/dante" / name):
            trial = copy(tmp_path / "base", tmp_path / "trial")
            flip(trial / "dante" / name, byte, bit)
            lines = []
            step = CheckpointManager("dante", trial, say=lines.append).load(module, optimizer)
            assert len(lines) == 1, (name, byte, lines)
            expected = "Continuing from step 1, the newest intact one." if step == 1 else "It is used as it is."
            assert str(trial / "dante" / name) in lines[0] and expected in lines[0]
            ends.add((name, step))
            shutil.rmtree(trial)
    assert {("model.pt", 1), ("optimizer.pt", 1)} <= ends


FLIPS = [
    ("config.json", '"format_version": 2', "format_version"),
    ("config.json", '"device": "c', "is damaged: a bit of it flipped"),
    ("config.json", '"n_head": ', "is damaged"),
    ("config.json", '"n_lay', "is damaged"),
    ("config.json", '"n_embd": 8', "is damaged"),
    ("config.json", "{", "not valid JSON"),
    ("config.json", '"batch_size": ', "is damaged"),
    ("tokenizer.json", '"token_kind": "c', "is damaged"),
    ("training_state.json", '"format_version": ', "is damaged"),
    ("training_state.json", '"val_loss": ', "is damaged"),
]


@pytest.mark.parametrize("bit", [1, 2, 6])
@pytest.mark.parametrize(("name", "before", "said"), FLIPS, ids=lambda value: value)
def test_a_flipped_bit_of_a_json_file_ends_in_the_kept_step(base, tmp_path, name, before, said, bit):
    root, second = base
    folder = copy(root, tmp_path / "x") / "dante"
    data = (folder / name).read_bytes()
    byte = data.index(before.encode()) + len(before) - (before[-1] in "28{")
    flip(folder / name, byte, bit)
    damaged = (folder / name).read_bytes()
    found, step, lines = resumed(folder.parent)
    if step == 3:  # one digit of a number that people edit
        assert before == '"batch_size": ' and "config.json: not as it was saved: it was edited" in lines[0]
        return
    assert step == 2 and equal(found, second)
    assert lines[0].startswith(f"WARNING: {folder / name}")
    assert said in lines[0].replace("is damaged (", "is damaged: (") or "not valid JSON" in lines[0]
    assert "Continuing from step 2, the newest intact one." in lines[0]
    (aside,) = folder.glob("aside_*_damaged_*")
    assert (aside / name).read_bytes() == damaged
    assert (folder / name).read_bytes() != damaged, "what is damaged does not stay at the top"
    assert resumed(folder.parent)[1:] == (2, [])


@pytest.mark.parametrize("data", [b"", b'{"n_layer": 1, "n_he', b'{"n_layer": 1\0}', b'{"name": "\xe9"}'], ids=repr)
def test_a_config_that_nobody_typed_is_damage(base, tmp_path, data):
    folder = copy(base[0], tmp_path / "x") / "dante"
    replace(folder / "config.json", data)
    found, step, lines = resumed(folder.parent)
    assert step == 2 and equal(found, base[1]) and f"WARNING: {folder}/config.json is damaged (" in lines[0]


def test_an_edited_config_is_used_and_said_until_the_next_save(base, tmp_path):
    folder = copy(base[0], tmp_path / "x") / "dante"
    path = folder / "config.json"
    replace(path, path.read_text().replace('"dropout": 0.1', '"dropout": 0.25').encode())
    lines = []
    with CheckpointManager("dante", folder.parent, say=lines.append) as made:
        model, optimizer, step = made.initialize_for_training({}, "char", None, 1e-3)
        assert step == 3 and model.config.dropout == 0.25
        assert re.fullmatch(
            rf"WARNING: {path}: not as it was saved: it was edited \(\d+ bytes; recorded \d+\)\. It is used as it is\.",
            lines[0],
        )
        made.save(model, optimizer, step=4)
    assert resumed(folder.parent)[1:] == (4, [])


def test_a_config_that_was_only_formatted_anew_is_not_mentioned(base, tmp_path):
    folder = copy(base[0], tmp_path / "x") / "dante"
    replace(folder / "config.json", json.dumps(json.loads((folder / "config.json").read_text())).encode())
    assert resumed(folder.parent)[1:] == (3, [])


def test_a_flipped_bit_of_a_config_is_used_where_no_older_step_is_kept(tmp_path):
    save_steps(tmp_path, 1, config=TINY, keep=0)
    path = tmp_path / "dante/config.json"
    flip(path, path.read_bytes().index(b"n_layer") + 2)  # then the weights show it
    lines = []
    with CheckpointManager("dante", tmp_path, say=lines.append) as made, made.newest_intact() as bundle:
        assert bundle.config.n_layer == 1
    assert "config.json: not as it was saved: a bit of it flipped (CRC32 " in lines[0]


def test_what_a_person_wrote_wrong_is_still_theirs_to_correct(base, tmp_path):
    folder = copy(base[0], tmp_path / "x") / "dante"
    path = folder / "config.json"
    replace(path, path.read_text().replace('"n_head": 2', '"n_head": "two"').encode())
    before = listed(folder)
    with pytest.raises(CheckpointMismatch, match=r"config\.json: n_head is 'two'"):
        resumed(folder.parent)
    assert listed(folder) == before


def test_a_config_with_a_value_that_json_cannot_hold_counts_as_edited(base, tmp_path):
    folder = copy(base[0], tmp_path / "x") / "dante"
    path = folder / "config.json"
    replace(path, path.read_text().replace('"n_head"', '"note": NaN, "n_head"').encode())
    with open_bundle(folder) as bundle:
        (line,) = edited(bundle, [])
    assert "it was edited" in line


@pytest.mark.parametrize("size", [1, 3, 300])
def test_the_flipped_bit_is_found_by_its_checksum(size):
    chance = random.Random(size)
    data = bytearray(chance.randbytes(size))
    crc = zlib.crc32(data)
    assert flipped_bit(bytes(data), crc) is None
    for _ in range(20):
        byte, bit = chance.randrange(size), chance.randrange(8)
        data[byte] ^= 1 << bit
        assert flipped_bit(bytes(data), crc) == (byte, bit)
        if size > 1:
            data[byte - 1] ^= 3
            assert flipped_bit(bytes(data), crc) is None
            data[byte - 1] ^= 3
        data[byte] ^= 1 << bit


# Mixtures

MIXED = [
    ("model.pt",),
    ("optimizer.pt",),
    ("model.pt", "optimizer.pt"),
    ("training_state.json",),
    ("training_state.json", "optimizer.pt"),
    ("training_state.json", "model.pt"),
]


@pytest.mark.parametrize("old", MIXED, ids="+".join)
def test_a_copy_that_mixes_two_steps_is_walked_back_from(base, tmp_path, old):
    root, second = base
    folder = copy(root, tmp_path / "x") / "dante"
    for name in old:
        replace(folder / name, (folder / "step_00000002" / name).read_bytes())
    found, step, lines = resumed(folder.parent)
    assert step == 2 and equal(found, second)
    said = (
        f"is not the file of step 2, which is in step_00000002, beside a {STATE} of step 2"
        if STATE in old
        else f"is the file of step 2 (step_00000002), beside a {STATE} of step 3"
    )
    wrong = re.search(r"(\w+\.pt): ", lines[0])[1]
    assert (wrong in old) != (STATE in old)
    (aside,) = folder.glob("aside_*")
    assert lines == [
        f"WARNING: {folder / wrong}: {said}: two steps are mixed, as in a copy made during a save. Continuing from "
        f"step 2, the newest intact one. What is damaged was not deleted: {aside}."
    ]
    assert resumed(folder.parent)[1:] == (2, [])


@pytest.mark.parametrize("name", ["model.pt", "optimizer.pt"])
def test_a_file_of_a_save_that_is_not_here_is_told_by_its_size_and_its_tensors(base, tmp_path, name):
    root, second = base
    folder = copy(root, tmp_path / "x") / "dante"
    data = (folder / "step_00000001" / name).read_bytes()
    shutil.rmtree(folder / "step_00000001")
    assert len(data) == (folder / name).stat().st_size
    replace(folder / name, data)
    found, step, lines = resumed(folder.parent)
    assert step == 2 and equal(found, second)
    said = f"{folder / name}: is the file of another save, beside a {STATE} of step 3: two steps are mixed"
    assert lines[0].startswith(f"WARNING: {said}")


def test_where_no_step_is_whole_a_mixture_of_whole_files_is_used_and_said(base, tmp_path):
    folder = copy(base[0], tmp_path / "x") / "dante"
    first = (folder / "step_00000001/model.pt").read_bytes()
    for kept in folder.glob("step_*"):
        shutil.rmtree(kept)
    replace(folder / "model.pt", first)
    _, step, lines = resumed(folder.parent)
    assert step == 3 and lines[0].startswith(f"WARNING: {folder}/model.pt: whole, but not the file that was saved")
    assert "It is used as it is." in lines[0]


def test_a_mixed_kept_step_is_passed_over(base, tmp_path):
    folder = copy(base[0], tmp_path / "x") / "dante"
    data = (folder / "model.pt").read_bytes()
    replace(folder / "step_00000002/model.pt", data)
    replace(folder / "model.pt", data[:-100])
    _, step, lines = resumed(folder.parent)
    assert step == 1 and f"{folder}/step_00000002/model.pt: is the file of step 3 (the top), beside" in lines[0]
    with pytest.raises(CheckpointError, match=r"kept|is the file of"):
        manager(folder.parent).go_back(2)


def test_weights_that_a_person_put_there_are_used_and_said(base, tmp_path):
    folder = copy(base[0], tmp_path / "x") / "dante"
    content = torch.load(folder / "model.pt", weights_only=True)
    content["lm_head.weight"] += 1
    (folder / "model.pt").unlink()
    torch.save(content, folder / "model.pt")
    found, step, lines = resumed(folder.parent)
    assert step == 3 and equal(found, content)
    assert lines[0].startswith(f"WARNING: {folder}/model.pt: whole, but not the file that was saved: it was replaced (")


@pytest.mark.parametrize("kind", ["another model", "not ours", "safetensors", "a call"])
def test_a_replaced_file_that_cannot_be_read_is_damage_of_any_kind(base, tmp_path, kind):
    root, second = base
    folder = copy(root, tmp_path / "x") / "dante"
    path = folder / "model.pt"
    path.unlink()
    if kind == "another model":
        torch.save({name: torch.cat([tensor, tensor]) for name, tensor in second.items()}, path)
    elif kind == "not ours":
        torch.save({"encoder.weight": torch.ones(3)}, path)
    elif kind == "safetensors":
        path.write_bytes(len(b"{}").to_bytes(8, "little") + b"{}")
    else:
        torch.save({**second, "hidden": json.JSONDecoder}, path)
    found, step, lines = resumed(folder.parent)
    assert step == 2 and equal(found, second)
    assert str(path) in lines[0] and "Continuing from step 2, the newest intact one." in lines[0]


def test_a_replaced_file_is_no_damage_when_the_system_fails(base, tmp_path, monkeypatch):
    folder = copy(base[0], tmp_path / "x") / "dante"
    content = torch.load(folder / "model.pt", weights_only=True)
    (folder / "model.pt").unlink()
    torch.save(content, folder / "model.pt")

    class Full:
        ACCESS_COPY = 0

        @staticmethod
        def mmap(*_, **__):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("core.loading.mapped.mmap", Full)
    before = listed(folder)
    with pytest.raises(CheckpointError, match=r"cannot be mapped \(Cannot allocate memory\)"):
        resumed(folder.parent)
    assert listed(folder) == before


def test_a_stale_file_handle_is_no_damage(base, tmp_path, monkeypatch):
    folder = copy(base[0], tmp_path / "x") / "dante"
    before = listed(folder)

    def stale(fd, size):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("core.bundle.verify.crc32_file", stale)
    with pytest.raises(CheckpointError, match="Stale file handle"):
        resumed(folder.parent)
    assert listed(folder) == before


# A training state that is gone


def test_without_its_training_state_a_step_of_version_2_is_damaged_not_step_0(tmp_path):
    save_steps(tmp_path, 1, config=TINY, keep=0)
    folder = tmp_path / "dante"
    (folder / STATE).unlink()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    before = listed(folder)
    with pytest.raises(NoneIntact) as caught:
        resumed(tmp_path)
    assert str(caught.value).startswith(
        f"{folder / STATE}: missing, and config.json is of format version 2, in which each step has one. "
    )
    assert "nothing was changed" in str(caught.value) and "--allow_fresh" in str(caught.value)
    assert listed(folder) == before and (folder / "metrics.jsonl").read_text() == '{"step": 1}\n'
    with manager(tmp_path, allow_fresh=True) as made:
        assert made.newest_intact() is None


def test_a_kept_step_without_its_training_state_is_not_gone_back_to(base, tmp_path):
    folder = copy(base[0], tmp_path / "x") / "dante"
    (folder / "step_00000002" / STATE).unlink()
    replace(folder / "model.pt", b"PK")
    assert resumed(folder.parent)[1] == 1


def test_a_folder_of_version_1_opens_without_a_training_state(tmp_path):
    save_steps(tmp_path, 1, config=TINY, keep=0)
    folder = tmp_path / "dante"
    (folder / STATE).unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["format_version"]
    (folder / "config.json").write_text(json.dumps(config))
    assert resumed(tmp_path)[1] == 0


def test_a_training_state_of_a_newer_format_is_no_damage(base, tmp_path):
    folder = copy(base[0], tmp_path / "x") / "dante"
    replace(folder / STATE, seal({**state_of(folder), "format_version": 99}))
    before = listed(folder)
    with pytest.raises(CheckpointMismatch, match=r"training_state\.json: format_version 99, .* Update the program\."):
        resumed(folder.parent)
    assert listed(folder) == before


def test_shards_are_not_read_whole_to_try_them(monkeypatch, base):
    with open_bundle(base[0] / "dante") as bundle:
        monkeypatch.setattr(type(bundle), "is_sharded", True)
        monkeypatch.setattr(tensors, "read_part", lambda part: pytest.fail("read"))
        tensors.read_through(bundle)


@pytest.mark.parametrize("name", ["config.json", STATE])
def test_a_pipe_in_the_place_of_a_file_names_the_step_that_is_kept_and_how_to_continue_from_it(name, base, tmp_path):
    root = copy(base[0], tmp_path / "x")
    (root / "dante" / name).unlink()
    os.mkfifo(root / "dante" / name)
    with pytest.raises(NoneIntact, match=r"Step 2 is kept in step_00000002, and nothing was changed\.") as caught:
        resumed(root)
    command = re.search(r"To continue from it: (mv \S+ \S+), then start again\.$", str(caught.value))[1]
    subprocess.run(command.split(), check=True)
    assert resumed(root)[1] == 2
