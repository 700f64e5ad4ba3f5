"""Bad files, through every door where a user meets them: one sentence with the path and what to do."""

from __future__ import annotations

import io
import os
import random
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from core.checkpoint import CheckpointManager
from core.data.tokenizer import tokenizer_from_state
from core.errors import CheckpointDamaged, CheckpointError, CheckpointNotFound
from core.model import GPT
from tests.makers.doors import (
    OF_A_FILE,
    OF_A_FOLDER,
    Old,
    Shell,
    digests,
    edit,
    errors,
    generate,
    hide,
    legacy,
    load,
    looked_at,
    refused,
    run,
    single,
    tensor_at,
    train,
)
from tests.makers.generations import CHARS, TOKENIZER, write_old_bundle, write_single_file
from tests.makers.models import flip, save_durably, state_of

# Files that are no torch files


def zip_without_content() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("photos/cat.jpg", b"meow")
    return buffer.getvalue()


NO_TORCH_FILES = {
    "empty": (b"", "empty (0 bytes), expected a torch file"),
    "text": (b"hello world\n", 'not a torch zip file: a text file that begins with "hello world'),
    "random": (b"\xa4" + random.Random(0).randbytes(5000), "not a torch zip file: it begins with b'\\xa4"),
    "zip without data.pkl": (
        zip_without_content(),
        'a zip without data.pkl, so not one that torch.save wrote; it holds ["cat.jpg"]',
    ),
    "web page": (b"<!DOCTYPE html><html>", "Download the file again"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "Fetch the file with git lfs pull"),
}


@pytest.mark.parametrize("kind", NO_TORCH_FILES)
def test_file_that_is_no_torch_file_says_what_it_is_alone_and_in_a_bundle(old, folder, kind):
    data, said = NO_TORCH_FILES[kind]
    folder.mkdir()
    (folder / "latest.pt").write_bytes(data)
    for door in OF_A_FILE:
        refused(door, folder, str(folder / "latest.pt"), said)
    (folder / "latest.pt").unlink()
    write_old_bundle(folder, old.fused, old.moments, step=3)
    (folder / "model.pt").write_bytes(data)
    for door in OF_A_FOLDER:
        refused(door, folder, str(folder / "model.pt"), said)
    out, err = looked_at(folder, 1)
    assert "Last recorded training step: 3" in out
    assert err.startswith(f"error: {folder / 'model.pt'}: ") and said in err


@pytest.mark.parametrize("stream", [False, True], ids=["zip", "stream"])
@pytest.mark.parametrize("share", [0.0001, 0.02, 0.5, 0.9, 1.0])
def test_truncated_single_file_names_its_size(old, folder, share, stream):
    path = write_single_file(folder / "latest.pt", old.fused, old.moments, step=3, stream=stream)
    size = min(int(share * path.stat().st_size), path.stat().st_size - 1)
    os.truncate(path, size)
    for door in OF_A_FILE:
        refused(door, folder, str(path), f"cut off after {size} bytes")
    with pytest.raises(CheckpointError, match=f"cut off after {size} bytes"):
        looked_at(path)


@pytest.mark.parametrize("name", ["model.pt", "optimizer.pt"])
@pytest.mark.parametrize("size", [3, 1000, 20_000])
def test_truncated_file_of_a_bundle_is_named_and_nothing_starts_anew(old, folder, name, size):
    write_old_bundle(folder, old.fused, old.moments, step=3)
    os.truncate(folder / name, size)
    said = f"{folder / name}: cut off after {size} bytes"
    stays = "No intact older step is kept"
    assert f"{stays} in {folder}, and nothing was changed" in refused(train, folder, said, kind=CheckpointDamaged)
    refused(load, folder, said, kind=CheckpointDamaged)
    assert looked_at(folder, 1)[1].startswith(f"error: {said}")
    if name == "model.pt":
        refused(generate, folder, said, stays, kind=CheckpointDamaged)
    else:
        assert generate(folder) == 3, "the optimizer state is no part of what computes"


# JSON


