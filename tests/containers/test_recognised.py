"""Formats that are not read are called by their name, under any ending, with the command of their own program."""

from __future__ import annotations

import io
import json
import shlex
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import convert_checkpoints
import inspect_model
from core.containers.open import open_container
from core.containers.recognised import FILES, FOLDERS, file_kind, folder_kind
from core.errors import CheckpointError
from tests.makers.conversions import converted


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros((2, 2), "f4"), b=np.ones(2))
    return buffer.getvalue()


def keras(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name in names or ("metadata.json", "config.json", "model.weights.h5"):
            made.writestr(name, "{}")
    return buffer.getvalue()


def llm_c(magic: int) -> bytes:
    return np.array([magic, 3, 64, 128, 2, 4, 32, *[0] * 249], "<i4").tobytes() + bytes(64)


HEADS: dict[str, bytes] = {
    "a Git LFS pointer, not the file itself": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 54\n",
    "a web page": b"\n<!DOCTYPE html><html><body>404</body></html>",
    "an XML text": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "an HDF5 file, as Keras and h5py write": b"\x89HDF\r\n\x1a\n" + bytes(90),
    "a numpy array": b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}",
    "a GGUF file of llama.cpp": b"GGUF\x03\0\0\0" + bytes(50),
    "a model of llm.c": llm_c(20240326),
    "a state of llm.c's optimizer": llm_c(20240327),
    "tokens for training, not a model": llm_c(20240520),
    "a model of llama2.c": struct.pack("<I", 0x616B3432) + bytes(300),
    "a gzip file": b"\x1f\x8b\x08" + bytes(30),
    "a Zstandard file": b"\x28\xb5\x2f\xfd" + bytes(30),
    "a bzip2 file": b"BZh91AY&SY" + bytes(30),
    "an xz file": b"\xfd7zXZ\0" + bytes(30),
    "a 7-Zip file": b"7z\xbc\xaf\x27\x1c" + bytes(30),
    "an archive of numpy arrays (npz)": npz(),
    "a model of Keras": keras(),
}

