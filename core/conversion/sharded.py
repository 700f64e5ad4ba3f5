"""Choose the parts of a sharded checkpoint to convert: the main weights, or their average (EMA), and the optimizer.

A DCP folder, a folder of rank files and a step folder hold more than a model. Parts that are not requested are not
opened if they are stored separately, so that a damaged optimizer does not stop the conversion of its model.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..bundle.choice import has_bundle
from ..containers.container import Container
from ..containers.dcp.folder import SUFFIX, is_dcp, open_dcp
from ..containers.dcp.metadata import METADATA
from ..containers.dcp.rebuilt import lost, rebuild, sibling
from ..containers.hf_folder import is_hf_folder
from ..containers.megatron_folder import is_megatron_folder
from ..containers.pickles.inert import Call, as_text
from ..containers.rank_files import open_rank_files, rank_files
from ..containers.safetensors import open_safetensors
from ..containers.spec import TensorSpec
from ..containers.step_folder import is_step_folder, open_step_folder, step_parts
from ..containers.step_parents import model_within
from ..containers.tensors.views import stored
from ..containers.trainer_folder import is_trainer_folder, open_trainer_folder
from ..containers.trees import map_paths
from ..errors import CheckpointMismatch
from ..families.identify import UNKNOWN
from ..families.megatron_iteration import is_iteration
from ..families.parts import AVERAGE, MAIN, OPTIMIZER, RUN, Words, aside, holder_of, is_optimizer, parts_of
from ..inspection.config_entry import config_entry
from ..inspection.inspect import Inspection, of_weights
from .plan import Options, Ref, Source, Target, WeightFile

REASONS: dict[Words, str] = {
    MAIN: "main weights; --save_ema takes the EMA",
    AVERAGE: "EMA; --save_ema takes it instead",
    OPTIMIZER: "optimizer; --include_optimizer keeps it",
    RUN: "state of the run, not a weight of the model",
}


def is_sharded(path: Path) -> bool:
    """Whether a path is a DCP folder, a folder of rank files, or a step folder."""
    path = _folder(path)
    if not path.is_dir() or has_bundle(os.listdir(path)):  # noqa: PTH208
        return False
    if is_step_folder(path):
        return True
    if is_hf_folder(path) or is_megatron_folder(path):
        return False
    return is_trainer_folder(path) or is_dcp(path) or bool(rank_files(path))


def _folder(path: Path) -> Path:
    return path.parent if path.name == METADATA or path.suffix in (SUFFIX, METADATA) else model_within(path)


def open_sharded(path: Path, options: Options) -> Inspection:
    """Open the requested parts of a sharded checkpoint; a lost `.metadata` is rebuilt if that is exact.

    Raises: CheckpointMismatch when it has no such part; CheckpointDamaged, CheckpointError as the readers.
    """
    path = _folder(path)

    def open_part(part: Path) -> Container:
        if not part.is_dir():
            return open_safetensors(part)
        like = (options.more.get("metadata_from") or sibling(part)) if lost(part) else None
        return open_dcp(part, rebuild(part, Path(like)) if like else None)

    if is_step_folder(path):
        container = open_step_folder(path, _wanted(path, options), open_part)
    elif is_trainer_folder(path):
        container = open_trainer_folder(path)
    elif is_dcp(path):
        container = open_part(path)
    else:
        container = open_rank_files(path)
    key = _chosen(container, options)
    others = () if key else tuple(f"{word}." for word in _parts(container.content))
    mine = [name for name in container.tensors if name.startswith(key) and not name.startswith(others)]
    weights = {name.removeprefix(key): container.tensors[name] for name in mine}
    if is_optimizer(container.content):
        weights = {}
    elif not weights:
        raise CheckpointMismatch(f"{path}: found no tensor of a model among {len(container.tensors)}. Name another.")
    place, config = config_entry(container.content) if isinstance(container.content, Mapping) else ("", None)
    found = of_weights(path, container, key, weights, config)
    found.place, found.chosen = place, [*container.notes, *found.chosen]
    if options.include_optimizer:
        found.optimizer = _optimizer(container)[1]
    return found


def _wanted(path: Path, options: Options) -> list[str]:
    """The parts of a step to open."""
    there = step_parts(path)
    main = "ema" if options.more.get("save_ema") else "model"
    if main not in there:
        raise CheckpointMismatch(
            f"{path}: found {', '.join(there)}, expected {main}_sharded/, {main}.safetensors or {main}_rank*.pt. "
            + ("Leave out --save_ema, or name the step that has it." if main == "ema" else "--save_ema takes the EMA.")
        )
    return [main, "optimizer"] if options.include_optimizer else [main]


def _parts(content: Any) -> dict[str, Words]:
    """The parts of a nested checkpoint by name, with the kind of each; of a flat one those of the run.

    Where an entry holds all parts, as in `{"app": {"model": ..., "optim": ...}}`, its name precedes theirs.
    """
    parts = {
        word: kind
        for word, kind in parts_of(content).items()
        if kind is RUN or isinstance(content.get(word), (Mapping, list))
    }
    holder = holder_of(content)
    inner = _parts(content[holder]) if holder else {}
    return {f"{holder}.{word}": kind for word, kind in inner.items()} | parts


def _chosen(container: Container, options: Options) -> str:
    """The prefix of the names of the requested weights."""
    parts, wanted = _parts(container.content), AVERAGE if options.more.get("save_ema") else MAIN
    word = next((word for word, words in parts.items() if words is wanted), None)
    if word is not None:
        return f"{word}."
    if wanted is AVERAGE and not container.path.name.startswith("ema"):
        there = ", ".join(parts) or f"{len(container.tensors)} tensors without parts"
        beside = container.path.parent / "ema_sharded"
        hint = f"Name {beside}." if beside.is_dir() else "Leave out --save_ema, or name a checkpoint that has it."
        raise CheckpointMismatch(
            f"{container.path}: found {there}, expected EMA weights ({', '.join(AVERAGE)}). {hint}"
        )
    return ""


def _optimizer(container: Container) -> tuple[str, Any]:
    """The name and content of the optimizer's part; the name is "" where it is all there is."""
    if is_optimizer(container.content) and len(container.content) != 1:
        return "", container.content
    parts = _parts(container.content)
    word = next((word for word, words in parts.items() if words is OPTIMIZER), None)
    if word is None:
        there = ", ".join(parts) or "weights alone"
        raise CheckpointMismatch(
            f"{container.path}: found {there}, expected an optimizer ({', '.join(OPTIMIZER)}). Leave out "
            "--include_optimizer, or name the folder that holds both."
        )
    holder = holder_of(container.content)
    content = container.content[holder] if holder else container.content
    return word, content[word.removeprefix(f"{holder}.")]


