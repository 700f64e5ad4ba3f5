"""The config beside a file of weights: whose it is, when it is read, and what is said where it cannot be."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from core.containers.beside import config_beside
from core.containers.flat_yaml import dump_flat_yaml, parse_flat_yaml
from core.errors import CheckpointError
from core.inspection.inspect import inspect_path
from tests.makers.conversions import converted, tensors_of
from tests.makers.trainer_folders import gpt2, save_dcp, write_trainer

LITGPT = {
    "transformer.wte.weight": torch.zeros(8, 4),
    "transformer.h.0.attn.qkv.weight": torch.zeros(12, 4),
    "lm_head.weight": torch.zeros(8, 4),
}


def test_weights_by_their_name_become_what_their_folder_becomes(tmp_path):
    folder = write_trainer(tmp_path / "checkpoint-500")
    with inspect_path(folder / "model.safetensors") as found:
        assert (found.place, found.config["n_head"]) == ("config.json", 4)
        assert found.contradictions == []
    converted(folder / "model.safetensors", tmp_path / "a", "bundle")
    converted(folder, tmp_path / "b", "bundle")
    assert tensors_of(tmp_path / "a/model.pt") == tensors_of(tmp_path / "b/model.pt")
    assert (tmp_path / "a/config.json").read_bytes() == (tmp_path / "b/config.json").read_bytes()


def test_config_json_is_read_only_with_the_file_that_it_is_for(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_head": 4}))
    save_file(gpt2(1), tmp_path / "mine.safetensors")
    torch.save({}, tmp_path / "optimizer.pt")
    assert config_beside(tmp_path / "mine.safetensors")[0].config["n_head"] == 4
    save_file(gpt2(1), tmp_path / "other.safetensors")
    assert config_beside(tmp_path / "mine.safetensors") == (None, "")
    (tmp_path / "other.safetensors").rename(tmp_path / "model.safetensors")
    assert config_beside(tmp_path / "model.safetensors")[0].place == "config.json"
    (tmp_path / "config.json").write_text(json.dumps({"n_head": 4}))  # nobody's
    assert config_beside(tmp_path / "model.safetensors") == (None, "")
    (tmp_path / "config.json").write_text('{"n_head": 4')
    found, said = config_beside(tmp_path / "model.safetensors")
    assert found is None and said.startswith(f"the config beside it is not read: {tmp_path}/config.json: ")


def test_a_config_that_contradicts_the_tensors_is_said(tmp_path):
    folder = write_trainer(tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_layer": 9}))
    with inspect_path(folder / "model.safetensors") as found:
        assert any("n_layer" in fault and "9" in fault for fault in found.contradictions)


def test_nanochat_has_its_config_and_step_in_a_file_of_the_same_number(tmp_path):
    names = ("transformer.h.0.attn.c_q.weight", "transformer.h.0.attn.c_k.weight", "transformer.h.0.attn.c_v.weight")
    for step in (100, 200):
        torch.save(dict.fromkeys(names, torch.zeros(4, 4)), tmp_path / f"model_{step:06}.pt")
        meta = {"step": step, "val_bpb": 1.0, "model_config": {"n_layer": 1, "n_head": 2, "sequence_len": step}}
        (tmp_path / f"meta_{step:06}.json").write_text(json.dumps(meta))
    with inspect_path(tmp_path / "model_000200.pt") as found:
        assert (found.place, found.step, found.config["sequence_len"]) == ("meta_000200.json", 200, 200)
    (tmp_path / "meta_000200.json").write_text('{"step": 200}')
    with inspect_path(tmp_path / "model_000200.pt") as found:
        assert found.config is None
        assert f"{tmp_path}/meta_000200.json: has no model_config, so nothing of it is used" in found.chosen


def test_meta_has_its_config_in_params_json(tmp_path):
    torch.save({"tok_embeddings.weight": torch.zeros(8, 4)}, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps({"dim": 4, "n_heads": 2, "rope_theta": 500000.0}))
    with inspect_path(tmp_path / "consolidated.00.pth") as found:
        assert (found.place, found.config["rope_theta"]) == ("params.json", 500000.0)


@pytest.mark.parametrize("name", ["lit_model.pth", "model.ckpt"])
def test_litgpt_has_its_config_in_yaml(tmp_path, name):
    torch.save({"model": LITGPT}, tmp_path / name)
    (tmp_path / "model_config.yaml").write_text(YAML)
    for path in (tmp_path, tmp_path / name):
        with inspect_path(path) as found:
            assert (found.place, found.config) == ("model_config.yaml", VALUES)
    (tmp_path / "model_config.yaml").write_text("n_head: &x 2\nn_layer: 1\n")
    with inspect_path(tmp_path / name) as found:
        assert found.config is None
        assert found.chosen == [
            f'the config beside it is not read: {tmp_path}/model_config.yaml: line 1 is "n_head: &x 2"; only a flat '
            "mapping, as litgpt writes, is read."
        ]


YAML = """\
# as yaml.dump writes
bias: false
gelu_approximate: none
hf_config:
  name: pythia-14m
  org: EleutherAI
