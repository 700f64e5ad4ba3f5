"""The value of a config field before the field existed, and the settings of old programs that recorded none.

Each repair is one small function with its reason; it is called only for a field that a file lacks.
"""

from __future__ import annotations

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

    def has(self, name: str) -> bool:
        """Whether the model has a tensor of this name, `{i}` any layer."""
        first, layered, rest = name.partition("{i}")
        return any(
            found == name or (layered and found.startswith(first) and found.endswith(rest)) for found in self.shapes
        )

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


def _activation(values: Values, seen: Evidence) -> Any:
    """Lecture-style models computed ReLU, fused ones the exact GELU, before `mlp_type` and `activation` existed."""
    if values.get("mlp_type") in ACTIVATIONS:
        return values["mlp_type"]
    return "relu" if seen.plan.family == LECTURE else "gelu"


def _bias(values: Values, seen: Evidence) -> Any:
    """Lecture-style configs had no `bias` at first: their heads had none."""
    return seen.has("blocks.{i}.sa.qkv.bias")


def _proj_bias(values: Values, seen: Evidence) -> Any:
    """`bias` described qkv alone in lecture-style models, whose projection always had one."""
    has = seen.has("blocks.{i}.sa.proj.bias")
    return None if has == values.get("bias", seen.has("blocks.{i}.sa.qkv.bias")) else has


def _mlp_bias(values: Values, seen: Evidence) -> Any:
    """Biases that no field describes are those that the weights have."""
    return seen.has("blocks.{i}.fwd.net.0.bias") or seen.has("blocks.{i}.fwd.net.2.bias")


def _norm_bias(values: Values, seen: Evidence) -> Any:
    """As `mlp_bias`."""
    return any(map(seen.has, ("ln_f.bias", "blocks.{i}.ln1.bias", "blocks.{i}.ln2.bias")))


def _head_bias(values: Values, seen: Evidence) -> Any:
    """As `mlp_bias`."""
    return seen.has("lm_head.bias")


def _tied_head(values: Values, seen: Evidence) -> Any:
    """The head had weights of its own: one that a file lacks was lost."""
    return False


def _vocab_size(values: Values, seen: Evidence) -> Any:
    """Sizes that a config lacks are those of the tensors."""
    return seen.side("token_embedding_table.weight", 0)


def _n_embd(values: Values, seen: Evidence) -> Any:
    """As `vocab_size`."""
    return seen.side("token_embedding_table.weight", 1)


def _block_size(values: Values, seen: Evidence) -> Any:
    """As `vocab_size`."""
    return seen.side("position_embedding_table.weight", 0)


def _n_layer(values: Values, seen: Evidence) -> Any:
    """As `vocab_size`."""
    layers = {name.split(".")[1] for name in seen.shapes if name.startswith("blocks.")}
    return len(layers) or None


def _n_head(values: Values, seen: Evidence) -> Any:
    """Lecture-style names count the heads; in fused tensors nothing shows them."""
    return seen.heads


REPAIRS: dict[str, Callable[[Values, Evidence], Any]] = {
    "vocab_size": _vocab_size,
    "n_embd": _n_embd,
    "block_size": _block_size,
    "n_layer": _n_layer,
    "n_head": _n_head,
    "bias": _bias,
    "proj_bias": _proj_bias,
    "mlp_bias": _mlp_bias,
    "norm_bias": _norm_bias,
    "head_bias": _head_bias,
    "tied_head": _tied_head,
    "activation": _activation,
}


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
