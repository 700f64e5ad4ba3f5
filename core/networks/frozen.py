"""The frozen tensors of a module, by digest: what stands for them in a step that holds only what is trained."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..console.words import listed
from ..errors import CheckpointMismatch, InputError
from .wrappers import plain_tensors

_PIECE = 1 << 20
"""Elements that are brought to the CPU at once."""

Digests = dict[str, dict[str, Any]]
"""Of each frozen tensor by name: its dtype, its shape, and the CRC32 of its numbers."""


class Frozen:
    """Digests of the tensors that are not trained. Each is computed once, until torch counts a change of its tensor."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[weakref.ref[torch.Tensor], tuple[int, int], dict[str, Any]]] = {}
        self._base: Mapping[str, Any] = {}
        """What was recorded last: from then on, other values would be in no file."""

    def of(self, module: nn.Module) -> Digests:
        """The digests of the parameters that require no gradient.

        Raises: InputError where nothing is trained, for a module in shards, and for a frozen tensor that has changed.
        """
        parameters = {name: p for name, p in plain_tensors(module).items() if isinstance(p, nn.Parameter)}
        if any(hasattr(p, "device_mesh") for p in parameters.values()):
            raise InputError("trainable_only: the model is in shards, expected whole tensors. Nothing was written.")
        if not any(p.requires_grad for p in parameters.values()):
            raise InputError("trainable_only: no parameter requires a gradient, so none is saved. Nothing was written.")
        found = {name: self._digest(name, p) for name, p in parameters.items() if not p.requires_grad}
        if changed := [name for name, digest in found.items() if self._base.get(name, digest) != digest]:
            raise InputError(
                f"trainable_only: {listed(changed, separator=', ')} require no gradient, and have changed since the "
                "step before, so that their values would be lost. Save the whole model. Nothing was written."
            )
        self._base = {**self._base, **found}
        return found

    def compare(self, live: Mapping[str, torch.Tensor], recorded: Mapping[str, Any], path: object) -> None:
        """Make sure that the tensors of a module are those that a step was saved beside.

        Raises: CheckpointMismatch naming the first that differs, with both digests.
        """
        for name, digest in recorded.items():
            found = self._digest(name, live[name]) if name in live and not live[name].is_meta else {}
            if found != digest:
                raise CheckpointMismatch(
                    f"{path} holds only what was trained, beside another base: {name} is {_told(found)}, expected "
                    f"{_told(digest)}. Load the base into the model first. Nothing was changed."
                )
        self._base = recorded

    def _digest(self, name: str, tensor: torch.Tensor) -> dict[str, Any]:
        state = tensor._version, tensor.data_ptr()
        if (seen := self._seen.get(name)) is not None and seen[0]() is tensor and seen[1] == state:
            return seen[2]
        crc = 0
        for piece in tensor.detach().reshape(-1).split(_PIECE):
            crc = zlib.crc32(piece.contiguous().cpu().view(torch.uint8).numpy(), crc)
        kind = str(tensor.dtype).removeprefix("torch.")
        digest = {"dtype": kind, "shape": list(tensor.shape), "crc32": f"{crc:08x}"}
        self._seen[name] = weakref.ref(tensor), state, digest
        return digest


def _told(digest: Any) -> str:
    """A digest in words; what a file records of one may be anything."""
    if not isinstance(digest, Mapping) or not digest:
        return "not there, or on the meta device" if digest == {} else repr(digest)[:80]
    return f"{str(digest.get('dtype'))[:20]} {str(digest.get('shape'))[:40]} (CRC32 {str(digest.get('crc32'))[:8]})"
