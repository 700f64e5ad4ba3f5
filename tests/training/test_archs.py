"""train.py --arch llama and qwen3: the model that a new run gets, what it learns, and how it resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import train
from core.config.decoders import DECODERS, arch_of_config, complete
from core.config.gpt import GPTConfig
from core.errors import CheckpointMismatch
from core.kinds import KINDS
from core.model import GPT
from core.training import report
from tests.conftest import ROOT
from tests.makers.limits import wait_until
from tests.makers.models import TEXT
from tests.makers.runs import bits, losses, same

SMALL = {"n_layer": 1, "n_embd": 32, "n_head": 4, "block_size": 16, "batch_size": 4, "eval_iters": 1, "device": "cpu"}
HEAD = {"tied_head": True, "head_bias": False}
LLAMA = {"pos_encoding": "rotary", "norm_type": "rmsnorm", "mlp_type": "swiglu", "mlp_bias": False, **HEAD}
LLAMA |= {"bias": False, "norm_bias": False, "proj_bias": None, "n_ffn": 384, "n_kv_head": 2}
QWEN3 = {**LLAMA, "norm_eps": 1e-6, "rope_theta": 1e6, "qk_norm": "head", "head_size": 64}
PRESET = {"batch_size": 16, "block_size": 64, "n_embd": 128, "n_head": 4, "n_layer": 4, "dropout": 0.0}


def words(root, name, end, **flags):
    """A command line that trains one model below a root to a step."""
    given = {"model_name": name, "checkpoint_root": root, "max_iters": end, **flags}
    return [f"--{flag}={value}" for flag, value in given.items()]


def run(root, name, end, **flags):
    """Train one model below a root to a step, in this process; return its config.json."""
    assert train.main(words(root, name, end, **flags)) == 0
    return json.loads((root / name / "config.json").read_text())


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 40)
    return path


@pytest.fixture(autouse=True)
def no_sample(monkeypatch):
    """The text that a run ends with takes longer than these runs."""
    monkeypatch.setattr(report, "say_result", lambda *_: None)


@pytest.mark.parametrize(("arch", "expected"), [("llama", LLAMA), ("qwen3", QWEN3)])
def test_a_new_model_has_the_choices_of_its_family_and_the_sizes_of_the_preset(tmp_path, text, arch, expected):
    config = run(tmp_path, "new", 1, arch=arch, input_file=text, eval_iters=1, device="cpu")
    rest = {"device": "cpu", "format_version": 3, "vocab_size": len(set(TEXT))}
    assert config == {**PRESET, **expected, **rest}


@pytest.mark.parametrize("arch", DECODERS)
def test_it_learns_and_resumes_to_the_bits_of_a_run_that_never_stopped(tmp_path, text, arch):
    flags = {**SMALL, "input_file": text, "learning_rate": 1e-2, "warmup_iters": 2}
    run(tmp_path, "once", 40, arch=arch, **flags)
    run(tmp_path, "twice", 15, arch=arch, **flags)
    run(tmp_path, "twice", 40)
    assert same(bits(tmp_path / "once"), bits(tmp_path / "twice"))
    found = losses(tmp_path, "twice")
    assert found == losses(tmp_path, "once")
    assert found[40] < found[1] - 0.8


@pytest.mark.full  # four processes
@pytest.mark.parametrize("arch", DECODERS)
def test_a_killed_run_resumes_to_the_bits_of_one_that_was_not(tmp_path, text, arch):
    flags = {**SMALL, "input_file": text, "save_interval": 10, "arch": arch}
    script = [sys.executable, str(ROOT / "train.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    state = tmp_path / "killed/training_state.json"
    killed = subprocess.Popen([*script, *words(tmp_path, "killed", 4000, **flags)], env=environment)
    wait_until(lambda: state.exists() or killed.poll() is not None)
    killed.kill()
    assert killed.wait() == -9
    end = json.loads(state.read_text())["step"] + 25
    for name, more in (("killed", {}), ("once", flags)):
        subprocess.run([*script, *words(tmp_path, name, end, **more)], env=environment, check=True)
    assert same(bits(tmp_path / "killed"), bits(tmp_path / "once"))
    assert losses(tmp_path, "killed") == losses(tmp_path, "once")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"n_embd": 768, "n_head": 12}, {"n_ffn": 2048, "n_kv_head": 6}),
        ({"n_embd": 576, "n_head": 9}, {"n_ffn": 1536, "n_kv_head": 3}),  # SmolLM2 135M
        ({"n_embd": 4096, "n_head": 32}, {"n_ffn": 10944, "n_kv_head": 16}),
        ({"n_embd": 35, "n_head": 5}, {"n_ffn": 128, "n_kv_head": 5}),
        ({"n_embd": 100, "n_head": 10}, {"n_ffn": 320, "n_kv_head": 5}),
        ({}, {"n_ffn": 1024, "n_kv_head": 3}),
        ({"n_embd": 64, "n_ffn": 100, "n_kv_head": 1, "n_head": 4}, {"n_ffn": 100, "n_kv_head": 1}),
    ],
)
def test_sizes_that_nobody_specified_follow_from_the_others(fields, expected):
    found = complete("llama", fields)
    assert {name: found[name] for name in expected} == expected and "head_size" not in found
    wide = complete("qwen3", fields)
    assert wide["head_size"] == 2 * (fields.get("n_embd", 384) // fields.get("n_head", 6))
    assert GPTConfig.from_dict(wide).head_width % 2 == 0
    assert complete("gpt", fields) == fields


def test_size_flags_of_a_command_decide_the_sizes_that_follow(tmp_path, text):
    config = run(tmp_path, "new", 1, arch="qwen3", input_file=text, **{**SMALL, "n_embd": 48, "n_head": 6})
    names = ("n_layer", "n_embd", "n_head", "block_size", "n_ffn", "n_kv_head", "head_size")
    assert [config[name] for name in names] == [1, 48, 6, 16, 128, 3, 16]


@pytest.mark.parametrize(
    ("choices", "arch"),
    [
        ({}, "gpt"),
        (DECODERS["llama"], "llama"),
        (DECODERS["qwen3"], "qwen3"),
        ({**DECODERS["llama"], "sliding_window": 8, "n_kv_head": 2, "norm_eps": 1e-6}, "llama"),  # Mistral
        ({**DECODERS["llama"], "qkv_bias": True, "tied_head": False}, "llama"),  # Qwen2
        ({**DECODERS["llama"], "norm_placement": "after_sublayer", "qk_norm": "width"}, "gpt"),  # OLMo 2
        ({**DECODERS["llama"], "norm_type": "rmsnorm_1p", "mlp_type": "geglu"}, "gpt"),  # Gemma
        ({"pos_encoding": "rotary", "parallel_residual": True}, "gpt"),  # GPT-NeoX
    ],
)
def test_a_config_is_recognised_by_the_choices_that_tell_families_apart(choices, arch):
    assert arch_of_config(GPTConfig.from_dict(choices)) == arch


def test_another_architecture_is_refused_on_resume_and_as_a_start(tmp_path, text):
    flags = {**SMALL, "input_file": text}
    run(tmp_path, "plain", 1, **flags)
    run(tmp_path, "modern", 1, arch="llama", **flags)
    saved = (tmp_path / "modern/model.pt").read_bytes()
    for name, arch, found in (
        ("plain", "llama", "GPT"),
        ("modern", "qwen3", "GPT (llama)"),
        ("modern", "gpt", "GPT (llama)"),
        ("modern", "flex_small", "GPT (llama)"),
    ):
        with pytest.raises(CheckpointMismatch) as refused:
            run(tmp_path, name, 2, arch=arch, **flags)
        where = tmp_path / name / "config.json"
        assert f"{where}: the checkpoint is a {found}, this run has --arch {arch}. Leave it out" in str(refused.value)
    with pytest.raises(CheckpointMismatch, match=r"the checkpoint is a GPT \(llama\), this run has --arch qwen3"):
        run(tmp_path, "started", 1, arch="qwen3", init_from_model="modern", **flags)
    assert (tmp_path / "modern/model.pt").read_bytes() == saved
    run(tmp_path, "modern", 2, arch="llama", **flags)
    assert run(tmp_path, "started", 1, arch="llama", init_from_model="modern", **flags)["n_kv_head"] == 2


def test_a_config_that_stands_alone_decides_the_architecture(tmp_path, text):
    alone = {**complete("llama", {"n_embd": 64, "n_head": 4}), "n_layer": 1, "block_size": 16, "n_kv_head": 4}
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/config.json").write_text(json.dumps(alone))
    said = r"config.json: it describes a GPT \(llama\), this run has --arch qwen3. Remove the file"
    with pytest.raises(CheckpointMismatch, match=said):
        run(tmp_path, "alone", 1, arch="qwen3", input_file=text)
    config = run(tmp_path, "alone", 1, arch="llama", input_file=text, batch_size=2, eval_iters=1, device="cpu")
    assert {name: config.get(name) for name in alone} == {**alone, "n_kv_head": None}  # 4 of 4 heads are not grouped


def test_presets_of_all_architectures_have_the_same_sizes_and_settings():
    for on_cpu in (True, False):
        plain = KINDS["gpt"].preset(on_cpu)
        assert KINDS["llama"].preset(on_cpu) == KINDS["qwen3"].preset(on_cpu) == plain
        for arch in DECODERS:
            config = GPTConfig.from_dict({name: v for name, v in complete(arch, plain).items() if name != "dtype"})
            assert config.kv_heads * 2 == config.n_head and config.qkv_bias is None
            assert {name.split(".")[-1] for name in GPT(config).state_dict()} == {"weight"}, "no bias anywhere"
