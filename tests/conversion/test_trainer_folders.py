"""Steps of transformers' Trainer and of accelerate, and optimizer states by names: bit for bit what was saved."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

import inspect_model
from core.errors import CheckpointDamaged, CheckpointMismatch, CheckpointNotFound
from core.inspection.inspect import inspect_path
from tests.makers.conversions import converted, same
from tests.makers.dcp_folders import load
from tests.makers.trainer_folders import (
    CONFIG,
    gpt2,
    moments_of,
    save_dcp,
    state_of,
    write_fsdp,
    write_run,
    write_trainer,
)

# what lies in a folder of the Trainer


@pytest.mark.parametrize("layers", [1, 3])
def test_a_step_of_the_trainer_becomes_a_bundle_with_its_step_and_moments(tmp_path, layers):
    weights = gpt2(layers)
    facts = converted(write_trainer(tmp_path / "checkpoint-500", 500, weights), tmp_path / "b", "bundle")
    assert json.loads((tmp_path / "b/training_state.json").read_text())["step"] == 500
    made = torch.load(tmp_path / "b/optimizer.pt", weights_only=True)
    numbers = {n: i for g in made["param_groups"] for n, i in zip(g["param_names"], g["params"], strict=True)}
    moments = moments_of(weights)
    for i in range(layers):
        places = {"ln1": "ln_1", "ln2": "ln_2", "sa.qkv": "attn.c_attn", "fwd.net.2": "mlp.c_proj"}
        for ours, theirs in places.items():
            for key in ("exp_avg", "exp_avg_sq"):
                entry = made["state"][numbers[f"blocks.{i}.{ours}.weight"]][key]
                expected = moments[f"transformer.h.{i}.{theirs}.weight"][key]
                assert torch.equal(entry, expected.t() if expected.dim() > 1 else expected)
                entry = made["state"][numbers[f"blocks.{i}.{ours}.bias"]][key]
                assert torch.equal(entry, moments[f"transformer.h.{i}.{theirs}.bias"][key])
    assert [group["weight_decay"] for group in made["param_groups"]] == [0.01, 0.0]
    said = facts["notes"]
    assert "its position in the data is epoch 1.25 (trainer_state.json); train.py draws batches of its own" in said
    assert facts["dropped"]["scheduler"].startswith("3 values")
    assert not [name for name in facts["dropped"] if name.startswith("optimizer")]


def test_what_lies_beside_the_weights_is_shown_and_the_rest_is_named(tmp_path):
    with inspect_path(write_trainer(tmp_path / "checkpoint-500")) as found:
        content = found.container.content
        assert (found.step, content["trainer_state"]["epoch"]) == (500, 1.25)
        assert content["scheduler"] == {"last_epoch": 500, "_last_lr": [2e-5, 2e-5]}
        assert content["optimizer"]["param_groups"][0]["lr"] == 5e-5
        assert found.contradictions == []
        assert len(found.weights) == len(gpt2())
        assert "also here, not part of the model: rng_state_0.pth, training_args.bin" in found.container.notes
        assert {"optimizer.pt", "scheduler.pt", "trainer_state.json"} <= found.container.files.keys()


def test_the_moments_of_a_step_are_compared_with_those_of_its_bundle(tmp_path, capsys):
    folder = write_trainer(tmp_path / "checkpoint-500")
    converted(folder, tmp_path / "b", "bundle")
    assert inspect_model.main(["--diff", str(folder), str(tmp_path / "b"), "--moments"]) == 0
    assert "moments: 56 compared, 56 equal" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["pt", "dcp"])
def test_include_optimizer_of_a_folder_of_transformers_keeps_it_by_names(tmp_path, to):
    weights = gpt2()
    converted(write_trainer(tmp_path / "x", 500, weights), tmp_path / f"o.{to}", to, include_optimizer=True)
    made = torch.load(tmp_path / "o.pt", weights_only=True) if to == "pt" else load(tmp_path / "o.dcp")
    assert same(made["model"], weights)
    state = made["optimizer"]
    for group in state["param_groups"]:
        for name, number in zip(group.get("param_names", group["params"]), group["params"], strict=True):
            assert same(state["state"][number], moments_of(weights)[name])


@pytest.mark.parametrize(("to", "why"), [("hf", "has no optimizer state"), ("safetensors", "more than tensors")])
def test_include_optimizer_is_refused_where_it_has_no_place(tmp_path, to, why):
    with pytest.raises(CheckpointMismatch, match=why):
        converted(write_trainer(tmp_path / "x"), tmp_path / "o", to, include_optimizer=True)


def test_moments_of_other_shapes_are_left_out_with_the_reason_and_refused_when_asked_for(tmp_path):
    folder = write_trainer(tmp_path / "x")
    state = state_of(gpt2())
    state["state"][3]["exp_avg"] = torch.ones(2, 2)
    torch.save(state, folder / "optimizer.pt")
    facts = converted(folder, tmp_path / "b", "bundle")
    assert any("optimizer state is left out: exp_avg of parameter 3 is (2, 2)" in said for said in facts["notes"])
    with pytest.raises(CheckpointMismatch, match=r"exp_avg of parameter 3 is .* Leave out --include_optimizer"):
        converted(folder, tmp_path / "o.pt", "pt", include_optimizer=True)


def test_a_damaged_optimizer_leaves_the_model_and_is_named(tmp_path):
    folder = write_trainer(tmp_path / "x")
    file = folder / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-400])
    facts = converted(folder, tmp_path / "b", "bundle")
    assert any(said.startswith(f"its optimizer is left out: {file}: ") for said in facts["notes"])
    with pytest.raises(CheckpointMismatch, match="no optimizer state"):
        converted(folder, tmp_path / "o.pt", "pt", include_optimizer=True)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_what_may_act_beside_the_weights_is_left_out_and_named(tmp_path, name):
    class Trap:
        def __reduce__(self):
            return (os.system, ("echo trapped",))

    folder = write_trainer(tmp_path / "x")
    torch.save({"state": {}, "param_groups": [], "trap": Trap()}, folder / name)
    facts = converted(folder, tmp_path / "o.safetensors", "safetensors")
    said = f"its {name[:-3]} is left out: {name} names posix.system("
    assert any(note.startswith(said) and note.endswith("; nothing was executed") for note in facts["notes"])
    assert same(load_file(tmp_path / "o.safetensors"), gpt2())


@pytest.mark.parametrize("suffix", ["bin", "pt"])
def test_the_optimizer_of_an_unknown_model_is_kept_as_it_is_laid_out(tmp_path, suffix):
    (folder := tmp_path / "x").mkdir()
    weights = {"a.weight": torch.randn(3, 2), "b": torch.randn(4)}
    torch.save(weights, folder / "pytorch_model.bin")
    state = {"state": {0: {"exp_avg": torch.randn(3, 2)}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}
    torch.save(state, folder / f"optimizer.{suffix}")
    converted(folder, tmp_path / "o.pt", "pt", include_optimizer=True)
    made = torch.load(tmp_path / "o.pt", weights_only=True)
    assert same(made["model"], weights) and same(made["optimizer"]["state"][0], state["state"][0])
    assert made["optimizer"]["param_groups"] == state["param_groups"]
    facts = converted(folder, tmp_path / "o.safetensors", "safetensors")
    assert facts["dropped"]["optimizer.state.0.exp_avg"] == "optimizer; --include_optimizer keeps it"


def test_the_optimizer_beside_an_original_is_no_part_of_it(tmp_path):
    folder = write_trainer(tmp_path / "x")
    save_dcp({"model": gpt2()}, tmp_path / "model_sharded/model_sharded")
    facts = converted(
        tmp_path / "model_sharded", tmp_path / "o.safetensors", "safetensors", more={"match_original": folder}
    )
    assert facts["filled"] == {} and same(load_file(tmp_path / "o.safetensors"), gpt2())


# accelerate's FSDP


def test_a_folder_of_fsdp_is_its_model_and_never_its_scheduler(tmp_path):
    weights = gpt2()
    folder = write_fsdp(tmp_path / "checkpoint-500", weights)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "n_layer": 2}))
    with inspect_path(folder) as found:
        assert (found.identity.family, found.step) == ("hf_gpt2", 500)
        assert found.container.kind == "folder of accelerate's FSDP, DCP folder, 1 file"
    converted(folder, tmp_path / "o.safetensors", "safetensors")
    assert same(load_file(tmp_path / "o.safetensors"), weights)
    converted(folder, tmp_path / "b", "bundle", include_optimizer=True)
    made = torch.load(tmp_path / "b/optimizer.pt", weights_only=True)
    names = [name for group in made["param_groups"] for name in group["param_names"]]
    place = names.index("blocks.1.ln2.bias")
    assert same(made["state"][place], moments_of(weights)["transformer.h.1.ln_2.bias"])


@pytest.mark.parametrize("name", ["pytorch_model_fsdp.bin", "pytorch_model_fsdp_0.bin"])
def test_a_model_of_fsdp_that_was_saved_whole_opens_too(tmp_path, name):
    weights = gpt2(1)
    (folder := tmp_path / "x").mkdir()
    torch.save(weights, folder / name)
    torch.save(state_of(weights), folder / "optimizer.bin")
    write_run(folder, 4, "bin")
    converted(folder, tmp_path / "o.pt", "pt", include_optimizer=True)
    assert same(torch.load(tmp_path / "o.pt")["model"], weights)


def test_two_models_of_one_step_are_named(tmp_path):
    for i in (0, 1):
        save_dcp({"model": {"w": torch.ones(2)}}, tmp_path / f"pytorch_model_fsdp_{i}")
    with pytest.raises(CheckpointNotFound, match=r"holds 2 models, pytorch_model_fsdp_0, .*_1\. Name one of them\."):
        converted(tmp_path, tmp_path / "o.pt", "pt")


def test_a_scheduler_alone_is_no_checkpoint(tmp_path):
    write_run(tmp_path, 3, "bin")
    with pytest.raises(CheckpointNotFound, match=r"no checkpoint here.* found rng_state_0\.pth, scheduler\.bin"):
        converted(tmp_path, tmp_path / "o.pt", "pt")


def test_a_damaged_model_of_fsdp_is_refused(tmp_path):
    folder = write_fsdp(tmp_path / "x", gpt2(1))
    (folder / "pytorch_model_fsdp_0/__0_0.distcp").unlink()
    with pytest.raises(CheckpointDamaged, match=r"pytorch_model_fsdp_0/\.metadata: 1 of its 1 files are missing"):
        converted(folder, tmp_path / "o.pt", "pt")


# optimizers alone, under another entry, by names


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("to", ["pt", "dcp"])
def test_the_folder_of_an_optimizer_alone_becomes_a_file(tmp_path, wrapped, to):
    state = state_of(gpt2(1), by_name=True)
    folder = save_dcp({"optimizer": state} if wrapped else state, tmp_path / "optimizer_0")
    facts = converted(folder, tmp_path / f"o.{to}", to)
    made = torch.load(tmp_path / "o.pt", weights_only=True) if to == "pt" else load(tmp_path / "o.dcp")
    assert made["param_groups"] == state["param_groups"]
    assert all(same(made["state"][name], entry) for name, entry in state["state"].items())
    assert facts["dropped"] == {}
    with pytest.raises(CheckpointMismatch, match="--dtype casts weights, and it is the state of an optimizer alone"):
        converted(folder, tmp_path / f"o2.{to}", to, dtype="bfloat16")
    with pytest.raises(CheckpointMismatch, match=f"{folder}: it is the state of an optimizer.* --to dcp hold"):
        converted(folder, tmp_path / "o.safetensors", "safetensors")


def test_the_values_of_an_optimizer_in_a_single_file_stay_listed(tmp_path):
    torch.save(state_of(gpt2(1)), tmp_path / "optimizer.pt")
    facts = converted(tmp_path / "optimizer.pt", tmp_path / "o.safetensors", "safetensors")
    assert "no place for it" in facts["dropped"]["param_groups"]


def test_a_module_called_state_is_no_optimizer(tmp_path):
    weights = {"state.proj.weight": torch.randn(3, 2), "state.norm.weight": torch.randn(3)}
    converted(save_dcp(weights, tmp_path / "x"), tmp_path / "o.safetensors", "safetensors")
    assert same(load_file(tmp_path / "o.safetensors"), weights)


@pytest.mark.parametrize("holder", ["app", "my.app"])
def test_what_an_entry_holds_together_is_taken_apart(tmp_path, holder):
    weights = gpt2(1)
    state = state_of(weights, by_name=True)
    folder = save_dcp({holder: {"model": weights, "optim": state}, "step": 3}, tmp_path / "app")
    converted(folder, tmp_path / "o.safetensors", "safetensors")
    assert same(load_file(tmp_path / "o.safetensors"), weights)
    (tmp_path / "app").rename(tmp_path / "unknown")
    plain = {name.replace("transformer", "net").replace("attn", "x"): tensor for name, tensor in weights.items()}
    folder = save_dcp({holder: {"model": plain, "optim": state_of(plain, by_name=True)}}, tmp_path / "app")
    converted(folder, tmp_path / "o.pt", "pt", include_optimizer=True)
    made = torch.load(tmp_path / "o.pt", weights_only=True)
    assert same(made["model"], plain)
    assert all(same(made["optimizer"]["state"][name], entry) for name, entry in moments_of(plain).items())


@pytest.mark.parametrize("flat", [False, True])
def test_an_optimizer_state_by_names_goes_into_a_bundle(tmp_path, flat):
    """The layout of get_optimizer_state_dict, nested or flattened, in a file and in a DCP folder."""
    weights = gpt2(1)
    state = state_of(weights, by_name=True)
    if flat:
        settings = {n: g for g in state["param_groups"] for n in g["params"]}
        state = {f"state.{n}.{k}": v for n, entry in state["state"].items() for k, v in entry.items()} | {
            f"param_groups.{n}.{k}": v for n, group in settings.items() for k, v in group.items() if k != "params"
        }
    content = {"model": weights, "optimizer": state, "config": {**CONFIG, "n_layer": 1}}
    torch.save(content, tmp_path / "x.pt")
    save_dcp(content, tmp_path / "x")
    for source, options in (("x.pt", {}), ("x", {"include_optimizer": True})):
        converted(tmp_path / source, tmp_path / f"b{source[1:2]}", "bundle", **options)
        made = torch.load(tmp_path / f"b{source[1:2]}/optimizer.pt", weights_only=True)
        numbers = {n: i for g in made["param_groups"] for n, i in zip(g["param_names"], g["params"], strict=True)}
        entry = moments_of(weights)["transformer.h.0.attn.c_attn.weight"]["exp_avg"]
        assert torch.equal(made["state"][numbers["blocks.0.sa.qkv.weight"]]["exp_avg"], entry.t())
        assert [group["weight_decay"] for group in made["param_groups"]] == [0.01, 0.0]


def test_torch_loads_the_optimizer_of_a_dcp_folder_by_names(tmp_path):
    """dcp.load fills the state dict of a live model and optimizer, as torch's own tutorial does."""
    torch.manual_seed(0)
    weights = gpt2(1)
    folder = write_trainer(tmp_path / "x", 5, weights)
    converted(folder, tmp_path / "dcp", "dcp", include_optimizer=True)
    model = torch.nn.Module()
    for name, tensor in weights.items():
        *path, last = name.split(".")
        module = model
        for word in path:
            if not hasattr(module, word):
                module.add_module(word, torch.nn.Module())
            module = getattr(module, word)
        module.register_parameter(last, torch.nn.Parameter(torch.zeros_like(tensor)))
    decayed = [p for n, p in model.named_parameters() if n.endswith("weight") and ".ln_" not in n]
    others = [p for p in model.parameters() if all(p is not one for one in decayed)]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}])
    target = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    for group in target["optimizer"]["param_groups"]:  # those that AdamW has beside the file's
        for key in set(group) - {"params", "lr", "betas", "eps", "weight_decay"}:
            del group[key]
    with warnings.catch_warnings(action="ignore"):
        dcp.load(target, checkpoint_id=tmp_path / "dcp")
    assert same(target["model"], weights)
    moments = moments_of(weights)
    assert all(same(target["optimizer"]["state"][name], entry) for name, entry in moments.items())
    set_optimizer_state_dict(model, optimizer, target["optimizer"], options=StateDictOptions(strict=False))
    parameter = dict(model.named_parameters())["transformer.h.0.ln_2.bias"]
    assert torch.equal(optimizer.state[parameter]["exp_avg"], moments["transformer.h.0.ln_2.bias"]["exp_avg"])


