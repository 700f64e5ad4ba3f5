"""What torch.compile, FSDP, checkpoint_wrapper and Fabric add to names, anywhere in them, changes no model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.families.family import HELD
from core.families.identify import identify, weights_key
from tests.makers.conversions import converted
from tests.makers.nanogpt_files import TODAY, ckpt

PLACES = st.dictionaries(st.integers(0, 5), st.lists(st.sampled_from(HELD), min_size=1, max_size=3), max_size=3)


def wrapped(name: str, places: dict[int, list[str]]) -> str:
    """A name with the words of wrappers before some of its own."""
    words = name.split(".")
    return ".".join(word for i, own in enumerate(words) for word in (*places.get(i, ()), own))


def test_the_names_are_those_under_which_wrappers_hold_their_module():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_WRAPPED_MODULE

    assert {_CHECKPOINT_WRAPPED_MODULE, "_fsdp_wrapped_module", "_orig_mod", "_forward_module"} <= set(HELD)


@settings(max_examples=60, deadline=None)
@given(PLACES, st.sampled_from(["", "module.", "model.", "state_dict.net."]))
def test_a_model_is_recognised_under_wrapped_names(places, before):
    plain = {
        "transformer.wte.weight": (65, 32),
        "transformer.wpe.weight": (8, 32),
        "transformer.ln_f.weight": (32,),
        **{f"transformer.h.{i}.{part}.weight": shape for i in range(2) for part, shape in SIDES.items()},
    }
    shapes = {before + wrapped(name, places): shape for name, shape in plain.items()}
    key = weights_key(shapes)
    found = identify({name.removeprefix(key): shape for name, shape in shapes.items()})
    assert found.family == "nanogpt" and not found.missing and not found.unplaced
    assert set(found.places.values()) == set(plain)


SIDES = {
    "ln_1": (32,),
    "attn.c_attn": (96, 32),
    "attn.c_proj": (32, 32),
    "ln_2": (32,),
    "mlp.c_fc": (128, 32),
    "mlp.c_proj": (32, 128),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A file of nanoGPT, and the bundle that it becomes."""
    folder = tmp_path_factory.mktemp("plain")
    ckpt(folder / "ckpt.pt", order=TODAY)
    converted(folder / "ckpt.pt", folder / "bundle", "bundle")
    return folder


def renamed(source: Path, target: Path, weights: Callable[[str], str], moments: Callable[[str], str]) -> None:
    """The file with other names, also of the parameters that its optimizer lists."""
    content = torch.load(source, weights_only=True)
    names = [name for name in content["model"] if name != "lm_head.weight"]
    groups = content["optimizer"]["param_groups"]
    for group, names_of_group in zip(groups, TODAY(names, content["model"]), strict=True):
        group["param_names"] = [moments(name) for name in names_of_group]
    content["model"] = {weights(name): tensor for name, tensor in content["model"].items()}
    torch.save(content, target)


BY = {
    "plain": lambda name: name,
    "compile": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module._orig_mod.{name}",
    "Fabric": lambda name: f"_forward_module._orig_mod.{name}",
    "FSDP": lambda name: wrapped(name, {0: ["_fsdp_wrapped_module"], 3: ["_fsdp_wrapped_module"]}),
    "FSDP and checkpoints": lambda name: wrapped(
        name, {0: ["_fsdp_wrapped_module"], 3: ["_fsdp_wrapped_module", "_checkpoint_wrapped_module"]}
    ),
}


@pytest.mark.parametrize(
    ("weights", "moments"),
    [*(("plain", by) for by in BY), *((by, "plain") for by in BY), ("FSDP", "DDP"), ("Fabric", "FSDP")],
)
def test_weights_and_moments_are_those_of_the_plain_file_under_any_two_wrappers(plain, tmp_path, weights, moments):
    renamed(plain / "ckpt.pt", tmp_path / "ckpt.pt", BY[weights], BY[moments])
    facts = converted(tmp_path / "ckpt.pt", tmp_path / "bundle", "bundle")
    assert not [note for note in facts["notes"] if "optimizer" in note]
    for file in ("model.pt", "optimizer.pt"):
        assert (tmp_path / "bundle" / file).read_bytes() == (plain / "bundle" / file).read_bytes()


@pytest.mark.parametrize("word", HELD)
def test_two_models_under_one_name_are_refused_and_named(word):
    shapes = {"transformer.h.0.attn.c_attn.weight": (96, 32), f"transformer.{word}.h.0.attn.c_attn.weight": (96, 32)}
    found = identify(shapes)
    assert found.family == "unknown"
    assert "are the same tensor without their prefixes" in found.reason and word in found.reason
