"""The field rope_scaling: how rotary positions change for a longer context, in the words of Hugging Face's configs."""

from __future__ import annotations

from typing import Any

from .fields import is_positive

NEEDED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""The numbers of each rope_type."""

OPTIONAL = {"yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")}


def settled(value: Any) -> Any:
    """Name the kind `rope_type`, which was called `type` before; "default" scales nothing."""
    if not isinstance(value, dict):
        return value
    kind = value.get("rope_type", value.get("type"))
    rest = {name: v for name, v in value.items() if name not in ("rope_type", "type") and v is not None}
    return None if kind == "default" and not rest else {"rope_type": kind, **rest}


def fault(value: Any) -> str | None:
    """Say what is wrong with a settled rope_scaling; None where nothing is."""
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("rope_type") not in tuple(NEEDED):
        return f"rope_scaling is {value!r}, expected a rope_type of {', '.join(NEEDED)} with its numbers"
    kind = value["rope_type"]
    allowed = {"rope_type", *NEEDED[kind], *OPTIONAL.get(kind, ())}
    if missing := [name for name in NEEDED[kind] if name not in value]:
        return f"rope_scaling {kind} has no {', '.join(missing)}"
    if other := sorted(map(str, value.keys() - allowed)):
        return f"rope_scaling {kind} has {', '.join(other)}, which this model does not compute"
    for name, number in value.items():
        if name == "truncate" and not isinstance(number, bool):
            return f"rope_scaling has truncate {number!r}, expected true or false"
        if name not in ("rope_type", "truncate") and not is_positive(number):
            return f"rope_scaling has {name} {number!r}, expected a number above 0"
    if kind == "llama3" and value["low_freq_factor"] >= value["high_freq_factor"]:
        return "rope_scaling llama3 has a low_freq_factor that is not below high_freq_factor"
    return None
