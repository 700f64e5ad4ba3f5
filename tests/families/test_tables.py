"""Every table of every family: its names, prefixes, and shapes that do not fit."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.families.claims import NAMES, TIED
from core.families.family import plain_names
from core.families.identify import FAMILIES, identify, weights_key
from core.families.match import match, numbered
from tests.makers.family_tables import IDS, SIZES, build, named
from tests.makers.limits import processor_seconds


@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
def test_every_table_recognises_what_it_describes(family):
    found = identify(build(family))
    names = {style.name for style in family.styles} or {family.name}
    assert found.family in names and found.program.startswith(family.program.split(" Llama")[0])
    assert found.architecture.n_layer == 9
    assert (found.unplaced, found.missing, found.conflicts) == ([], [], [])
    assert set(found.places) == set(build(family))


@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
def test_each_name_of_a_table_finds_its_own_row(family):
    shapes = build(family)
    plain = plain_names(shapes)
    found = match(family, plain, {name: numbered(name) for name in plain}, shapes)
    assert found.places == {name: name for name in shapes}
    assert set(found.rows.values()) == set(family.tensors)
    table = set(family.tensors)
    assert {*family.signature, family.embedding, family.head} <= table
    assert all(set(names) <= table for names in family.switches.values())
    assert family.positions in {"", *family.tensors} and {*family.tables, *family.some} <= table
    assert set(family.claims.values()) <= {*family.switches, "gated"}
    assert all(set(style.switches) <= {*family.switches, "gated"} for style in family.styles)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "module._orig_mod.", "_orig_mod.module.model."])
@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
def test_prefixes_nest_in_any_order(family, prefix):
    plain, shapes = identify(build(family)), {prefix + name: shape for name, shape in build(family).items()}
    found = identify(shapes)
    said = [note.removeprefix(prefix) for note in found.architecture.notes]
    assert (found.prefix, found.family) == (prefix, plain.family)
    assert replace(found.architecture, notes=said) == plain.architecture
    assert found.places == {prefix + name: name for name in plain.places}


def test_llamas_own_first_word_is_no_prefix():
    shapes = build(named("Hugging Face Llama"))
    assert identify(shapes).prefix == ""
    bare = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    assert (identify(bare).prefix, identify(bare).family) == ("", "hf_qwen3")


def test_compiled_layers_have_the_wrapper_in_the_middle():
    shapes = {re.sub(r"^blocks\.\d+\.", r"\g<0>_orig_mod.", name): s for name, s in build(named("our GPT")).items()}
    found = identify(shapes)
    assert (found.family, found.unplaced, found.missing, found.prefix) == ("fused", [], [], "")


def test_one_tensor_under_two_prefixes_is_refused_with_both_names():
    shapes = build(named("our GPT")) | {"module.ln_f.weight": (256,)}
    found = identify(shapes)
    assert found.family == "unknown"
    assert found.reason.startswith("ln_f.weight and module.ln_f.weight are the same tensor without their prefixes")


def test_mutated_shape_is_a_conflict_that_names_both_shapes():
    shapes = build(named("our GPT"))
    shapes["blocks.3.fwd.net.0.weight"] = (704, 255)
    assert identify(shapes).conflicts == [
        "blocks.3.fwd.net.0.weight is (704, 255), expected (704, 256), for n_embd is 256 by "
        "token_embedding_table.weight (50304, 256)"
    ]


@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_mutated_side_is_a_conflict_that_names_the_tensor(family, data):
    shapes = build(family)
    plain = plain_names(shapes)
    rows = match(family, plain, {name: numbered(name) for name in plain}, shapes).rows
    sides = Counter(side.strip("0123456789 ") for row in rows.values() for side in family.tensors[row])
    shown = [  # a side that no other tensor shows may be anything
        (name, axis)
        for name, row in rows.items()
        for axis, side in enumerate(family.tensors[row])
        if not side.endswith("+") and (side.isdigit() or sides[side.strip("0123456789 ")] > 1)
    ]
    name, axis = data.draw(st.sampled_from(shown))
    shape = list(shapes[name])
    shape[axis] += data.draw(st.integers(1, 1000))
    found = identify({**shapes, name: tuple(shape)})
    assert any(name in sentence and str(tuple(shape)) in sentence for sentence in found.conflicts)
    assert found.architecture.n_layer in (9, shape[axis])


def test_queries_and_keys_that_cannot_fill_one_matrix_are_a_conflict():
    shapes = build(named("Megatron torch_dist, local names"), off=["qkv_bias"])
    shapes["decoder.layers.self_attention.linear_proj.weight"] = (9, 256, 513)
    assert identify(shapes).conflicts == [
        "decoder.layers.self_attention.linear_qkv.weight is (9, 768, 256), expected (9, 513 + an even number, 256), "
        "for q_size is 513 by decoder.layers.self_attention.linear_proj.weight (9, 256, 513)"
    ]


def test_wrong_number_of_sides_is_a_conflict():
    shapes = build(named("our GPT")) | {"ln_f.weight": (256, 1)}
    assert identify(shapes).conflicts == ["ln_f.weight is (256, 1), expected 1 sides: n_embd"]


def test_attention_where_the_program_has_none_is_a_conflict():
    shapes = build(named("modded-nanogpt train_gpt.py, 2025-06")) | {"blocks.7.attn.qkv_w": (3, 512, 256)}
    assert identify(shapes).conflicts == ["blocks.7.attn.qkv_w is there, but this program has none in that layer"]


def test_lost_layer_leaves_the_number_open_and_is_said():
    shapes = {name: shape for name, shape in build(named("our GPT")).items() if not name.startswith("blocks.4.")}
    found = identify(shapes)
    assert found.architecture.n_layer is None
    assert found.conflicts == ["layers 0, 1, 2, 3, 5, 6, 7, 8 are there, 1 in between are not"]


def test_scalars_tell_the_layers_when_one_is_lost():
    shapes = build(named("modded-nanogpt train_gpt_medium.py"), n_layer=12)
    found = identify({name: shape for name, shape in shapes.items() if not name.startswith("blocks.4.")})
    assert found.architecture.n_layer == 12


def test_layers_of_another_kind_at_the_end_count_as_layers():
    shapes = build(named("our GPT"), n_layer=3) | {"blocks.3.moe.gate": (8, 256), "blocks.3.ln1.weight": (256,)}
    found = identify(shapes)
    assert (found.architecture.n_layer, found.unplaced) == (4, ["blocks.3.moe.gate"])
    assert "blocks.3.sa.qkv.weight" in found.missing


def test_mixture_of_experts_with_llamas_attention_is_unknown_and_says_what_is_nearest():
    shapes = {name: s for name, s in build(named("Hugging Face Llama"), n_layer=2).items() if ".mlp." not in name}
    shapes |= {
        f"model.layers.{i}.block_sparse_moe.experts.{j}.w{k}.weight": (704, 256)
        for i in range(2)
        for j in range(8)
        for k in (1, 2, 3)
    }
    found = identify(shapes)
    assert found.family == "unknown"
    assert found.reason == (
        "the nearest is Hugging Face Llama, but in no layer is model.layers.{i}.mlp.gate_proj.weight, "
        "and model.layers.0.block_sparse_moe.experts.0.w1.weight has no place in it"
    )


def test_more_in_each_layer_than_the_program_has_is_said():
    shapes = build(named("Hugging Face Llama"), n_layer=2, off=["qk_norm"])
    shapes |= {f"model.layers.{i}.third_layernorm.weight": (256,) for i in range(2)}
    found = identify(shapes)
    assert (found.family, found.program) == ("hf_llama", "Hugging Face Llama, with tensors of its own")
    assert found.unplaced == [f"model.layers.{i}.third_layernorm.weight" for i in range(2)]


def test_few_names_with_a_place_are_unknown():
    shapes = {"blocks.0.sa.qkv.weight": (768, 256), **{f"vision.{i}.weight": (3,) for i in range(9)}}
    assert identify(shapes).reason == "the nearest is our GPT, but only 1 of 10 tensors have a place in it"


def test_optimizer_is_left_out_and_said():
    shapes = build(named("nanoGPT")) | {"optimizer.state.0.exp_avg": (768, 256), "optim.state.ln.exp_avg": (3,)}
    found = identify(shapes)
    assert found.unplaced == []
    assert found.reason.endswith("have a place, 2 tensors of an optimizer were left out")


@settings(max_examples=200, deadline=None)
@given(family=st.sampled_from(FAMILIES), n_layer=st.sampled_from([2, 4, 10]), data=st.data())
def test_random_subsets_never_miscount_layers(family, n_layer, data):
    shapes = build(family, n_layer=n_layer)
    names = data.draw(st.lists(st.sampled_from(sorted(shapes)), unique=True, min_size=1))
    found = identify({name: shapes[name] for name in names})
    if found.architecture is not None:
        layers = {int(m[1]) for name in names if (m := re.search(r"\b(?:h|layers|blocks)\.(\d+)\.", name))}
        shown = max(layers) + 1 if layers and len(layers) == max(layers) + 1 else None
        assert found.architecture.n_layer in (shown, n_layer if shown is None else shown)
        assert (found.unplaced, found.buffers) == ([], {})
        assert set(found.places) == set(names) and len(found.missing) + len(names) >= len(layers)


@settings(max_examples=200, deadline=None)
@given(family=st.sampled_from(FAMILIES), data=st.data())
def test_random_renames_never_crash_nor_invent_layers(family, data):
    shapes = build(family, n_layer=4)
    words = st.sampled_from(
        ["x", "#", "0", "00", "model", "module", "blocks", "weight", "", "٣", "transformer", "optim"]
    )
    for name in data.draw(st.lists(st.sampled_from(sorted(shapes)), unique=True, max_size=5)):
        shape, parts = shapes.pop(name), name.split(".")
        parts[data.draw(st.integers(0, len(parts) - 1))] = data.draw(words)
        shapes[".".join(parts)] = shape
    weights_key(shapes)
    found = identify(shapes, {"n_layer": 3, "n_head": 7})
    if found.architecture is not None:
        assert found.architecture.n_layer in (None, 4, 3)
        aside = sum("optim." in name for name in shapes)
        assert len(found.places) + len(found.buffers) + len(found.unplaced) == len(shapes) - aside


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=2),
)
fields = st.sampled_from(
    [name for names in NAMES.values() for name in names]
    + [*TIED, "bias", "model_type", "activation", "normalization", "group_query_attention", "swiglu", "mlp_bias"]
)


@settings(max_examples=300, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    config=st.dictionaries(fields, values),
    sizes=st.dictionaries(st.sampled_from(sorted(SIZES)), st.integers(0, 2**40)),
)
def test_no_config_and_no_size_is_too_odd(family, config, sizes):
    found = identify(build(family, n_layer=2, **sizes), config)
    assert found.architecture is None or found.architecture.n_layer in (2, None)


def test_hostile_numbers_in_names_cost_neither_time_nor_memory():
    shapes = {f"blocks.{i * 999}.sa.heads.{i}.key.weight": (64, 256) for i in range(1000)}
    shapes |= {f"blocks.0.sa.heads.{i}.key.weight": (64, 256) for i in range(5000)}
    shapes |= {f"blocks.{i}.ln1.weight": (256,) for i in range(5000)}
    with processor_seconds(10):
        found = identify(shapes)
    assert (found.family, len(found.missing)) == ("lecture", 10_000)


def test_endless_names_cost_no_time_and_have_no_place():
    endless = {"model." * 100_000 + f"x{i}": (1,) for i in range(20)}
    with processor_seconds(10):
        found = identify({**build(named("our GPT")), **endless})
        assert (found.family, found.unplaced, weights_key(endless)) == ("fused", list(endless), "")


def test_ten_thousand_tensors_are_recognised_within_seconds():
    shapes = build(named("Hugging Face Llama"), n_layer=500)
    assert len(shapes) > 9_000
    with processor_seconds(10):
        found = identify({f"model.{name}": shape for name, shape in shapes.items()}, {"num_hidden_layers": 500})
    assert (found.architecture.n_layer, found.conflicts) == (500, [])
