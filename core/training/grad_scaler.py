"""The loss scale of fp16: a torch.amp.GradScaler whose state goes through training_state.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

SMALLEST = 2.0**-16
"""When a scale below this is still too high, range is not the cause: the run has diverged."""


def make_scaler(device: torch.device, dtype: torch.dtype, saved: Any) -> torch.amp.GradScaler:
    """Make the scaler of a run: for fp16 one that continues from a saved state, for other dtypes a no-op."""
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if scaler.is_enabled() and isinstance(saved, Mapping):
        known = scaler.state_dict()
        scaler.load_state_dict({**known, **{name: saved[name] for name in known if _is_number(saved.get(name))}})
    return scaler


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
