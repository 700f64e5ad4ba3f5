"""modded-nanogpt of 2024-10 and 11 has nanochat's names: it is told by the entries of its files, or by a tied head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.families.identify import identify
from core.inspection.inspect import inspect_path
from tests.makers.conversions import converted, tensors_of

PROGRAM = "modded-nanogpt train_gpt2.py, 2024-10 and 2024-11"


def weights(prefix: str = "", *, tied: bool = True, later: bool = False) -> dict[str, torch.Tensor]:
    """The names of its first version; `later` adds those of November."""
    made = {"transformer.wte.weight": torch.randn(128, 64)}
    for i in range(4):
        for name in ("c_q", "c_k", "c_v", "c_proj"):
            made[f"transformer.h.{i}.attn.{name}.weight"] = torch.randn(64, 64)
        made[f"transformer.h.{i}.mlp.c_fc.weight"] = torch.randn(256, 64)
        made[f"transformer.h.{i}.mlp.c_proj.weight"] = torch.randn(64, 256)
        if later:
            made[f"transformer.h.{i}.attn.lamb"], made[f"transformer.h.{i}.lambdas"] = torch.tensor(0.5), torch.ones(2)
    made["lm_head.weight"] = made["transformer.wte.weight"] if tied else torch.randn(128, 64)
    if later:
        made["skip_weights"] = torch.ones(2)
    return {prefix + name: tensor for name, tensor in made.items()}


def program(path: Path, content: dict) -> str:
    torch.save(content, path)
    with inspect_path(path) as found:
        assert not found.identity.missing and not found.identity.unplaced
        return found.identity.program


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("later", [True, False])
def test_a_state_step_file_is_of_modded_nanogpt(tmp_path, prefix, tied, later):
    content = {"step": 100, "code": "import os", "model": weights(prefix, tied=tied, later=later), "optimizers": []}
    assert program(tmp_path / "state_step000100.pt", content) == PROGRAM
    converted(tmp_path / "state_step000100.pt", tmp_path / "x.pt", "pt")
    held = {name.removeprefix("model.").removeprefix(prefix) for name in tensors_of(tmp_path / "x.pt")}
    assert held >= set(weights(later=later)) - {"lm_head.weight"}


def test_bare_weights_are_told_by_a_tied_head_or_by_tensors_that_nanochat_has_not(tmp_path):
    assert program(tmp_path / "tied.pt", weights()) == PROGRAM
    assert program(tmp_path / "later.pt", weights(tied=False, later=True)) == PROGRAM
    assert program(tmp_path / "neither.pt", weights(tied=False)) == "nanochat"


def test_files_of_nanochat_stay_nanochats(tmp_path):
    made = weights("_orig_mod.", tied=False) | {"resid_lambdas": torch.ones(4), "x0_lambdas": torch.ones(4)}
    assert program(tmp_path / "model_000100.pt", made) == "nanochat"
    assert identify({name: tuple(t.shape) for name, t in weights(tied=False).items()}).family == "nanochat"
