"""A model's folder on a real disk: what is at the top, kept and aside after each change."""

from __future__ import annotations

import errno
import json
import re

import pytest

from core.bundle.commit import ModelFolder
from core.bundle.folder import step_folder
from core.bundle.storage import Storage
from core.bundle.training_state import STATE, seal, unseal
from core.bundle.write import write_bundle
from core.errors import CheckpointDamaged, SaveFailed


@pytest.fixture(params=["links", "moves"])
def folder(tmp_path, request):
    storage = Storage()
    storage.folder_fsync = False
    storage.links = request.param == "links" and storage.links
    return ModelFolder(tmp_path, storage)


def save(folder, step, label, optimizer=True):
    folder.recover()
    stage = stage_step(folder, step, label, optimizer)
    folder.commit(stage)
    folder.roll_forward()


def stage_step(folder, step, label, optimizer=True):
    stage = folder.stage()
    files = {
        n: lambda out, n=n: out.write(f"{n} {label}".encode()) for n in ("model.pt", "optimizer.pt")[: 1 + optimizer]
    }
    files["config.json"] = {"n_embd": 64, "n_head": 1, "saved_with": label}
    state = {"step": step, "format_version": 2, "commit_id": label, "parent": folder.newest_id()}
    write_bundle(folder, stage, state, files)
    return stage


def newest(folder):
    opened = folder.open_newest()
    try:
        return opened.state.get("commit_id"), {
            n: f.read().decode() for n, f in opened.files.items() if n != "config.json"
        }
    finally:
        opened.close()


def kept(folder, step):
    opened = folder.open_kept(folder.path / step_folder(step))
    try:
        return opened.state.get("commit_id"), {
            n: f.read().decode() for n, f in opened.files.items() if n != "config.json"
        }
    finally:
        opened.close()


def whole(label):
    return label, {"model.pt": f"model.pt {label}", "optimizer.pt": f"optimizer.pt {label}"}


def test_a_save_is_at_the_top_and_the_older_step_is_kept(folder):
    save(folder, 1, "a")
    save(folder, 2, "b")
    assert newest(folder) == whole("b")
    assert kept(folder, 1) == whole("a")
    assert {p.name for p in folder.path.iterdir()} == {
        "config.json", "model.pt", "optimizer.pt", "step_00000001", "training_state.json"
    }  # fmt: skip


def test_a_committed_step_is_read_before_it_is_rolled_forward(folder):
    save(folder, 1, "a")
    folder.commit(stage_step(folder, 2, "b"))
    assert newest(folder) == whole("b")
    assert (folder.path / "model.pt").read_text() == "model.pt a"
    folder.recover()
    assert (folder.path / "model.pt").read_text() == "model.pt b"
    assert kept(folder, 1) == whole("a")


def test_a_staged_step_is_never_read_and_recovery_removes_it(folder):
    save(folder, 1, "a")
    stage = stage_step(folder, 2, "b")
    assert newest(folder) == whole("a")
    folder.recover()
    assert not stage.exists()


def test_a_save_without_optimizer_removes_the_old_one_from_the_top_only(folder):
    save(folder, 1, "a")
    save(folder, 2, "b", optimizer=False)
    assert not (folder.path / "optimizer.pt").exists()
    assert newest(folder) == ("b", {"model.pt": "model.pt b"})
    assert kept(folder, 1) == whole("a")


def test_an_edited_config_survives_a_save(folder):
    save(folder, 1, "a")
    edited = '{"n_embd": 64, "n_head": 1, "batch_size": 3}   '
    (folder.path / "config.json").write_text(edited)
    save(folder, 2, "b")
    assert (folder.path / "config.json").read_text() == edited
    assert (folder.path / "step_00000001" / "config.json").read_text() == edited


def test_editing_json_at_the_top_in_place_leaves_history_alone(folder):
    save(folder, 1, "a")
    save(folder, 2, "b")
    before = (folder.path / "step_00000001" / "config.json").read_bytes()
    with (folder.path / "config.json").open("r+b") as file:
        file.write(b"XXXX")
    assert (folder.path / "step_00000001" / "config.json").read_bytes() == before


def test_a_save_over_a_bundle_without_a_training_state_keeps_it_as_step_0(folder):
    (folder.path / "model.pt").write_text("model.pt of a person")
    (folder.path / "config.json").write_text('{"n_embd": 64, "n_head": 1}')
    save(folder, 1, "a")
    assert newest(folder) == whole("a")
    assert not list(folder.path.glob("aside_*"))
    assert [p.name for p in folder.path.glob("step_*")] == ["step_00000000"]
    assert (folder.path / "step_00000000/model.pt").read_text() == "model.pt of a person"


def test_the_same_step_with_other_content_puts_the_first_aside(folder):
    for label in "abc":
        save(folder, 1, label)
    assert newest(folder) == whole("c")
    assert kept(folder, 1) == whole("b")
    (aside,) = folder.path.glob("aside_00000001_*")
    assert (aside / "model.pt").read_text() == "model.pt a"


