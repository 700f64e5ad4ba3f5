"""Hugging Face folders: one file or shards, what an index must not say, and what is only noted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core.containers.hf_folder import open_hf_folder
from core.containers.open import open_container
from core.errors import CheckpointDamaged, CheckpointNotFound
from tests.conftest import ROOT
from tests.makers.containers import assert_same, load_hf, plain_tensors, write_hf

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00003.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three shards with an index."""
    (tmp_path / "m").mkdir()
    return write_hf("safetensors", 3)(tmp_path / "m")


def change(folder: Path, **fields) -> dict:
    index = json.loads((folder / INDEX).read_text())
    index.update(fields)
    (folder / INDEX).write_text(json.dumps(index))
    return index


def damage(path: Path) -> str:
    with pytest.raises(CheckpointDamaged) as caught:
        open_container(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["hf_gpt2", "hf_gpt2_sharded", "hf_llama_gqa_untied", "hf_qwen2_tied"])
def test_what_transformers_saved_opens_with_its_config(shared, name):
    path = shared / "fixtures" / name
    container = open_container(path)
    assert_same(container, load_hf(path))
    assert container.content["config"] == json.loads((path / "config.json").read_text())
    assert container.files["generation_config.json"] == (path / "generation_config.json").stat().st_size
    shards = len(list(path.glob("model*.safetensors")))
    files = f", {shards} files" if shards > 1 else ""
    assert container.kind == f"Hugging Face folder, safetensors{files}"


@pytest.mark.parametrize("name", ["hf_gpt2", "hf_llama_gqa_untied", "hf_qwen2_tied"])
def test_the_bin_of_a_fixture_opens_as_a_folder_with_its_shared_head(shared, name, tmp_path):
    source = shared / "fixtures" / name
    shutil.copyfile(source / "pytorch_model.bin.ref", tmp_path / "pytorch_model.bin")
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    container = open_container(tmp_path)
    theirs = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert container.kind == "Hugging Face folder, torch zip" and container.foreign == []
    assert_same(container, theirs)
    head, embedding = (
        theirs.get("lm_head.weight"),
        next(n for n in theirs if n.endswith(("wte.weight", "tokens.weight"))),
    )
    assert head is not None
    tied = head.data_ptr() == theirs[embedding].data_ptr()
    specs = container.tensors
    assert (specs["lm_head.weight"].storage == specs[embedding].storage) == tied == (name != "hf_llama_gqa_untied")


def test_an_index_by_itself_opens_its_folder(folder):
    assert open_container(folder / INDEX) == open_container(folder)
    (folder / INDEX).rename(folder / "other.safetensors.index.json")
    assert open_container(folder / "other.safetensors.index.json").tensors == open_container(folder).tensors


def test_a_relative_index_opens(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert len(open_container(Path(INDEX)).tensors) == len(plain_tensors())
    assert len(open_container(Path()).tensors) == len(plain_tensors())


def test_a_missing_shard_is_counted_and_named(folder):
    (folder / FIRST).unlink()
    said = damage(folder / INDEX)
    assert f"{INDEX}: of its 3 files, 1 not there: {FIRST}. Download" in said


def test_shards_without_their_index_open_with_a_note_or_name_the_missing(folder):
    (folder / INDEX).unlink()
    container = open_container(folder)
    assert_same(container, load_hf(folder))
    assert container.notes[0].startswith("no index beside the shards")
    (folder / FIRST).unlink()
    assert f"of its 3 files, 1 not there: {FIRST}" in damage(folder)


def test_a_tensor_that_no_shard_has_is_named(folder):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    change(folder, weight_map={**weight_map, "ghost.weight": FIRST})
    said = damage(folder / INDEX)
    n = len(weight_map)
    assert f"lists {n + 1} tensors, its files hold {n} of them: ghost.weight is not in {FIRST}." in said


def test_a_tensor_that_is_in_another_shard_is_named_with_both(folder):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    change(folder, weight_map={**weight_map, "scalar": FIRST})
    assert f"places scalar in {FIRST}, it is in model-00003-of-00003.safetensors." in damage(folder / INDEX)


def test_a_tensor_that_the_index_lacks_is_there_and_noted(folder):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    del weight_map["scalar"]
    change(folder, weight_map=weight_map)
    container = open_container(folder)
    assert container.tensors["scalar"].shape == ()
    assert container.notes == ["not in the index, and yet in the files: scalar (model-00003-of-00003.safetensors)"]


@pytest.mark.parametrize("size", [5, "many", -1, 1e300])
def test_another_total_size_is_noted_with_both_numbers(folder, size):
    true = json.loads((folder / INDEX).read_text())["metadata"]["total_size"]
    change(folder, metadata={"total_size": size})
    (note,) = open_container(folder).notes
    assert note == f"the index gives a total_size of {json.dumps(size)} bytes, the tensors have {true}"


@pytest.mark.parametrize("metadata", [None, {}, [], "x"])
def test_an_index_needs_no_metadata(folder, metadata):
    change(folder, metadata=metadata)
    assert open_container(folder).notes == []


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../../x", "./x", "", ".", "a\0b", "a\nb", "\ud800", "a//b", "x/"]
)
def test_an_index_cannot_name_a_file_out_of_its_folder(folder, name):
    shutil.copyfile(folder / FIRST, folder.parent / "x.safetensors")
    change(folder, weight_map={"a": name})
    assert f"{INDEX}: names the file {json.dumps(name)}, expected one within its folder." in damage(folder / INDEX)


