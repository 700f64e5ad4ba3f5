"""--to safetensors: one file, or a folder of files with their index; tied tensors are written once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...containers import safetensors_writer
from ...containers.hf_folder import BESIDE
from ...containers.json_files import dump_json
from ...families.fused import FUSED
from ..plan import Options, Plan, Source, Target, WeightFile, target_of
from ..sharded import add_optimizer_tensors

INDEX = "model.safetensors.index.json"


def plan_safetensors(model: Source, options: Options, target: Path) -> Plan:
    """Plan a .safetensors file, or a folder of them when the target has no such name."""
    is_folder = is_for_folder(model, options, target)
    if model.along:
        add_optimizer_tensors(model, options)
    elif options.include_optimizer and model.moments is None:
        raise model.refuse("it has no optimizer state. Leave out --include_optimizer.")
    elif options.include_optimizer:
        raise model.refuse("an optimizer state is more than tensors: --to pt, --to nanogpt and --to bundle hold it.")
    plan = Plan(model, target, "safetensors", [], is_folder=is_folder)
    add_weights(plan, options, "" if is_folder else target.name)
    if is_folder:
        plan.copies = beside(model, ("config.json", *BESIDE))
    return plan


def is_for_folder(model: Source, options: Options, target: Path) -> bool:
    """Whether a target is a folder of files, by its name.

    Raises: CheckpointMismatch for one file with --shard_size.
    """
    if target.suffix != ".safetensors":
        return True
    if options.shard_size is not None:
        raise model.refuse(f"{target.name} is one file, and --shard_size cuts it. Name a folder.")
    return False


def add_weights(plan: Plan, options: Options, name: str = "") -> None:
    """Plan the files of a model's weights: the one of this name, or those of a folder."""
    model = plan.model
    metadata = dict(safetensors_writer.USUAL)
    for alias, kept in ties(model).items() if options.tied is not False else ():
        model.drop(alias, f"tied to {kept}, and safetensors has no tied tensors")
        metadata[alias] = kept
    targets = {one: target_of(model, one, name, options) for one in model.tensors}
    files = {name: list(targets)} if name else in_shards(targets, options.shard_size)
    add_files(plan, files, targets, metadata, has_index=len(files) > 1)


def in_shards(targets: Mapping[str, Target], most: int | None) -> dict[str, list[str]]:
    """The names in each file of a folder, of at most so many bytes each."""
    shards = safetensors_writer.in_shards({name: target.nbytes for name, target in targets.items()}, most)
    return dict(zip(safetensors_writer.shard_names(len(shards)), shards, strict=True))


def add_files(
    plan: Plan,
    files: Mapping[str, Sequence[str]],
    targets: Mapping[str, Target],
    metadata: Mapping[str, str],
    has_index: bool,
) -> None:
    """Put the tensors of each file into a plan, and the index of all."""
    for file, names in files.items():
        placed = [replace(targets[name], file=file) for name in names]
        plan.files.append(WeightFile(file, placed, metadata=dict(metadata)))
    if has_index:
        sizes = {name: target.nbytes for name, target in targets.items()}
        plan.texts[INDEX] = dump_json(safetensors_writer.index(files, sizes))


def ties(model: Source) -> dict[str, str]:
    """Tensors that are another one again, and which."""
    seen: dict[tuple[Any, ...], str] = {}
    found = {}
    for name, view in model.tensors.items():
        if view.names and (first := seen.setdefault(view.place, name)) != name:
            found[name] = first
    return found


def beside(model: Source, names: tuple[str, ...]) -> dict[str, Path]:
    """Find files that lie beside the weights of another program's model and go along; links are not followed."""
    folder = model.container.path
    if model.family_of_source.startswith("litgpt") and not folder.is_dir():  # it opens as the one file of its tensors
        folder = folder.parent
    if folder.is_dir() and model.family_of_source not in (FUSED, "lecture"):
        found = {name: folder / name for name in names}
        return {name: path for name, path in found.items() if os.path.isfile(path)}  # noqa: PTH113
    return {}
