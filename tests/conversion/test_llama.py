"""Llama, Qwen2 and Qwen3 of transformers to Megatron's export and back: bit for bit, and the tables as bijections."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from core.errors import CheckpointError
from core.families.megatron_tables import GPT2, LLAMA, TRANSFORMER_ENGINE, unstacked
from core.families.rules import apply
from tests.makers.conversions import Scratch, converted, read, tensors_of
from tests.makers.megatron_exports import exported, hf_model, off_by
from tests.makers.megatron_iterations import write_iteration

pytestmark = pytest.mark.usefixtures("one_thread")

many = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
small = st.integers(1, 4)

SIDES = {
    "input_layernorm.weight": ("h",),
    "input_layernorm.bias": ("h",),
    "self_attention.linear_qkv.weight": ("qkv", "h"),
    "self_attention.linear_qkv.bias": ("qkv",),
    "self_attention.q_layernorm.weight": ("d",),
    "self_attention.k_layernorm.weight": ("d",),
    "self_attention.linear_proj.weight": ("h", "q"),
    "self_attention.linear_proj.bias": ("h",),
    "pre_mlp_layernorm.weight": ("h",),
    "pre_mlp_layernorm.bias": ("h",),
    "mlp.linear_fc1.weight": ("fc1", "h"),
    "mlp.linear_fc1.bias": ("fc1",),
    "mlp.linear_fc2.weight": ("h", "f"),
    "mlp.linear_fc2.bias": ("h",),
}
OUTSIDE = {
    "embedding.word_embeddings.weight": ("v", "h"),
    "embedding.position_embeddings.weight": ("p", "h"),
    "decoder.final_layernorm.weight": ("h",),
    "decoder.final_layernorm.bias": ("h",),
    "output_layer.weight": ("v", "h"),
}


def megatron(scratch: Scratch, table, layers: int, sides: dict[str, int], absent: set[str], rng) -> dict:
    """A model under the names of a table: random bits, without what is absent."""
    made = {}
    for row in table:
        name = row[0]
        short = name.removeprefix("decoder.layers.{i}.")
        if short in absent:
            continue
        shape = tuple(sides[side] for side in (SIDES | OUTSIDE)[short])
        for i in range(layers) if "{i}" in name else (0,):
            one = name.replace("{i}", str(i))
            made[one] = scratch.put(one, rng.integers(0, 2**32, shape, dtype=np.uint32))
    return made


def numbers(groups: int, per: int, size: int) -> dict[str, int]:
    sizes = {"n_kv_head": groups, "n_head": groups * per, "q_size": groups * per * size, "kv_size": groups * size}
    return sizes | {"head_size": size}


@many
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@given(st.data())
def test_tables_are_bijections_over_sizes_groups_biases_and_tying(tmp_path, name, data):
    """And q, k and v are where Megatron's own view of its rows has them."""
    scratch, table = Scratch(tmp_path / "scratch"), LLAMA if name == "llama" else GPT2
    layers, groups, per, size, width, ffn = (data.draw(small) for _ in range(6))
    per = 1 if name == "gpt2" else per
    sizes = numbers(groups, per, size)
    sides = {"h": width, "d": size, "q": sizes["q_size"], "qkv": sizes["q_size"] + 2 * sizes["kv_size"], "f": ffn}
    sides |= {"fc1": 2 * ffn if name == "llama" else ffn, "v": data.draw(small), "p": 3}
    removable = [row[0].removeprefix("decoder.layers.{i}.") for row in table]
    absent = data.draw(st.sets(st.sampled_from([one for one in removable if "bias" in one or "_layernorm" in one
                                                or one == "output_layer.weight"])))  # fmt: skip
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    theirs = megatron(scratch, table, layers, sides, absent, rng)
    there = apply(table, theirs, sizes)
    assert there.unused == []
    back = apply(there.rows.values(), there.tensors, sizes, back=True)
    assert back.unused == [] and back.tensors.keys() == theirs.keys()
    assert all((read(back.tensors[key]) == read(view)).all() for key, view in theirs.items())
    again = apply(table, there.tensors, sizes, back=True)  # the whole table makes the same, without knowing the way
    assert again.tensors.keys() == theirs.keys()
    rows = read(theirs["decoder.layers.0.self_attention.linear_qkv.weight"]).reshape(groups, per + 2, size, width)
    parts = (rows[:, :per], rows[:, per], rows[:, per + 1])
    if name == "llama":
        for letter, part in zip("qkv", parts, strict=True):
            made = read(there.tensors[f"model.layers.0.self_attn.{letter}_proj.weight"])
            assert (made == part.reshape(-1, width)).all()
    else:
        made = read(there.tensors["transformer.h.0.attn.c_attn.weight"])
        assert (made == np.concatenate([part.reshape(-1, width) for part in parts]).T).all()


