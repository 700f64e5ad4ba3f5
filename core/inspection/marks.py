"""What an inspected file shows about the program that wrote it: the input of `families.choices`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..containers.pickles.foreign import attributes
from ..containers.pickles.inert import Call
from ..containers.plain import plain
from ..families.choices import Choice, choices_of
from ..families.programs import Marks
from .inspect import Inspection

ARGUMENTS = "model_args"
"""The entry that holds the model's config in nanoGPT and programs after it."""


def config_of(found: Inspection) -> tuple[str, dict[str, Any]]:
    """The place and fields of a file's config: model_args, if it has them, even if other entries look like a config."""
    content = found.container.content
    arguments = attributes(content.get(ARGUMENTS)) if isinstance(content, Mapping) else None
    if arguments is not None:
        return ARGUMENTS, {str(name): plain(value) for name, value in arguments.items()}
    return found.place, dict(found.config or {})


def marks_of(found: Inspection) -> Marks:
    """Collect what a file shows about its program."""
    content = found.container.content if isinstance(found.container.content, Mapping) else {}
    entries = frozenset(name for name in content if isinstance(name, str))
    place, config = config_of(found)
    if found.bundle is not None:
        place = "config" if found.bundle.single else "config.json"
        config = dict(found.bundle.config_values)
        entries |= {"tokenizer"} if found.bundle.tokenizer is not None else set()
    shape = found.identity.architecture
    return Marks(
        entries=entries,
        config=config,
        place=place if config else "",
        is_object=isinstance(held := content.get(place), Call) and attributes(held) is held.state,
        first_group=_first_group(found.optimizer),
        n_layer=(shape.n_layer if shape is not None else None) or 0,
        is_gated=shape is not None and shape.gated,
    )


def choices(found: Inspection, flags: Mapping[str, Any] | None = None) -> list[Choice]:
    """List the choices of an inspected model; [] for one of an unknown family."""
    return choices_of(found.identity, marks_of(found), flags or {})


def _first_group(optimizer: Any) -> int | None:
    groups = optimizer.get("param_groups") if isinstance(optimizer, Mapping) else None
    if not isinstance(groups, list) or len(groups) != 2 or not isinstance(groups[0], Mapping):
        return None
    return len(groups[0]["params"]) if isinstance(groups[0].get("params"), list) else None
