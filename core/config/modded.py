"""ModdedConfig: the size and variant of a modded-nanogpt model; its config.json is read and checked here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ..errors import CheckpointMismatch
from .fields import DEVICE, ConfigFields, Rule, is_whole, one_of, whole_number
from .variants import BLOCK, HEAD_SIZE, VALUE_TABLES, VARIANTS, Variant

CLASSES = ("GPTFlexAttention", "GPTBatched")
"""Values of `model_class` in a config.json that has this config."""

GPT2_END = 50256
"""GPT-2's end of text, with which modded-nanogpt begins each document."""

WINDOWS = ("exact", "full")


@dataclass
class ModdedConfig(ConfigFields):
    """Size and variant of a model, and the preferences of the run that made it.

    `vocab_size` is the rows of the embedding, `head_rows` those of the head: programs pad either, or both.
    """

    variant: str = "small"
    vocab_size: int = 50304
    head_rows: int = 50304
    n_layer: int = 12
    n_head: int = 6
    n_embd: int = 768
    block_size: int = 65536
    eos_token_id: int = GPT2_END
    window: int | str = "exact"
    batch_size: int = 1
    device: str = "auto"  # a preference: "auto" is CUDA if available

    OURS: ClassVar[tuple[str, ...]] = ("format_version", "model_class")
    RULES: ClassVar[dict[str, Rule]] = {
        **dict.fromkeys(
            ("vocab_size", "head_rows", "n_layer", "n_head", "n_embd", "block_size", "batch_size"), whole_number(1)
        ),
        "variant": one_of(*VARIANTS),
        "eos_token_id": whole_number(0),
        "window": (
            lambda value: value in WINDOWS or is_whole(value, 1),
            f"expected exact, full or a number of blocks of {BLOCK}",
        ),
        "device": DEVICE,
    }

    def contradictions(self) -> list[str]:
        """Describe fields that do not fit together."""
        width = self.n_head * HEAD_SIZE
        if self.n_embd != width:
            heads = f"{self.n_head} heads of {HEAD_SIZE} make {width}"
            return [f"n_embd is {self.n_embd}, and {heads}; the value embeddings need them equal"]
        if self.n_layer % 2 or self.n_layer < 2 * VALUE_TABLES:
            return [f"n_layer is {self.n_layer}, expected an even number of at least {2 * VALUE_TABLES}"]
        return []

    @property
    def kind(self) -> Variant:
        """The computation of the variant."""
        return VARIANTS[self.variant]

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config.json") -> Self:
        """Read a config.json; fields this program does not know are kept in `unknown`.

        Raises: CheckpointMismatch when a field is missing, has a wrong type or an impossible value.
        """
        needed = [name for name in ("variant", "vocab_size", "n_layer", "n_head", "n_embd") if name not in values]
        if needed:
            raise CheckpointMismatch(f"{where}: {', '.join(needed)} missing; the tensors alone do not say it.")
        return super().from_dict({"head_rows": values["vocab_size"], **values}, where)
