"""A model sharded over ranks (FSDP): filled from a step of any kind, plain or in any number of shards."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..bundle.bundle import CONFIG, TOKENIZER, Bundle
from ..bundle.contradictions import check_fit
from ..bundle.parts import ShardedFile
from ..data.tokenizer import tokenizer_from_state
from ..model import GPT
from ..networks.device import resolve_device
from ..networks.distributed import World
from ..networks.state_dict import local
from .spread import block_like, empty_like, fill_shards
from .tensors import load_optimizer, load_weights, recorded_dtype


def build_spread(bundle: Bundle, world: World) -> GPT:
    """Build the model of a bundle and shard it over the ranks, each of which reads only the part that it keeps.

    Raises: CheckpointMismatch as `load_model`.
    """
    config = check_fit(bundle)
    device = resolve_device(config.device, str(bundle.path(CONFIG)))
    with torch.device("meta"):
        model = GPT(config)
    model.retie()
    stored = getattr(torch, next(iter(bundle.weights.tensors.values())).dtype)
    model.to(dtype=recorded_dtype(bundle) or stored)
    world.spread(model, device.type)
    model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    if isinstance(bundle.weights.source, ShardedFile):
        fill_shards(bundle.weights.source, parameters, alone=world.size == 1)
    else:
        tensors = load_weights(bundle)
        with torch.no_grad():
            for name, parameter in parameters.items():
                local(parameter).copy_(local(block_like(tensors[name], parameter)))
    model.requires_grad_(True)
    model.step = bundle.step
    if bundle.tokenizer is not None:
        model.tokenizer = tokenizer_from_state(bundle.tokenizer, None, str(bundle.path(TOKENIZER)))
    return model.train()


def optimizer_state(bundle: Bundle) -> dict[str, Any] | None:
    """The optimizer state of a bundle; if it is in shards, without its moments, which `fill_moments` reads."""
    if not bundle.has_optimizer or bundle.optimizer is None:
        return None
    if not isinstance(bundle.optimizer.source, ShardedFile):
        return load_optimizer(bundle)
    bundle.optimizer.source.refuse_foreign()
    content = bundle.optimizer.content
    entries = {name: {**entry, "step": 0.0} for name, entry in content["state"].items()}
    return {"state": entries, "param_groups": content["param_groups"]}


def fill_moments(bundle: Bundle, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
    """Fill an optimizer that was made from the result of `optimizer_state` with the moments in the shards."""
    if bundle.optimizer is None or not isinstance(bundle.optimizer.source, ShardedFile) or not bundle.has_optimizer:
        return
    targets: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if key != "step":
                value = optimizer.state[parameter][key] = empty_like(parameter)
            targets[f"state.{name}.{key}"] = value
    fill_shards(bundle.optimizer.source, targets, alone=world.size == 1)
