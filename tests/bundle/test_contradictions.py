"""Config, tokenizer, weights and optimizer that are not of one model: both values, and the one that would fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import CheckpointMismatch
from core.families.fused import recognise
from tests.makers.doors import (
    OF_A_FILE,
    OF_A_FOLDER,
    changed,
    edit,
    generate,
    legacy,
    load,
    looked_at,
    refused,
    single,
    train,
)
from tests.makers.generations import CHARS, SIZES, TOKENIZER, FusedGPT, batch, write_old_bundle, write_single_file

GPT2 = {"token_kind": "gpt2"}
TABLE = "token_embedding_table.weight"
LOST = "it was saved incompletely"


# Configs that do not fit

MISFITS = {
    "n_layer": (4, "n_layer is 4, but the tensors have 2 layers. Set n_layer to 2"),
    "n_embd": (48, "n_embd is 48, but token_embedding_table.weight has 24 columns. Set n_embd to 24"),
    "block_size": (99, "block_size is 99, but position_embedding_table.weight has 12 rows. Set block_size to 12"),
    "vocab_size": (20, "vocab_size is 20, but token_embedding_table.weight has 17 rows. Set vocab_size to 17"),
    "bias": (True, "bias is true, but blocks.0.sa.qkv.bias is not there. Set bias to false"),
    "proj_bias": (True, "proj_bias is true, but blocks.0.sa.proj.bias is not there. Set proj_bias to false"),
    "mlp_bias": (False, "mlp_bias is false, but blocks.0.fwd.net.0.bias is there. Set mlp_bias to true"),
    "norm_bias": (False, "norm_bias is false, but blocks.0.ln1.bias is there. Set norm_bias to true"),
    "head_bias": (False, "head_bias is false, but lm_head.bias is there. Set head_bias to true"),
    "tied_head": (
        True,
        "tied_head is true, but lm_head.weight in {file} has other values than token_embedding_table.weight. "
        "Set tied_head to false",
    ),
}


@pytest.mark.parametrize("field", MISFITS)
def test_field_that_does_not_fit_says_both_values_and_the_one_that_would(old, folder, field):
    value, said = MISFITS[field]
    write_old_bundle(folder, old.fused, None, step=3)
    edit(folder / "config.json", **{field: value})
    for door in OF_A_FOLDER:
        refused(door, folder, str(folder / "config.json"), said.format(file="model.pt"), kind=CheckpointMismatch)
    if field != "tied_head":  # values are not read for looking
        assert f"contradiction: {folder / 'config.json'} does not fit model.pt: {said}\n" in looked_at(folder)[0]
    single(folder, old.fused, None, config={**old.fused.config, field: value})
    refused(legacy, folder, str(folder / "latest.pt"), said.format(file="latest.pt"), kind=CheckpointMismatch)


def test_several_fields_that_do_not_fit_are_all_listed_with_tokenizer_and_optimizer(old, folder):
    fields = [field for field in MISFITS if field not in ("tied_head", "proj_bias")]
    moments = changed(old.moments, lambda s: s["state"][0].update(exp_avg=torch.zeros(3, 3)))
    write_old_bundle(folder, old.fused, moments, step=3)
    edit(folder / "config.json", **{field: MISFITS[field][0] for field in fields})
    edit(folder / "tokenizer.json", **GPT2)
    sentences = [
        *(MISFITS[field][1] for field in fields),
        f"{folder / 'tokenizer.json'}: gpt2 has 50257 ids, but vocab_size is 20 in {folder / 'config.json'}",
        f"{folder / 'optimizer.pt'}: optimizer state: {TABLE}: exp_avg is (3, 3), expected (17, 24)",
    ]
    for door in (generate, load):
        refused(door, folder, *sentences)
    out = looked_at(folder)[0]
    assert [sentence for sentence in sentences if sentence not in out] == []


@pytest.mark.parametrize(("heads", "fits"), [(2, 3), (4, 3), (1, 3)])
def test_other_number_of_heads_than_the_tensors_have_would_compute_something_else(old, folder, heads, fits):
    said = f"n_head is {heads}, but the tensors have {fits} heads. Set n_head to {fits}"
    single(folder, old.lecture, None, config={**old.lecture.config, "n_head": heads})
    for door in OF_A_FILE:
        refused(door, folder, f"{folder / 'latest.pt'} does not fit its weights: {said}.", kind=CheckpointMismatch)
    assert f"contradiction: {folder / 'latest.pt'} does not fit its weights: {said}\n" in looked_at(folder)[0]


@pytest.mark.parametrize("layers", [2**31 - 1, 10**6])
def test_endless_layers_are_refused_at_once(old, folder, layers):
    write_old_bundle(folder, old.fused, None, step=3)
    edit(folder / "config.json", n_layer=layers)
    refused(generate, folder, f"n_layer is {layers}, but the tensors have 2 layers. Set n_layer to 2.")
    names = {f"blocks.{i}.ln1.weight": torch.ones(24) for i in (0, 2)}
    torch.save({**names, "token_embedding_table.weight": torch.ones(17, 24)}, folder / "model.pt")
    refused(generate, folder, f"n_layer is {layers}, but the tensors have 2 layers")


def test_heads_that_do_not_divide_a_huge_width_are_refused_at_once(old, folder):
    write_old_bundle(folder, old.fused, None, step=3)
    edit(folder / "config.json", n_embd=2**31 - 1, n_head=6)
    refused(generate, folder, "n_embd 2147483647 is not divisible by n_head 6; n_head may be 1.")


# Tokenizers

TOKENIZERS = {
    "too many characters": ({"chars": [*CHARS, "x", "y"]}, "19 characters, but vocab_size is 17"),
    "far too few rows for gpt2": (GPT2, "gpt2 has 50257 ids, but vocab_size is 17"),
    "unknown kind": ({"token_kind": "bert"}, "token_kind is 'bert', expected char, gpt2 or hf"),
}


@pytest.mark.parametrize("door", [generate, load])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizer_of_another_model_is_named_with_both_numbers(old, folder, door, kind):
    change, said = TOKENIZERS[kind]
    write_old_bundle(folder, old.fused, None, step=3)
    edit(folder / "tokenizer.json", **change)
    message = refused(door, folder, f"{folder / 'tokenizer.json'}: ", said, kind=CheckpointMismatch)
    assert "vocab_size" not in said or message.endswith(f"{folder / 'config.json'}. It does not fit this model.")
    single(folder, old.fused, None, tokenizer={**TOKENIZER, **change})
    refused(legacy, folder, f"{folder / 'latest.pt'}: ", said, kind=CheckpointMismatch)


@pytest.mark.parametrize("rows", [50256, 50240])
def test_gpt2_with_too_few_rows_is_refused_and_with_padding_taken(folder, rows):
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 2}
    write_single_file(folder / "latest.pt", FusedGPT(**sizes, vocab_size=rows), step=1, tokenizer=GPT2)
    refused(legacy, folder, f"gpt2 has 50257 ids, but vocab_size is {rows} in {folder / 'latest.pt'}")
    write_single_file(folder / "latest.pt", FusedGPT(**sizes, vocab_size=50304), step=1, tokenizer=GPT2)
    assert legacy(folder) == 1


def test_characters_far_fewer_than_rows_are_of_another_model(folder):
    sizes = {**SIZES, "vocab_size": len(CHARS) + 128}
    write_single_file(folder / "latest.pt", FusedGPT(**sizes), step=1)
    refused(legacy, folder, "17 characters, but vocab_size is 145", "It does not fit this model.")


# Optimizers

OTHER = "It does not fit this model; --init_from_model starts a new model from the weights alone."


def without_last(state: dict[str, Any]) -> None:
    state["state"].pop(state["param_groups"][0]["params"].pop())


def split(state: dict[str, Any]) -> None:
    group = state["param_groups"][0]
    state["param_groups"] = [{**group, "params": part} for part in (group["params"][:5], group["params"][5:])]


def first(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["state"][0].update(values)


def group(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["param_groups"][0].update(values)


OPTIMIZERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another shape": (first(exp_avg=torch.zeros(3, 3)), f"{TABLE}: exp_avg is (3, 3), expected (17, 24)"),
    "too few": (without_last, "found 25 parameters without names, expected 26"),
    "too many": (lambda s: s["param_groups"][0]["params"].append(99), "found 27 parameters without names, expected 26"),
    "groups that do not add up": (split, "found 5 + 21 parameters without names, expected 26, or 11 + 15"),
    "two names": (group(param_names=["a", "b"]), "26 parameters have 2 names"),
    "names of another model": (
        lambda s: group(param_names=[f"p{i}" for i in range(26)])(s),
        f"{TABLE} is missing; position_embedding_table.weight is missing",
    ),
    "names that are numbers": (group(param_names=list(range(26))), "param_names are not the names of parameters"),
    "names that are a number": (group(param_names=3), "param_names are not the names of parameters"),
    "a parameter twice": (group(params=[0, *range(25)]), "params are not the numbers of parameters, each once"),
    "a list as a number": (group(params=[[0], *range(1, 26)]), "params are not the numbers of parameters, each once"),
    "an entry that is text": (lambda s: s["state"].update({0: "x"}), "state[0] is str, expected dict"),
    "a list as a moment": (first(exp_avg=[1.0]), f"{TABLE}: exp_avg is list, expected a tensor (17, 24)"),
    "nothing as a moment": (first(exp_avg=None), f"{TABLE}: exp_avg is NoneType, expected a tensor (17, 24)"),
    "text as a count": (first(step="x"), f"{TABLE}: step is str, expected a number"),
    "no groups": (
        lambda s: s.pop("param_groups"),
        "found state, expected state and param_groups (dict, list of dicts)",
    ),
    "lecture: a head without moments": (
        lambda s: s["state"].pop(2),
        "the parts of blocks.0.sa.qkv.weight have different entries",
    ),
    "nothing": (lambda s: s.clear(), "found nothing, expected state and param_groups (dict, list of dicts)"),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizer_of_another_model_is_refused_by_every_door(old, folder, kind):
    change, said = OPTIMIZERS[kind]
    is_lecture = kind.startswith("lecture")
    model = old.lecture if is_lecture else old.fused
    state = changed(old.lecture_moments if is_lecture else old.moments, change)
    single(folder, model, None, optimizer_state_dict=state)
    for door in OF_A_FILE:
        refused(door, folder, f"{folder / 'latest.pt'}: optimizer state: {said}", OTHER, kind=CheckpointMismatch)
    (folder / "latest.pt").unlink()
    write_old_bundle(folder, model, state, step=3)
    for door in OF_A_FOLDER:
        refused(door, folder, f"{folder / 'optimizer.pt'}: optimizer state: {said}", OTHER, kind=CheckpointMismatch)
    assert f"contradiction: {folder / 'optimizer.pt'}: optimizer state: {said}" in looked_at(folder)[0]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_another_kind_of_optimizer_cannot_be_resumed_but_its_model_generates(folder, kind):
    model = FusedGPT(**SIZES)
    settings = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    moments = kind(model.parameters(), lr=0.1, **settings)
    model(batch(model)[0]).sum().backward()
    moments.step()
    has = {"SGD": "momentum_buffer", "Adagrad": "step, sum", "RMSprop": "square_avg, step"}[kind.__name__]
    said = f"optimizer state: {TABLE} has {has}, expected exp_avg, exp_avg_sq, step"
    write_old_bundle(folder, model, moments, step=3)
    refused(train, folder, f"{folder / 'optimizer.pt'}: {said}", OTHER, kind=CheckpointMismatch)
    assert generate(folder) == 3


@pytest.mark.parametrize("count", [9, torch.tensor(9.0)], ids=["number", "tensor"])
def test_moments_of_heads_with_different_counts_are_no_moments_of_one_matrix(old, folder, count):
    def change(state: dict[str, Any]) -> None:
        for entry in state["state"].values():
            entry["step"] = type(count)(3) if isinstance(count, int) else torch.tensor(3.0)
        state["state"][2]["step"] = count

    single(folder, old.lecture, None, optimizer_state_dict=changed(old.lecture_moments, change))
    numbers = "[3, 9]" if isinstance(count, int) else "[3.0, 9.0]"
    said = f"the parts of blocks.0.sa.qkv.weight were updated {numbers} times"
    for door in (train, load, legacy):
        refused(door, folder, f"{folder / 'latest.pt'}: optimizer state: {said}", OTHER, kind=CheckpointMismatch)


@pytest.mark.parametrize(
    ("model", "other", "found", "wanted"), [("fused", "lecture", 44, 26), ("lecture", "fused", 26, 44)]
)
def test_optimizer_of_the_other_generation_says_both_numbers(old, folder, model, other, found, wanted):
    moments = old.moments if other == "fused" else old.lecture_moments
    write_old_bundle(folder, getattr(old, model), moments, step=3)
    for door in OF_A_FOLDER:
        refused(
            door, folder, f"{folder / 'optimizer.pt'}: optimizer state: found {found} parameters", f"{wanted}", OTHER
        )


# State dicts


def weights_refused(folder: Path, model: Any, weights: dict, *said: str) -> None:
    """Both forms of checkpoint refuse the weights with the same words."""
    single(folder, model, None, model_state_dict=weights)
    for door in OF_A_FILE:
        refused(door, folder, str(folder / "latest.pt"), *said, kind=CheckpointMismatch)
    (folder / "latest.pt").unlink()
    write_old_bundle(folder, model, None, step=3)
    torch.save(weights, folder / "model.pt")
    for door in OF_A_FOLDER:
        refused(door, folder, *said, kind=CheckpointMismatch)
    out = looked_at(folder)[0]
    assert "contradiction: " in out and said[0] in out


def without(pattern: str) -> Callable[[dict], dict]:
    return lambda weights: {name: t for name, t in weights.items() if not re.search(pattern, name)}


def more(**tensors: torch.Tensor) -> Callable[[dict], dict]:
    return lambda weights: weights | tensors


ONE = f"1 of 26 tensors are not there: {LOST}"
QUERY, VALUE = "blocks.0.sa.heads.1.query.weight", "blocks.1.sa.heads.2.value.weight"
PARTS = "missing: " + ", ".join(f"blocks.1.sa.heads.2.{part}.weight" for part in ("query", "key", "value"))
NO_PLACE = "without a place in this model: " + ", ".join(f"extra.{i}" for i in range(10)) + " and 36 more."
WEIGHTS: dict[str, tuple[str, Callable[[dict], dict], list[str]]] = {
    "46 more": (
        "fused",
        more(**{f"extra.{i}": torch.ones(1) for i in range(46)}),
        ["46 tensors are too many: something was added to the model that saved it", NO_PLACE],
    ),
    "no layer 0": (
        "fused",
        without(r"^blocks\.0\."),
        [f"10 of 26 tensors are not there: {LOST}", "missing: blocks.0.ln1.weight, blocks.0.ln1.bias, "],
    ),
    **{
        f"no {name}": ("fused", without(f"^{name}$"), [ONE, f"missing: {name}"])
        for name in ("blocks.1.sa.qkv.weight", TABLE, "ln_f.bias", "blocks.0.fwd.net.2.weight")
    },
    "no head, which is no tied one": (
        "fused",
        without("^lm_head.weight"),
        ["tied_head is false, but lm_head.weight is not there. Set tied_head to true if the head was the token table"],
    ),
    "no matrix of one head": ("lecture", without(VALUE), [f"1 of 44 tensors are not there: {LOST}; missing: {VALUE}"]),
    "no head of one layer": (
        "lecture",
        without(r"^blocks\.1\.sa\.heads\.2\."),
        [f"3 of 44 tensors are not there: {LOST}", PARTS],
    ),
    "no last head": (
        "lecture",
        without(r"\.heads\.2\."),
        [
            "blocks.0.sa.qkv.weight is (48, 24), expected (72, 24)",
            "n_head is 3, but the tensors have 2 heads: it was saved incompletely",
        ],
    ),
    "a head of another shape": (
        "lecture",
        more(**{QUERY: torch.ones(3, 24)}),
        [f"{QUERY} is (3, 24), but blocks.0.sa.heads.0.query.weight is (8, 24)"],
    ),
    "two prefixes": (
        "fused",
        more(**{f"_orig_mod.module.{TABLE}": torch.ones(17, 24)}),
        [f"{TABLE} and _orig_mod.module.{TABLE} are the same tensor without their prefixes"],
    ),
    "both spellings": (
        "lecture",
        more(**{"blocks.0.fwd.net.0.weight": torch.ones(96, 24)}),
        ["blocks.0.ffwd.net.0.weight and blocks.0.fwd.net.0.weight are two names of blocks.0.fwd.net.0.weight"],
    ),
    **{
        dtype: (
            "fused",
            more(**{"ln_f.bias": torch.ones(24).to(getattr(torch, dtype))}),
            [f"ln_f.bias is {dtype}, expected float32, bfloat16, float16, float64"],
        )
        for dtype in ("int64", "bool", "float8_e4m3fn", "complex64")
    },
    "nothing": ("fused", without(""), ["it has no tensors"]),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_not_of_the_config_are_told_by_name(old, folder, kind):
    model, change, said = WEIGHTS[kind]
    weights_refused(folder, getattr(old, model), change(getattr(old, model).state_dict()), *said)


def test_weights_of_nanogpt_in_the_place_of_ours_are_told_as_another_programs(shared, old, folder):
    content = torch.load(shared / "fixtures" / "nanogpt_char_biasFalse" / "ckpt.pt", weights_only=True)
    count = len(content["model"])
    said = f"none of its {count} tensors has a name of this model's own: they are another program's"
    weights_refused(
        folder, old.fused, content["model"], said, "without a place in this model: transformer.wte.weight, "
    )


def test_checkpoint_of_nanogpt_in_the_place_of_ours_is_told_by_its_entries(shared, folder):
    folder.mkdir()
    data = (shared / "fixtures" / "nanogpt_char_biasFalse" / "ckpt.pt").read_bytes()
    (folder / "latest.pt").write_bytes(data)
    found = "found the entries model, optimizer, model_args, iter_num, best_val_loss, config"
    remedy = f"inspect_model.py shows its contents, and convert_checkpoints.py {folder / 'latest.pt'} DST --to bundle "
    for door in OF_A_FILE:
        refused(
            door, folder, f"{folder / 'latest.pt'}: {found}, expected the entries model_state_dict and config", remedy
        )
    assert "iter_num" in looked_at(folder / "latest.pt")[0]


def test_head_with_an_absurd_number_costs_nothing(folder):
    names = {f"blocks.{i}.sa.heads.9999.key.weight": torch.zeros(1, 1) for i in range(200)}
    with pytest.raises(CheckpointMismatch, match="a head has the number 9999, but there are only 200 tensors in all"):
        recognise(names)
