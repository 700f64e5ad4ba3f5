"""Resume on some ranks and write what they hold to a file: forked.py RANKS tests.makers.reload ROOT OUT PARALLEL."""

from __future__ import annotations

import torch

from core.checkpoint import CheckpointManager
from core.families.family import plain_name
from core.networks.distributed import open_world, whole
from core.training.ranks import WorldRanks


def main(words: list[str]) -> int:
    root, out, parallel = words
    with open_world(parallel) as world, CheckpointManager("dante", root, ranks=WorldRanks(world)) as manager:
        bundle = manager.newest_intact()
        assert bundle is not None and bundle.tokenizer is not None
        model, optimizer, step = manager.initialize_for_training(
            {"device": "cpu"}, bundle.tokenizer["token_kind"], None, 1e-3, bundle=bundle
        )
        names = {p: plain_name(name) for name, p in model.named_parameters()}
        weights = {plain_name(name): whole(tensor) for name, tensor in model.state_dict().items()}
        moments = {names[p]: {k: whole(v) for k, v in s.items()} for p, s in optimizer.state.items()}
        if world.is_first:
            torch.save({"step": step, "weights": weights, "moments": moments}, out)
    return 0
