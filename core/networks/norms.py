"""Norms: the kinds that a GPT's config names, each over the last dimension of its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from ..config.gpt import GPTConfig


class LayerNorm1p(nn.LayerNorm):
    """LayerNorm whose weight is stored less 1, as Megatron's: weight decay pulls the factor to 1, and not to 0."""

    def reset_parameters(self) -> None:
        """Start as a factor of 1."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., C]."""
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class RMSNorm1p(nn.RMSNorm):
    """RMSNorm whose weight is stored less 1, as Gemma's; adding 1 on import would lose bits that go back out."""

    def reset_parameters(self) -> None:
        """Start as a factor of 1."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., C]."""
        return F.rms_norm(x, self.normalized_shape, self.weight + 1, self.eps)


NORMS: dict[str, Callable[[int, float, bool], nn.Module]] = {
    "layernorm": lambda width, eps, bias: nn.LayerNorm(width, eps=eps, bias=bias),
    "layernorm_1p": lambda width, eps, bias: LayerNorm1p(width, eps=eps, bias=bias),
    "rmsnorm": lambda width, eps, bias: nn.RMSNorm(width, eps=eps),
    "rmsnorm_1p": lambda width, eps, bias: RMSNorm1p(width, eps=eps),
    "rmsnorm_no_weight": lambda width, eps, bias: nn.RMSNorm(width, eps=eps, elementwise_affine=False),
}
"""Each kind, from the width, the epsilon under the root, and whether it has a bias."""


def normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    """Apply a norm that a model may lack; an nn.Identity in its place would cost more than the choice itself."""
    if norm is None:
        return x
    y: Tensor = norm(x)
    return y


def make_norm(config: GPTConfig, width: int) -> nn.Module:
    """Make a norm of the model's kind over `width` numbers."""
    return NORMS[config.norm_type](width, config.norm_eps, config.norm_bias)
