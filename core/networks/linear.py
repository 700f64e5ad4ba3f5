"""The linear layers and tables of a GPT: initialised by the model, and fast for the few rows of a generation step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# F.linear reads weights at 12 GB/s when it has few rows (MKL's gemm), this operator at 27 (oneDNN), of 34 that two
# cores can read at all. It is what torch.compile emits for a linear layer, and is missing in builds without oneDNN.
_FEW_ROWS = 32
_ONEDNN = torch.ops.mkldnn._linear_pointwise if hasattr(torch.ops.mkldnn, "_linear_pointwise") else None


class Linear(nn.Linear):
    """nn.Linear that leaves initialisation to GPT and is fast for the few rows of a generation step."""

    def reset_parameters(self) -> None:
        """Do nothing: GPT initialises all weights at once, or takes them from a file."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x [..., C_in]."""
        if (
            not torch.is_grad_enabled()
            and _ONEDNN is not None
            and x.numel() <= _FEW_ROWS * self.in_features
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.compiler.is_compiling()
        ):
            return _ONEDNN(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding that leaves initialisation to GPT."""

    def reset_parameters(self) -> None:
        """Do nothing: GPT initialises all weights at once, or takes them from a file."""
