"""inspect_model.py as people run it: a command line, its text and its JSON."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch

import inspect_model
from core.config.gpt import GPTConfig
from core.console.words import size_text
from core.inspection.report_text import age
from core.inspection.tensor_table import grouped
from core.model import GPT
from tests.makers.doors import Shell
from tests.makers.megatron_exports import LLAMA, export_of, exported
from tests.makers.models import flip, started, train_and_save

ROOT = Path(__file__).resolve().parents[2]


def inspect(capsys, *argv: object) -> str:
    assert inspect_model.main([str(word) for word in argv]) == 0
    return capsys.readouterr().out


def run(*argv: object, **settings) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "inspect_model.py"), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, **{"cwd": ROOT, **settings})


def seed_bundle(folder: Path, tokenizer: dict | None = None, **changes) -> GPT:
    """A bundle as the first version of the format had it, written by plain torch and json."""
    torch.manual_seed(0)
    config = {"batch_size": 32, "block_size": 16, "vocab_size": 50304, "n_embd": 24, "n_head": 6, "n_layer": 6}
    config |= {"dropout": 0.2, "bias": False, "device": "cuda"}
    model = GPT(GPTConfig.from_dict(config))
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / "model.pt")
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer or {"token_kind": "gpt2"}))
    (folder / "training_state.json").write_text(json.dumps({"step": 1000, "optimizer_file": "optimizer.pt"}))
    return model


def test_begins_with_the_four_sections_of_the_first_version_line_for_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seed_bundle(Path("checkpoints/dante"))
    expected = """\
=== FORMAT ===
New JSON-based format
Location: checkpoints/dante

=== CONFIG ===
batch_size:32, block_size:16, vocab_size:50304, n_embd:24, n_head:6, n_layer:6, dropout:0.2, bias:False, device:cuda

=== TOKENIZER ===
kind      : gpt2
vocab     : GPT-2 BPE (fixed ~50k tokens)

=== TRAINING STATE ===
Last recorded training step: 1000

