"""Fill an existing module, and its optimizer, from a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..bundle.bundle import Bundle
from ..bundle.folder import MODEL
from ..networks.modded import ModdedGPT
from .modded import refuse_other_shapes
from .tensors import Pairs, fitting, load_moments, read_part


def fill_live(
    bundle: Bundle,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    say: Callable[[str], None],
    strict: bool = True,
) -> None:
    """Copy the weights of a step into a module and its moments into an optimizer; report what was left alone.

    Raises: CheckpointMismatch when names or shapes do not fit; module and optimizer are unchanged then.
    """
    pairs, lines = Pairs(), list[str]()
    if isinstance(module, ModdedGPT):
        refuse_other_shapes(bundle, module)
    else:
        pairs, lines = fitting(bundle, module, strict)
    for line in lines:
        say(f"{bundle.path(MODEL)}: {line}")
    if optimizer is not None:
        load_moments(bundle, module, optimizer, say, strict)
    if isinstance(module, ModdedGPT):
        module.load_state_dict(read_part(bundle.weights))
    with torch.no_grad():
        for live, saved in pairs:
            live.copy_(saved)