NO_JSON = {
    "empty": (b"", "0 bytes that are not valid JSON (Expecting value: line 1 column 1 (char 0))"),
    "cut": (
        b'{"n_layer": 2, "n_',
        "18 bytes that are not valid JSON (Unterminated string starting at: line 1 column 16",
    ),
    "list": (b"[1, 2]", "found a JSON list, expected an object"),
    "number": (b"3", "found a JSON int, expected an object"),
    "duplicate key": (b'{"step": 3, "step": 4}', "(the key 'step' occurs 2 times)"),
    "latin-1": (b'{"name": "\xe9"}', "not valid JSON ('utf-8' codec can't decode byte 0xe9 in position 10"),
    "byte order mark": (b"\xef\xbb\xbf{}", "not valid JSON (Unexpected UTF-8 BOM"),
    "too deep": (b"[" * 100_000, "100000 bytes that are not valid JSON"),
}


@pytest.mark.parametrize("kind", NO_JSON)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "training_state.json"])
def test_json_that_cannot_be_read_is_named_with_the_place(old, folder, name, kind):
    data, said = NO_JSON[kind]
    write_old_bundle(folder, old.fused, old.moments, step=3)
    (folder / name).write_bytes(data)
    remedies = {
        train: "Correct it, or copy that of a kept step." if name == "config.json" else "nothing was changed",
        generate: "Correct it, or copy" if name == "config.json" else "No intact older step is kept",
        load: "Correct it, or copy" if name == "config.json" else said,
    }
    for door, remedy in remedies.items():
        refused(door, folder, f"{folder / name}: ", said, remedy)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        looked_at(folder)


FIELDS = [
    *(("training_state.json", {"step": value}, f"step is {value!r}, expected") for value in ("3", 3.5, None, [3])),
    *(
        (name, {"format_version": 99}, "format_version 99, this program reads up to 3. Update the program.")
        for name in ("config.json", "training_state.json")
    ),
]


@pytest.mark.parametrize(("name", "change", "said"), FIELDS, ids=str)
def test_field_of_a_bundle_that_cannot_be_is_shown_with_its_file(old, folder, name, change, said):
    write_old_bundle(folder, old.fused, old.moments, step=3)
    edit(folder / name, **change)
    for door in OF_A_FOLDER:
        refused(door, folder, f"{folder / name}: {said}")


# Entries of a single file