=== PARAMETERS ===
"""
    assert inspect(capsys, "--model_name", "dante").startswith(expected)


def test_characters_are_counted_and_shown_on_one_line(tmp_path, capsys):
    chars = ["\n", "\x1b", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUé"]
    seed_bundle(tmp_path / "m", {"token_kind": "char", "chars": chars})
    out = inspect(capsys, tmp_path / "m")
    assert "kind      : char\nvocab     : 50 characters: \\n\\x1babcdefghijklmnopqrstuvwxyzABCDEFGHIJKL...\n" in out


def test_parameters_and_tensors_are_those_of_the_model(tmp_path, capsys):
    model = seed_bundle(tmp_path / "m")
    count = sum(p.numel() for p in model.parameters())
    tables = model.token_embedding_table.weight.numel() + model.position_embedding_table.weight.numel()
    facts = json.loads(inspect(capsys, tmp_path / "m", "--json"))
    assert facts["parameters"] == {"total": count, "without_embeddings": count - tables}
    assert [(t["name"], tuple(t["shape"])) for t in facts["tensors"]] == [
        (n, tuple(t.shape)) for n, t in model.state_dict().items()
    ]
    assert facts["contradictions"] == []
    out = inspect(capsys, tmp_path / "m")
    assert f"total              : {count:,}\nwithout embeddings : {count - tables:,}\n" in out
    assert re.search(r"^blocks\.\{0\.\.5\}\.sa\.qkv\.weight +6 x \(72, 24\) +float32$", out, re.MULTILINE)
    assert re.search(r"^blocks\.\{0\.\.5\}\.fwd\.net\.0\.weight +6 x \(96, 24\) +float32$", out, re.MULTILINE)
    assert re.search(r"^lm_head\.bias +\(50304,\) +float32$", out, re.MULTILINE)


def test_history_lists_steps_with_loss_size_and_age(tmp_path, capsys):
    made, model, optimizer = started(tmp_path, keep=2)
    with made.writing():
        train_and_save(made, model, optimizer, 3, val_loss=lambda step: 4.0 - step)
    facts = json.loads(inspect(capsys, "--checkpoint_root", tmp_path, "--json"))
    assert facts["training_state"]["step"] == 3
    assert [(kept["step"], kept["val_loss"]) for kept in facts["history"]] == [(1, 3.0), (2, 2.0)]
    for kept in facts["history"]:
        assert kept["bytes"] == sum(p.stat().st_size for p in Path(kept["path"]).iterdir())
    out = inspect(capsys, "--checkpoint_root", tmp_path)
    assert re.search(r"^step 2  val_loss 2\.0000  [\d.]+ KB  \d+ seconds old$", out, re.MULTILINE)

    by_step = json.loads(inspect(capsys, "--checkpoint_root", tmp_path, "--step", 2, "--json"))
    by_path = json.loads(inspect(capsys, facts["history"][1]["path"], "--json"))
    assert by_step["training_state"] == by_path["training_state"]
    assert by_step["training_state"]["step"] == 2


@pytest.mark.parametrize(
    ("passed", "text"),
    [
        ({"seconds": 30}, "30 seconds"),
        ({"minutes": 5}, "5 minutes"),
        ({"hours": 3}, "3 hours"),
        ({"days": 9}, "9 days"),
    ],
)
def test_age_is_told_in_its_own_unit(passed, text):
    assert age((datetime.now().astimezone() - timedelta(**passed)).isoformat()) == f"{text} old"
    assert age(None) == age("yesterday") == "age unknown"


def test_several_models_are_listed_with_step_loss_and_size(tmp_path, capsys):
    seed_bundle(tmp_path / "boccaccio")
    seed_bundle(tmp_path / "dante")
    (tmp_path / "dante" / "training_state.json").write_text('{"step": 7, "val_loss": 1.5}')
    (tmp_path / "old").mkdir()
    torch.save({"model_state_dict": {}, "config": {}, "step": 4}, tmp_path / "old" / "latest.pt")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    out = inspect(capsys, "--checkpoint_root", tmp_path)
    assert out.startswith(f"{tmp_path} holds 4 models; choose one with --model_name:\n")
    assert re.search(r"^boccaccio +step 1000 +val_loss unknown +[\d.]+ MB +age unknown$", out, re.MULTILINE)
    assert re.search(r"^dante +step 7 +val_loss 1\.5000 +[\d.]+ MB +age unknown$", out, re.MULTILINE)
    assert re.search(r"^old +step 4 +latest\.pt +[\d.]+ KB$", out, re.MULTILINE)
    assert re.search(r"^torn +.*config\.json", out, re.MULTILINE)
    facts = json.loads(inspect(capsys, "--checkpoint_root", tmp_path, "--json"))
    assert [model["name"] for model in facts["models"]] == ["boccaccio", "dante", "old", "torn"]


def test_a_list_of_models_has_all_kept_steps_the_size_in_total_and_the_age(tmp_path, capsys):
    for name, count in (("dante", 3), ("many", 9), ("one", 1)):
        made, model, optimizer = started(tmp_path, name, keep=9)
        with made.writing():
            train_and_save(made, model, optimizer, count, val_loss=lambda step: 4.0 - step / 4)
            if name == "dante":
                made.go_back(2)
    files = {name: [p for p in (tmp_path / name).rglob("*") if p.is_file()] for name in ("dante", "many")}
    sizes = {name: sum(p.stat().st_size for p in found) for name, found in files.items()}
    rows = [re.split("  +", line) for line in inspect(capsys, tmp_path).splitlines()[1:]]
    ages = [row.pop(4) for row in rows]
    older = "older: 8, 7, 6, 5, 4, 3 and 2 more"
    assert rows[1] == ["many", "step 9", "val_loss 1.7500", size_text(sizes["many"]), older]
    assert rows[0][:3] == ["dante", "step 2", "val_loss 3.5000"] and rows[0][4:] == ["older: 1"] and len(rows[2]) == 4
    assert all(re.fullmatch(r"\d+ seconds old", one) for one in ages)
    facts = json.loads(inspect(capsys, tmp_path, "--json"))["models"]
    assert [one["kept"] for one in facts] == [[1], [1, 2, 3, 4, 5, 6, 7, 8], []]
    assert facts[1]["total_bytes"] == sizes["many"] > 8 * facts[1]["bytes"] > 0
    assert facts[0]["bytes"] * 3 < facts[0]["total_bytes"] <= sizes["dante"]  # links count once


def test_single_file_shows_its_content_and_tensors(tmp_path, capsys):
    content = {
        "model": {"h.0.w": torch.ones(2, 3), "h.1.w": torch.ones(2, 3)},
        "iter_num": 40,
        "hook": Shell(tmp_path / "executed"),
    }
    torch.save(content | {"loss": float("nan"), 5: torch.float16}, tmp_path / "ckpt.pt")
    out = inspect(capsys, tmp_path / "ckpt.pt")
    assert out.startswith(f"=== FORMAT ===\nPyTorch zip file\nLocation: {tmp_path / 'ckpt.pt'}\n")
    assert re.search(r"^iter_num +: +40$", out, re.MULTILINE)
    assert re.search(r"^model +: +2 tensors, 48 bytes$", out, re.MULTILINE)
    assert re.search(r'^hook +: +posix\.system\("touch ', out, re.MULTILINE)
    assert re.search(r"^model\.h\.\{0\.\.1\}\.w +2 x \(2, 3\) +float32$", out, re.MULTILINE)
    facts = json.loads(inspect(capsys, tmp_path / "ckpt.pt", "--json"))
    assert facts["content"]["model"]["h.0.w"] == "tensor float32 (2, 3)"
    assert (facts["content"]["loss"], facts["content"]["5"]) == ("nan", "torch.float16")
    assert not (tmp_path / "executed").exists()


def test_names_that_move_the_cursor_are_escaped(tmp_path, capsys):
    torch.save({"\x1b[2Jw\n": torch.ones(1), "\x1b[3J": "\x1b[4J"}, tmp_path / "x.pt")
    out = inspect(capsys, tmp_path / "x.pt")
    assert "\x1b" not in out
    assert "\\x1b[2Jw\\n" in out


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["h.0.w", "h.1.w", "h.2.w"], [("h.{0..2}.w", "3 x (4,)")]),
        (["h.0.w", "h.2.w"], [("h.{0,2}.w", "2 x (4,)")]),
        ([f"{i}.w" for i in range(0, 20, 2)], [("{0,2,4,...,18}.w", "10 x (4,)")]),
        ([f"h.{i}.k.{j}" for i in range(2) for j in range(3)], [("h.{0..1}.k.{0..2}", "6 x (4,)")]),
        (["h.0.k.0", "h.1.k.0", "h.1.k.1"], [("h.{0..1}.k.0", "2 x (4,)"), ("h.1.k.1", "(4,)")]),
        (["c_fc1.w", "c_fc2.w"], [("c_fc1.w", "(4,)"), ("c_fc2.w", "(4,)")]),
        (["w", "v"], [("w", "(4,)"), ("v", "(4,)")]),
    ],
)
def test_tensors_are_grouped_by_the_numbers_in_their_names(names, expected):
    rows = grouped([{"name": n, "shape": [4], "dtype": "bool"} for n in names])
    assert rows == [(name, count, "bool") for name, count in expected]


def test_a_flipped_weight_does_not_disturb_looking(tmp_path, capsys):
    seed_bundle(tmp_path / "m")
    before = inspect(capsys, tmp_path / "m")
    flip(tmp_path / "m" / "model.pt", 20000)
    assert inspect(capsys, tmp_path / "m") == before


def test_mistakes_are_one_sentence_and_the_right_exit_code(tmp_path):
    seed_bundle(tmp_path / "models" / "m")
    shutil.copy(tmp_path / "models" / "m" / "config.json", tmp_path / "x.pt")
    for argv, code, message in [
        (["--checkpoint_root", tmp_path / "none"], 1, "python train.py --model_name"),
        ([tmp_path / "nothing"], 1, "nothing here. Give a model folder"),
        ([tmp_path / "x.pt"], 1, "a JSON text, not a checkpoint"),
        ([tmp_path / "models" / "m", "--step", "7"], 1, "this step is not kept"),
        ([tmp_path / "models" / "m" / "model.pt", "--step", "7"], 1, "a single file has no steps"),
        ([tmp_path, "--model_name", "m"], 2, "two checkpoints"),
        (["--jsom"], 2, "did you mean --json?"),
    ]:
        done = run(*argv)
        assert done.returncode == code, argv
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""


def test_text_that_the_terminal_cannot_show_is_escaped(tmp_path):
    seed_bundle(tmp_path / "m", {"token_kind": "char", "chars": ["é", "世"]})
    done = run(tmp_path / "m", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert "vocab     : 2 characters: \\xe9\\u4e16" in done.stdout


@pytest.mark.parametrize(
    ("values", "noted"),
    [
        ([None, io.BytesIO(b"amax")], "2 _extra_state entries are left out, such as a._extra_state: "),
        ([None], "1 _extra_state entry is left out, such as a._extra_state: "),
        ([], None),
    ],
)
def test_extra_states_that_are_no_tensors_are_counted(shared, tmp_path, capsys, values, noted):
    state, config = exported(export_of(shared / "fixtures", LLAMA))
    states = {f"{name}._extra_state": value for name, value in zip("ab", values, strict=False)}
    torch.save({"model_state_dict": {**state, **states}, "model_config": config}, tmp_path / "x.pt")
    said = [line for line in inspect(capsys, tmp_path / "x.pt").splitlines() if "_extra_state entr" in line]
    assert said == ([f"note: {noted}what Transformer Engine keeps for FP8"] if noted else [])
