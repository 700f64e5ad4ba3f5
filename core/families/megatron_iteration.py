"""An iteration of Megatron (torch_dist): the tensors of its model, and the arguments of its run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..containers.container import Container
from ..containers.pickles.foreign import attributes
from ..containers.plain import plain
from ..containers.spec import TensorSpec

KIND = "Megatron iteration (torch_dist)"
EXTRA = "_extra_state"

ASIDE = ("optimizer.", "chained_", "common.", "common_state", "rng_state", "rerun_state_machine_state")
"""Prefixes of the names of everything in an iteration besides its model."""


def is_iteration(container: Container) -> bool:
    """Whether a container is an iter_* folder whose tensors are in a DCP folder: its pickles are not read."""
    return container.kind.startswith(KIND)


def is_extra_state(name: str) -> bool:
    """Whether a name is of Transformer Engine's extra state for FP8, of a layer or of a shard of layers."""
    return name.partition("/")[0].endswith(EXTRA)


def extra_states(content: Any, key: str) -> dict[str, Any]:
    """The extra states beside the tensors under `key` of a content that are no tensors: None, bytes, or lists."""
    node = content
    for word in key.split(".")[:-1]:
        node = node.get(word) if isinstance(node, Mapping) else None
    entries = node.items() if isinstance(node, Mapping) else ()
    return {
        name: value
        for name, value in entries
        if isinstance(name, str) and is_extra_state(name) and not isinstance(value, TensorSpec)
    }


def model_of(tensors: Mapping[str, TensorSpec]) -> tuple[dict[str, TensorSpec], list[str]]:
    """The tensors of the model, and a sentence that counts the others; all of them where there is no model."""
    others: Counter[str] = Counter()
    model = {}
    for name, spec in tensors.items():
        first = EXTRA if is_extra_state(name) else next((word for word in ASIDE if name.startswith(word)), None)
        if first is None:
            model[name] = spec
        else:
            others[first.strip("._")] += 1
    if not model or not others:
        return dict(tensors), []
    shown = ", ".join(f"{count} of {word}" for word, count in others.items())
    return model, [f"tensors beside the model are left out: {shown}"]


def said(container: Container) -> tuple[dict[str, Any] | None, int | None]:
    """The arguments of the run as a config, and the iteration; None for those that the folder does not record."""
    common = container.content.get("common") if isinstance(container.content, dict) else None
    common = common if isinstance(common, dict) else {}
    fields = attributes(common.get("args"))
    step = common.get("iteration")
    return None if fields is None else _config(fields), step if type(step) is int else None


def _config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that are set; with biases everywhere, the argument for those of qkv alone has no effect."""
    config = {str(name): plain(value) for name, value in arguments.items() if value is not None}
    if config.get("add_bias_linear") is True:
        config.pop("add_qkv_bias", None)
    return config
