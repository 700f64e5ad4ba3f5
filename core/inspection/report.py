"""The facts of a checkpoint, from its headers, as JSON values; report_text.py writes them for people."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..bundle.bundle import KeptStep, open_bundle
from ..bundle.choice import LEGACY_FILES, choose
from ..bundle.contradictions import contradictions
from ..bundle.evolution import notes
from ..bundle.training_state import STATE
from ..config.variants import VARIANTS
from ..console.words import listed_names
from ..containers.pickles.inert import Call
from ..containers.spec import TensorSpec
from ..containers.trees import leaves
from ..errors import CheckpointDamaged, CheckpointError
from .inspect import Facts, Inspected
from .tensor_table import tensor_facts

FORMATS = {
    "bundle": "New JSON-based format",
    "legacy single file": "Legacy single file",
    "torch zip": "PyTorch zip file",
    "torch stream": "PyTorch stream file (before torch 1.6)",
}
"""Names of the kinds of containers in the first line."""

SCRIPTS = {f"modded_{variant.name}": variant.program for variant in VARIANTS.values()}
"""Readable names of the variants of modded-nanogpt."""


def facts_of(found: Inspected, pattern: str | None = None) -> Facts:
    """Collect the facts of a checkpoint; `pattern` selects the tensors to list."""
    identity, container = found.identity, found.container
    architecture = identity.architecture
    ours = found.bundle is not None
    facts: Facts = {
        "format": FORMATS.get(container.kind, container.kind),
        "location": str(found.path),
        "family": identity.family,
        "program": identity.program,
        "script": script_of(found),
        "reason": identity.reason,
        "architecture": _architecture(architecture) if architecture is not None else None,
        "config": found.config,
        "step": found.step,
        "files": dict(container.files),
        "bytes": found.size,
        "dtypes": _dtypes(found.weights.values()),
        "parameters": _parameters(found),
        "contradictions": [] if ours else [*identity.conflicts, *lacks(found)],
        "notes": [*container.notes, *(architecture.notes if architecture is not None and not ours else [])],
        "health": _health(found),
        "damaged": [],
        "foreign": [],
        "tensors": tensor_facts(found.weights if ours else container.tensors, pattern),
    }
    for call in container.foreign:
        facts["foreign"].append(f"{found.path}: its pickle names {call}")
    if not ours:
        return {**facts, "content": _content(container.content)}

    return {**facts, **facts_of_ours(found)}


def script_of(found: Inspected) -> str | None:
    """Name the script of modded-nanogpt it is from; our bundles have one layout for all, so the config names it."""
    config = found.config or {}
    if "model_class" in config:
        from ..config.modded import CLASSES

        if config["model_class"] in CLASSES and (variant := VARIANTS.get(str(config.get("variant")))):
            return f"{variant.program}, as {config['model_class']}"
    return SCRIPTS.get(found.identity.family)


def _architecture(architecture: Any) -> Facts:
    return {name: getattr(architecture, name) for name in architecture.__slots__ if name != "notes"}


def lacks(found: Inspected) -> list[str]:
    """List the tensors that a foreign model lacks, and those that do not belong to it, in a sentence each."""
    identity = found.identity
    groups = (("missing", identity.missing), ("not part of the model", identity.unplaced))
    return [f"{what}: {listed_names(names, 3)}" for what, names in groups if names]


def _parameters(found: Inspected) -> Facts:
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


def _health(found: Inspected) -> Facts:
    """How many of the bytes can be checked."""
    checks = found.container.checks
    recorded = sum(check.size for check in checks if check.crc32 is not None and not _whole(check, found))
    return {"records": len(checks), "recorded_bytes": recorded, "bytes": found.size}


def _whole(check: Any, found: Inspected) -> bool:
    """Whether a check covers a whole file whose records have checks of their own."""
    return check.names == (check.file,) and found.bundle is not None


def _content(content: Any) -> Facts:
    return dict(content) if isinstance(content, Mapping) else {"": content}


def tensors_in(value: Any) -> Iterable[TensorSpec]:
    """The tensors anywhere in a content."""
    for leaf in leaves(value):
        if isinstance(leaf, TensorSpec):
            yield leaf
        elif isinstance(leaf, Call):
            yield from tensors_in((leaf.args, leaf.items, leaf.state))


def facts_of_ours(found: Inspected) -> Facts:
    """Collect the facts that only our checkpoints have; they replace those for other programs' checkpoints."""
    bundle = found.bundle
    assert bundle is not None
    files = dict(found.container.files)
    if not bundle.single:
        with contextlib.suppress(OSError):
            files[STATE] = (bundle.folder / STATE).stat().st_size
    facts: Facts = {
        "tokenizer": bundle.tokenizer,
        "training_state": bundle.state.to_dict(),
        "files": files,
        "history": [_kept_facts(kept) for kept in found.history],
        "notes": [note for note in found.container.notes if note not in found.damage],
        "foreign": [],
        "damaged": list(found.damage),
        "contradictions": [],
    }
    for part in (bundle.weights, bundle.optimizer):
        with contextlib.suppress(CheckpointError):  # damage is among the notes of the container
            if part is not None:
                facts["foreign"] += [f"{part.source.path}: its pickle names {call}" for call in part.source.foreign]
    facts["foreign"] = list(dict.fromkeys(facts["foreign"]))
    try:
        if bundle.config is None:
            facts["contradictions"] = [*found.identity.conflicts, *lacks(found)] if script_of(found) else []
        elif not _unread(found):
            facts["contradictions"] = contradictions(bundle, with_optimizer=found.optimizer is not None)
            facts["notes"] += notes(str(bundle.path("config.json")), bundle.config, bundle.state)
    except CheckpointDamaged as error:
        facts["damaged"].append(str(error))
    except CheckpointError as error:
        facts["contradictions"] = [str(error)]
    return facts


def _unread(found: Inspected) -> bool:
    """Whether the file of the weights itself is damaged, so that nothing can be compared with it."""
    bundle = found.bundle
    return bundle is not None and any(line.startswith(str(bundle.weights.source.path)) for line in found.damage)


def _kept_facts(kept: KeptStep) -> Facts:
    return {
        "step": kept.step,
        "val_loss": kept.state.val_loss,
        "bytes": sum(p.stat().st_size for p in kept.path.iterdir() if p.is_file()),
        "saved_at": kept.state.saved_at,
        "path": str(kept.path),
    }


def model_facts(folder: Path) -> Facts:
    """The line of one model in the list of all."""
    try:
        with open_bundle(folder) as bundle:
            return {
                "name": folder.name,
                "step": bundle.step,
                "val_loss": bundle.state.val_loss,
                "bytes": sum(bundle.sizes.values()),
                "saved_at": bundle.state.saved_at,
            }
    except CheckpointError as error:
        legacy = [folder / name for name in LEGACY_FILES if (folder / name).is_file()]
        if legacy:
            first = choose(folder).candidates[:1]
            step = first[0].step if first else None
            chosen = folder / first[0].single if first and first[0].single else legacy[0]
            return {"name": folder.name, "legacy": chosen.name, "step": step, "bytes": chosen.stat().st_size}
        return {"name": folder.name, "error": str(error)}
