"""Open a text classifier that the fine-tuning example saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..bundle.intact import open_chosen
from ..config.modded import ModdedConfig
from ..console.words import differences, listed
from ..data.tokenizer import Tokenizer, tokenizer_from_state
from ..errors import CheckpointMismatch
from ..networks.batched import GPTBatched
from ..networks.classification import GPTClassification
from .tensors import read_part


@dataclass(frozen=True)
class Classifier:
    """A fine-tuned model as it was saved, with the names of its classes."""

    model: GPTClassification
    classes: list[str]
    tokenizer: Tokenizer
    step: int


def load_classifier(folder: str | Path, device: str | torch.device = "cpu") -> Classifier:
    """Load what examples/finetune_classification.py saved, in eval mode; the pretrained checkpoint is not needed.

    Raises: CheckpointNotFound, CheckpointDamaged, CheckpointMismatch when the folder holds something else.
    """
    with open_chosen(Path(folder)) as bundle:
        extra, settings = bundle.state.extra, bundle.state.get("finetuning")
        config = extra.get("pretrained_config") if isinstance(extra, dict) else None
        classes = settings.get("classes") if isinstance(settings, dict) else None
        if not isinstance(config, dict) or not isinstance(classes, list) or bundle.tokenizer is None:
            raise CheckpointMismatch(
                f"{folder}: step {bundle.step} is not a classifier; its training state has no pretrained_config, "
                "classes or tokenizer. examples/finetune_classification.py makes one."
            )
        with torch.device("meta"):
            pretrained = GPTBatched.of_config(ModdedConfig.from_dict(config, f"{folder}: pretrained_config"))
            model = GPTClassification(pretrained, len(classes))
        tensors = read_part(bundle.weights)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if faults := differences(expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()}):
            raise CheckpointMismatch(f"{bundle.weights.source.path} does not fit this model: {listed(faults)}.")
        model.load_state_dict(tensors, assign=True)
        return Classifier(model.to(device).eval(), classes, tokenizer_from_state(bundle.tokenizer), bundle.step)