NAMES: dict[str, list[str]] = {
    "a checkpoint of DeepSpeed's ZeRO": ["zero_to_fp32.py", "latest", "global_step12/"],
    "one step of DeepSpeed's ZeRO, in parts of its ranks": [
        "mp_rank_00_model_states.pt", *(f"bf16_zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(2))
    ],
    "one step of GPT-NeoX, a file for each layer": [
        *(f"layer_{i:02}-model_00-model_states.pt" for i in (0, 2, 3)), "mp_rank_00_model_states.pt"
    ],
    "a model of Meta in parts of several ranks": ["consolidated.00.pth", "consolidated.01.pth", "params.json"],
    "the output of a recipe of torchtune, in parts": ["hf_model_0001_0.pt", "hf_model_0002_0.pt", "recipe_state.pt"],
    "a checkpoint of TensorFlow": ["model.ckpt.data-00000-of-00001", "model.ckpt.index", "checkpoint"],
    "a SavedModel of TensorFlow": ["saved_model.pb", "variables/"],
    "a checkpoint of Orbax (JAX)": ["_CHECKPOINT_METADATA", "default/"],
    "weights of Flax": ["config.json", "flax_model.msgpack"],
    "a torch file that was unpacked": ["data.pkl", "data/", "version", "byteorder"],
    "a model of Keras that was unpacked": ["metadata.json", "config.json", "model.weights.h5"],
}  # fmt: skip


def test_every_row_has_an_example():
    assert [row.what for row in FILES] == list(HEADS) and [row.what for row in FOLDERS] == list(NAMES)


def said_by_both(path: Path, capsys) -> str:
    """What inspection and conversion say of a path: the same sentence, and nothing is made."""
    said = []
    for run, words in (
        (inspect_model.main, [path]),
        (convert_checkpoints.main, [path, path.parent / "x", "--to", "pt"]),
    ):
        with pytest.raises(CheckpointError) as caught:
            run([str(word) for word in words])
        said.append(str(caught.value))
    assert said[0] == said[1] and "\n" not in said[0] and said[0].endswith(".")
    assert not (path.parent / "x").exists() and capsys.readouterr().out == ""
    return said[0]


@pytest.mark.parametrize("ending", [".pt", ".safetensors", ""])
@pytest.mark.parametrize("what", HEADS)
def test_a_file_is_called_by_its_name_under_any_ending_with_a_command(tmp_path, what, ending, capsys):
    path = tmp_path / f"my model{ending}"
    path.write_bytes(HEADS[what])
    said = said_by_both(path, capsys)
    row = file_kind(HEADS[what])
    assert said.startswith(f"{path}: {what}, not a ") and said.endswith(f" {row.said(path)}")
    words = {word for word in ("path", "folder", "name", "stem", "text") if f"{{{word}}}" in row.command}
    shown = {
        "path": shlex.quote(str(path)),
        "folder": str(tmp_path),
        "name": shlex.quote(path.name),
        "text": repr(str(path)),
    }
    assert all(shown[word] in said for word in words - {"stem"})


@pytest.mark.parametrize("what", NAMES)
def test_a_folder_is_called_by_its_name_with_a_command(tmp_path, what, capsys):
    folder = tmp_path / "the step"
    for name in NAMES[what]:
        place = folder / name
        (place if name.endswith("/") else place.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            place.write_bytes(b"\x03\x00\x07" * 50)
    row = folder_kind(name.rstrip("/") for name in NAMES[what])
    assert said_by_both(folder, capsys) == f"{folder}: {what}. {row.said(folder)}"
    assert str(folder) in row.said(folder) or str(tmp_path) in row.said(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_clone_without_lfs_is_told_from_a_model(tmp_path, name, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(HEADS["a Git LFS pointer, not the file itself"])
    said = said_by_both(tmp_path, capsys)
    assert said.startswith(f"{tmp_path / name}: a Git LFS pointer, not the file itself")
    assert f"git -C {tmp_path} lfs pull --include {name}" in said


@pytest.mark.parametrize("ending", [".pt", ".bin", ".safetensors", ".ckpt"])
def test_an_answer_of_a_server_is_no_checkpoint(tmp_path, ending, capsys):
    path = tmp_path / f"model{ending}"
    path.write_text(json.dumps({"error": "Repository not found"}))
    said = said_by_both(path, capsys)
    assert said.startswith(f'{path}: a JSON text, not a checkpoint, that begins with "{{\\"error\\": \\"Repository')
    assert "Download it again" in said


@pytest.mark.parametrize("size", [8, 100, 4096])
@pytest.mark.parametrize("ending", [".pt", ".safetensors", ".bin"])
def test_zeros_were_never_written(tmp_path, ending, size, capsys):
    path = tmp_path / f"model{ending}"
    path.write_bytes(bytes(size))
    said = said_by_both(path, capsys)
    assert said.startswith(f"{path}: ") and "These zeros were never written" in said and "download it again." in said


def test_numbers_without_a_header_are_told_as_such(tmp_path, capsys):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(np.linspace(-1, 1, 3000, dtype="<f4").tobytes())
    said = said_by_both(path, capsys)
    assert said.startswith(f"{path}: not a torch zip file: it begins with b'\\x00\\x00\\x80\\xbf")
    assert "give the folder that they are from to its own program." in said


@pytest.mark.parametrize(
    ("name", "other", "command"),
    [
        ("consolidated.00.pth", "consolidated.01.pth", "transformers.models.llama.convert_llama_weights_to_hf"),
        ("hf_model_0001_0.pt", "hf_model_0002_0.pt", "glob.glob('*_model_*.pt')"),
        ("layer_00-model_00-model_states.pt", "layer_02-model_00-model_states.pt", "convert_neox_to_hf.py"),
    ],
)
def test_a_part_by_itself_names_the_command_that_joins_them(tmp_path, name, other, command):
    for file in (name, other):
        torch.save({"layers.0.w.weight": torch.ones(4, 4)}, tmp_path / file)
    with pytest.raises(CheckpointError) as caught:
        converted(tmp_path / name, tmp_path / "out.pt", "pt")
    assert str(caught.value).startswith(f"{tmp_path / name}: ") and command in str(caught.value)
    (tmp_path / other).unlink()
    converted(tmp_path / name, tmp_path / "out.pt", "pt")


@pytest.mark.parametrize("base", ["gpt2", "meta-llama/Llama-3.1-8B", None])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_shown_and_not_converted_and_its_base_is_named(tmp_path, file, base, capsys):
    folder = tmp_path / "lora"
    folder.mkdir()
    names = [f"base_model.model.transformer.h.0.attn.c_attn.lora_{x}.weight" for x in "AB"]
    tensors = {name: torch.zeros(4, 4) for name in names}
    save_file(tensors, folder / file) if file.endswith("safetensors") else torch.save(tensors, folder / file)
    if base is not None:
        config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 4}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        converted(folder, tmp_path / "out.pt", "pt")
    said = str(caught.value)
    assert said.startswith(
        f"{folder}: 2 of 2 tensors are those of LoRA, such as {names[0]}: an adapter of {base or 'BASE'},"
    )
    assert f"from_pretrained({base or 'BASE'!r}), {str(folder)!r}).merge_and_unload().save_pretrained('OUT')" in said
    assert inspect_model.main([str(folder)]) == 0
    shown = capsys.readouterr().out
    assert f"contradiction: only a part of a model: {said.removeprefix(f'{folder}: ')}" in shown and names[1] in shown


def test_a_model_with_a_few_tensors_of_an_adapter_is_a_model(tmp_path):
    tensors = {f"layers.{i}.weight": torch.ones(4, 4) for i in range(6)} | {"layers.0.lora_A.weight": torch.ones(2, 4)}
    save_file(tensors, tmp_path / "m.safetensors")
    converted(tmp_path / "m.safetensors", tmp_path / "out.pt", "pt")


def test_an_unpacked_file_opens_when_it_is_packed_as_the_sentence_says(tmp_path):
    torch.save({"a": torch.arange(3.0)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole:
        whole.extractall(tmp_path / "unpacked")
    folder = tmp_path / "unpacked/whole"
    with pytest.raises(
        CheckpointError, match=r"a torch file that was unpacked\. \(cd .* && zip -0 -r whole.pt whole\)"
    ):
        open_container(folder)
    with zipfile.ZipFile(tmp_path / "again.pt", "w") as made:  # as zip -0 -r does
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                made.write(path, path.relative_to(folder.parent))
    assert list(open_container(tmp_path / "again.pt").tensors) == ["a"]
