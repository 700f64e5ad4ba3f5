"""GPTClassification: a head over GPTBatched that puts texts into classes, and how its answers are scored.

Shapes: B texts, T positions, C n_embd, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..bundle.intact import open_chosen
from ..config.modded import SpeedrunConfig
from ..console.listing import differences, listed
from ..data.tokenizer import Tokenizer, tokenizer_from_state
from ..errors import CheckpointMismatch, InputError
from ..loading.tensors import read_part
from .batched import GPTBatched


class GPTClassification(nn.Module):
    """A pretrained model and a head on the last real token of each text: Dropout, Linear, ReLU, Dropout, Linear.

    `pretrained_model` may be set to another one of the same width. `class_weights` [K] weigh the classes in the loss.
    """

    def __init__(
        self,
        pretrained_model: GPTBatched,
        num_classes: int,
        dropout: float = 0.1,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise InputError(f"num_classes: found {num_classes}, expected at least 2.")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout: found {dropout}, expected a number from 0 up to, not including, 1.")
        if class_weights is not None and tuple(class_weights.shape) != (num_classes,):
            raise InputError(
                f"class_weights: found shape {tuple(class_weights.shape)}, expected one number for each of the "
                f"{num_classes} classes."
            )
        self.pretrained_model = pretrained_model
        self.width = pretrained_model.config.n_embd
        self.head = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(self.width, self.width // 2),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(self.width // 2, num_classes),
        )
        # Not persistent: they are a wish of the training run, and a classifier answers without them.
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(
        self, tokens: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Classify texts: tokens and mask [B, T] to fp32 logits [B, K], and the mean loss for labels [B].

        `attention_mask` is true (or 1) at real tokens; padding may be left or right, and any id.

        Raises: CheckpointMismatch when `pretrained_model` was set to one of another width.
        """
        features = self.pretrained_model.forward_features(tokens, attention_mask)
        if features.size(-1) != self.width:
            raise CheckpointMismatch(
                f"pretrained_model: found width {features.size(-1)}, and the head was made for {self.width}. "
                "Make a new GPTClassification of that model."
            )
        pooled = last_real(features, attention_mask)
        logits = self.head(pooled.to(next(self.head.parameters()).dtype)).float()
        if labels is None:
            return logits, None
        weights = None if self.class_weights is None else self.class_weights.float()
        return logits, F.cross_entropy(logits, labels, weight=weights)


@dataclass(frozen=True)
class Classifier:
    """A fine-tuned model as it was saved, with what its answers mean."""

    model: GPTClassification
    classes: list[str]
    tokenizer: Tokenizer
    step: int


def load_classifier(folder: str | Path, device: str | torch.device = "cpu") -> Classifier:
    """Load what examples/finetune_classification.py saved, in eval mode; the pretrained checkpoint is not needed.

    Raises: CheckpointNotFound, CheckpointDamaged, CheckpointMismatch when the folder holds something else.
    """
    with open_chosen(Path(folder)) as bundle:
        extra, settings = bundle.state.get("extra"), bundle.state.get("finetuning")
        config = extra.get("pretrained_config") if isinstance(extra, dict) else None
        classes = settings.get("classes") if isinstance(settings, dict) else None
        if not isinstance(config, dict) or not isinstance(classes, list) or bundle.tokenizer is None:
            raise CheckpointMismatch(
                f"{folder}: step {bundle.step} is no classifier; its training state has no pretrained_config, classes "
                "or tokenizer. examples/finetune_classification.py makes one."
            )
        with torch.device("meta"):
            pretrained = GPTBatched.of_config(SpeedrunConfig.from_dict(config, f"{folder}: pretrained_config"))
            model = GPTClassification(pretrained, len(classes))
        tensors = read_part(bundle.weights)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if faults := differences(expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()}):
            raise CheckpointMismatch(f"{bundle.weights.source.path} is of another model: {listed(faults)}.")
        model.load_state_dict(tensors, assign=True)
        return Classifier(model.to(device).eval(), classes, tokenizer_from_state(bundle.tokenizer), bundle.step)


def last_real(features: Tensor, attention_mask: Tensor) -> Tensor:
    """Take the features of the last real token: [B, T, C] and a mask [B, T] to [B, C], whichever side is padded."""
    real = attention_mask.to(features.device, torch.bool)
    last = real.size(1) - 1 - real.flip(1).to(torch.uint8).argmax(1)
    return features[torch.arange(len(features), device=features.device), last]


def confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Count answers: predicted and true classes [N] to int64 [K, K], rows are true classes."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


@dataclass(frozen=True)
class ClassScore:
    """How one class was found: of those that were called so, and of those that are so, the share that is right."""

    precision: float
    recall: float
    f_score: float
    support: int  # texts that are of the class


def accuracy(counts: Tensor) -> float:
    """The share of right answers in a confusion matrix [K, K]; 0 for none."""
    return _share(int(counts.trace()), int(counts.sum()))


def class_scores(counts: Tensor) -> list[ClassScore]:
    """Precision, recall and F-score of each class of a confusion matrix [K, K]; a share of nothing is 0."""
    scores = []
    for k in range(len(counts)):
        right, called, there = int(counts[k, k]), int(counts[:, k].sum()), int(counts[k].sum())
        f_score = _share(2 * right, called + there)
        scores.append(ClassScore(_share(right, called), _share(right, there), f_score, there))
    return scores


def macro_f(counts: Tensor) -> float:
    """The mean F-score over the classes that occur, as truth or as answer, in a confusion matrix [K, K]."""
    occur = (counts.sum(0) + counts.sum(1)) > 0
    scores = [score.f_score for score, occurs in zip(class_scores(counts), occur.tolist(), strict=True) if occurs]
    return sum(scores) / len(scores) if scores else 0.0


def balanced_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Weights [K] that make all classes count alike in the loss: N / (K * texts of the class); 0 for an empty class."""
    counts = torch.bincount(labels, minlength=num_classes)
    return torch.where(counts > 0, len(labels) / (num_classes * counts.clamp(min=1)), 0.0)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