@many
@given(st.data())
def test_stacked_layers_and_names_of_transformer_engine_are_bijections(tmp_path, data):
    scratch, layers = Scratch(tmp_path / "scratch"), data.draw(small)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    table = unstacked(layers)
    given_ = data.draw(st.sets(st.sampled_from([row[0] for row in table]), min_size=1))
    stacks = {name: scratch.put(name, rng.integers(0, 2**32, (layers, 3, 2), dtype=np.uint32)) for name in given_}
    there = apply(table, stacks, {})
    assert len(there.tensors) == layers * len(stacks) and there.unused == []
    back = apply(there.rows.values(), there.tensors, {}, back=True)
    assert all((read(back.tensors[name]) == read(view)).all() for name, view in stacks.items())
    local = apply(TRANSFORMER_ENGINE, there.tensors, {})
    returned = apply(local.rows.values(), local.tensors, {}, back=True)
    assert returned.tensors.keys() | set(local.unused) == there.tensors.keys()


@pytest.mark.parametrize("name", ["hf_llama_gqa_untied", "hf_qwen2_tied"])
def test_fixtures_go_to_megatron_and_back_bit_for_bit(fixtures, tmp_path, name):
    converted(fixtures / name, tmp_path / "export.pt", "megatron")
    converted(tmp_path / "export.pt", tmp_path / "hf", "hf")
    assert tensors_of(tmp_path / "hf") == tensors_of(fixtures / name)
    made, given_ = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "hf", fixtures / name))
    same = given_.keys() & made.keys()
    assert {key: made[key] for key in same} == {key: given_[key] for key in same}
    config = exported(tmp_path / "export.pt")[1]
    first = "num_layers hidden_size num_attention_heads vocab_size max_position_embeddings ffn_hidden_size"
    assert list(config)[:8] == [*first.split(), "num_query_groups", "kv_channels"]


@pytest.mark.full
@pytest.mark.parametrize("name", ["hf_llama_gqa_untied", "hf_qwen2_tied"])
def test_transformers_computes_the_same_logits_from_what_came_back(fixtures, tmp_path, name):
    converted(fixtures / name, tmp_path / "export.pt", "megatron")
    converted(tmp_path / "export.pt", tmp_path / "hf", "hf")
    expected = load_file(fixtures / name / "expected.safetensors")
    assert off_by(tmp_path / "hf", expected["input_ids"], expected["logits_fp32"]) < 2e-6


NEEDED = {
    "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "hidden_act", "attention_bias", "mlp_bias", "bos_token_id", "eos_token_id", "torch_dtype", "dtype", "rope_theta",
    "rope_parameters",
}  # fmt: skip


def random_model(folder: Path, kind: str, **changes) -> Path:
    """A model of transformers with random numbers in every weight, biases and norms too."""
    import transformers

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 5e5, "rms_norm_eps": 3e-6}
    config = getattr(transformers, f"{kind}Config")(**sizes | changes)
    torch.manual_seed(7)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Qwen3", {"head_dim": 16}),  # wider than hidden_size / heads
        ("Qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
        ("Qwen2", {"num_key_value_heads": 4}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"mlp_bias": True, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    ],
)
def test_models_of_transformers_go_to_megatron_and_back(tmp_path, kind, changes):
    source = random_model(tmp_path / "source", kind, **changes)
    converted(source, tmp_path / "export.pt", "megatron")
    converted(tmp_path / "export.pt", tmp_path / "hf", "hf")
    assert tensors_of(tmp_path / "hf") == tensors_of(source)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config.keys() >= NEEDED and config["architectures"] == [f"{kind}ForCausalLM"]
    ids = torch.randint(64, (2, 40))
    with torch.no_grad():
        assert off_by(tmp_path / "hf", ids, hf_model(source)(ids).logits) < 2e-6
    card = (tmp_path / "hf/README.md").read_text()
    assert "Converted from `export.pt`" in card and "Megatron export with local names" in card
    state, said = exported(tmp_path / "export.pt")  # an iteration of the same tensors
    run = {name: value for name, value in said.items() if name not in ("bos_token_id", "eos_token_id")}
    converted(write_iteration(tmp_path / "iter_0000001", state, **run), tmp_path / "hf2", "hf")
    assert tensors_of(tmp_path / "hf2") == tensors_of(source)


