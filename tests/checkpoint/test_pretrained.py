"""Any file of modded-nanogpt opens with one call, computes what it computed, and says what it is."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from core import model as model_module
from core.config.variants import VARIANTS
from core.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, CheckpointNotFound
from core.loading.modded import load_flex_checkpoint
from core.model import GPTBatched, GPTFlexAttention
from core.pretrained import inspect_checkpoint, load_pretrained_checkpoint
from tests.conftest import ROOT
from tests.makers.modded_checkpoints import flex_model, upstream_file, upstream_state
from tests.makers.modded_models import VARIANTS as NAMES
from tests.makers.models import flip

IDS = torch.arange(256) * 7 % 60  # whole blocks, so that both models run the same kernels
FIXTURES = {
    "modded_small_16e2da07_d128h1_opt/state_step000005.pt": ("small", 512, 0),
    "modded_small_16e2da07_d128h1_opt/state_ws8_scalars64.pt": ("small", 512, 4),
    "modded_medium_06743860_d128h1_opt/state_step000005.pt": ("medium", 500, 0),
}


def quiet(path, *args, **settings):
    return load_pretrained_checkpoint(path, *args, say=lambda line: None, **settings)


@pytest.mark.parametrize("variant", NAMES)
def test_a_file_computes_what_the_model_it_was_saved_from_computes(tmp_path, variant):
    path = upstream_file(tmp_path / "state_step001770.pt", variant)
    source, flex_info, _ = load_flex_checkpoint(path)
    model, info, _ = quiet(path)
    assert info == flex_info
    assert info["step"] == model.step == 1770
    with torch.no_grad():
        assert torch.equal(model(IDS[None])[0][0], source(IDS)[0])


@pytest.mark.parametrize("variant", NAMES)
def test_weights_keep_their_dtype_unless_one_is_asked_for(tmp_path, variant):
    path = upstream_file(tmp_path / "state.pt", variant)
    kept, rounded = quiet(path)[0], quiet(path, dtype="bf16")[0]
    matrices = torch.bfloat16 if variant == "medium" else torch.float32
    assert kept.embed.weight.dtype == torch.bfloat16
    assert kept.blocks[0].attn.qkvo_w.dtype == kept.blocks[0].mlp.fc_w.dtype == matrices
    assert kept.lm_head_w.dtype == kept.scalars.dtype == torch.float32
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", FIXTURES)
def test_files_of_the_program_itself_are_recognised(shared, name, capsys):
    path = shared / "fixtures" / name
    variant, rows, padding = FIXTURES[name]
    _, info, content = load_pretrained_checkpoint(path)
    assert capsys.readouterr().out == f"Format: {VARIANTS[variant].program}\n"
    expected = {"variant": variant, "format": variant, "vocab_size": rows, "head_rows": 512, "num_heads": 1}
    expected |= {"num_layers": VARIANTS[variant].depth, "model_dim": 128, "step": 5, "scalars_padding": padding}
    assert {key: info[key] for key in expected} == expected
    assert {"step", "model", "optimizers"} <= content.keys()


def test_inspection_says_in_two_lines_what_a_file_is(tmp_path, capsys):
    path = upstream_file(tmp_path / "state.pt", "small_2025_02")
    info, content = inspect_checkpoint(path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Format: small (from train_gpt_small.py of 2025-02)"
    assert lines[1].startswith("12 layers, 1 heads, width 128, vocabulary 61 (head 128), step 1770, ")
    assert info["format"] == "small" and info["variant"] == "small_2025_02"
    assert torch.equal(content["model"]["_orig_mod.skip_weights"], flex_model("small_2025_02").skip_weights)


def test_rows_of_embedding_and_head_may_differ(tmp_path):
    head = upstream_state()["_orig_mod.lm_head.weight"][:64].clone()
    loaded, info, _ = quiet(upstream_file(tmp_path / "state.pt", **{"lm_head.weight": head}))
    assert (info["vocab_size"], info["head_rows"]) == (61, 64)
    assert loaded(IDS[None])[0].shape == (1, 256, 64)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_the_load_of_the_old_instructions_works_as_written(tmp_path, prefix):
    state = upstream_state(prefix=prefix)
    padded = state[f"{prefix}scalars"]
    assert len(padded) == 64  # for 8 ranks
    target = flex_model()
    with torch.no_grad():
        for p in target.parameters():
            p.zero_()
    assert str(target.load_state_dict(dict(state), strict=True)) == "<All keys matched successfully>"
    assert torch.equal(target.scalars, padded[:60])
    written = target.state_dict()
    assert {prefix + name for name in written} == state.keys()
    assert torch.equal(written["scalars"], padded)
    again = flex_model()
    again.load_state_dict(written)
    assert torch.equal(again.state_dict()["scalars"], padded)


def test_a_flipped_bit_is_found_before_use(tmp_path):
    path = upstream_file(tmp_path / "state.pt")
    needle = upstream_state()["_orig_mod.lm_head.weight"].numpy().tobytes()[:64]
    flip(path, path.read_bytes().index(needle) + 5)
    with pytest.raises(CheckpointDamaged, match=r"state\.pt: model\._orig_mod\.lm_head\.weight is damaged \(CRC32"):
        quiet(path)


def test_a_later_version_is_refused_with_the_names_without_a_place(tmp_path):
    path = upstream_file(tmp_path / "state.pt", qk_bank=torch.zeros(3, 4), vo_bank=torch.zeros(2))
    with pytest.raises(CheckpointMismatch) as refused:
        quiet(path)
    assert "without a place: " in str(refused.value)
    assert {"qk_bank", "vo_bank"} <= set(re.findall(r"\w+_bank", str(refused.value)))


def test_an_incomplete_file_is_refused_with_what_is_missing(tmp_path):
    path = upstream_file(tmp_path / "state.pt", **{"blocks.3.mlp.c_fc.weight": None})
    with pytest.raises(CheckpointMismatch, match=r"missing: \S*blocks\.3\.mlp\.c_fc\.weight\."):
        quiet(path)


def test_a_file_of_another_program_is_named(shared):
    path = shared / "fixtures/nanogpt_char_biasFalse/ckpt.pt"
    with pytest.raises(CheckpointMismatch, match=r"ckpt\.pt: not a modded-nanogpt checkpoint .*it is of nanoGPT"):
        quiet(path)


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(CheckpointNotFound, match=r"state\.pt: cannot be opened \(No such file"):
        quiet(tmp_path / "state.pt")


def test_a_pickle_that_names_code_is_refused(tmp_path):
    torch.save({"step": 1, "model": upstream_state(), "optimizers": [subprocess.Popen]}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"bad\.pt: its pickle names \w+\.Popen"):
        quiet(tmp_path / "bad.pt")


MEASURE = """
import sys
from core.pretrained import load_pretrained_checkpoint
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
load_pretrained_checkpoint(sys.argv[3], dtype="fp32", say=lambda line: None)  # what torch imports at its first use
before = peak()
model, info, checkpoint = load_pretrained_checkpoint(sys.argv[1], dtype=sys.argv[2] or None, say=lambda line: None)
print((peak() - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("dtype", ["", "fp32"])
def test_loading_needs_little_more_memory_than_the_model(tmp_path, dtype):
    path, small = upstream_file(tmp_path / "state.pt", vocab=120_000), upstream_file(tmp_path / "small.pt")
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), dtype, str(small)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(result.stdout) <= 1.3


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("file", "made", "class_", "own", "given"),
    [
        ("medium", "small", GPTFlexAttention, "blocks.0.attn.qkv_w", "blocks.0.attn.qkvo_w"),
        ("medium", "small_2025_02", GPTFlexAttention, "blocks.0.attn.qkv_w", "blocks.0.attn.qkvo_w"),
        ("small", "medium", GPTFlexAttention, "blocks.0.attn.qkvo_w", "blocks.0.attn.qkv_w"),
        ("small", "small", GPTBatched, "blocks.0.attn.qkvo_w", "blocks.0.attn.qkv_w"),
    ],
)
def test_a_state_of_another_layout_is_refused_and_changes_nothing(file, made, class_, own, given, strict):
    torch.manual_seed(0)
    state = {f"_orig_mod.{n}": t for n, t in GPTFlexAttention(256, 12, 1, 128, 128, variant=file).state_dict().items()}
    model = class_(256, 12, 1, 128, 128, variant=made)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointMismatch) as raised:
        model.load_state_dict(state, strict=strict)
    assert str(raised.value) == (
        f"{class_.__name__} ({made}): the weights of its layers have the layout of {own}, and those given that of "
        f"{given}: none of them has a place, and nothing was loaded. "
        "core.pretrained.load_pretrained_checkpoint(path) finds the layout of a file, and converts it."
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_classes_of_the_old_instructions_are_in_core_model():
    small = model_module.GPTFlexAttention(256, 6, 1, 128, 128)
    block = small.blocks[0]
    assert type(block) is model_module.TrainingScriptBlock and type(block.attn) is model_module.TrainingScriptAttention
    assert type(block.mlp) is model_module.TrainingScriptMLP and type(block.mlp.c_fc) is model_module.CastedLinear
