"""llama2.c's ckpt.pt: to our GPT with the logits of its formulas, its run and moments, and on to transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import CheckpointMismatch
from tests.makers.conversions import converted, hf_logits, our_logits, texts, worst
from tests.makers.llama2c_files import ARGUMENTS, logits, state_of, write

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.tensor([[3, 17, 34, 8, 8, 21, 0, 39, 12, 30, 5, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])
CLOSE = 5e-6  # of the range of logits: fp32 against float64

VARIED: dict[str, dict[str, Any]] = {
    "grouped": {},
    "all heads": {"n_kv_heads": None},
    "one group": {"n_kv_heads": 1, "n_heads": 2},
    "own width": {"hidden_dim": 48},
    "other epsilon": {"norm_eps": 0.1},
    "large heads": {"dim": 48, "n_heads": 2, "n_kv_heads": 2},
}


def json_in(bundle: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((bundle / name).read_text())


def halves(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Rows of heads whose neighbours turn together, with those half a head apart instead."""
    return torch.cat([torch.cat((head[0::2], head[1::2])) for head in rows.split(size)])


@pytest.mark.parametrize("changed", VARIED.values(), ids=VARIED)
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_bundle_has_the_logits_of_its_formulas(tmp_path, changed, prefix):
    arguments = {**ARGUMENTS, **changed}
    state = state_of(arguments)
    converted(write(tmp_path / "ckpt.pt", state, arguments, prefix=prefix), tmp_path / "bundle", "bundle")
    assert worst(our_logits(tmp_path / "bundle", IDS).double(), logits(state, arguments, IDS)) < CLOSE
    config = json_in(tmp_path / "bundle")
    assert (config["tied_head"], config.get("norm_eps", 1e-5)) == (True, arguments.get("norm_eps", 1e-5))
    assert "rotary_layout" not in config  # a plain Llama


def test_moments_follow_the_rows_of_their_weights_and_the_run_goes_on(tmp_path):
    state = state_of(ARGUMENTS)
    facts = converted(write(tmp_path / "ckpt.pt", state, ARGUMENTS), tmp_path / "bundle", "bundle")
    assert {"rope base 10000.0 (llama2.c, always)", "norm epsilon 1e-05 (llama2.c, its default)"} <= {*texts(facts)}
    weights = torch.load(tmp_path / "bundle" / "model.pt", weights_only=True)
    q, k, v = (state[f"layers.1.attention.w{part}.weight"] for part in "qkv")
    assert torch.equal(weights["blocks.1.sa.qkv.weight"], torch.cat([halves(q, 8), halves(k, 8), v]))
    saved = torch.load(tmp_path / "bundle" / "optimizer.pt", weights_only=True)
    decayed, rest = saved["param_groups"]
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert all("ln" in name for name in rest["param_names"]) and len(rest["param_names"]) == 5
    names = [*decayed["param_names"], *rest["param_names"]]
    assert {*names} == weights.keys() - {"lm_head.weight"}
    assert all(torch.equal(saved["state"][k]["exp_avg"], 3 * weights[name]) for k, name in enumerate(names))
    state = json_in(tmp_path / "bundle", "training_state.json")
    assert (state["step"], state["val_loss"]) == (2, 3.25)
    wanted = {
        "learning_rate": 5e-4,
        "lr_schedule": "cosine",
        "warmup_iters": 10.0,
        "lr_decay_iters": 100,
        "min_lr": 0.0,
    }
    assert wanted.items() <= state["training"].items() and json_in(tmp_path / "bundle")["batch_size"] == 6
    (said,) = [note for note in facts["notes"] if note.startswith("not taken over from its config: ")]
    assert "out_dir 'out'" in said and "n_heads" not in said
    assert facts["dropped"] == {}


def test_buffers_of_old_files_are_left_out(tmp_path):
    angles = torch.outer(torch.arange(24.0), 10000.0 ** (-torch.arange(4) / 4))
    state = state_of(ARGUMENTS)
    whole = {**state, "freqs_cos": angles.cos(), "freqs_sin": angles.sin()}
    facts = converted(write(tmp_path / "ckpt.pt", whole, ARGUMENTS, optimizer=None), tmp_path / "bundle", "bundle")
    assert facts["dropped"] == dict.fromkeys(("model.freqs_cos", "model.freqs_sin"), "the angles of rotary positions")
    assert worst(our_logits(tmp_path / "bundle", IDS).double(), logits(state, ARGUMENTS, IDS)) < CLOSE


def test_a_head_of_other_values_stays_one(tmp_path):
    state = state_of(ARGUMENTS, tied=False)
    converted(write(tmp_path / "ckpt.pt", state, ARGUMENTS, optimizer=None), tmp_path / "bundle", "bundle")
    assert not json_in(tmp_path / "bundle").get("tied_head")
    assert worst(our_logits(tmp_path / "bundle", IDS).double(), logits(state, ARGUMENTS, IDS)) < CLOSE


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rope_theta": 500000.0}, "rope_theta is 500000.0 in model_args, which llama2.c does not compute"),
        ({"n_experts": 4}, "n_experts is 4 in model_args, which llama2.c does not compute"),
        ({"dim": 31}, "dim is 31 in the config, but the tensors have 32"),
        ({"n_heads": 5}, "n_heads is 5 in the config, but the tensors have"),
        ({"hidden_dim": 47}, "hidden_dim is 47 in the config, but the tensors have 88"),
    ],
    ids=["theta", "experts", "dim", "n_heads", "hidden_dim"],
)
def test_other_arguments_are_refused_by_name(tmp_path, arguments, said):
    source = write(tmp_path / "ckpt.pt", state_of(ARGUMENTS), {**ARGUMENTS, **arguments})
    with pytest.raises(CheckpointMismatch) as error:
        converted(source, tmp_path / "bundle", "bundle")
    assert said in str(error.value) and str(source) in str(error.value)


def test_metas_own_file_is_no_file_of_llama2c(tmp_path):
    torch.save(state_of(ARGUMENTS), tmp_path / "consolidated.00.pth")
    params = {"dim": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "rope_theta": 500000.0, "norm_eps": 1e-5}
    (tmp_path / "params.json").write_text(json.dumps(params))
    with pytest.raises(CheckpointMismatch, match=r"the names of Meta's Llama, but no model_args of llama2\.c"):
        converted(tmp_path / "consolidated.00.pth", tmp_path / "bundle", "bundle")
    converted(tmp_path / "consolidated.00.pth", tmp_path / "kept.safetensors", "safetensors")


@pytest.mark.full
@pytest.mark.parametrize("changed", VARIED.values(), ids=VARIED)
def test_it_becomes_a_plain_llama_of_transformers(tmp_path, changed):
    pytest.importorskip("transformers")
    arguments = {**ARGUMENTS, **changed}
    state = state_of(arguments)
    converted(write(tmp_path / "ckpt.pt", state, arguments), tmp_path / "hf", "hf")
    config = json_in(tmp_path / "hf")
    assert (config["architectures"], config["tie_word_embeddings"]) == (["LlamaForCausalLM"], True)
    assert worst(hf_logits(tmp_path / "hf", IDS).double(), logits(state, arguments, IDS)) < 1e-5
