"""What programs call the parts of a checkpoint beside each other: weights, their average, the optimizer, the run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

Words = tuple[str, ...]

MAIN: Words = ("model", "state_dict", "model_state_dict")
AVERAGE: Words = ("ema", "ema_model", "model_ema", "ema_state_dict")
OPTIMIZER: Words = (
    "optimizer",
    "optim",
    "optimizers",
    "optimizer_state_dict",
    "optimizer_states",
    "optimizer_state",
    "optim_state",
    "optim_state_dict",
)
RUN: Words = (
    "train_state",
    "training_state",
    "trainer",
    "trainer_state",
    "extra_state",
    "progress",
    "loops",
    "callbacks",
    "dataloader",
    "dataloader_state",
    "dataloader_state_dict",
    "sampler",
    "lr_scheduler",
    "lr_schedulers",
    "lr_scheduler_state_dict",
    "scheduler",
    "schedulers",
    "scheduler_state_dict",
    "scaler",
    "grad_scaler",
    "rng",
    "rng_state",
    "rng_states",
    "cuda_rng_state",
    "torch_rng_state",
)
"""The state of a run, which is neither weights nor of the optimizer: as torchtitan, Lightning and others call it."""

_MOMENTS = re.compile(r"(?:.*\.)?optim(?:s|izers?|izer_states?|izer_state_dict|_states?|_state_dict)?\.")


def is_of_optimizer(name: str) -> bool:
    """Whether a tensor's name says that it belongs to an optimizer."""
    return _MOMENTS.match(name) is not None


def parts_of(content: Any) -> dict[str, Words]:
    """The entries that are parts, with the kind of each; none of a run unless weights or optimizer are named too.

    A model may have a module called `scaler` or `progress`: beside a part `model` or `optimizer` it is none.
    """
    if not isinstance(content, Mapping):
        return {}
    words = {str(key).partition(".")[0] for key in content}  # DCP may save flat names
    found: dict[str, Words] = {word: kind for kind in (MAIN, AVERAGE, OPTIMIZER) for word in kind if word in words}
    run: dict[str, Words] = {word: RUN for word in RUN if word in words}
    sure = {"train_state", "lr_scheduler", "dataloader"} & run.keys()
    return found | (run if MAIN in found.values() or OPTIMIZER in found.values() or len(sure) > 1 else {})


def holder_of(content: Any) -> str:
    """The entry that holds all parts, as in `{"app": {"model": ..., "optim": ...}}`; "" where none does."""
    if not isinstance(content, Mapping) or MAIN in parts_of(content).values():
        return ""
    inner = {name: parts_of(part) for name, part in content.items() if isinstance(part, Mapping)}
    holders = (name for name, parts in inner.items() if {MAIN, OPTIMIZER} <= set(parts.values()))
    return next((name for name in holders if isinstance(name, str)), "")


def is_optimizer(content: Any) -> bool:
    """Whether a content is the state of an optimizer and nothing else."""
    if not isinstance(content, Mapping):
        return False
    (only,) = content.values() if len(content) == 1 and set(parts_of(content).values()) == {OPTIMIZER} else (content,)
    return isinstance(only, Mapping) and ({"state", "param_groups"} <= only.keys() or is_flat(only))


def is_flat(optimizer: Mapping[Any, Any]) -> bool:
    """Whether an optimizer state is flattened, as torch does with flatten_optimizer_state_dict=True."""
    kinds = {str(key).partition(".")[0] for key in optimizer if "." in str(key)}
    return "param_groups" in kinds <= {"state", "param_groups"} and all("." in str(key) for key in optimizer)


def aside(names: Iterable[str], content: Any) -> dict[str, Words]:
    """The tensors of an optimizer or a run among those of a model, with their kind; none if that were all."""
    names, parts = list(names), parts_of(content)
    found: dict[str, Words] = {name: OPTIMIZER for name in names if is_of_optimizer(name)}
    for name in names:
        kind = parts.get(name.partition(".")[0])
        if kind is OPTIMIZER or kind is RUN:
            found[name] = kind
    return found if len(found) < len(names) else {}