ORDERS = {
    "GPT2": {},
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {"attention_bias": True, "head_dim": 4},
    "Olmo2": {"attention_bias": True},
    "Gemma": {"head_dim": 4},
    "Gemma2": {"head_dim": 4},
    "Phi": {},
    "GPTNeoX": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
}
"""Families of transformers with as many parameters as each may have, of as few shapes as possible."""


@pytest.mark.full
@pytest.mark.parametrize("kind", ORDERS)
def test_the_order_of_the_trainer_is_that_of_transformers_modules(tmp_path: Path, kind):
    transformers = pytest.importorskip("transformers")
    from transformers.trainer_pt_utils import get_parameter_names

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16, "vocab_size": 40}
    more = {"intermediate_size": 16, "num_key_value_heads": 4, "tie_word_embeddings": False} if kind != "GPT2" else {}
    more |= {"pad_token_id": 0} if kind != "GPT2" else {}
    config = getattr(transformers, f"{kind}Config")(**sizes, **more, **ORDERS[kind])
    model = getattr(transformers, f"{kind}{'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'}")(config)
    model.save_pretrained(tmp_path / "x")
    names = get_parameter_names(model, [torch.nn.LayerNorm], [r"bias", r"norm"])
    every = dict(model.named_parameters())
    groups = [[p for n, p in every.items() if n in names], [p for n, p in every.items() if n not in names]]
    optimizer = torch.optim.AdamW([{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}])
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "x/optimizer.pt")
    converted(tmp_path / "x", tmp_path / "o.pt", "pt", include_optimizer=True)
    made = torch.load(tmp_path / "o.pt", weights_only=True)["optimizer"]
    found = {n: i for g in made["param_groups"] for n, i in zip(g["param_names"], g["params"], strict=True)}
    if kind == "GPTNeoX":  # whose head has another name in files
        found["lm_head.weight"] = found.pop("embed_out.weight")
    assert found.keys() == every.keys()
    for name, number in found.items():
        assert same(made["state"][number], optimizer.state[every[name]])
    converted(tmp_path / "x", tmp_path / "ours", "bundle")
    assert torch.load(tmp_path / "ours/optimizer.pt", weights_only=True)["state"]
