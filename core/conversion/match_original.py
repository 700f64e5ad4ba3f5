"""--match_original: write a checkpoint in the form of its original model: the same names, shapes, dtypes and files.

Tensors that training did not keep are taken from the original and listed; those that the original lacks are refused.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from ..console.words import listed
from ..containers import safetensors_writer
from ..containers.container import Container, listing
from ..containers.hf_folder import BESIDE, is_hf_folder, open_hf_folder
from ..containers.open import open_container
from ..containers.tensors.views import View, stored
from ..errors import CheckpointMismatch
from ..families.parts import is_of_optimizer
from ..families.rules import RENAME, Chain, Merge, Permute, Row, Rule, apply
from .opening import open_model
from .plan import Options, Plan, Source, Target
from .sharded import take_parts
from .targets.safetensors import INDEX, add_files, in_shards, is_for_folder

ALONG = ("config.json", "llm_config.json", "vit_config.json", *BESIDE)
"""Files of the original that are copied unchanged."""

PATCHES = "patch_embedding.weight"
"""Suffix of the name of a convolution over patches, which some programs have as a linear layer over pixels."""

LINEAR = Chain((Permute((0, 2, 3, 1)), Merge(2, "channels"), Merge(1, "patch_row")))
"""[E, C, p, p] to [E, p * p * C]: the pixels of a patch one after another, each with its channels."""


def plan_matched(source: Path, target: Path, to: str, options: Options, held: ExitStack) -> Plan:
    """Plan the files of the original model with the weights of a checkpoint in them.

    Raises: CheckpointMismatch when the checkpoint has tensors that the original lacks, or that do not fit;
        CheckpointError as the readers.
    """
    folder = Path(options.more["match_original"])
    model = open_model(source, held, options, needs_family=False)
    take_parts(model, source, options)
    _refuse_others(model, to, target, options, folder)
    original = _original(folder)
    wanted = {name: stored(original, spec) for name, spec in original.tensors.items()}
    if surplus := [name for name in model.tensors if name not in wanted]:
        raise model.refuse(
            f"{len(surplus)} of its {len(model.tensors)} tensors are not among the {len(wanted)} of {folder}: "
            f"{listed(surplus, 5)}. No tensor is left out silently: name the model that it was trained from."
        )
    taken = [name for name in wanted if name not in model.tensors]
    if len(taken) == len(wanted):
        raise model.refuse(f"it has no tensor of {folder}. Name the model that it was trained from.")
    _reshape(model, wanted)
    targets = {name: _target(model, name, view) for name, view in wanted.items()}
    casts = Counter((t.view.dtype, t.dtype) for t in targets.values() if t.dtype != t.view.dtype)
    model.notes += [
        f"{count} tensors are cast from {a} to {b}, as {folder} has them" for (a, b), count in casts.items()
    ]
    if taken:
        model.notes.append(f"{len(taken)} of {len(wanted)} tensors are not in {source}, and were taken from {folder}:")
        model.notes += [f"taken from the original: {name}" for name in taken]
    plan = _laid_out(model, targets, original, target, options)
    beside = _home(folder)
    along = {name: beside / name for name in ALONG if os.path.isfile(beside / name)}  # noqa: PTH113
    if plan.is_folder:
        plan.copies = along
    else:
        plan.beside = along
        model.notes.append(f"copied beside {target.name}: {', '.join(along) or 'nothing'}")
    plan.check()
    return plan


def _refuse_others(model: Source, to: str, target: Path, options: Options, folder: Path) -> None:
    """Refuse options that cannot be combined with --match_original."""
    if to not in ("safetensors", "hf"):
        raise model.refuse(f"--match_original writes safetensors. Use --to safetensors or --to hf, not --to {to}.")
    if to == "hf" and target.suffix == ".safetensors":
        raise model.refuse(f"{target.name} is one file, and --to hf writes a folder. Use --to safetensors.")
    asked = {
        "--dtype": options.dtype,
        "--vocab_size": options.vocab_size,
        "--tied and --untied": options.tied,
        "--include_optimizer": options.include_optimizer or None,
        "--meta": options.meta,
    }
    if wrong := [flag for flag, value in asked.items() if value is not None]:
        raise model.refuse(f"--match_original determines everything that is written. Leave out {', '.join(wrong)}.")
    if Path(os.path.realpath(target)).is_relative_to(os.path.realpath(_home(folder))):
        raise CheckpointMismatch(f"{target}: lies in the original {folder}, which is only read. Name another place.")


def _home(original: Path) -> Path:
    """The folder of a model, given by its folder, by an index, or by its only file."""
    return original if original.is_dir() else original.parent


def _original(folder: Path) -> Container:
    """Open the safetensors of the original model."""
    if folder.is_dir() and not is_hf_folder(folder):
        there = [name for name in listing(folder) if name.endswith(".safetensors")]
        raise CheckpointMismatch(
            f"{folder}: found {', '.join(there[:5]) or 'no safetensors'}, expected model.safetensors or {INDEX}. "
            "--match_original names the folder of the model, or one file of it."
        )
    container = open_hf_folder(folder) if folder.is_dir() else open_container(folder)
    if "safetensors" not in container.kind:
        raise CheckpointMismatch(f"{folder}: found {container.kind}, expected safetensors.")
    container.tensors = {name: spec for name, spec in container.tensors.items() if not is_of_optimizer(name)}
    return container


def _reshape(model: Source, wanted: dict[str, View]) -> None:
    """Make the convolution over patches linear if the original is; all other shapes must be equal.

    Raises: CheckpointMismatch.
    """
    rows: list[Row] = []
    sizes: dict[str, int] = {}
    faults = []
    for name, view in model.tensors.items():
        expected = wanted[name].shape
        rule: Rule = RENAME
        if view.shape != expected:
            linear = (view.shape[0], math.prod(view.shape[1:])) if len(view.shape) == 4 else None
            if not (name.endswith(PATCHES) and expected == linear):
                faults.append(f"{name} is {view.shape}, in the original {expected}")
                continue
            _, channels, _, width = view.shape
            sizes, rule = {"channels": channels, "patch_row": width * channels}, LINEAR
        rows.append((name, name, rule))
    if faults:
        raise model.refuse(f"{listed(faults, 5)}. Name the model that it was trained from.")
    made = apply(rows, model.tensors, sizes)
    model.tensors, model.sizes = made.tensors, {**model.sizes, **sizes}
    model.rules = {name: rule for name, rule in made.rules.items() if rule != str(RENAME)}
    model.sources = {name: view for name, view in model.sources.items() if name in wanted or name in model.dropped}
    model.route = [(tuple(rows), False)]


def _target(model: Source, name: str, original: View) -> Target:
    view = model.tensors.get(name, original)
    rule = model.rules.get(name, "copy") if name in model.tensors else "from the original"
    rule += f", cast to {original.dtype}" if view.dtype != original.dtype else ""
    return Target(name, name, "", original.dtype, view, rule)


def _laid_out(model: Source, targets: dict[str, Target], original: Container, target: Path, options: Options) -> Plan:
    """Plan one file, or a folder: in the files of the original, or in others of at most --shard_size."""
    is_folder = is_for_folder(model, options, target)
    if not is_folder:
        files = {target.name: list(targets)}
    elif options.shard_size is not None or not original.path.is_dir():
        files = in_shards(targets, options.shard_size)
    else:
        files = {}
        for name in targets:
            files.setdefault(original.tensors[name].file or "model.safetensors", []).append(name)
    plan = Plan(model, target, "safetensors", [], is_folder=is_folder)
    has_index = is_folder and (len(files) > 1 or "model.safetensors" not in files)
    add_files(plan, files, targets, safetensors_writer.USUAL, has_index)
    return plan
