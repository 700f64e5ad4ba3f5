"""ModdedConfig: the size and variant of a modded-nanogpt model; its config.json is read and checked here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..errors import CheckpointMismatch
from .gpt import FORMAT_VERSION
from .variants import BLOCK, HEAD_SIZE, VALUE_TABLES, VARIANTS, Variant

CLASSES = ("GPTFlexAttention", "GPTBatched")
"""Values of `model_class` in a config.json that has this config."""

GPT2_END = 50256
"""GPT-2's end of text, with which modded-nanogpt begins each document."""

WINDOWS = ("exact", "full")


@dataclass
class ModdedConfig:
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
    unknown: dict[str, Any] = field(default_factory=dict)  # fields of other programs, kept as they are

    def __post_init__(self) -> None:
        self.check("config")

    def check(self, where: str) -> None:
        """Raise unless every field has its type and a possible value.

        Raises: CheckpointMismatch naming each field, its value and what is allowed.
        """
        faults = [
            f"{name} is {value!r}, expected a whole number of at least 1"
            for name in ("vocab_size", "head_rows", "n_layer", "n_head", "n_embd", "block_size", "batch_size")
            if not _whole(value := getattr(self, name), 1)
        ]
        if not isinstance(self.variant, str) or self.variant not in VARIANTS:
            faults.append(f"variant is {self.variant!r}, expected {', '.join(VARIANTS)}")
        if not _whole(self.eos_token_id, 0):
            faults.append(f"eos_token_id is {self.eos_token_id!r}, expected a whole number of at least 0")
        if self.window not in WINDOWS and not _whole(self.window, 1):
            faults.append(f"window is {self.window!r}, expected exact, full or a number of blocks of {BLOCK}")
        if not isinstance(self.device, str) or not self.device:
            faults.append(f"device is {self.device!r}, expected auto, cpu, cuda or cuda:N")
        if not faults and self.n_embd != self.n_head * HEAD_SIZE:
            faults.append(
                f"n_embd is {self.n_embd}, and {self.n_head} heads of {HEAD_SIZE} make {self.n_head * HEAD_SIZE}; the "
                "value embeddings need them equal"
            )
        if not faults and (self.n_layer % 2 or self.n_layer < 2 * VALUE_TABLES):
            faults.append(f"n_layer is {self.n_layer}, expected an even number of at least {2 * VALUE_TABLES}")
        if faults:
            raise CheckpointMismatch(f"{where}: {'; '.join(faults)}.")

    @property
    def kind(self) -> Variant:
        """The computation of the variant."""
        return VARIANTS[self.variant]

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config.json") -> ModdedConfig:
        """Read a config.json; fields this program does not know are kept in `unknown`.

        Raises: CheckpointMismatch when a field is missing, has a wrong type or an impossible value.
        """
        known = {f.name for f in fields(cls)} - {"unknown"}
        needed = [name for name in ("variant", "vocab_size", "n_layer", "n_head", "n_embd") if name not in values]
        if needed:
            raise CheckpointMismatch(f"{where}: {', '.join(needed)} missing; the tensors alone do not say it.")
        given = {name: value for name, value in values.items() if name in known}
        config = cls.__new__(cls)
        for name, value in {**asdict(cls()), "head_rows": given["vocab_size"], **given}.items():
            setattr(config, name, value)
        config.unknown = {
            k: v for k, v in values.items() if k not in known and k not in ("format_version", "model_class")
        }
        config.check(where)
        return config

    def to_dict(self, model_class: str) -> dict[str, Any]:
        """The content of config.json, with the unknown fields of the file it came from."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "unknown"}
        return {"model_class": model_class, **known, "format_version": FORMAT_VERSION, **self.unknown}


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31