@pytest.mark.full
def test_safetensors_sharded_dtype_and_untied(tmp_path):
    source = random_model(tmp_path / "source", "Qwen3", head_dim=16, tie_word_embeddings=True)
    converted(source, tmp_path / "a.safetensors", "safetensors")
    assert tensors_of(tmp_path / "a.safetensors") == tensors_of(source)
    converted(source, tmp_path / "export.pt", "megatron")
    converted(tmp_path / "export.pt", tmp_path / "hf", "hf", shard_size=20_000, dtype="bfloat16", tied=False)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["dtype"], config["torch_dtype"], config["tie_word_embeddings"]) == ("bfloat16", "bfloat16", False)
    model = hf_model(tmp_path / "hf")
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert (tmp_path / "hf/model.safetensors.index.json").exists()
    converted(tmp_path / "hf", tmp_path / "untied.pt", "megatron")
    assert exported(tmp_path / "untied.pt")[1]["untie_embeddings_and_output_weights"] is True


def refused(source: Path, target: Path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        converted(source, target, "megatron", **options)
    assert not target.exists()
    return str(caught.value)


def test_what_an_export_cannot_hold_is_refused_or_said(fixtures, tmp_path):
    source = shutil.copytree(fixtures / "hf_llama_gqa_untied", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())

    def change(**values) -> None:
        (source / "config.json").write_text(json.dumps(config | values))

    change(hidden_act="gelu")
    assert "hidden_act is 'gelu'; a gate of Megatron's export is silu" in refused(source, tmp_path / "x.pt")
    change(model_type="mistral")
    assert "Hugging Face Mistral cannot become megatron. It can become bundle, hf," in refused(
        source, tmp_path / "x.pt"
    )
    change(num_attention_heads=5)
    assert "num_attention_heads is 5 in the config" in refused(source, tmp_path / "x.pt")
    change(use_sliding_window=True, sliding_window=24)
    facts = converted(source, tmp_path / "sliding.pt", "megatron")
    assert "warning: some of its layers see a sliding window only: set that in Megatron by hand" in facts["notes"]
    assert exported(tmp_path / "sliding.pt")[1]["window_size"] == [24, 0]
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    change(rope_parameters=scaled)
    facts = converted(source, tmp_path / "scaled.pt", "megatron")
    assert "warning: its positions are scaled (llama3): set that in Megatron by hand" in facts["notes"]
    converted(tmp_path / "scaled.pt", tmp_path / "scaled", "hf")
    assert json.loads((tmp_path / "scaled/config.json").read_text())["rope_parameters"] == scaled
    (source / "config.json").unlink()
    assert "no config.json in it, and the heads are not in the tensors" in refused(source, tmp_path / "x.pt")


def test_a_head_that_was_written_as_well_is_tied_unless_the_config_says_no(fixtures, tmp_path):
    tensors = load_file(fixtures / "hf_gpt2/model.safetensors")
    config = json.loads((fixtures / "hf_gpt2/config.json").read_text())
    config.pop("tie_word_embeddings", None)  # GPT-2's default is a tied head

    def folder(name: str, head: torch.Tensor, **values) -> Path:
        (tmp_path / name).mkdir()
        save_file({**tensors, "lm_head.weight": head}, tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text(json.dumps(config | values))
        return tmp_path / name

    table = tensors["transformer.wte.weight"]
    for name, values in (("tied", {}), ("untied", {"tie_word_embeddings": False})):
        converted(folder(name, table.clone(), **values), tmp_path / f"{name}.pt", "megatron")
        state, said = exported(tmp_path / f"{name}.pt")
        assert ("output_layer.weight" in state) is (name == "untied")
        assert said["untie_embeddings_and_output_weights"] is (name == "untied")
    assert "its config ties head and token table, but lm_head.weight has other values than transformer.wte" in refused(
        folder("other", table + 1), tmp_path / "x.pt"
    )


def test_tokenizer_files_go_along_between_folders(fixtures, tmp_path):
    source = shutil.copytree(fixtures / "hf_llama_gqa_untied", tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer_config.json").write_text('{"a": 1}')
    converted(source, tmp_path / "hf", "hf", dtype="bfloat16")
    assert (tmp_path / "hf/tokenizer_config.json").read_text() == '{"a": 1}'
    made = load_file(tmp_path / "hf/model.safetensors")
    assert all(torch.equal(made[n], t.bfloat16()) for n, t in load_file(source / "model.safetensors").items())
