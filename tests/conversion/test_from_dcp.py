"""Conversions of DCP folders and files of ranks, with real folders of four FSDP ranks as the source."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import convert_checkpoints
from core.containers.dcp.rebuilt import rebuild
from core.errors import CheckpointDamaged, CheckpointMismatch
from tests.makers.conversions import converted, same
from tests.makers.dcp_folders import lost, save, write_ranks

STEP = "0000002"


@pytest.fixture
def ranks(shared) -> Path:
    return shared / "fixtures/dcp_fsdp2_4ranks"


def writable(source: Path, target: Path, pattern: str = "*") -> Path:
    """A copy of what fits the pattern; fixtures are read-only."""
    shutil.copytree(source, target, ignore=lambda _, names: [n for n in names if not Path(n).match(pattern)])
    for path in [target, *target.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return target


@pytest.fixture
def step(ranks, tmp_path) -> Path:
    return writable(ranks / STEP, tmp_path / STEP)


def expected(ranks: Path, part: str = "model") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(ranks / f"expected_{part}.safetensors")


def convert(source: Path, folder: Path, **more) -> dict[str, torch.Tensor]:
    converted(source, folder / "made.safetensors", "safetensors", more=more)
    return safetensors.torch.load_file(folder / "made.safetensors")


# weights, average, optimizer


@pytest.mark.parametrize("source", [STEP, f"{STEP}/model_sharded", f"{STEP}/model_sharded/.metadata", "nested_step-3"])
def test_main_weights_are_the_default(ranks, source, tmp_path):
    assert same(convert(ranks / source, tmp_path), expected(ranks))
    converted(ranks / source, tmp_path / "made.pt", "pt")
    assert same(torch.load(tmp_path / "made.pt"), expected(ranks))


@pytest.mark.parametrize("source", [STEP, f"{STEP}/ema_sharded"])
def test_ema_is_the_ema(ranks, source, tmp_path):
    found = convert(ranks / source, tmp_path, save_ema=True)
    assert same(found, expected(ranks, "ema"))
    assert not same(found, expected(ranks))


def test_files_of_ranks_are_put_together(ranks, tmp_path):
    alone = writable(ranks / STEP, tmp_path / "alone", "model_rank*")
    assert same(convert(alone, tmp_path), expected(ranks))
    both = writable(ranks / STEP, tmp_path / "both", "*_rank*")
    converted(both, tmp_path / "both.pt", "pt", include_optimizer=True)
    found = torch.load(tmp_path / "both.pt")
    assert same(found["model"], expected(ranks))
    assert_optimizer(found["optimizer"], ranks)


def assert_optimizer(found: dict, ranks: Path) -> None:
    optim = torch.load(ranks / "expected_optim.pt", weights_only=False)
    assert found["param_groups"] == optim["param_groups"]
    assert found["state"].keys() == optim["state"].keys()
    assert all(same(found["state"][name], entry) for name, entry in optim["state"].items())


@pytest.mark.parametrize("source", [STEP, "nested_step-3"])
def test_optimizer_is_kept_as_it_was_where_it_is_asked_for(ranks, source, tmp_path):
    plan = converted(ranks / source, tmp_path / "made.pt", "pt", include_optimizer=True)
    found = torch.load(tmp_path / "made.pt")
    assert same(found["model"], expected(ranks))
    assert_optimizer(found["optimizer"], ranks)
    assert sum(t["target"].startswith("opt") for t in plan["tensors"]) == 72


def test_optimizer_tensors_stand_among_the_others_in_safetensors(ranks, tmp_path):
    plan = converted(ranks / "nested_step-3", tmp_path / "made.safetensors", "safetensors", include_optimizer=True)
    found = safetensors.torch.load_file(tmp_path / "made.safetensors")
    optim = torch.load(ranks / "expected_optim.pt", weights_only=False)
    moments = {f"optim.state.{n}.{k}": v for n, entry in optim["state"].items() for k, v in entry.items()}
    assert same(found, {**expected(ranks), **moments})
    assert any("12 values of optim" in note for note in plan["notes"])
    with pytest.raises(CheckpointMismatch, match="--dtype would cast the optimizer"):
        converted(
            ranks / "nested_step-3", tmp_path / "x.safetensors", "safetensors", include_optimizer=True, dtype="bfloat16"
        )


def test_every_tensor_is_used_or_dropped_with_a_reason(ranks, tmp_path):
    state = {"model": {"w": torch.ones(3)}, "ema": {"w": torch.zeros(3)}, "optim": {"m": torch.ones(2)}, "lr": 0.5}
    folder = save(state, tmp_path / "nested")
    plan = converted(folder, tmp_path / "a.safetensors", "safetensors")
    assert plan["dropped"] == {
        "ema.w": "EMA; --save_ema takes it instead",
        "optim.m": "optimizer; --include_optimizer keeps it",
        "lr": "0.5; --to safetensors has no place for it",
    }
    plan = converted(folder, tmp_path / "b.safetensors", "safetensors", more={"save_ema": True})
    assert plan["dropped"]["model.w"] == "main weights; --save_ema takes the EMA"
    assert torch.equal(safetensors.torch.load_file(tmp_path / "b.safetensors")["w"], torch.zeros(3))
    plan = converted(ranks / STEP, tmp_path / "c.safetensors", "safetensors")
    assert any(note.startswith("not opened: ema, optimizer of ") for note in plan["notes"])


def test_damage_to_an_optimizer_does_not_stop_its_model(ranks, step, tmp_path):
    os.truncate(step / "optimizer_rank00001.pt", 100)
    assert same(convert(step, tmp_path), expected(ranks))
    with pytest.raises(CheckpointDamaged, match="optimizer_rank00001"):
        converted(step, tmp_path / "x.pt", "pt", include_optimizer=True)


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("nested_step-3", {"more": {"save_ema": True}}, "found model, optim, expected EMA weights"),
        (f"{STEP}/model_sharded", {"more": {"save_ema": True}}, r"Name .*0000002/ema_sharded\."),
        (f"{STEP}/model_sharded", {"include_optimizer": True}, "found weights alone, expected an optimizer"),
        (
            "expected_model.safetensors",
            {"more": {"save_ema": True}},
            "--save_ema takes a part of a bundle or of a sharded",
        ),
    ],
)
def test_a_part_that_is_not_there_is_refused(ranks, source, options, words, tmp_path):
    with pytest.raises(CheckpointMismatch, match=words):
        converted(ranks / source, tmp_path / "made.safetensors", "safetensors", **options)


# a lost .metadata


@pytest.mark.parametrize(("part", "ema"), [("model", False), ("ema", True)])
def test_lost_metadata_is_rebuilt_after_the_folder_beside_it(ranks, step, part, ema, tmp_path):
    (step / f"{part}_sharded/.metadata").unlink()
    plan = converted(step, tmp_path / "made.safetensors", "safetensors", more={"save_ema": ema})
    assert same(safetensors.torch.load_file(tmp_path / "made.safetensors"), expected(ranks, part))
    assert any("rebuilt after" in note and "in 4 files are accounted for" in note for note in plan["notes"])
    assert same(convert(step / f"{part}_sharded", tmp_path / "alone", save_ema=ema), expected(ranks, part))


@pytest.mark.parametrize("by_order", [False, True])
def test_lost_metadata_is_rebuilt_after_what_is_named(ranks, step, by_order, tmp_path):
    for part in ("model", "ema"):
        (step / f"{part}_sharded/.metadata").unlink()
    like = ranks / STEP / "ema_sharded"
    if by_order:
        like = tmp_path / "order.pt"
        converted(writable(ranks / STEP, tmp_path / "ranks", "model_rank*"), like, "pt")
    assert same(convert(step, tmp_path, metadata_from=like), expected(ranks))


def test_lost_metadata_without_anything_to_go_by_is_refused(step, tmp_path):
    for part in ("model", "ema"):
        (step / f"{part}_sharded/.metadata").unlink()
    with pytest.raises(CheckpointDamaged, match=r"\(4\) hold \d+ whole items, but only .* --metadata_from names"):
        convert(step, tmp_path)


MODEL = {"a": torch.randn(7, 3), "b": torch.randn(5), "c": torch.randn(8, 2), "d": torch.randn(5), "e": torch.randn(3)}


@pytest.mark.parametrize("by_size", [False, True])
def test_rows_by_rank_are_named_by_the_order_of_the_modules_or_of_sizes(by_size, tmp_path):
    folder = lost(write_ranks(tmp_path / "rows", MODEL, 3, by_size))
    torch.save(MODEL, tmp_path / "like.pt")
    assert same(convert(folder, tmp_path, metadata_from=tmp_path / "like.pt"), MODEL)


def test_what_does_not_account_for_every_item_is_refused(ranks, step, tmp_path):
    folder = lost(step / "model_sharded")
    others = write_ranks(tmp_path / "others", MODEL, 4)
    with pytest.raises(CheckpointMismatch, match=r"another layout: __0_0\.distcp: found \d+ items, expected \d+"):
        rebuild(folder, others)
    with pytest.raises(CheckpointMismatch, match=r"found the files .*, expected __0_0\.distcp, __1_0"):
        rebuild(folder, write_ranks(tmp_path / "two", MODEL, 2))
    with pytest.raises(CheckpointMismatch, match="lists tensors in an order of its own"):
        rebuild(folder, ranks / "expected_model.safetensors")
    names = list(expected(ranks))
    torch.save({name: expected(ranks)[name] for name in names}, tmp_path / "sorted.pt")  # not the order of modules
    with pytest.raises(CheckpointMismatch, match="does not account for every item"):
        rebuild(folder, tmp_path / "sorted.pt")
    (gone := write_ranks(tmp_path / "gone", MODEL, 3) / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointMismatch, match=r"found the files __0_0\.distcp, __2_0\.distcp, expected one of each"):
        rebuild(lost(gone.parent), tmp_path / "sorted.pt")
    with (folder / "__2_0.distcp").open("ab") as file:
        file.write(b"surplus")
    with pytest.raises(CheckpointDamaged, match=r"__2_0\.distcp: no zip ends at byte"):
        rebuild(folder, step / "ema_sharded")


def test_one_choice_among_several_is_no_choice(tmp_path):
    folder = lost(write_ranks(tmp_path / "rows", MODEL, 3))
    more = {"a": MODEL["a"], "x": torch.randn(5), **{n: t for n, t in MODEL.items() if n not in "ab"}}
    torch.save({**more, "y": torch.randn(2)}, tmp_path / "like.pt")
    with pytest.raises(CheckpointMismatch, match=r"y \(2,\) fits nowhere, the files go on with nothing"):
        rebuild(folder, tmp_path / "like.pt")


# damage


def test_files_of_ranks_under_each_others_names_are_put_together_by_what_they_say(ranks, tmp_path):
    alone = writable(ranks / STEP, tmp_path / "alone", "model_rank*")
    (alone / "model_rank00001.pt").rename(alone / "x")
    (alone / "model_rank00002.pt").rename(alone / "model_rank00001.pt")
    (alone / "x").rename(alone / "model_rank00002.pt")
    assert same(convert(alone, tmp_path), expected(ranks))


def test_a_known_model_in_a_dcp_folder_becomes_what_its_family_does(shared, tmp_path):
    nanogpt = shared / "fixtures/nanogpt_char_biasFalse"
    state = torch.load(nanogpt / "ckpt.pt", weights_only=True)
    folder = save({key: state[key] for key in ("model", "model_args", "iter_num")}, tmp_path / "dcp")
    meta = nanogpt / "meta.pkl"
    for source, name in ((folder, "from_dcp"), (nanogpt / "ckpt.pt", "from_file")):
        converted(source, tmp_path / name, "hf", meta=meta)
    one, other = (tmp_path / name / "model.safetensors" for name in ("from_dcp", "from_file"))
    assert same(safetensors.torch.load_file(one), safetensors.torch.load_file(other))


# the command line


def test_command_says_what_it_did(ranks, tmp_path, capsys):
    words = [str(ranks / STEP), str(tmp_path / "e.safetensors"), "--to", "safetensors", "--save_ema", "--json"]
    assert convert_checkpoints.main(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert (len(said["tensors"]), said["verified"]) == (25, True)
    assert said["notes"][-1].startswith("not opened: model, optimizer of ")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["a", "--save_ema"], "--save_ema: only for a conversion, not a migration. Add --to"),
        (["--checkpoint_dir", "a"], "go together"),
        (["--checkpoint_dir", "a", "--output_path", "b", "c"], "found c as well"),
        (["a", "b", "--to", "safetensors", "--match_original"], "needs the folder of the model"),
        (["a", "b", "--to", "safetensors", "--model_path", "m"], "which is missing"),
        (["a", "b", "--to", "safetensors", "--match_original", "m", "--model_path", "n"], "name two models"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(words, error, capsys):
    with pytest.raises(SystemExit) as stopped:
        convert_checkpoints.main(words)
    assert stopped.value.code == 2
    assert error in capsys.readouterr().err
