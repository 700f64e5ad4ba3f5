"""The upstream fixtures of modded-nanogpt: files its own program wrote, and what it computed from them."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load_file

from tests.makers.modded_models import flex_of
from tests.makers.modded_reference import weights_of

SMALL, MEDIUM = "modded_small_16e2da07_d128h1_opt", "modded_medium_06743860_d128h1_opt"
STEP5 = "state_step000005.pt"
FILES = ((SMALL, STEP5), (SMALL, "state_ws8_scalars64.pt"), (MEDIUM, STEP5))
END = 499  # the fixtures' end of text
CASES = [(folder, file, name) for folder, file in FILES for name in ("one_doc_full", "multi_doc_win3")]


@dataclass(frozen=True)
class Case:
    """One forward pass of the program: its ids, and its outputs at some positions."""

    state: dict[str, torch.Tensor]  # as the file has it
    variant: str
    ids: torch.Tensor
    positions: torch.Tensor
    window: int
    expected: dict[str, torch.Tensor]
    facts: dict[str, float]

    @property
    def targets(self) -> torch.Tensor:
        """The next id, and behind the last the first: what the program was given with these ids."""
        return self.ids.roll(-1)

    def flex(self, **settings):
        vocab = self.state["_orig_mod.embed.weight"].shape[0]
        return flex_of(self.state, self.variant, vocab, end=END, **settings)

    def weights(self, dtype: type = np.float64):
        return weights_of(self.state, self.variant, dtype)


@functools.cache
def saved(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def case(shared, folder, file, name) -> Case:
    root = shared / "fixtures" / folder
    facts = json.loads((root / "meta.json").read_text(encoding="utf-8"))["cases"][name]
    entries = load_file(root / "expected.safetensors")
    expected = {key.partition("/")[2]: t for key, t in entries.items() if key.startswith(f"{name}/")}
    variant = "medium" if folder == MEDIUM else "small"
    ids, positions = expected["ids"], expected["positions"]
    state = saved(root / file)["model"]
    return Case(state, variant, ids, positions, facts["sliding_window_num_blocks"], expected, facts)
