"""Inspect a checkpoint of ours, or of any other program, from its headers alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..bundle.names import is_model
from ..config.variants import VARIANTS
from ..console.words import listed_names
from ..containers.container import Check, Container
from ..containers.pickles.foreign import Finding
from ..containers.spec import TensorSpec
from ..errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, CheckpointNotFound
from ..families import megatron_iteration
from ..families.identify import Identity, identify, weights_key
from ..families.parts import aside
from .config_entry import config_entry
from .module_entry import module_entry

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle, KeptStep

# the readers of our own bundles are imported on demand: that takes as long as opening another program's file

SCRIPTS = {f"modded_{variant.name}": variant.program for variant in VARIANTS.values()}
"""The script that each family of modded-nanogpt is from."""

Facts = dict[str, Any]
"""The facts of a checkpoint, as JSON values."""


@dataclass(eq=False, repr=False)
class Inspection(contextlib.AbstractContextManager["Inspection"]):
    """A checkpoint and everything in its headers; `bundle` is set when it is one of ours."""

    path: Path
    container: Container
    weights: dict[str, TensorSpec]  # the model's tensors, by their names in its state dict
    key: str  # precedes these names in the container
    identity: Identity
    config: dict[str, Any] | None
    place: str = ""  # of the config: an entry of the file's content, or a file
    tokenizer: dict[str, Any] | None = None
    optimizer: Any = None  # its inert content
    step: int | None = None
    bundle: Bundle | None = None
    history: list[KeptStep] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)  # what cannot be read of a bundle, or of a step, a sentence each
    chosen: list[str] = field(default_factory=list)  # which of several checkpoints this is, and why
    partial: str = ""  # why this is known to be only a part of a model, and what to do

    @property
    def script(self) -> str | None:
        """The script of modded-nanogpt it is from; our bundles have one layout for all, so the config names it."""
        config = self.config or {}
        if "model_class" in config:
            from ..config.modded import CLASSES

            if config["model_class"] in CLASSES and (variant := VARIANTS.get(str(config.get("variant")))):
                return f"{variant.program}, as {config['model_class']}"
        return SCRIPTS.get(self.identity.family)

    @property
    def lacks(self) -> list[str]:
        """What a foreign model lacks, and which of its tensors do not belong to it, in a sentence each."""
        groups = (("missing", self.identity.missing), ("not part of the model", self.identity.unplaced))
        said = [f"{what}: {listed_names(names, 3)}" for what, names in groups if names]
        return [f"only a part of a model: {self.partial}", *said] if self.partial else said

    @property
    def contradictions(self) -> list[str]:
        """Where the parts of a bundle contradict each other; of a foreign model, its tensors and config."""
        if self.bundle is None or self.bundle.config is None:
            return [*self.identity.conflicts, *self.lacks]
        from ..bundle.contradictions import contradictions

        return contradictions(self.bundle)

    @property
    def size(self) -> int:
        """Total size of its files in bytes."""
        return sum(self.container.files.values())

    def __exit__(self, *_: object) -> None:
        """Close the files of a bundle."""
        if self.bundle is not None:
            self.bundle.close()


class _OpenFiles(Container):
    """A container whose files are already open: a concurrent save does not affect what is read."""

    opened: dict[str, BinaryIO]

    def open(self, name: str) -> BinaryIO:
        file = self.opened[name]
        own = Path("/proc/self/fd") / str(file.fileno())
        if own.exists():
            return own.open("rb", buffering=0)
        return os.fdopen(os.dup(file.fileno()), "rb", buffering=0)

    def proves_itself(self, name: str) -> bool:
        """Whether this is a tokenizer with the fingerprint of its vocabulary."""
        from ..bundle.bundle import TOKENIZER
        from ..bundle.tokenizer_state import proves_itself
        from ..containers.json_files import read_json

        if name != TOKENIZER:
            return False
        with self.open(name) as file, contextlib.suppress(CheckpointError):
            return proves_itself(read_json(file, name))
        return False


def named(path: Path, call: str) -> Finding:
    """A sentence about a call or name in a file, which stays a record where it is one."""
    made = Finding(f"{path}: its pickle names {call}")
    made.is_record = getattr(call, "is_record", False)
    return made


def inspect_path(path: Path, step: int | None = None) -> Inspection:
    """Open a checkpoint of any kind: a model's folder (its newest step, or a kept one), another folder, or a file.

    Raises: CheckpointNotFound, CheckpointDamaged, CheckpointError when nothing at the path can be read.
    """
    if path.is_file():
        if step is not None:
            raise CheckpointError(f"{path}: a single file has no steps to choose from with --step.")
        found = of_container(path)
        if isinstance(found.container.content, dict) and "model_state_dict" in found.container.content:
            from ..bundle.legacy import is_legacy, open_legacy

            if is_legacy(found.container.content) and not found.container.unpacked:
                with contextlib.suppress(CheckpointMismatch):  # one that cannot be loaded is still shown
                    return of_bundle(open_legacy(path))
        return found
    if not path.exists():
        raise CheckpointNotFound(f"{path}: nothing here. Give a model folder, a step folder in it, or a file.")
    if step is None and not is_model(path):
        return of_container(path)
    from ..bundle.bundle import history
    from ..bundle.choice import open_choice

    lines: list[str] = []
    bundle = open_choice(path, lines.append, step)
    if bundle is None:
        return of_container(path)
    found = of_bundle(bundle)
    if step is None:
        found.history, found.chosen = history(path), lines
    return found


def of_bundle(bundle: Bundle) -> Inspection:
    """Inspect a bundle or single file of ours.

    A part that cannot be read becomes a note, so that the rest is still shown. The bundle is closed together with the
    result, or at once if it cannot be inspected.
    """
    with contextlib.ExitStack() as held:
        held.enter_context(bundle)
        container, damage = _open_files(bundle)
        weights: dict[str, TensorSpec] = {}
        with contextlib.suppress(CheckpointError):  # it is among the damage
            weights = bundle.weights.tensors
        optimizer = None
        with contextlib.suppress(CheckpointError):
            optimizer = bundle.optimizer.content if bundle.optimizer is not None else None
        key = f"{bundle.weights.key}." if weights and bundle.weights.key else ""
        found = Inspection(
            path=bundle.path("") if bundle.single else bundle.folder,
            container=container,
            weights=weights,
            key=key,
            identity=identity_of(weights, bundle.config_values, container),
            config=bundle.config_values,
            tokenizer=bundle.tokenizer,
            optimizer=optimizer,
            step=bundle.state.step,
            bundle=bundle,
            damage=damage,
        )
        held.pop_all()
    return found


def _open_files(bundle: Bundle) -> tuple[Container, list[str]]:
    """The open files of a bundle as a container, and sentences about those that cannot be read."""
    from ..bundle.commit import CONFIG
    from ..bundle.parts import ShardedFile
    from ..containers.joined import join
    from ..containers.torch_files.container import container_of

    path = bundle.path("") if bundle.single else bundle.folder
    whole = _OpenFiles("legacy single file" if bundle.single else "bundle", path, {}, {}, dict(bundle.sizes))
    whole.opened = bundle.files
    damage: list[str] = []
    for name, part in bundle.torch_parts.items():
        if bundle.single and part is not bundle.weights:
            continue
        file = part.source.path
        try:
            if isinstance(part.source, ShardedFile):
                made = part.source.header
            else:
                made = container_of(part.source.header, file, bundle.sizes[file.name])
            if bundle.single:
                whole.tensors, whole.content = made.tensors, made.content
                whole.checks, whole.foreign, whole.notes = made.checks, made.foreign, made.notes
            else:
                join(whole, made, "" if part is bundle.weights else name.removesuffix(".pt"))
        except CheckpointError as error:
            damage.append(str(error))
            whole.notes.append(str(error))
    for name, entry in bundle.state.files.items():
        if name in bundle.files and name != CONFIG:  # a person may edit the config
            whole.checks.append(Check(name, 0, entry["size"], int(entry["crc32"], 16), (name,)))
    return whole, damage


def of_container(path: Path) -> Inspection:
    """Inspect a checkpoint of another program."""
    from ..containers.beside import config_beside
    from ..containers.open import open_container

    container = open_container(path)
    key = weights_key(container.tensors)
    weights = {name.removeprefix(key): spec for name, spec in container.tensors.items() if name.startswith(key)}
    content = container.content if isinstance(container.content, Mapping) else {}
    if megatron_iteration.is_iteration(container):
        model, notes = megatron_iteration.model_of(weights)
        config, step = megatron_iteration.said(container)
        found = of_weights(path, container, key, model, config)
        found.place, found.step, found.chosen = "common.pt", step, [*notes, *container.caveats]
    else:
        others = {} if key else aside(weights, content)
        weights = {name: spec for name, spec in weights.items() if name not in others}
        place, config = module_entry(container.content, key)
        if config is None:
            place, config = config_entry(content)
        beside, unread = config_beside(container.path) if config is None and container.path.is_file() else (None, "")
        if beside is not None:
            place, config = beside.place, beside.config
        found = of_weights(path, container, key, weights, config)
        found.place = "config.json" if container.kind.startswith("Hugging Face folder") else place
        found.step = beside.step if beside is not None and found.step is None else found.step
        found.chosen += [unread] if unread else []
    words = ("optimizer", "optimizer_state_dict", "optimizers")
    found.optimizer = next((content[word] for word in words if word in content), None)
    return found


def of_weights(
    path: Path, container: Container, key: str, weights: dict[str, TensorSpec], config: dict[str, Any] | None = None
) -> Inspection:
    """Inspect the tensors of a container that are a model's weights, whose names in it begin with `key`."""
    from ..containers.part import part_of_model
    from ..containers.step_parents import step_in_name
    from ..containers.steps import step_of

    found = Inspection(path, container, weights, key, identity_of(weights, config, container), config)
    try:
        found.step, counts = step_of(container)
        if found.step is None and container.path.is_dir():
            found.step = step_in_name(container.path)
            counts = [f"step {found.step} is in the name of its folder alone"] * (found.step is not None)
        found.chosen = [*counts, *container.caveats]
    except CheckpointDamaged as error:
        found.damage, found.chosen = [str(error)], list(container.caveats)
    found.partial = part_of_model(container)
    return found


def identity_of(
    weights: Mapping[str, TensorSpec], config: Mapping[str, Any] | None, container: Container | None
) -> Identity:
    """Recognise a model by its tensors' names, shapes and shared storages, and by the config beside it.

    Only a head with a storage of its own is read, from `container`, up to the first value that its token table has not.
    """
    shared = {name: f"{spec.file}/{spec.storage}/{spec.offset}" for name, spec in weights.items()}

    def same(head: str, table: str) -> bool | None:
        one, other = weights[head], weights[table]
        if container is None or (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        from ..containers.tensors.reading import same_elements
        from ..containers.tensors.views import stored

        try:
            return same_elements(stored(container, one), stored(container, other))
        except CheckpointError:  # its bytes cannot be read, which --verify reports
            return None

    content = container.content if container is not None and isinstance(container.content, Mapping) else {}
    return identify({name: spec.shape for name, spec in weights.items()}, config, shared, same, list(content))
