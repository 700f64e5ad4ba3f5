"""The facts that only our checkpoints have: tokenizer, training state, history, what does not fit."""

from __future__ import annotations

import contextlib
from pathlib import Path
from stat import S_ISREG

from ..bundle.also import also_kinds
from ..bundle.bundle import KeptStep, history, open_bundle
from ..bundle.choice import LEGACY_FILES, choose
from ..bundle.contradictions import contradictions
from ..bundle.evolution import notes
from ..bundle.training_state import STATE, TrainingState
from ..errors import CheckpointDamaged, CheckpointError
from .inspect import Facts, Inspection, named


def facts_of_ours(found: Inspection) -> Facts:
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
        "also": {},
        "files": files,
        "history": [_kept_facts(kept) for kept in found.history],
        "notes": [note for note in found.container.notes if note not in found.damage],
        "foreign": [],
        "damaged": list(found.damage),
        "contradictions": [],
    }
    for part in bundle.torch_parts.values():
        with contextlib.suppress(CheckpointError):  # damage is among the notes of the container
            facts["foreign"] += [named(part.source.path, call) for call in part.source.foreign]
    with contextlib.suppress(CheckpointError):
        facts["also"] = also_kinds(bundle)
    facts["foreign"] = list(dict.fromkeys(facts["foreign"]))
    try:
        if bundle.config is None:
            facts["contradictions"] = [*found.identity.conflicts, *found.lacks] if found.script else []
        elif not _unread(found) and not bundle.state.frozen:
            facts["contradictions"] = contradictions(bundle, with_optimizer=found.optimizer is not None)
            facts["notes"] += notes(str(bundle.path("config.json")), bundle.config, bundle.state)
    except CheckpointDamaged as error:
        facts["damaged"].append(str(error))
    except CheckpointError as error:
        facts["contradictions"] = [str(error)]
    return facts


def _unread(found: Inspection) -> bool:
    """Whether the file of the weights itself is damaged, so that nothing can be compared with it."""
    bundle = found.bundle
    return bundle is not None and any(line.startswith(str(bundle.weights.source.path)) for line in found.damage)


def _kept_facts(kept: KeptStep) -> Facts:
    size = sum(p.stat().st_size for p in kept.path.iterdir() if p.is_file())
    return {**_step_facts(kept.step, kept.state, size), "path": str(kept.path)}


def _step_facts(step: int, state: TrainingState, size: int) -> Facts:
    return {"step": step, "val_loss": state.val_loss, "bytes": size, "saved_at": state.saved_at}


def _bytes_below(folder: Path) -> int:
    """Bytes of all files of a model, with those of older steps and of what lies aside; linked ones count once."""
    found = {}
    with contextlib.suppress(FileNotFoundError):  # a concurrent writer removes some
        stats = [stat for stat in map(Path.lstat, folder.rglob("*")) if S_ISREG(stat.st_mode)]
        found = {(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}
    return sum(found.values())


def model_facts(folder: Path) -> Facts:
    """The line of one model in the list of all."""
    try:
        with open_bundle(folder) as bundle:
            newest = _step_facts(bundle.step, bundle.state, sum(bundle.sizes.values()))
        kept = [one.step for one in history(folder) if one.step != newest["step"]]
        return {"name": folder.name, **newest, "kept": kept, "total_bytes": _bytes_below(folder)}
    except CheckpointError as error:
        legacy = [folder / name for name in LEGACY_FILES if (folder / name).is_file()]
        if legacy:
            first = choose(folder).candidates[:1]
            step = first[0].step if first else None
            chosen = folder / first[0].single if first and first[0].single else legacy[0]
            return {"name": folder.name, "legacy": chosen.name, "step": step, "bytes": chosen.stat().st_size}
        from .below import foreign_facts  # opens what is not ours, which a list of models seldom has

        return foreign_facts(folder, folder.name) or {"name": folder.name, "error": str(error)}
