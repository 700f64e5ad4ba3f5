"""What a checkpoint holds beside what a conversion writes: each entry is listed, with its value or its size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..bundle.legacy import TOKENIZER_KEY
from ..containers.pickles.inert import Call, Global, as_text
from ..containers.steps import HOLDERS, NAMES
from ..containers.trees import leaves
from ..families.megatron_iteration import is_iteration
from ..families.parts import OPTIMIZER, holder_of, parts_of
from ..inspection.config_entry import KEYS as CONFIG_KEYS
from ..inspection.marks import ARGUMENTS
from ..inspection.report import tensors_in
from .plan import Plan, Source
from .run import OF_NANOGPT

_WHOLE = ("torch zip", "torch stream", "DCP folder", "legacy single file")
"""Kinds of containers whose content is the checkpoint; files beside weights are copied, or belong to other programs."""

_BESIDE = ("Hugging Face folder", "safetensors", "folder of accelerate")
"""Kinds that have what belongs to a run beside the weights, by its word."""

_LONG = 60  # characters of a value


def entries_left_out(plan: Plan) -> dict[str, str]:
    """The entries of a checkpoint that are not written, by name: what each is, and why it is left out."""
    model = plan.model
    content = model.container.content
    is_whole = model.container.kind.startswith(_WHOLE) and not is_iteration(model.container)
    if isinstance(content, Mapping) and model.container.kind.startswith(_BESIDE) and model.container.path.is_dir():
        content = {word: content[word] for word in parts_of(content) if word in content}
    elif not isinstance(content, Mapping) or not is_whole or not model.tensors:
        return {}
    if holder := holder_of(content):
        content = {**content, **content[holder]}
        del content[holder]
    written = {name for target in plan.targets for name in target.view.names}
    used = written | model.dropped.keys() | {name for view in model.sources.values() for name in view.names}
    parts, taken = parts_of(content), _taken(model, plan.format)
    found = {}
    for key, value in content.items():
        specs = list(tensors_in(value))
        left = [spec for spec in specs if spec.nbytes and spec.name not in used]
        values = sum(isinstance(leaf, (str, int, float, Call, Global)) for leaf in leaves(value))
        of_optimizer = parts.get(str(key).partition(".")[0]) is OPTIMIZER
        has_note = of_optimizer and (plan.format == "bundle" or any(spec.name in written for spec in specs))
        if key in taken or has_note or not (left or values):
            continue
        reason = f"--to {plan.format} has no place for it"
        if of_optimizer and plan.format in ("pt", "dcp", "nanogpt"):
            reason = "--include_optimizer keeps it"
        found[key if isinstance(key, str) else as_text(key, _LONG)] = f"{_what(value, left, values)}; {reason}"
    return found


def _what(value: Any, left: list[Any], values: int) -> str:
    """An entry in a few words: a single value as it is, others by their number."""
    if isinstance(value, (Mapping, list, tuple)):
        counts = {"tensor": len(left), "value": values}
        return " and ".join(f"{count} {word}{'s' * (count != 1)}" for word, count in counts.items() if count)
    return as_text(value, _LONG)


def _taken(model: Source, kind: str) -> set[Any]:
    """The entries whose meaning is in what is written."""
    content = model.container.content
    if kind not in ("bundle", "nanogpt", "hf", "megatron", "litgpt"):
        return set()
    if model.container.kind == "legacy single file" and kind == "bundle":
        return set(content)  # training_state.json keeps entries of unknown names
    keys = (ARGUMENTS, *CONFIG_KEYS) if model.family_of_source in OF_NANOGPT else CONFIG_KEYS
    found = {next((key for key in keys if key in content), ""), TOKENIZER_KEY}
    if kind in ("bundle", "nanogpt"):
        found |= {*NAMES, *(f"{holder}.{name}" for holder in HOLDERS for name in NAMES)}
        found |= {key for key in HOLDERS if isinstance(content.get(key), Mapping) and content[key].keys() <= {*NAMES}}
        found |= {"best_val_loss"} if model.state.best else set()
    if kind == "bundle" and model.run is not None:
        found.add("config")
    return found
