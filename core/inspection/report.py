"""The facts of a checkpoint, from its headers, as JSON values; report_text.py writes them for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..containers.pickles.inert import LEAVES, Call, flat
from ..containers.spec import TensorSpec
from ..families.choices import Choice
from ..families.megatron_iteration import extra_states
from .inspect import Facts, Inspection, named
from .marks import choices
from .tensor_table import tensor_facts

FORMATS = {
    "bundle": "New JSON-based format",
    "legacy single file": "Legacy single file",
    "torch zip": "PyTorch zip file",
    "torch stream": "PyTorch stream file (before torch 1.6)",
}
"""Names of the kinds of containers in the first line."""


def facts_of(found: Inspection, pattern: str | None = None) -> Facts:
    """Collect the facts of a checkpoint; `pattern` selects the tensors to list."""
    identity, container = found.identity, found.container
    architecture = identity.architecture
    ours = found.bundle is not None
    facts: Facts = {
        "format": FORMATS.get(container.kind, container.kind),
        "location": str(found.path),
        "family": identity.family,
        "program": identity.program,
        "script": found.script,
        "reason": identity.reason,
        "architecture": _architecture(architecture) if architecture is not None else None,
        "config": found.config,
        "step": found.step,
        "files": dict(container.files),
        "bytes": found.size,
        "dtypes": _dtypes(found.weights.values()),
        "parameters": _parameters(found),
        "choices": choice_facts(choices(found)),
        "contradictions": [] if ours else [*identity.conflicts, *found.lacks],
        "notes": [*container.notes, *([] if ours else _notes(found))],
        "health": _health(found),
        "damaged": list(found.damage),
        "foreign": [named(found.path, call) for call in container.foreign],
        "tensors": tensor_facts(found.weights if ours else container.tensors, pattern),
    }
    if not ours:
        return {**facts, "content": _content(found)}

    from .report_ours import facts_of_ours  # the room of our folders, which other files do without

    return {**facts, **facts_of_ours(found)}


def choice_facts(made: Iterable[Choice]) -> list[Facts]:
    """The choices of a model, each with its value, its origin, and the sentence about a value that may be wrong."""
    return [
        {"name": one.name, "value": one.value, "origin": one.origin, "text": str(one), "warning": one.warning or None}
        for one in made
    ]


def _notes(found: Inspection) -> list[str]:
    """Those of the model: its extra states that are no tensors are counted, as the others are among its buffers."""
    noted = found.identity.architecture.notes if found.identity.architecture is not None else []
    if not (names := list(extra_states(found.container.content, found.key))):
        return list(noted)
    what = "entry is" if len(names) == 1 else "entries are"
    left_out = f"{len(names)} _extra_state {what} left out, such as {names[0]}: what Transformer Engine keeps for FP8"
    return [left_out, *noted]


def _architecture(architecture: Any) -> Facts:
    return {name: getattr(architecture, name) for name in architecture.__slots__ if name != "notes"}


def _parameters(found: Inspection) -> Facts:
    """Count parameters, tied ones once; of an unknown model, elements of all tensors."""
    architecture = found.identity.architecture
    if architecture is not None:
        return {"total": architecture.parameters, "without_embeddings": architecture.parameters_without_embeddings}
    tensors = found.weights or found.container.tensors
    once = {(t.file, t.storage, t.offset, t.shape, t.strides): t.numel for t in tensors.values()}
    total = sum(once.values())
    return {"total": total, "without_embeddings": total}


def _dtypes(tensors: Iterable[TensorSpec]) -> dict[str, int]:
    """Elements of each dtype, the most first."""
    counts: dict[str, int] = {}
    for tensor in tensors:
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _health(found: Inspection) -> Facts:
    """How many of the bytes can be checked."""
    checks = found.container.checks
    recorded = sum(check.size for check in checks if check.crc32 is not None and not _whole(check, found))
    return {"records": len(checks), "recorded_bytes": recorded, "bytes": found.size}


def _whole(check: Any, found: Inspection) -> bool:
    """Whether a check covers a whole file whose records have checks of their own."""
    return check.names == (check.file,) and found.bundle is not None


def _content(found: Inspection) -> Facts:
    """Everything in a file by name; of a bare state dict without its tensors, which are listed by themselves."""
    content = found.container.content
    if not isinstance(content, Mapping):
        return {} if isinstance(content, TensorSpec) else {"": content}
    bare = found.weights if not found.key else {}
    return {name: value for name, value in content.items() if name not in bare or not isinstance(value, TensorSpec)}


def tensors_in(value: Any) -> Iterable[TensorSpec]:
    """The tensors anywhere in a content."""
    if isinstance(value, TensorSpec):
        yield value
        return
    if isinstance(value, Call):
        value = (value.args, value.items, value.state)
    elif isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return
    for inner in value:
        if type(inner) not in LEAVES and not flat(inner, LEAVES):
            yield from tensors_in(inner)
