"""ModelKind: the interface between a kind of model and the manager and train.py, which know no kind themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from ..bundle.bundle import Bundle
from ..bundle.folder import CONFIG
from ..bundle.intact import open_chosen
from ..bundle.names import model_folder
from ..config.decoders import arch_of_config
from ..config.gpt import GPTConfig
from ..config.modded import ModdedConfig
from ..console.commands import typed
from ..data.corpus import Corpus
from ..data.dataloader import DataLoader
from ..data.tokenizer import Tokenizer
from ..errors import CheckpointMismatch, InputError
from ..model import GPT, GPTFlexAttention

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What a run specifies for its model."""

    given: Mapping[str, Any]  # fields of the config that a person specified; they win, or are refused
    tokenizer: Tokenizer | str  # a tokenizer, or the value of --tokenization
    learning_rate: float  # per update; Muon's where that trains
    weight_decay: float | None = None  # None: as the checkpoint has it, or the kind's own
    preset: Mapping[str, Any] = field(default_factory=dict)  # fields of a new model that are not specified
    text: str | None = None  # the characters of a new char tokenizer
    seed: int = 1337
    dtype: torch.dtype | None = None  # of embeddings, which activations follow; None: unchanged
    init_from_model: str | None = None  # another model below the same root
    origin: Origin | None = None


@dataclass(frozen=True)
class Origin:
    """A checkpoint of another program that a new run starts from."""

    model: GPTFlexAttention | GPT
    content: Any  # of a file of modded-nanogpt, which has its optimizer states; of a GPT its optimizer state
    path: Path
    tokenizer: dict[str, Any] | None = None  # its state, as in tokenizer.json
    notes: Sequence[str] = ()

    @property
    def arch(self) -> str:
        """The name of its kind of model for --arch."""
        config = self.model.config
        return arch_of_config(config) if isinstance(config, GPTConfig) else f"flex_{config.variant}"


MODDED_CLASS = "GPTFlexAttention"
"""The model_class of modded-nanogpt models that train."""

ANOTHER = "Leave it out, or train under another --model_name."

Source = Bundle | Origin | None
"""The source of a model's weights: a step, a checkpoint of another program, or None."""


class ModelKind(Protocol):
    """One kind of model that train.py trains."""

    @property
    def arch(self) -> str:
        """Its name for --arch."""

    @property
    def autocasts(self) -> bool:
        """Whether --dtype is the arithmetic of its forward pass; else its embeddings have that dtype."""

    def preset(self, on_cpu: bool) -> dict[str, Any]:
        """Default fields of the config and default settings of a run."""

    def refuse_contradictions(self, bundle: Bundle, given: Mapping[str, Any]) -> None:
        """Raise CheckpointMismatch when given fields differ from a step's; only headers are read."""

    def new(self, request: Request, folder: Path, source: Source, say: Say) -> Any:
        """Make a model at step 0 where it trains: initialised, or with the weights of a source.

        A config.json that stands in the folder without weights is the architecture of the model.

        Raises: CheckpointMismatch when architecture or tokenizer contradict the source or that file.
        """

    def load(self, bundle: Bundle, request: Request, say: Say) -> Any:
        """Load the model of a step to train on, where it trains.

        Raises: CheckpointMismatch when architecture or tokenizer contradict it; both are shown.
        """

    def optimizer(self, model: Any, request: Request, source: Source, say: Say) -> Any:
        """Make the optimizer of a model, with the moments that its source has."""

    def loader(self, corpus: Corpus, model: Any, seed: int) -> DataLoader:
        """Make the batches of a model: a function of (seed, step)."""


def refuse_other_fields(
    where: Path | str, found: Mapping[str, Any], given: Mapping[str, Any], free: Sequence[str] = ()
) -> None:
    """Raise CheckpointMismatch when a given field, unless it is `free` to change, differs from the one found."""
    faults = [
        f"{name} is {value} here and {found[name]} in the checkpoint"
        for name, value in given.items()
        if name in found and name not in free and value != found[name]
    ]
    if faults:
        raise CheckpointMismatch(f"{where}: {'; '.join(faults)}. {ANOTHER}")


def new_model(kind: ModelKind, request: Request, folder: Path, say: Say, *, check: bool = True) -> Any:
    """Make a model at step 0 for a folder from the source that a request names, and report the source.

    Raises: InputError when it names two, CheckpointMismatch as `ModelKind.new`.
    """
    if request.origin is not None and request.init_from_model:
        raise InputError("--init_from_checkpoint and --init_from_model: a run has one start. Leave one out.")
    if not request.init_from_model:
        model = kind.new(request, folder, request.origin, say)
        if request.origin is not None:
            for note in request.origin.notes:
                say(f"{request.origin.path}: {note}")
            say(f"starting from the weights of {request.origin.path}, a new run at step 0")
        return model
    with open_chosen(model_folder(folder.parent, request.init_from_model), say, check=check) as source:
        model = kind.new(request, folder, source, say)
        say(f"starting from the weights of {request.init_from_model}, step {source.step}")
    return model


def arch_of(bundle: Bundle | None, arch: str | None) -> str:
    """The kind that a run trains, by its name for --arch. A checkpoint decides; --arch must not contradict it.

    Raises: CheckpointMismatch naming both.
    """
    if bundle is None:
        return arch or "gpt"
    values, where = bundle.config_values, bundle.path(CONFIG)
    name = values.get("model_class", "GPT")
    variant = ModdedConfig.from_dict(values, str(where)).variant if name == MODDED_CLASS else None
    decoder = "gpt" if bundle.config is None else arch_of_config(bundle.config)
    found = f"flex_{variant}" if variant else decoder
    if arch is not None and (name not in ("GPT", MODDED_CLASS) or found != arch):
        detail = variant or (decoder if decoder != "gpt" else None)
        kind = f"{name} ({detail})" if detail else name
        raise CheckpointMismatch(f"{where}: the checkpoint is a {kind}, this run has --arch {arch}. {ANOTHER}")
    if name == "GPTBatched":
        raise CheckpointMismatch(
            f"{where}: model_class is GPTBatched; {typed('train.py')} trains GPT and {MODDED_CLASS}. "
            "Train from the file of its program: --init_from_checkpoint FILE, under another --model_name."
        )
    return found