def test_links_within_the_folder_and_into_the_blobs_of_a_cache_are_followed(folder):
    (folder / FIRST).rename(folder / "real")
    (folder / FIRST).symlink_to("real")
    plain = open_container(folder)
    repo = folder.parent / "models--x"
    snapshot = repo / "snapshots" / "abc"
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        shutil.copyfile(path, repo / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert open_container(snapshot).tensors == plain.tensors
    (snapshot / FIRST).unlink()
    (snapshot / FIRST).symlink_to(folder / "real")
    assert "is a link that leads outside the folder" in damage(snapshot / INDEX)


def test_a_folder_reached_through_a_link_opens(folder):
    (folder.parent / "link").symlink_to(folder)
    assert open_container(folder.parent / "link").tensors == open_container(folder).tensors


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "0 bytes that are not valid JSON"),
        ("[]", "found a JSON list, expected an object"),
        ("{}", "its weight_map is None, expected a file for each tensor"),
        ('{"weight_map": {}}', "its weight_map is {}, expected"),
        ('{"weight_map": {"a": 3}}', "places a in 3, expected a file's name"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "the key 'a' occurs 2 times"),
        ('{"metadata": ' + "[" * 300 + "]" * 300 + ', "weight_map": {"a": "x"}}', "nested deeper than 200 levels"),
    ],
)
def test_an_index_that_is_none_says_why(folder, text, said):
    (folder / INDEX).write_text(text)
    assert said in damage(folder / INDEX)


def test_a_damaged_config_is_named(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointDamaged, match=r"config\.json: 1 bytes that are not valid JSON"):
        open_container(folder)


def test_numbers_that_json_lacks_are_read_as_transformers_writes_them(folder):
    (folder / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert open_container(folder).content["config"] == {"time_step_limit": [0.0, float("inf")]}


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        CheckpointNotFound, match=r"expected one of model\.safetensors, model\.safetensors\.index\.json"
    ):
        open_hf_folder(tmp_path)


def test_safetensors_come_before_bins_and_what_is_not_read_is_noted(tmp_path):
    write_hf("bin", 1)(tmp_path)
    write_hf("safetensors", 1)(tmp_path)
    for name in ("optimizer.pt", "tokenizer.json", "notes.txt"):
        (tmp_path / name).write_text("x")
    container = open_container(tmp_path)
    assert container.kind == "Hugging Face folder, safetensors"
    assert container.notes == [
        "with tokenizer.json",
        "also here, not part of the model: optimizer.pt, pytorch_model.bin",
    ]
    assert container.files.keys() == {"config.json", "model.safetensors", "tokenizer.json"}


def test_what_a_bin_names_besides_data_is_reported(tmp_path):
    write_hf("bin", 2)(tmp_path)
    file = next(tmp_path.glob("*-00002-*.bin"))
    torch.save({**torch.load(file, weights_only=True), "trainer": print, "step": 3}, file)
    container = open_container(tmp_path)
    assert container.foreign == ["__builtin__.print"]
    assert container.content[file.name]["step"] == 3


SHARDS, PER_SHARD = 64, 157


def make_large(folder: Path) -> None:
    """10,048 tensors in 64 sparse files of 2 GB."""
    weight_map = {}
    shape, nbytes = [1024, 6656], 1024 * 6656 * 2
    for i in range(SHARDS):
        file = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        header = {"__metadata__": {"format": "pt"}}
        for j in range(PER_SHARD):
            name = f"model.layers.{i}.block.{j}.self_attn.q_proj.weight"
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [j * nbytes, (j + 1) * nbytes]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + PER_SHARD * nbytes)
    index = {"metadata": {"total_size": SHARDS * PER_SHARD * nbytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read from /proc")
def test_64_shards_with_ten_thousand_tensors_open_within_a_second_and_120_mb(tmp_path):
    make_large(tmp_path)
    code = (
        "import sys\n"
        "from pathlib import Path; from core.containers.open import open_container\n"
        "container = open_container(Path(sys.argv[1]))\n"
        "peak = Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]\n"
        "print(len(container.tensors), len(container.notes), peak)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    count, notes, kilobytes = done.stdout.split()
    assert (int(count), int(notes)) == (SHARDS * PER_SHARD, 0)
    assert int(kilobytes) < 120_000
