"""GPTFlexAttention: modded-nanogpt as it trains, one long packed sequence of documents; names are upstream's.

Shapes: T positions of the sequence, C n_embd, H heads, D head size, V rows of the head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config.variants import BLOCK
from ..errors import InputError
from .bound import bound
from .modded import ModdedGPT
from .windows import documents

KERNELS = ("auto", "flex", "sdpa")
"""The kernels for the attention of GPTFlexAttention: auto is flex on CUDA, and SDPA elsewhere."""


class GPTFlexAttention(ModdedGPT):
    """A modded-nanogpt model over one packed sequence, in which the end-of-text token begins each document.

    On CUDA attention is compiled flex attention, elsewhere (and for gradients there) the same mask for SDPA; `kernel`,
    one of KERNELS, chooses.
    """

    kernel = "auto"

    def forward_features(self, ids: Tensor, window: int | str | None = None) -> Tensor:
        """Compute the input of the head: packed ids [T] to [T, C], after the final norm.

        `window` is the long layers' in blocks of 128 (the others have half of it), "full" is causal within each
        document, None is the config's: the variant's last windows.

        Raises: InputError for ids of another shape, or more than max_seq_len.
        """
        if ids.dim() != 1 or not len(ids):
            raise InputError(f"ids: found shape {tuple(ids.shape)}, expected one packed sequence [T], T at least 1.")
        T = len(ids)
        if self.config.block_size < T:
            raise InputError(f"ids: found {T} positions, expected at most max_seq_len {self.config.block_size}.")
        docs = documents(ids, self.config.eos_token_id)
        ids, docs = F.pad(ids, (0, -T % BLOCK)), F.pad(docs, (0, -T % BLOCK), value=T + 1)
        if self.kernel not in KERNELS:
            raise InputError(f"kernel: found {self.kernel!r}, expected {', '.join(KERNELS)}.")
        flex = self.kernel == "flex" or (self.kernel == "auto" and docs.is_cuda)
        attend = self.attention(len(docs), docs, self.config.window if window is None else window, flex, docs.device)
        positions = torch.arange(len(ids), device=ids.device)
        return self.stream(ids[None], positions, attend)[0, :T]

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, window: int | str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the next ids: packed ids [T] to fp32 logits [T, V], and the mean loss for targets [T].

        Targets that are -1 are ignored; `window` as in `forward_features`.
        """
        logits = self.logits(self.forward_features(ids, window))
        return logits, None if targets is None else self.loss(logits, targets)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Continue a prompt; see `networks.generation.generate`."""
        return self.batched().generate(*args, **kwargs)

    batched = bound(".batched", "batched", __package__)
    save_checkpoint_bundle = bound("..kinds.model_methods", "save_checkpoint_bundle", __package__)