ENTRIES = {
    "config None": (
        {"config": None},
        "its config is None, expected fields by name (a dict, or an object with attributes)",
    ),
    "config number": ({"config": 3}, "its config is 3, expected fields by name"),
    "config list": ({"config": [1]}, "its config is [1], expected fields by name"),
    "config with a number as a field": ({"config": {1: 2}}, "its config has a field 1, expected names"),
    "step text": ({"step": "3"}, 'its step is "3", expected a whole number of at least 0'),
    "step negative": ({"step": -1}, "its step is -1, expected a whole number of at least 0"),
    "step bool": ({"step": True}, "its step is True, expected a whole number of at least 0"),
    "step float": ({"step": 3.0}, "its step is 3.0, expected a whole number of at least 0"),
    "step tensors": (
        {"step": torch.tensor([3, 4])},
        "its step is tensor int64 (2,), expected a whole number of at least 0",
    ),
    "step None": ({"step": None}, "its step is None, expected a whole number of at least 0"),
    "tokenizer list": ({"tokenizer": [1]}, "its tokenizer is [1], expected a dict"),
    "optimizer list": ({"optimizer_state_dict": []}, "its optimizer_state_dict is [], expected a dict"),
    "optimizer number": ({"optimizer_state_dict": 3}, "its optimizer_state_dict is 3, expected a dict"),
    "optimizer text": ({"optimizer_state_dict": "x"}, 'its optimizer_state_dict is "x", expected a dict'),
    "weights None": ({"model_state_dict": None}, "its model_state_dict is None, expected a dict"),
    "weights list": ({"model_state_dict": [1]}, "its model_state_dict is [1], expected a dict"),
    **{
        f"{entry} call": ({entry: Shell("/executed")}, f"its {entry} is posix.system(")
        for entry in ("config", "step", "tokenizer", "model_state_dict", "optimizer_state_dict")
    },
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_entry_of_a_single_file_that_is_no_value_of_its_kind_is_shown(old, folder, kind):
    change, said = ENTRIES[kind]
    single(folder, old.fused, None, **change)
    for door in OF_A_FILE:
        refused(door, folder, f"{folder / 'latest.pt'}: {said}")
    assert "=== FORMAT ===" in looked_at(folder / "latest.pt")[0], "what cannot be loaded is still shown"


def test_step_that_is_a_numpy_integer_is_a_step(old, folder):
    import numpy

    single(folder, old.fused, None, step=numpy.int64(7))
    assert [door(folder) for door in OF_A_FILE] == [7, 7, 7, 7]


@pytest.mark.parametrize("content", ["state dict", "tensor", "list", "empty"])
def test_file_that_is_no_checkpoint_says_what_was_found_and_expected(old, folder, content):
    values = {"state dict": old.fused.state_dict(), "tensor": torch.ones(3), "list": [1, 2], "empty": {}}
    found = {
        "state dict": "the entries token_embedding_table.weight, ",
        "tensor": "tensor float32 (3,)",
        "list": "[1, 2]",
        "empty": "an empty dict",
    }
    folder.mkdir()
    torch.save(values[content], folder / "latest.pt")
    for door in OF_A_FILE:
        refused(
            door,
            folder,
            f"{folder / 'latest.pt'}: found {found[content]}",
            "expected the entries model_state_dict and config of a single-file checkpoint.",
            "inspect_model.py shows",
        )


@pytest.mark.parametrize("door", [generate, load])
def test_folder_without_a_checkpoint_says_what_was_looked_for_and_what_is_there(folder, door):
    folder.mkdir()
    (folder / "notes.txt").write_text("x")
    (folder / "log.csv").write_text("x")
    looked = "no checkpoint here. Looked for config.json + model.pt (bundle), latest.pt or final.pt (single file)"
    said = f"{folder}: {looked}; found log.csv, notes.txt."
    assert refused(door, folder, kind=CheckpointNotFound) == said
    looked = looked.removesuffix(" (single file)")
    with pytest.raises(
        CheckpointNotFound, match=rf"{re.escape(f'{folder}: {looked}')}.*; found log\.csv, notes\.txt\."
    ):
        looked_at(folder)


def test_single_file_that_is_a_folder_or_is_not_there_says_so(folder):
    (folder / "latest.pt").mkdir(parents=True)
    refused(legacy, folder, f"{folder / 'latest.pt'}: cannot be opened (Is a directory).", kind=CheckpointNotFound)
    (folder / "latest.pt").rmdir()
    said = f"{folder / 'latest.pt'}: cannot be opened (No such file or directory). Expected a single-file checkpoint."
    assert refused(legacy, folder, kind=CheckpointNotFound) == said
    (folder / "latest.pt").symlink_to("nowhere.pt")
    assert refused(legacy, folder, kind=CheckpointNotFound) == said


# Nothing runs


@pytest.mark.parametrize("hidden", [False, True], ids=["entry", "popped"])
@pytest.mark.parametrize("name", ["latest.pt", "model.pt", "optimizer.pt"])
def test_call_in_a_file_is_text_and_nothing_runs(old, tmp_path, folder, name, hidden):
    marker = tmp_path / "executed"
    extra = {} if hidden else {"hook": Shell(marker)}
    if name == "latest.pt":
        single(folder, old.fused, old.moments, **extra)
    else:
        write_old_bundle(folder, old.fused, old.moments, step=3)
        content = {"model.pt": old.fused.state_dict(), "optimizer.pt": old.moments.state_dict()}[name]
        torch.save({**content, **extra}, folder / name)
    if hidden:
        hide(folder / name, marker)
    call = f'posix.system("touch {marker}")'
    remedy = "Nothing was executed, and nothing is loaded; inspect_model.py shows its tensors and plain values."
    for door in OF_A_FILE if name == "latest.pt" else OF_A_FOLDER:
        assert refused(door, folder) == f"{folder / name}: its pickle names {call}. {remedy}"
    out, err = looked_at(folder / name)
    assert f"WARNING: {folder / name}: its pickle names {call}; nothing was executed\n" in err
    assert "=== TENSORS ===" in out
    if name != "optimizer.pt":
        assert f"its pickle names {call}; nothing was executed\n" in looked_at(folder)[1]
    assert not marker.exists()


# Damage


PROJ = "blocks.1.sa.proj.weight"


def damaged(folder: Path, old: Old, **settings: Any) -> Path:
    path = write_single_file(folder / "latest.pt", old.fused, old.moments, step=3, **settings)
    flip(path, tensor_at(path, f"model_state_dict.{PROJ}") + 5)
    return path


def test_flipped_bit_names_the_tensor_and_both_checksums_and_nothing_starts_anew(old, folder):
    path = damaged(folder, old)
    where = re.escape(f"{path}: model_state_dict.{PROJ}")
    said = rf"{where} is damaged \(CRC32 (\w{{8}}), recorded (\w{{8}})\)\."
    for door in OF_A_FILE:
        found, recorded = re.match(said, refused(door, folder, kind=CheckpointDamaged)).groups()
        assert found != recorded


def test_training_saves_on_beside_a_damaged_file_and_keeps_it(old, folder):
    write_single_file(folder / "final.pt", old.fused, None, step=2)
    path = damaged(folder, old)
    before = digests(folder)
    with CheckpointManager("dante", folder.parent, say=lambda line: None) as made:
        model, optimizer, step = made.initialize_for_training({}, tokenizer_from_state(TOKENIZER), None, 1e-3)
        save_durably(made, model, optimizer, step=step + 1)
    assert state_of(folder)["step"] == 3
    assert {file: digest for file, digest in digests(folder).items() if file in before} == before
    assert path.exists() and generate(folder) == 3


def test_cut_file_beside_a_whole_one_is_passed_over_with_a_warning(old, folder, capsys):
    path = write_single_file(folder / "latest.pt", old.fused, old.moments, step=3)
    write_single_file(folder / "final.pt", old.fused, None, step=2)
    os.truncate(path, 5000)
    lines: list[str] = []
    assert train(folder, lines) == 2 and generate(folder) == 2 and load(folder) == 2
    warning = f"WARNING: {path}: cut off after 5000 bytes: the directory that ends every zip is missing."
    assert lines[0] == warning and capsys.readouterr().err.count(warning) == 2


def test_old_stream_format_has_no_checksums_and_opens(old, folder):
    damaged(folder, old, stream=True)
    assert [door(folder) for door in OF_A_FILE] == [3, 3, 3, 3]
    changed = GPT.load_legacy(folder / "latest.pt")[0].state_dict()
    wrong = [name for name, tensor in old.fused.state_dict().items() if not torch.equal(changed[name], tensor)]
    assert wrong == [PROJ]


# The real command lines


def test_scripts_end_in_one_line_and_no_traceback(old, tmp_path):
    root, text = tmp_path / "checkpoints", tmp_path / "text.txt"
    text.write_text("".join(CHARS) * 40)
    (root / "empty").mkdir(parents=True)
    (root / "empty" / "latest.pt").write_bytes(b"")
    write_old_bundle(root / "misfit", old.fused, old.moments, step=3)
    edit(root / "misfit" / "config.json", block_size=99, n_layer=7)
    write_old_bundle(root / "slip", old.fused, old.moments, step=3)
    (root / "slip" / "config.json").write_text("{")
    damaged(root / "flipped", old)
    single(root / "evil", old.fused, old.moments, hook=Shell(tmp_path / "executed"))
    before = digests(root)
    flags = ("--checkpoint_root", root, "--model_name")
    both = "block_size is 99, but position_embedding_table.weight has 12 rows. Set block_size to 12; n_layer is 7"
    training, writing = ("train.py", "--input_file", text), ("generate.py", "--prompt", "a")
    for name, said, (script, *more) in (
        ("empty", "latest.pt: empty (0 bytes), expected a torch file.", writing),
        ("misfit", both, training),
        ("slip", "config.json: 1 bytes that are not valid JSON", training),
        ("flipped", f"latest.pt: model_state_dict.{PROJ} is damaged (CRC32 ", writing),
        ("evil", "latest.pt: its pickle names posix.system(", training),
    ):
        found = errors(run(script, *flags, name, *more))
        assert found.startswith(f"error: {root / name}") and said in found
    assert errors(run("inspect_model.py", *flags, "empty")).startswith(f"error: {root / 'empty' / 'latest.pt'}: empty")
    seen = run("inspect_model.py", *flags, "evil")
    assert seen.returncode == 0 and "WARNING: " in seen.stderr and "=== TENSORS ===" in seen.stdout
    found = errors(run("generate.py", "--legacy_checkpoint", root / "nowhere.pt", "--checkpoint_root", root))
    assert f"{root / 'nowhere.pt'}: no such file" in found
    assert "argument --top_k: " in errors(run("generate.py", *flags, "misfit", "--top_k", "x"), 2)
    assert digests(root) == before and not (tmp_path / "executed").exists()
