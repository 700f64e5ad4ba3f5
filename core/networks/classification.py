"""GPTClassification: a head over GPTBatched that classifies texts, and the scores of its predictions.

Shapes: B texts, T positions, C n_embd, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CheckpointMismatch, InputError
from .batched import GPTBatched


class GPTClassification(nn.Module):
    """A pretrained model and a head on the last real token of each text: Dropout, Linear, ReLU, Dropout, Linear.

    `pretrained_model` may be replaced by another one of the same width. `class_weights` [K] apply to the loss.
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
        # Not persistent: they are a setting of the training run, and a classifier predicts without them.
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(
        self, tokens: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Classify texts: tokens and mask [B, T] to fp32 logits [B, K], and the mean loss for labels [B].

        `attention_mask` is true (or 1) at real tokens; padding may be left or right, with any id.

        Raises: CheckpointMismatch when `pretrained_model` was set to one of another width.
        """
        features = self.pretrained_model.forward_features(tokens, attention_mask)
        if features.size(-1) != self.width:
            raise CheckpointMismatch(
                f"pretrained_model: found width {features.size(-1)}, expected {self.width}, that of the head. "
                "Make a new GPTClassification from that model."
            )
        pooled = last_real(features, attention_mask)
        logits = self.head(pooled.to(next(self.head.parameters()).dtype)).float()
        if labels is None:
            return logits, None
        weights = None if self.class_weights is None else self.class_weights.float()
        return logits, F.cross_entropy(logits, labels, weight=weights)


def last_real(features: Tensor, attention_mask: Tensor) -> Tensor:
    """Take the features of the last real token: [B, T, C] and a mask [B, T] to [B, C], whichever side is padded."""
    real = attention_mask.to(features.device, torch.bool)
    last = real.size(1) - 1 - real.flip(1).to(torch.uint8).argmax(1)
    return features[torch.arange(len(features), device=features.device), last]


def confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Count predictions: predicted and true classes [N] to int64 [K, K]; rows are true classes."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


@dataclass(frozen=True)
class ClassScore:
    """Scores of one class: the right fraction of the texts predicted as it, and of the texts that belong to it."""

    precision: float
    recall: float
    f_score: float
    support: int  # texts of the class


def accuracy(counts: Tensor) -> float:
    """The fraction of correct predictions in a confusion matrix [K, K]; 0 when it is empty."""
    return _share(int(counts.trace()), int(counts.sum()))


def class_scores(counts: Tensor) -> list[ClassScore]:
    """Precision, recall and F-score of each class of a confusion matrix [K, K]; a fraction of nothing is 0."""
    columns = (counts.diagonal().tolist(), counts.sum(0).tolist(), counts.sum(1).tolist())
    return [
        ClassScore(_share(right, called), _share(right, there), _share(2 * right, called + there), there)
        for right, called, there in zip(*columns, strict=True)
    ]


def macro_f(counts: Tensor) -> float:
    """The mean F-score over the classes that occur, as truth or as prediction, in a confusion matrix [K, K]."""
    occur = (counts.sum(0) + counts.sum(1)) > 0
    scores = [score.f_score for score, occurs in zip(class_scores(counts), occur.tolist(), strict=True) if occurs]
    return sum(scores) / len(scores) if scores else 0.0


def balanced_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Weights [K] that make all classes count equally:  N / (K * texts of the class); 0 for an empty class."""
    counts = torch.bincount(labels, minlength=num_classes)
    return torch.where(counts > 0, len(labels) / (num_classes * counts.clamp(min=1)), 0.0)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
