"""An average of the weights (EMA): a copy in fp32 that moves a little towards them after each optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..console.words import differences, listed
from ..errors import CheckpointMismatch, InputError
from ..networks.state_dict import local
from ..networks.wrappers import plain_tensors


class Ema:
    """A model's average: `average += (1 - decay) * (weights - average)`, starting at the weights or a saved average.

    It has the names of the model's state dict; tied weights have one average. Tensors that are not floating-point
    equal the model's.

    Raises: InputError for a decay of 0, CheckpointMismatch when a saved average does not fit the model.
    """

    def __init__(self, model: nn.Module, decay: float, saved: Mapping[str, Tensor] | None = None) -> None:
        check_decay(decay)
        if not decay:
            raise InputError("ema is 0, which averages nothing: expected a number above 0 and below 1.")
        self.decay = decay
        live = {name: tensor for name, tensor in plain_tensors(model).items() if isinstance(tensor, Tensor)}
        if saved is not None:
            shapes = [{name: tuple(t.shape) for name, t in side.items()} for side in (live, saved)]
            if faults := differences(shapes[0], shapes[1]):
                raise CheckpointMismatch(f"the average does not fit this model: {listed(faults)}.")
        averages: dict[int, Tensor] = {}
        self._tensors: dict[str, Tensor] = {}
        for name, tensor in live.items():
            start = saved[name] if saved is not None else tensor
            if id(tensor) not in averages:
                averages[id(tensor)] = (
                    start.detach().to(tensor.device, torch.float32, copy=True)
                    if tensor.is_floating_point()
                    else tensor.detach()
                )
            self._tensors[name] = averages[id(tensor)]
        moving = {id(t): t for t in live.values() if t.is_floating_point()}
        self._weights = [local(t.detach()) for t in moving.values()]
        self._averages = [local(averages[i]) for i in moving]
        self._fp32 = all(t.dtype == torch.float32 for t in self._weights)

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights as they are now."""
        weights = self._weights if self._fp32 else [t.float() for t in self._weights]
        torch._foreach_lerp_(self._averages, weights, 1.0 - self.decay)

    def tensors(self) -> dict[str, Tensor]:
        """The average under the names of the model's state dict: what `ema.pt` holds."""
        return dict(self._tensors)

    @contextmanager
    def following(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Update after each step that the optimizer makes while the block runs."""
        # A hook, so that a step that GradScaler skips is skipped here too, and no save is still copying.
        hook: Callable[..., Any] = lambda *_: self.update()  # noqa: E731
        handle = optimizer.register_step_post_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def check_decay(decay: float) -> None:
    """Raise InputError for a decay with which an average would not stay between its weights."""
    if not 0 <= decay < 1:
        raise InputError(f"ema is {decay}, expected a number of at least 0 (none) and below 1.")
