"""What a conversion refuses before it writes: targets, names, flags without effect, vocabularies cut too short."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

import convert_checkpoints
from core.errors import CheckpointError
from core.model import GPT
from tests.makers.conversions import converted


@pytest.fixture
def source(tmp_path) -> Path:
    torch.save({"w": torch.arange(6.0), "n": torch.arange(3), "none": torch.zeros(0, 4)}, tmp_path / "src.pt")
    return tmp_path / "src.pt"


def error(source: Path, target: Path, to: str, **options) -> str:
    """The refusal, without the path of what it is about; nothing new may be there."""
    before = sorted(target.parent.iterdir())
    with pytest.raises(CheckpointError) as caught:
        converted(source, target, to, overwrite=True, **options)
    assert sorted(target.parent.iterdir()) == before
    return str(caught.value).removeprefix(f"{source}: ").removeprefix(f"{target}: ")


@pytest.mark.parametrize(
    ("name", "to", "said"),
    [
        ("x.safetensors", "pt", "ends in .safetensors, and --to pt writes a torch file. Name it otherwise."),
        ("x.pt", "safetensors", "ends in .pt, and --to safetensors writes a folder. Name it otherwise."),
        ("x.bin", "dcp", "ends in .bin, and --to dcp writes a folder. Name it otherwise."),
    ],
)
def test_a_name_that_says_other_than_what_is_written(source, tmp_path, name, to, said):
    assert error(source, tmp_path / name, to) == said


def test_a_bundle_or_a_folder_of_hugging_face_is_not_called_as_a_file(shared, tmp_path):
    for to, name in (("bundle", "b.pt"), ("hf", "hf.safetensors"), ("nanogpt", "n.safetensors")):
        said = error(shared / "fixtures/nanogpt_char_biasFalse/ckpt.pt", tmp_path / name, to)
        assert said == f"ends in {Path(name).suffix}, and --to {to} writes a folder. Name it otherwise."


def test_a_word_that_ends_as_a_folder_is_not_made_a_file(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"out/: names a folder, and --to pt writes a file. Name the file\."):
        convert_checkpoints.main(["src.pt", "out/", "--to", "pt"])
    assert [path.name for path in tmp_path.iterdir()] == ["src.pt"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes")
def test_a_device_or_a_pipe_is_not_even_moved_aside(source, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    said = error(source, tmp_path / "pipe", "pt")
    assert said == "is a device or a pipe, which is left where it is. Name another place."
    assert (tmp_path / "pipe").is_fifo()


def test_names_that_safetensors_cannot_hold(tmp_path):
    for name in ("__metadata__", "\ud800x"):
        torch.save({name: torch.zeros(2)}, tmp_path / "odd.pt")
        said = error(tmp_path / "odd.pt", tmp_path / "x.safetensors", "safetensors")
        assert said == f"{name!r} cannot be a name in a safetensors file. Use --to pt."
        converted(tmp_path / "odd.pt", tmp_path / "kept.pt", "pt", overwrite=True)
        assert list(torch.load(tmp_path / "kept.pt")) == [name]


def test_a_source_without_tensors(tmp_path):
    for content in ({}, {"step": 3}):
        torch.save(content, tmp_path / "src.pt")
        assert (
            error(tmp_path / "src.pt", tmp_path / "x.pt", "pt") == "it has no tensors, so there is nothing to convert."
        )


def test_the_model_card_of_a_target_whose_name_is_no_text(shared, tmp_path):
    target = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    converted(shared / "fixtures/hf_gpt2", target, "hf")
    assert "# caf\\udce9\n" in (target / "README.md").read_text()


@pytest.mark.parametrize(
    ("to", "options", "said"),
    [
        ("pt", {"shard_size": 10}, "--shard_size cuts safetensors, and --to pt writes none. Leave it out."),
        ("pt", {"tied": True}, "--tied needs to know which tensor is the head, and the program is not known."),
        (
            "pt",
            {"choices": {"rope_theta": 1.0}},
            "--rope_theta: --to pt takes tensors as they are. Leave it out.",
        ),
    ],
)
def test_flags_that_would_do_nothing(source, tmp_path, to, options, said):
    assert error(source, tmp_path / "x.pt", to, **options).startswith(said)


def test_an_optimizer_for_hugging_face(shared, tmp_path):
    nanogpt = shared / "fixtures/nanogpt_char_biasFalse/ckpt.pt"
    assert error(nanogpt, tmp_path / "hf", "hf", include_optimizer=True) == (
        "--include_optimizer: a folder of transformers has no optimizer state. Leave it out."
    )


@pytest.mark.parametrize("words", [["--dtype", "bf16"], ["--overwrite"], ["--no_verify"], ["--shard_size", "1GB"]])
def test_a_migration_takes_no_flag_of_a_conversion(source, tmp_path, capsys, words):
    with pytest.raises(SystemExit) as wrong:
        convert_checkpoints.main([str(source), str(tmp_path / "x"), *words])
    assert wrong.value.code == 2
    said = capsys.readouterr().err
    assert f"{words[0]}: only for a conversion, not a migration. Add --to (--list shows the formats)" in said


def test_only_padding_of_a_vocabulary_is_cropped(shared, tmp_path):
    folder = shared / "fixtures/nanogpt_char_biasFalse"
    meta = {"meta": folder / "meta.pkl"}
    assert error(folder / "ckpt.pt", tmp_path / "b", "bundle", vocab_size=33, **meta) == (
        "--vocab_size 33 would cut off tokens: the vocabulary has 34. Only padding is cropped."
    )
    said = error(shared / "fixtures/megatron_llama_gqa/exported_model.pt", tmp_path / "hf", "hf", vocab_size=249)
    assert said == "--vocab_size 249 would cut off tokens: the vocabulary has 250. Only padding is cropped."
    assert error(folder / "ckpt.pt", tmp_path / "b", "bundle", vocab_size=1000, **meta) == (
        "1000 rows for 34 characters: a bundle has as many, or up to a multiple of 8 fewer than 128 more. "
        "Leave --vocab_size out."
    )
    converted(folder / "ckpt.pt", tmp_path / "b", "bundle", vocab_size=40, **meta)
    assert GPT.load(tmp_path / "b")[0].config.vocab_size == 40


@pytest.mark.parametrize("to", ["safetensors", "pt", "dcp"])
def test_tensors_without_elements_and_whole_numbers_are_kept_beside_a_cast(source, tmp_path, to):
    facts = converted(source, tmp_path / "out", to, dtype="float16")
    assert {t["target"]: (t["dtype"], t["shape"]) for t in facts["tensors"]} == {
        "w": ("float16", [6]),
        "n": ("int64", [3]),
        "none": ("float16", [0, 4]),
    }


@pytest.fixture
def alone(shared, tmp_path):
    """The weights of a model of transformers in a folder, with a config.json that has no entries."""

    def made(name: str) -> tuple[Path, Path]:
        folder = tmp_path / "m"
        folder.mkdir()
        shutil.copy(shared / "fixtures" / name / "model.safetensors", folder)
        (folder / "config.json").write_text("{}")
        return folder / "model.safetensors", folder / "config.json"

    return made


def test_a_refusal_for_want_of_a_config_says_where_it_is_or_is_not(alone, tmp_path):
    (weights, config), made = alone("hf_llama_gqa_untied"), tmp_path / "made"
    heads = "the heads are not in the tensors."
    said = error(weights, made, "megatron")
    assert said == f"a file by itself, with which {config} is not read, and {heads} Name the folder: {config.parent}."
    assert error(config.parent, made, "megatron").startswith(f"its config.json has no entries, and {heads}")
    config.unlink()
    assert error(config.parent, made, "megatron").startswith(f"no config.json in it, and {heads}")
    assert error(weights, made, "megatron").startswith(f"no config.json beside it, and {heads}")


def test_a_config_that_is_not_read_with_a_file_is_named_where_a_choice_is_asked_for(alone, tmp_path):
    weights, config = alone("hf_gpt2")
    said = error(weights, tmp_path / "made", "bundle")
    assert said.startswith(
        "nothing in the file shows its heads and activation, without which its logits are not known."
    )
    assert said.endswith(f" Or name the folder: {config} is not read with a file.")
    assert "name the folder" not in error(config.parent, tmp_path / "made", "bundle")