def test_a_top_without_commit_id_is_kept_under_its_step(folder):
    (folder.path / "model.pt").write_text("old model")
    (folder.path / "config.json").write_text('{"n_embd": 64, "n_head": 1}')
    (folder.path / STATE).write_text('{"step": 5}')
    save(folder, 6, "a")
    assert kept(folder, 5) == (None, {"model.pt": "old model"})


def test_a_step_gone_back_to_is_at_the_top_under_its_own_id_and_still_kept(folder):
    save(folder, 1, "a")
    save(folder, 2, "b")
    (aside,) = folder.go_back(folder.path / "step_00000001", "damaged")
    assert newest(folder) == kept(folder, 1) == whole("a")
    assert re.fullmatch(r"aside_00000002_damaged_[0-9a-f]{16}", aside.name)
    assert (aside / "model.pt").read_text() == "model.pt b"
    assert list(folder.kept_steps()) == [1]
    save(folder, 2, "c")
    assert kept(folder, 1) == whole("a")
    assert len(list(folder.path.glob("aside_*"))) == 1


def test_going_back_takes_later_steps_aside_and_the_log_of_the_run_with_the_top(folder):
    for step, label in enumerate("abcd", 1):
        save(folder, step, label)
    (folder.path / "metrics.jsonl").write_text("{}\n")
    (folder.path / "notes.txt").write_text("mine")
    top, third = folder.go_back(folder.path / "step_00000002", "abandoned", [folder.path / "step_00000003"])
    assert newest(folder) == kept(folder, 2) == whole("b")
    assert list(folder.kept_steps()) == [1, 2]
    assert (top / "model.pt").read_text() == "model.pt d" and (top / "metrics.jsonl").read_text() == "{}\n"
    assert (third / "model.pt").read_text() == "model.pt c"
    assert {"metrics.jsonl", "notes.txt"} < {p.name for p in folder.path.iterdir()}
    assert not {".hist", ".committed"} & {p.name for p in folder.path.iterdir()}


def test_going_back_to_a_step_without_optimizer_leaves_none_at_the_top(folder):
    save(folder, 1, "a", optimizer=False)
    save(folder, 2, "b")
    (aside,) = folder.go_back(folder.path / "step_00000001", "abandoned")
    assert newest(folder) == ("a", {"model.pt": "model.pt a"})
    assert not (folder.path / "optimizer.pt").exists() and (aside / "optimizer.pt").exists()


@pytest.mark.parametrize(
    "aside",
    [{"../x": "aside_00000001_damaged_ab"}, {".": "../x"}, {"step_00000001": "step_00000009"}, [], None, {1: 2}],
)
def test_a_hostile_list_of_what_goes_aside_moves_nothing(folder, aside):
    save(folder, 1, "a")
    save(folder, 2, "b")
    stage = stage_step(folder, 3, "c")
    state = {**unseal((stage / STATE).read_bytes(), "x"), "went_back": {"aside": aside}}
    (stage / STATE).write_bytes(seal(state))
    folder.commit(stage)
    with pytest.raises(CheckpointDamaged, match="went_back does not list folders to be moved aside"):
        folder.recover()
    assert {p.name for p in folder.path.iterdir()} >= {"model.pt", "step_00000001"}
    assert not list(folder.path.glob("aside_*"))


def test_going_back_to_a_bundle_of_version_1_gives_it_checksums(folder):
    old = folder.path / "step_00000005"
    old.mkdir()
    (old / "model.pt").write_text("123456789")
    (old / STATE).write_text('{"step": 5}')
    assert folder.go_back(old, "abandoned") == []
    state = unseal((folder.path / STATE).read_bytes(), "top")
    assert state["step"] == 5
    assert state["integrity"]["files"] == {"model.pt": {"size": 9, "crc32": "cbf43926"}}
    assert json.loads((old / STATE).read_text()) == {"step": 5}


def test_prune_removes_only_the_named_steps(folder):
    for step, label in enumerate("abcd", 1):
        save(folder, step, label)
    folder.prune([1, 3])
    assert list(folder.kept_steps()) == [2]
    assert not list(folder.path.glob(".trash-*"))


def test_a_missing_file_is_named_with_the_step_that_lists_it(folder):
    save(folder, 7, "a")
    (folder.path / "optimizer.pt").unlink()
    with pytest.raises(CheckpointDamaged, match=r"optimizer\.pt: missing, but training_state\.json of step 7 lists it"):
        folder.open_newest()


def test_a_file_system_that_refuses_links_gets_moves(tmp_path, monkeypatch):
    storage = Storage()
    folder = ModelFolder(tmp_path, storage)
    real = storage.change

    def change(call, *args):
        if call.__name__ == "link":
            raise OSError(errno.EPERM, "no links here")
        return real(call, *args)

    monkeypatch.setattr(storage, "change", change)
    save(folder, 1, "a")
    save(folder, 2, "b")
    assert not storage.links
    assert newest(folder) == whole("b")
    assert kept(folder, 1) == whole("a")