n_embd: 48
n_head: 2
name: 'pythia (14m)'
norm_eps: 1.0e-06
rope_adjustments: null
sliding_window_indices:
- 1
- 0
empty: {}
"""

VALUES = {
    "bias": False,
    "gelu_approximate": "none",
    "hf_config": {"name": "pythia-14m", "org": "EleutherAI"},
    "n_embd": 48,
    "n_head": 2,
    "name": "pythia (14m)",
    "norm_eps": 1e-6,
    "rope_adjustments": None,
    "sliding_window_indices": [1, 0],
    "empty": {},
}


@pytest.mark.parametrize(
    "line",
    [
        "a: !!python/object/apply:os.system ['id']",
        "a: *x",
        "a: |",
        "a: [1, 2]",
        "a: {b: 1}",
        "- a",
        "  a: 1",
        "<<: x",
        "a b: 1",
        "a:\n- 1\n  b: 2",
        "a:\n  b: 1\n- 2",
        "a: 1\na: 2",
        "a: 1\n- 2",
        "a: 'it''s'",
        'a: "x\\n"',
        "a: # b",
        "\ta: 1",
        "a: No",
        "a: TRUE",
        "a: 010",
        "a: 0x10",
        "a: 2026-11-30",
        "a: .inf",
    ],
)
def test_other_yaml_is_refused_with_its_line(line):
    with pytest.raises(CheckpointError, match=r"^c: line \d is .*; only a flat mapping, as litgpt writes, is read\.$"):
        parse_flat_yaml(line.encode(), "c")


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(0.01, 1e5)
    | st.from_regex(r"[A-Za-z][A-Za-z0-9_.-]{0,9}", fullmatch=True)
)


names = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
flat = st.dictionaries(names, scalars | st.lists(scalars, max_size=3))


@given(
    flat,
    st.dictionaries(names, scalars, max_size=3),
    st.floats(1e-12, 1e-5),
    st.sampled_from(["", "a: b", "1.5", "No"]),
)
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_read_back(values, inner, small, word):
    values = {**values, "inner": inner, "small": small, "word": word}
    assert parse_flat_yaml(dump_flat_yaml(values), "c") == values


def test_numbers_and_words_are_written_as_pyyaml_writes_them():
    values = {"eps": 1e-05, "scale": 1e20, "word": "yes", "none": None, "flags": [True, 0], "empty": [], "text": "a: b"}
    assert dump_flat_yaml(values).decode().splitlines() == [
        "empty: []",
        "eps: 1.0e-05",
        "flags:",
        "- true",
        "- 0",
        "none: null",
        "scale: 1.0e+20",
        "text: 'a: b'",
        "word: 'yes'",
    ]


@pytest.mark.full
@given(flat)
@settings(max_examples=200, deadline=None)
def test_what_is_read_is_what_pyyaml_reads(values):
    yaml = pytest.importorskip("yaml")
    text = yaml.dump(values)
    try:
        found = parse_flat_yaml(text.encode(), "c")
    except CheckpointError:
        return
    assert found == (yaml.safe_load(text) or {})
    assert yaml.safe_load(dump_flat_yaml(values)) == values


def test_what_fabric_keeps_beside_shards_is_shown(tmp_path):
    save_dcp({"model": LITGPT}, tmp_path)
    torch.save({"iter_num": 40, "hparams": {"seed": 1}}, tmp_path / "meta.pt")
    with inspect_path(tmp_path) as found:
        assert found.container.content["meta"] == {"iter_num": 40, "hparams": {"seed": 1}}
        assert (found.step, "meta.pt" in found.container.files) == (40, True)
    (tmp_path / "meta.pt").write_bytes(b"PK\3\4 cut off")
    with inspect_path(tmp_path) as found:
        assert any(said.startswith(f"its meta.pt is left out: {tmp_path}/meta.pt: ") for said in found.chosen)
    converted(tmp_path, tmp_path.with_suffix(".safetensors"), "safetensors")
