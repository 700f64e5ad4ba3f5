"""This project's GPT in shards, one for each rank (FSDP)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..bundle.bundle import Bundle
from ..loading.fsdp import build_spread, fill_moments, optimizer_state
from ..model import GPT
from ..networks.distributed import ALONE, World
from .gpt import GptKind


@dataclass(frozen=True)
class ShardedGptKind(GptKind):
    """A GPT of which each rank of a world has a shard; each rank reads only the part that it keeps."""

    world: World = ALONE

    def _placed(self, model: GPT) -> GPT:
        self.world.spread(model, model.device.type)
        return model

    def _loaded(self, bundle: Bundle) -> GPT:
        return build_spread(bundle, self.world)

    def _state(self, bundle: Bundle) -> dict[str, Any] | None:
        return optimizer_state(bundle)

    def _fill(self, bundle: Bundle, model: GPT, optimizer: torch.optim.AdamW) -> None:
        fill_moments(bundle, model, optimizer, self.world)
