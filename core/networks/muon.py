"""Muon for the matrices of a modded-nanogpt model and AdamW for the rest, as one optimizer.

Muon: momentum, made orthogonal by a Newton-Schulz iteration in bf16. A parameter [n, rows, columns] is n matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .modded import ModdedGPT

NamedParameters = list[tuple[str, nn.Parameter]]
Coefficients = Sequence[tuple[float, float, float]]

MOMENTUM = (0.85, 0.95)
"""Muon's momentum at the start and after the warm-up."""

MOMENTUM_WARMUP = 300
"""Steps over which the momentum grows."""

BETAS, EPS = (0.8, 0.95), 1e-10
"""Settings of AdamW."""

STACKED = ("cuda",)
"""Where parameters of one shape are updated together: a processor gains nothing, and keeps its bits."""

STACK = 2**27
"""Numbers that the iteration then takes at once: it holds some copies of them in bf16 beside the step."""

TINY = 1e-7
"""Added to a norm before dividing by it."""


def momentum_at(step: int) -> float:
    """The momentum of Muon in the update that follows `step` updates."""
    share = min(step / MOMENTUM_WARMUP, 1.0)
    return (1 - share) * MOMENTUM[0] + share * MOMENTUM[1]


def orthogonal(matrices: Tensor, coefficients: Coefficients) -> Tensor:
    """Bring the singular values of each matrix [..., rows, columns] near 1, in bf16.

    Each step of the iteration maps a singular value s to a s + b s^3 + c s^5.
    """
    x = matrices.bfloat16().reshape(-1, *matrices.shape[-2:])
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT  # the smaller Gram matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + TINY)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for parameters whose last two axes are a matrix; others count matrices.

    (`torch.optim.Muon` takes matrices alone, and one triple of coefficients for all steps of the iteration.)
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, coefficients: Coefficients) -> None:
        defaults = {"lr": lr, "momentum": MOMENTUM[1], "weight_decay": 0.0, "coefficients": tuple(coefficients)}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for alike in _alike([p for p in group["params"] if p.grad is not None]):
                grads, buffers = [p.grad for p in alike if p.grad is not None], [self._buffer(p) for p in alike]
                torch._foreach_lerp_(buffers, grads, 1 - momentum)
                averages = torch._foreach_lerp(grads, buffers, momentum)
                updates = orthogonal(torch.stack(averages), group["coefficients"]).to(alike[0].dtype).unbind()
                # The update of a tall matrix is scaled to be as large per row as that of a square one.
                scale = max(1.0, alike[0].size(-2) / alike[0].size(-1)) ** 0.5
                torch._foreach_mul_(alike, 1 - lr * group["weight_decay"])
                torch._foreach_add_(alike, updates, alpha=-lr * scale)

    def _buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        return state["momentum_buffer"]


def _alike(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Those that are updated together: a GPU would wait for the launches of one after the other."""
    stacks: dict[tuple[Any, ...], list[list[Tensor]]] = {}
    for p in parameters:
        key = (p.device, p.dtype, p.shape) if p.device.type in STACKED else (id(p),)
        of_shape = stacks.setdefault(key, [[]])
        if of_shape[-1] and (len(of_shape[-1]) + 1) * p.numel() > STACK:
            of_shape.append([])
        of_shape[-1].append(p)
    return [alike for of_shape in stacks.values() for alike in of_shape]


class MuonWithAdamW(torch.optim.Optimizer):
    """One optimizer over the groups of AdamW, followed by those of Muon: one state, one list of groups, one file.

    `factor` of a group times the rate of the run is its learning rate; groups of Muon have a `momentum`.
    """

    def __init__(self, rest: list[dict[str, Any]], matrices: list[dict[str, Any]], **settings: Any) -> None:
        rate = settings["lr"]
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for g in rest for _, p in g["params"])
        self._adamw = torch.optim.AdamW(rest, rate, BETAS, EPS, weight_decay=0.0, fused=fused)
        self._muon = Muon(matrices, rate, settings["coefficients"])
        super().__init__([*self._adamw.param_groups, *self._muon.param_groups], {})

    def warm_up(self, step: int) -> None:
        """Set the momentum of Muon for the update that follows `step` updates."""
        for group in self.param_groups:
            if "momentum" in group:
                group["momentum"] = momentum_at(step)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for part, is_muon in ((self._adamw, False), (self._muon, True)):
            # Looked up each time: load_state_dict replaces both.
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if ("momentum" in group) == is_muon]
            part.step()


def configure_muon(model: ModdedGPT, learning_rate: float, weight_decay: float | None = None) -> MuonWithAdamW:
    """Make the optimizer of a modded-nanogpt model: Muon for the matrices of its layers, AdamW for the rest.

    `learning_rate` is Muon's; head, embeddings and scalars keep the variant's ratio to it. Matrices decay by the
    variant's weight decay unless one is given, those of feed-forwards in medium by twice as much.
    """
    variant = model.variant
    decay = variant.weight_decay if weight_decay is None else weight_decay
    matrices, rest = parameters_by_kind(model)
    feed_forward = [(name, p) for name, p in matrices if ".mlp." in name]
    attention = [(name, p) for name, p in matrices if ".mlp." not in name]
    factor = {kind: rate / variant.muon_rate for kind, rate in variant.adam_rates.items()}
    return MuonWithAdamW(
        [{"params": named, "factor": factor[kind], "lr": learning_rate * factor[kind]} for kind, named in rest.items()],
        [
            {"params": attention, "factor": 1.0, "weight_decay": decay},
            {"params": feed_forward, "factor": 1.0, "weight_decay": decay * variant.mlp_decay},
        ],
        lr=learning_rate,
        coefficients=variant.coefficients,
    )


def parameters_by_kind(model: ModdedGPT) -> tuple[NamedParameters, dict[str, NamedParameters]]:
    """Separate the matrices of the layers from the rest: head, embed and scalar, each in the model's order."""
    matrices: NamedParameters = []
    rest: dict[str, NamedParameters] = {"head": [], "embed": [], "scalar": []}
    for name, p in model.named_parameters():
        if p.dim() < 2:
            rest["scalar"].append((name, p))
        elif name.startswith("blocks."):
            matrices.append((name, p))
        else:
            rest["head" if name.startswith("lm_head") else "embed"].append((name, p))
    return matrices, rest