def test_going_back_twice_to_the_same_step_whose_files_the_top_then_shares_leaves_nothing_pending(folder):
    save(folder, 1, "a")
    save(folder, 2, "b")
    folder.go_back(folder.path / "step_00000001", "damaged")
    folder.go_back(folder.path / "step_00000001", "damaged")
    assert newest(folder) == kept(folder, 1) == whole("a")
    assert not folder.committed.exists()
    save(folder, 2, "c")
    assert newest(folder) == whole("c")


@pytest.mark.parametrize("to", ["relative", "absolute"])
def test_a_file_at_the_top_that_is_a_link_stays_valid_in_the_kept_step_and_when_going_back(folder, tmp_path, to):
    place = ModelFolder(tmp_path / "dante", folder.storage)
    place.path.mkdir()
    save(place, 1, "a")
    big = tmp_path / "big"
    big.mkdir()
    (place.path / "model.pt").rename(big / "m.pt")
    (place.path / "model.pt").symlink_to("../big/m.pt" if to == "relative" else big / "m.pt")
    save(place, 2, "b")
    held = place.path / step_folder(1) / "model.pt"
    assert kept(place, 1) == whole("a") and held.read_bytes() == (big / "m.pt").read_bytes() == b"model.pt a"
    assert held.is_symlink() is not folder.storage.links and newest(place) == whole("b")
    place.go_back(place.path / step_folder(1), "abandoned")
    assert newest(place) == whole("a") and place.asides()


def test_a_link_at_the_top_that_leads_nowhere_does_not_stop_a_save(folder):
    save(folder, 1, "a")
    (folder.path / "model.pt").unlink()
    (folder.path / "model.pt").symlink_to("gone.pt")
    save(folder, 2, "b")
    assert newest(folder) == whole("b")
    assert (folder.path / step_folder(1) / "model.pt").readlink().name == "gone.pt"


def interrupted(folder):
    """A top of step 1, and a commit of step 2 that was not rolled forward."""
    save(folder, 1, "a")
    folder.commit(stage_step(folder, 2, "b"))


def test_a_file_that_another_program_took_from_a_commit_does_not_cost_the_old_top(folder):
    interrupted(folder)
    taken = (folder.committed / "model.pt").rename(folder.path / "taken")
    before = listing(folder.path)
    with pytest.raises(CheckpointDamaged) as caught:
        folder.recover()
    assert str(caught.value).startswith(f"{folder.committed}: model.pt of step 2, which was committed, is gone")
    assert listing(folder.path) == before
    taken.rename(folder.committed / "model.pt")  # as the message says
    folder.recover()
    assert newest(folder) == whole("b") and kept(folder, 1) == whole("a")


def test_a_commit_that_lost_a_file_can_be_moved_away(folder):
    interrupted(folder)
    (folder.committed / "optimizer.pt").unlink()
    with pytest.raises(CheckpointDamaged, match=r"optimizer\.pt of step 2.*so that the step at the top is the newest"):
        folder.recover()
    folder.committed.rename(folder.path / "moved")
    folder.recover()
    assert newest(folder) == whole("a")


def test_a_roll_forward_that_has_begun_is_recognised_by_its_bytes_and_finished(folder):
    interrupted(folder)
    folder._preserve_top()
    (folder.committed / "model.pt").replace(folder.path / "model.pt")
    folder.recover()
    assert newest(folder) == whole("b") and kept(folder, 1) == whole("a")
    assert not folder.committed.exists()


@pytest.mark.parametrize("name", ["model.pt", "config.json"])
def test_a_stage_without_a_listed_file_is_not_committed(folder, name):
    save(folder, 1, "a")
    stage = stage_step(folder, 2, "b")
    (stage / name).unlink()
    with pytest.raises(SaveFailed, match=rf"{re.escape(str(stage / name))}: missing, expected \d+ bytes"):
        folder.commit(stage)
    assert not folder.committed.exists() and newest(folder) == whole("a")


def listing(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("renames", [True, False], ids=["renames", "no renames of folders"])
def test_a_commit_that_fails_after_its_rename_is_finished_by_the_next_writer(folder, renames):
    folder.storage.folder_renames = renames
    save(folder, 1, "A")
    real, made = folder.storage.sync_folder, []

    def fail(path):
        if made and path == folder.path and folder.storage.exists(folder.path / ".committed"):
            raise OSError(errno.EIO, "Input/output error")
        real(path)

    with pytest.raises(OSError, match="Input/output error"), folder.staging() as stage:
        files = {"model.pt": lambda out: out.write(b"model.pt B") and None, "config.json": {"n_embd": 64, "n_head": 1}}
        state = {"step": 2, "format_version": 2, "commit_id": "B", "parent": folder.newest_id()}
        write_bundle(folder, stage, state, files)
        made.append(stage)
        folder.storage.sync_folder = fail
        folder.commit(stage)
    folder.storage.sync_folder = real
    assert newest(folder)[0] == "B"
    ModelFolder(folder.path, folder.storage).recover()
    assert newest(folder) == ("B", {"model.pt": "model.pt B"}) and kept(folder, 1)[0] == "A"
    assert not [p.name for p in folder.path.iterdir() if p.name.startswith((".stage", ".committed"))]