def take_parts(model: Source, path: Path, options: Options) -> None:
    """Drop the parts beside the weights that were not requested, with reasons; the optimizer keeps its layout.

    Raises: CheckpointMismatch when a part is requested from a checkpoint that has no parts.
    """
    path, container = _folder(path), model.container
    if not is_sharded(path):
        if options.more.get("save_ema") and container.kind != "bundle":
            raise model.refuse(
                "--save_ema takes a part of a bundle or of a sharded checkpoint, and this is none. Name the EMA itself."
            )
        if model.family == UNKNOWN and not is_iteration(container):
            kinds = aside(container.tensors, container.content)
            asked = options.include_optimizer
            _drop_others(model, kinds, {name for name, kind in kinds.items() if asked and kind is OPTIMIZER})
        return
    if is_optimizer(container.content):
        if options.dtype is not None:
            raise model.refuse("--dtype casts weights, and it is the state of an optimizer alone. Leave it out.")
        model.along = {name: stored(container, spec) for name, spec in container.tensors.items()}
        return
    parts = _parts(container.content)
    kept = _optimizer(container)[0] if options.include_optimizer else None
    words = {
        name: next((word for word in parts if name.startswith(f"{word}.")), name.split(".")[0])
        for name in container.tensors
    }
    kinds = {name: parts.get(word, ()) for name, word in words.items()}
    _drop_others(model, kinds, {name for name, word in words.items() if word == kept})
    model.notes += [note for note in container.notes if note not in model.notes]
    apart = step_parts(path) if is_step_folder(path) else []
    left = [part for part in apart if isinstance(container.content, Mapping) and part not in parts]
    if left:
        model.notes.append(f"not opened: {', '.join(left)} of {path}")


def _drop_others(model: Source, kinds: Mapping[str, Words], kept: Collection[str]) -> None:
    """Drop the tensors beside the weights, with the reason of their kind, except the requested ones of an optimizer."""
    used = {name for view in model.tensors.values() for name in view.names}
    for name, spec in model.container.tensors.items():
        if name in used or name in model.dropped or not spec.nbytes:
            continue
        view = stored(model.container, spec)
        if name in kept:
            model.along[name] = view
        else:
            model.dropped[name] = REASONS.get(kinds.get(name, ()), "not a weight of the model")
            model.sources.setdefault(name, view)


def add_optimizer_tensors(model: Source, options: Options) -> None:
    """Include the tensors of an optimizer among the others; its other values cannot be stored there.

    Raises: CheckpointMismatch when a cast is requested, which would round counts and moments too.
    """
    if options.dtype is not None:
        raise model.refuse("--dtype would cast the optimizer's tensors as well. Leave out --include_optimizer.")
    if not model.tensors:
        raise model.refuse("it is the state of an optimizer, which is more than tensors. --to pt and --to dcp hold it.")
    model.tensors |= model.along
    model.sources |= model.along
    word, content = _optimizer(model.container)
    if values := _values(content):
        model.notes.append(
            f"left out: {values} values of {word} that are not tensors (lr, betas, ...), which safetensors cannot "
            "hold; --to pt keeps them"
        )


def add_optimizer(model: Source, file: WeightFile) -> None:
    """Store a sharded checkpoint's optimizer, with its layout, in a torch file, beside the weights in its `model`.

    Raises: CheckpointMismatch when it holds more than tensors and plain values.
    """
    content = _optimizer(model.container)[1]
    names: dict[int, str] = {id(spec): name for name, spec in model.container.tensors.items()}

    def laid(path: str, value: Any) -> Any:
        if isinstance(value, Call):
            raise model.refuse(f"its optimizer holds {as_text(value, 60)}. Leave out --include_optimizer.")
        if not isinstance(value, TensorSpec):
            return value
        name = names.get(id(value), value.name)
        view = model.along.get(name)
        if view is None:
            view = stored(model.container, value)
        file.targets.append(Target(name, path, file.name, view.dtype, view, "copy", is_weight=False))
        return Ref(path)

    if not model.tensors:
        file.content = map_paths(laid, content)
    else:
        file.content = {"model": file.content, "optimizer": map_paths(laid, content, "optimizer")}


def _values(content: Any) -> int:
    """Number of values in a content that are not tensors."""
    if isinstance(content, Mapping):
        return sum(map(_values, content.values()))
    if isinstance(content, (list, tuple)) and any(isinstance(item, (Mapping, TensorSpec)) for item in content):
        return sum(map(_values, content))
    return 0 if isinstance(content, TensorSpec) else 1
