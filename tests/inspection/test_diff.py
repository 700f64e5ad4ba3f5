"""Two checkpoints compared: the fixtures of four programs, and files with one thing changed."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import inspect_model
from core.containers.open import open_container
from core.conversion.migration.migrate import migrate
from core.families import gpt, megatron
from core.families.common_names import TABLES, common_fields, head_and_table, naming, places
from core.inspection.diff.comparison import compare
from core.inspection.diff.side import Side
from core.inspection.diff.text import comparison_facts
from core.inspection.inspect import inspect_path
from tests.makers.comparisons import compared, hf_folder, saved, side_of, text, with_optimizer
from tests.makers.models import started, train_and_save


@pytest.fixture
def nanogpt(shared: Path) -> dict:
    return torch.load(shared / "fixtures/nanogpt_char_biasFalse/ckpt.pt", weights_only=True)


# the fixtures


def test_legacy_file_equals_the_bundle_it_became_with_moments(shared: Path, tmp_path: Path):
    source = Path(shutil.copy(shared / "fixtures/lecture_char/legacy/latest.pt", tmp_path))
    assert [outcome.error for outcome in migrate(tmp_path, [source])] == [None]
    shutil.copytree(tmp_path, bundle := tmp_path / "dante", ignore=shutil.ignore_patterns("latest.pt", "dante"))
    found = compared(source, bundle, moments=True)
    assert (found.a.family, found.b.family) == ("lecture", "fused")
    assert found.different == []
    assert (found.weights.compared, found.moments.compared) == (39, 78)
    assert "3 tensors are made of 36 in A" in found.weights.notes
    assert text(found).endswith("equal in all that was compared")
    assert compared(bundle, source, moments=True).equal


def test_changed_head_of_a_legacy_file_is_found_in_the_fused_tensor(shared: Path, tmp_path: Path):
    original = shared / "fixtures/lecture_char/legacy/latest.pt"
    content = torch.load(original, weights_only=True)
    value = content["model_state_dict"]["blocks.1.sa.heads.2.value.weight"]
    value[5, 7] += 0.25
    exp_avg = content["optimizer_state_dict"]["state"][0]["exp_avg"]
    exp_avg[3, 3] += 1
    torch.save(content, changed := tmp_path / "latest.pt")
    migrate(tmp_path, [changed])
    changed.unlink()
    found = compared(original, tmp_path, moments=True)
    assert found.different == ["weights", "moments"]
    (pair,) = found.weights.different
    before = torch.load(original, weights_only=True)["model_state_dict"]["blocks.1.sa.heads.2.value.weight"][5, 7]
    assert (pair.title, pair.change.elements, pair.change.changed) == ("blocks.1.sa.qkv.weight", 3 * 48 * 48, 1)
    assert pair.change.absolute == abs(value[5, 7].double() - before.double()).item()
    (moment,) = found.moments.different
    assert (moment.title, moment.change.changed) == ("token_embedding_table.weight: exp_avg", 1)


def test_prefixes_of_compiled_models_do_not_count(shared: Path):
    folder = shared / "fixtures/nanogpt_char_biasFalse"
    found = compared(folder / "ckpt.pt", folder / "ckpt_orig_mod.pt", moments=True)
    assert found.equal and (found.weights.compared, found.moments.compared) == (22, 42)
    assert (found.config.same, found.step.same, found.optimizer.same) == (33, 1, 24)


def test_sharded_folder_equals_the_single_one(shared: Path):
    found = compared(shared / "fixtures/hf_gpt2", shared / "fixtures/hf_gpt2_sharded")
    assert found.equal and found.weights.compared == 40
    assert found.weights.notes == [], "both store the same layout"


def test_other_container_with_other_values_is_measured(shared: Path, tmp_path: Path):
    """The .bin beside the fixture was rounded to bfloat16, and stores the tied head."""
    path = Path(shutil.copy(shared / "fixtures/hf_gpt2/pytorch_model.bin.ref", tmp_path / "pytorch_model.bin"))
    theirs = torch.load(path, weights_only=True)
    ours = safetensors.torch.load_file(shared / "fixtures/hf_gpt2/model.safetensors")
    found = compared(shared / "fixtures/hf_gpt2/model.safetensors", path)
    assert found.different == ["weights"] and found.weights.compared == 41
    assert not found.weights.only_a and not found.weights.only_b
    for pair in found.weights.different:
        if pair.title == "lm_head.weight":
            continue
        a, b = ours[pair.title].double(), theirs[pair.title].double()
        assert pair.change.absolute == (a - b).abs().max().item()
        assert pair.change.changed == (a != b).sum().item()
    sizes = [pair.change.absolute for pair in found.weights.different]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 0.003


@pytest.mark.parametrize("bare", [False, True])
def test_nanogpt_equals_the_hugging_face_folder_of_its_weights(tmp_path: Path, shared: Path, nanogpt: dict, bare: bool):
    folder = hf_folder(tmp_path / "hf", nanogpt["model"], bare)
    found = compared(shared / "fixtures/nanogpt_char_biasFalse/ckpt.pt", folder)
    assert (found.a.family, found.b.family) == ("nanogpt", "hf_gpt2")
    assert found.different == []
    assert found.weights.compared == 22
    assert found.weights.notes == [
        "lm_head.weight is not stored in B, which uses its token table for it: that is compared",
        "only B has 19 biases that are all zero, which is the same as none",
        "12 tensors are transposed in B",
    ]
    assert found.step.remark == found.optimizer.remark == "only A has one"
    assert found.config.same == 4, "n_layer, n_head, n_embd, block_size; vocab_size is not in nanoGPT's config"


def test_element_changed_in_a_transposed_matrix_is_found(tmp_path: Path, shared: Path, nanogpt: dict):
    model = {name: tensor.clone() for name, tensor in nanogpt["model"].items()}
    model["transformer.h.2.mlp.c_fc.weight"][200, 3] = 5.0
    model["lm_head.weight"] = model["transformer.wte.weight"]
    found = compared(shared / "fixtures/nanogpt_char_biasFalse/ckpt.pt", hf_folder(tmp_path / "hf", model))
    (pair,) = found.weights.different
    before = nanogpt["model"]["transformer.h.2.mlp.c_fc.weight"][200, 3].item()
    assert (pair.title, pair.change.changed, pair.change.elements) == ("transformer.h.2.mlp.c_fc.weight", 1, 256 * 64)
    assert pair.change.absolute == 5.0 - before and pair.change.relative == (5.0 - before) / 5.0
    assert pair.a.shape == pair.b.shape == (256, 64)


def test_biases_that_are_not_zero_are_a_difference(tmp_path: Path, shared: Path, nanogpt: dict):
    folder = hf_folder(tmp_path / "hf", nanogpt["model"], biases=0.5)
    found = compared(shared / "fixtures/nanogpt_char_biasFalse/ckpt.pt", folder)
    assert found.different == ["weights"] and len(found.weights.only_b) == 19
    assert "transformer.h.{0..2}.ln_1.bias" in text(found)


def test_zeros_count_where_a_program_has_a_choice(tmp_path: Path, nanogpt: dict):
    """nanoGPT can leave biases out, and no program leaves weights out."""
    model = nanogpt["model"]
    plain = saved(tmp_path / "plain.pt", model, iter_num=1)
    biased = saved(tmp_path / "biased.pt", {**model, "transformer.ln_f.bias": torch.zeros(64)}, iter_num=1)
    assert list(compared(plain, biased).weights.only_b) == ["ln_f.bias"]
    folder = hf_folder(tmp_path / "hf", {**model, "transformer.extra.weight": torch.zeros(2, 2)})
    assert list(compared(plain, folder).weights.only_b) == ["transformer.extra.weight"]


def test_head_that_is_no_longer_the_token_table_is_compared_with_it(tmp_path: Path, nanogpt: dict):
    folder = hf_folder(tmp_path / "hf", nanogpt["model"])
    model = {**nanogpt["model"], "lm_head.weight": nanogpt["model"]["lm_head.weight"].clone()}
    model["lm_head.weight"][1, 1] += 1
    found = compared(saved(tmp_path / "ckpt.pt", model, iter_num=40), folder)
    (pair,) = found.weights.different
    assert (pair.title, pair.change.changed) == ("lm_head.weight", 1)


def test_head_of_its_own_that_is_missing_is_a_difference(tmp_path: Path, nanogpt: dict):
    folder = hf_folder(tmp_path / "hf", nanogpt["model"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    found = compared(saved(tmp_path / "ckpt.pt", nanogpt["model"], iter_num=40), folder)
    assert list(found.weights.only_a) == ["lm_head.weight"]


def test_transformer_engine_names_are_those_of_local_layers(shared: Path):
    folder = shared / "fixtures"
    found = compared(*(folder / f"megatron_llama_gqa{end}/exported_model.pt" for end in ("", "_TEnames")))
    assert found.equal and found.weights.compared == 15
    assert found.weights.notes == [
        "only B has 12 buffers, which count for nothing (what Transformer Engine keeps for FP8)"
    ]


def test_families_without_common_names_say_so(shared: Path):
    found = compared(shared / "fixtures/hf_gpt2", shared / "fixtures/hf_llama_gqa_untied")
    assert found.notes == ["no names in common are known for hf_gpt2 and hf_llama: tensors of equal names are compared"]
    assert not found.equal and found.weights.only_a and found.weights.only_b
    assert "note: no names in common are known" in text(found)


def test_weights_of_every_fixture_equal_themselves(shared: Path):
    for path in ("hf_qwen2_tied", "dcp_fsdp2_4ranks/0000002", "modded_small_16e2da07_d128h1_opt/state_step000005.pt"):
        found = compared(shared / "fixtures" / path, shared / "fixtures" / path, moments=True)
        assert found.equal and found.weights.compared == len(found.a.found.weights), path


# what is not tensors


def test_config_tokenizer_step_and_optimizer_differences_are_named(tmp_path: Path):
    made, model, optimizer = started(tmp_path)
    with made:
        train_and_save(made, model, optimizer, 1)
        shutil.copytree(tmp_path / "dante", other := tmp_path / "other")
        optimizer.param_groups[0]["lr"] = 0.5
        train_and_save(made, model, optimizer, 1)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "dropout": 0.25, "mine": 7}))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    chars = [*tokenizer["chars"][:-1], "ß"]
    (other / "tokenizer.json").write_text(json.dumps({**tokenizer, "chars": chars}))
    found = compared(tmp_path / "dante", other)
    assert found.different == ["config", "tokenizer", "step", "optimizer", "weights"]
    assert found.config.different == {"dropout": (0.1, 0.25)} and found.config.only_b == {"mine": 7}
    assert found.tokenizer.different == {"chars": (tokenizer["chars"], chars)}
    assert found.step.different == {"step": (2, 1)}
    assert found.optimizer.different["group 0: lr"] == (0.5, 1e-3)
    assert found.notes == ["the moments of the optimizers are not compared"]
    lines = text(found)
    assert f'{len(chars)} entries, [{len(chars) - 1}] is "\\u00df"' in lines
    assert "  dropout  A 0.1        B 0.25" in lines
    assert "different: config, tokenizer, step, optimizer, weights" in lines


def test_optimizer_settings_compare_by_value(tmp_path: Path):
    a = with_optimizer(tmp_path / "a.pt", {}, lr=torch.tensor(0.25), betas=(0.9, 0.95), fused=True)
    b = with_optimizer(tmp_path / "b.pt", {}, lr=0.25, betas=[0.9, 0.95], fused=1)
    found = compare(a, b, moments=True)
    assert found.optimizer.different == {"group 0: fused": (True, 1)}
    assert found.moments is not None and found.moments.compared == 0


def test_moments_that_only_one_has_are_a_difference(tmp_path: Path):
    a = with_optimizer(tmp_path / "a.pt", {0: {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)}})
    b = with_optimizer(tmp_path / "b.pt", {0: {"step": torch.tensor(4.0)}})
    found = compare(a, b, moments=True)
    assert found.different == ["moments"]
    assert list(found.moments.only_a) == ["w: exp_avg"] and found.moments.faults == ["w: step: 3.0 and 4.0"]
    c = with_optimizer(tmp_path / "c.pt", {0: {"exp_avg": torch.ones(2), "count": 3}})
    assert compare(a, c, moments=True).moments.faults == ["w: step is only in A", "w: count is only in B"]
    assert compare(a, b).equal and "moments of the optimizers are not compared" in text(compare(a, b))


def test_moments_whose_parts_do_not_fit_are_compared_part_by_part(shared: Path, tmp_path: Path):
    original = shared / "fixtures/lecture_char/legacy/latest.pt"
    content = torch.load(original, weights_only=True)
    key = list(content["model_state_dict"]).index("blocks.0.sa.heads.1.key.weight")
    masks = sum("tril" in name for name in list(content["model_state_dict"])[:key])
    content["optimizer_state_dict"]["state"][key - masks]["exp_avg"] = torch.zeros(3)
    torch.save(content, broken := tmp_path / "latest.pt")
    assert compared(broken, broken, moments=True).equal
    moments = compared(original, broken, moments=True).moments
    assert "blocks.0.sa.heads.1.key.weight: exp_avg" in moments.only_b
    assert list(moments.only_a) == ["blocks.0.sa.qkv.weight: exp_avg"]


def test_groups_with_other_parameters_are_a_difference(tmp_path: Path):
    a, b = with_optimizer(tmp_path / "a.pt", {}, lr=1), with_optimizer(tmp_path / "b.pt", {}, lr=1)
    groups = [{"params": [], "lr": 1}, {"params": [0], "lr": 1}]
    b.found.optimizer = {
        "state": {},
        "param_groups": [{**group, "param_names": ["w"][: len(group["params"])]} for group in groups],
    }
    found = compare(a, b)
    assert found.optimizer.different == {"group 0: parameters": (["w"], [])}
    assert found.optimizer.only_b == {"group 1: lr": 1, "group 1: parameters": ["w"]}


def test_state_that_is_of_no_torch_optimizer_is_said(tmp_path: Path):
    tensors = {"w": torch.zeros(2)}
    found = compared(
        saved(tmp_path / "a.pt", tensors, optimizer={"lr": 1}, step=1),
        saved(tmp_path / "b.pt", tensors, optimizer={"state": {}, "param_groups": []}, step=1),
        moments=True,
    )
    assert found.different == ["optimizer"] and "expected state and param_groups" in found.optimizer.remark
    assert found.notes == ["the moments of the optimizers are not compared: their owners are unknown"]


def test_part_that_only_one_has_counts_unless_the_other_is_weights_alone(tmp_path: Path):
    tensors = {"w": torch.zeros(2)}
    whole = saved(tmp_path / "whole.pt", tensors, step=3, config={"a": 1})
    part = saved(tmp_path / "part.pt", tensors, step=3)
    alone = saved(tmp_path / "alone.pt", tensors)
    assert compared(whole, part).different == ["config"]
    assert compared(whole, alone).equal
    assert "config: only A has one" in text(compared(whole, alone))


def test_old_config_is_compared_as_what_it_meant(shared: Path):
    with inspect_path(shared / "fixtures/lecture_char/legacy/latest.pt") as found:
        config = {**found.config, "activation": "relu", "proj_bias": True, "format_version": 2}
        assert compare(Side(found), Side(replace(found, config=config))).config.equal
        changed = Side(replace(found, config={**found.config, "activation": "gelu"}))
        assert compare(Side(found), changed).config.different == {"activation": ("relu", "gelu")}


def test_same_fields_of_two_programs_have_one_name():
    nano = {"n_layer": 12, "n_embd": 64, "block_size": 128, "dropout": 0.1}
    hugging_face = {"num_hidden_layers": 12, "hidden_size": 64, "max_position_embeddings": 128, "n_inner": None}
    assert common_fields({**nano, "activation": "gelu_tanh"}) == common_fields(
        {**hugging_face, "activation_function": "gelu_new"}
    )
    assert common_fields({"activation": "gelu_tanh", "n_embd": 8}) == {"activation": "GELU, tanh form", "n_embd": 8}
    megatron = {"untie_embeddings_and_output_weights": True}
    assert common_fields(megatron) == common_fields({"tie_word_embeddings": False}) == {"tied_head": False}


# laws

VALUES = st.sampled_from([0.0, -0.0, 1.0, -2.5, 3e4, math.inf, -math.inf, math.nan])
KINDS = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
TENSORS = st.builds(
    lambda kind, values, wide: torch.tensor(values[: 4 if wide else 2]).to(kind).reshape((2, 2) if wide else (2,)),
    KINDS,
    st.lists(VALUES, min_size=4, max_size=4),
    st.booleans(),
)
MODELS = st.dictionaries(st.sampled_from(["a", "b.weight", "module.c"]), TENSORS, min_size=1)
PARTS = st.fixed_dictionaries(
    {},
    optional={
        "config": st.dictionaries(st.sampled_from(["n", "m"]), st.integers(0, 1)),
        "tokenizer": st.just({"token_kind": "gpt2"}),
        "step": st.integers(0, 1),
        "optimizer": st.builds(lambda lr: {"state": {}, "param_groups": [{"params": [], "lr": lr}]}, st.integers(0, 1)),
    },
)


def made(folder: Path, number: int, tensors: dict, parts: dict) -> Side:
    path = folder / f"{number}.safetensors"
    safetensors.torch.save_file(tensors, path)
    container = open_container(path)
    return side_of(container, container.tensors, **parts)


@settings(max_examples=60, deadline=None)
@given(MODELS, MODELS, PARTS, PARTS, st.booleans())
def test_comparison_is_symmetric_and_a_checkpoint_equals_itself(
    tmp_path_factory, first, second, parts, others, moments
):
    folder = tmp_path_factory.mktemp("law")
    a, b = made(folder, 1, first, parts), made(folder, 2, second, others)
    there, back = compare(a, b, moments), compare(b, a, moments)
    assert there.different == back.different
    for one, other in ((there.weights, back.weights), (back.weights, there.weights)):
        assert one.only_a.keys() == other.only_b.keys()
        assert {p.name: p.change for p in one.different} == {p.name: p.change for p in other.different}
    assert compare(a, a, moments).equal and compare(b, b, moments).equal
    same = first.keys() == second.keys() and all(
        first[n].dtype == second[n].dtype
        and first[n].numpy(force=True).tobytes() == second[n].numpy(force=True).tobytes()
        if first[n].dtype != torch.bfloat16
        else second[n].dtype == torch.bfloat16
        and torch.equal(first[n].view(torch.int16).flatten(), second[n].view(torch.int16).flatten())
        for n in first
    )
    assert there.weights.equal == (same and all(first[n].shape == second[n].shape for n in first))
    json.dumps(comparison_facts(there), allow_nan=False)


def test_every_family_of_gpt2_has_the_same_common_names(shared: Path):
    rows = {}
    for file in ("lecture_char/legacy/latest.pt", "nanogpt_char_biasFalse/ckpt.pt", "hf_gpt2"):
        with inspect_path(shared / "fixtures" / file) as found:
            side = Side(found)
            rows[side.family] = {re.sub(r"\d+", "{i}", name, count=1) for name in side.tensors}
            assert naming(side.family) == "gpt2" and all(name in gpt.TENSORS for name in rows[side.family])
    assert rows["nanogpt"] - {"lm_head.weight"} < rows["hf_gpt2"]
    assert rows["lecture"] | {"blocks.{i}.sa.qkv.bias"} == rows["hf_gpt2"] | {"lm_head.weight", "lm_head.bias"}


def test_every_row_of_every_table_leads_to_a_tensor():
    for family, (of, table) in TABLES.items():
        known = gpt.TENSORS if of == "gpt2" else megatron.LOCAL
        assert {ours for _, ours, _ in table} <= set(known), family
    assert head_and_table("hf_qwen3") == ("lm_head.weight", "embed_tokens.weight")
    assert head_and_table("modded_small") is None
    assert places("hf_qwen2", ["model.norm.weight"])["norm.weight"].parts == ("model.norm.weight",)


# two steps of one model


def saved_steps(root: Path) -> Path:
    """Steps 1 to 4 of a model with an average and a generator of its own; each has its line in the log."""
    made, model, optimizer = started(root, keep=2, keep_best=0)
    for step in range(1, 5):
        value = torch.tensor([float(step)])
        ema = {name: torch.full_like(tensor, step // 3) for name, tensor in model.state_dict().items()}
        also = {"x": {"n": 3 + step // 4, "t": value}}
        made.save(model, optimizer, step=step, metrics={"val_loss": 5.0 - step}, ema=ema, also=also)
        made.wait()
    made.close()
    lines = [{"step": n, "loss": 1.0, "learning_rate": n * 1e-4, "grad_norm": n / 3} for n in range(1, 5)]
    (root / "dante/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root / "dante"


@pytest.mark.parametrize("by_name", [True, False])
def test_two_steps_of_one_model_are_compared_with_what_one_looks_for_first(tmp_path: Path, capsys, by_name: bool):
    folder = saved_steps(tmp_path)
    named = ["--model_name", "dante", "--checkpoint_root", str(tmp_path)] if by_name else [str(folder)]
    assert inspect_model.main([*named, "--diff", "2", "3"]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith(
        f"A: {folder}/step_00000002 (bundle, fused, step 2)\nB: {folder}/step_00000003 (bundle, fused, step 3)\n\n"
        "                 A       B\n"
        "validation loss  3.0000  2.0000\n"
        "learning rate    0.0002  0.0003\n"
        "gradient norm    0.667   1\n\nconfig: "
    )
    changed = r"^also: 1 compared, 0 equal\n.*\n.*\n    also\.x\.t +1 +0\.333 +1 of 1$"
    assert re.search(changed, shown, re.MULTILINE), shown
    assert shown.endswith("different: step, ema, also\n")
    assert inspect_model.main([*named, "--diff", "3", "newest", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["b"]["measured"] == {"val_loss": 1.0, "learning_rate": 4e-4, "grad_norm": 4 / 3}
    assert facts["ema"]["equal"] and [pair["name"] for pair in facts["also"]["different"]] == ["also.x.t"]
    assert facts["different"] == ["step", "also"] and facts["also"]["faults"] == ["x.n: 3 and 4"]
    assert inspect_model.main([*named, "--diff", "1", "3"]) == 2
    assert capsys.readouterr().err == (
        f"error: {folder}/step_00000001: this step is not kept. Kept steps: 2 (val_loss 3.0000), 3 (val_loss 2.0000); "
        "the newest is 4 (val_loss 1.0000). train.py --keep_steps 1 would have kept it.\n"
    )


def test_an_average_or_objects_that_only_one_of_two_bundles_has_make_them_different(tmp_path: Path):
    folder = saved_steps(tmp_path)
    made, model, optimizer = started(tmp_path, "plain")
    made.save(model, optimizer, step=4)
    made.close()
    found = compared(tmp_path / "plain", folder)
    assert {"ema", "also"} <= set(found.different)
    assert found.ema.faults == ["only B has ema.pt"] and found.also.faults == ["only B has also.pt"]
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    found = compared(folder, tmp_path / "weights.pt")
    assert found.ema.notes == ["only A has ema.pt"] and "ema" not in found.different


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dante", "--diff", "1", "x"], "of the steps of one model: 'x' is neither the number of a step nor newest"),
        (["a", "b", "--diff", "1", "2"], "names both checkpoints, or with one PATH or --model_name two of its steps"),
    ],
)
def test_words_that_name_no_step_are_wrong_use(words, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        inspect_model.main(words)
    assert said in capsys.readouterr().err
