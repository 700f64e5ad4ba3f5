"""The value of a config field before the field existed, and the settings of old programs that recorded none."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..config.gpt import ACTIVATIONS, GPTConfig
from ..errors import CheckpointMismatch
from ..families.family import Shape
from ..families.fused import LECTURE, Fusing

Values = dict[str, Any]
QKV = ".sa.qkv.weight"


@dataclass(frozen=True)
class Evidence:
    """What the header of the weights shows about a config."""

    plan: Fusing
    shapes: dict[str, Shape]  # under our names

    def has(self, *names: str) -> bool:
        """Whether the model has a tensor of one of these names, `{i}` any layer."""
        patterns = [re.compile(re.escape(name).replace(r"\{i\}", ".*")) for name in names]
        return any(pattern.fullmatch(found) for pattern in patterns for found in self.shapes)

    @property
    def heads(self) -> int | None:
        """How many heads the names of lecture-style tensors count; None where nothing shows them."""
        if self.plan.family != LECTURE:
            return None
        return max((len(parts) // 3 for name, parts in self.plan.sources.items() if name.endswith(QKV)), default=None)

    def side(self, name: str, axis: int) -> int | None:
        """One dimension of a matrix; None where the matrix is missing."""
        shape = self.shapes.get(name, ())
        return shape[axis] if len(shape) == 2 else None


def _proj_bias(values: Values, seen: Evidence) -> bool | None:
    """`bias` described qkv alone in lecture-style models, whose projection always had one."""
    has = seen.has("blocks.{i}.sa.proj.bias")
    return None if has == values.get("bias", seen.has("blocks.{i}.sa.qkv.bias")) else has


def _activation(values: Values, seen: Evidence) -> str:
    """Lecture-style models computed ReLU, fused ones the exact GELU, before `mlp_type` and `activation` existed."""
    if values.get("mlp_type") in ACTIVATIONS:
        return str(values["mlp_type"])
    return "relu" if seen.plan.family == LECTURE else "gelu"


_TABLE, _POSITIONS = "token_embedding_table.weight", "position_embedding_table.weight"

REPAIRS: dict[str, Callable[[Values, Evidence], Any]] = {
    # Sizes that a config lacks are those of the tensors.
    "vocab_size": lambda values, seen: seen.side(_TABLE, 0),
    "n_embd": lambda values, seen: seen.side(_TABLE, 1),
    "block_size": lambda values, seen: seen.side(_POSITIONS, 0),
    "n_layer": lambda values, seen: len({n.split(".")[1] for n in seen.shapes if n.startswith("blocks.")}) or None,
    # Lecture-style names count the heads; in fused tensors nothing shows them.
    "n_head": lambda values, seen: seen.heads,
    # Lecture-style configs had no `bias` at first: their heads had none.
    "bias": lambda values, seen: seen.has("blocks.{i}.sa.qkv.bias"),
    "proj_bias": _proj_bias,
    # Biases that no field describes are those that the weights have.
    "mlp_bias": lambda values, seen: seen.has("blocks.{i}.fwd.net.0.bias", "blocks.{i}.fwd.net.2.bias"),
    "norm_bias": lambda values, seen: seen.has("ln_f.bias", "blocks.{i}.ln1.bias", "blocks.{i}.ln2.bias"),
    "head_bias": lambda values, seen: seen.has("lm_head.bias"),
    # The head had weights of its own: one that a file lacks was lost.
    "tied_head": lambda values, seen: False,
    "activation": _activation,
}
"""The value of each field that a file lacks, as it was before the field existed; None where nothing shows it."""


def evolve(values: Values, seen: Evidence, where: str) -> GPTConfig:
    """Read a config of any age: its own fields, and for those it lacks their values before they existed.

    Raises: CheckpointMismatch for a wrong type, an impossible value, or a number of heads that nothing shows.
    """
    missing = {name: repair(values, seen) for name, repair in REPAIRS.items() if name not in values}
    if missing.get("n_head", 1) is None and seen.shapes:
        raise CheckpointMismatch(
            f"{where}: n_head is missing, and fused weights do not show it. Add it: another number of heads would "
            "compute something else from the same tensors."
        )
    if missing.get("block_size", 1) is None and values.get("pos_encoding") in ("rotary", "none"):
        raise CheckpointMismatch(
            f"{where}: block_size is missing, and weights without a table of positions do not show it. Add it: the "
            "positions that the model was trained for."
        )
    return GPTConfig.from_dict({**values, **{k: v for k, v in missing.items() if v is not None}}, where)


def old_settings(optimizer: Any) -> dict[str, Any]:
    """The settings of a program that recorded none, from its optimizer state; empty where there is no state.

    It had a constant learning rate, no warm-up and no clipping, was not compiled and computed in fp32.
    """
    group = (optimizer.get("param_groups") or [None])[0] if isinstance(optimizer, dict) else None
    if not isinstance(group, dict) or not isinstance(group.get("lr"), float):
        return {}
    decay = {"weight_decay": group["weight_decay"]} if isinstance(group.get("weight_decay"), (int, float)) else {}
    plain = {"lr_schedule": "constant", "warmup_iters": 0.0, "grad_clip": 0.0, "dtype": "fp32", "compile": False}
    return {"learning_rate": group["lr"], **decay, **plain}


def notes(bundle_path: str, config: GPTConfig | None, state: Mapping[str, Any]) -> list[str]:
    """What a person should know about an old checkpoint before training on it."""
    found = []
    if config is not None and config.unknown:
        found.append(f"{bundle_path}: kept as they are, and not used here: {', '.join(map(str, config.unknown))}")
    less = one_step_less(state)
    return [*found, f"{bundle_path}: {less}"] if less else found


def one_step_less(state: Mapping[str, Any]) -> str | None:
    """Report a final save that recorded one step fewer than was made, as in old programs; it is used as recorded."""
    training = state.get("training_config")
    last = training.get("max_iters") if isinstance(training, Mapping) else None
    if not isinstance(last, int) or state.get("step") != last - 1:
        return None
    return (
        f"step {last - 1} is recorded, and training_config has max_iters {last}: the last save of old programs "
        f"recorded one step less than was made. {last - 1} is used."
    )
