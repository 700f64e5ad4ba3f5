"""How two sets of named tensors differ, in sentences."""

from __future__ import annotations

from collections.abc import Mapping


def differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Say which tensors are missing, have no place, or have another shape."""
    missing = [f"{name} is missing" for name in expected if name not in found]
    surplus = [f"{name} has no place in this model" for name in found if name not in expected]
    wrong = [
        f"{name} is {tuple(found[name])}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    return missing + surplus + wrong


def counted(what: str, names: list[str]) -> str:
    """Count names and list them, at most ten: "2 new parameters (a, b)"; `what` is in the singular."""
    return f"{len(names)} {what}{'s' * (len(names) != 1)} ({listed(names, separator=', ')})"


def listed(faults: list[str], limit: int = 10, separator: str = "; ") -> str:
    """Join sentences, at most ten of them "and 37 more"."""
    more = f"{separator}and {len(faults) - limit} more" if len(faults) > limit else ""
    return separator.join(faults[:limit]) + more
