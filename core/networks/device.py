"""Where a model computes, and the facts of a machine that exactness depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..console.words import tell
from ..errors import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(wish: str | torch.device | None, where: str = "device") -> torch.device:
    """Resolve a device name: "auto" is CUDA if there is one; a missing CUDA device becomes the CPU, and is reported.

    Raises: InputError for a name that is not a device.
    """
    if wish is None or wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wish)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{where}: {wish!r} is not a device. Use auto, cpu, cuda or cuda:N.") from error
    if device.type == "meta":
        raise InputError(f"{where}: meta holds no numbers. Use auto, cpu, cuda or cuda:N.")
    if not _is_here(device):
        tell(f"{where}: {wish} is not on this machine; using the CPU")
        return torch.device("cpu")
    return device


def _is_here(device: torch.device) -> bool:
    if device.type == "cuda":
        return (device.index or 0) < torch.cuda.device_count()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError, NotImplementedError):  # each backend reports it in its own way
        return False
    return True


def resolve_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """Turn fp32, bf16 or fp16 into a torch dtype; None stays None.

    Raises: InputError for another name.
    """
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise InputError(f"dtype {name!r}: allowed is {', '.join(DTYPES)}.")
    return DTYPES[name]


def environment(
    device: torch.device, *, dtype: torch.dtype, compile: bool, fused: bool, ranks: int = 1
) -> dict[str, Any]:
    """The facts on which the bits of a training step depend besides the data, the settings and the seed."""
    facts: dict[str, Any] = {"torch": torch.__version__, "device": device.type}
    if device.type == "cuda":
        facts["device_name"] = torch.cuda.get_device_name(device)
    else:
        facts["threads"] = torch.get_num_threads()
        facts["cpu"] = torch.backends.cpu.get_cpu_capability()
    return {**facts, "dtype": str(dtype).removeprefix("torch."), "compile": compile, "fused": fused, "ranks": ranks}


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Describe the entries that differ now, by name; entries that were not recorded are not compared."""
    return {name: f"{name} {old} then, {now.get(name)} now" for name, old in then.items() if old != now.get(name)}


def seed_generator(seed: int, device: torch.device) -> None:
    """Seed the generator from which dropout on this device draws."""
    # The generators themselves: torch.manual_seed would seed every device, at a hundred times the cost.
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
