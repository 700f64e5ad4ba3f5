"""The kinds of model that train.py trains, by their names for --arch."""

from __future__ import annotations

from ..bundle.bundle import Bundle
from ..config.decoders import DECODERS
from ..config.variants import VARIANTS
from ..errors import InputError
from ..networks.distributed import ALONE, World
from .gpt import GptKind
from .kind import ModelKind, arch_of
from .modded import ModdedKind

_ALL: tuple[ModelKind, ...] = (GptKind(), *map(GptKind, DECODERS), *map(ModdedKind, VARIANTS))

KINDS = {kind.arch: kind for kind in _ALL}
"""All kinds, by name."""


def kind_of(bundle: Bundle | None, arch: str | None, world: World = ALONE) -> ModelKind:
    """The kind that a run trains: that of its checkpoint, which --arch must not contradict.

    Raises: CheckpointMismatch naming both, or for a checkpoint without its frozen tensors; InputError for a kind that
        cannot be sharded over the ranks of a world.
    """
    if bundle is not None:
        bundle.refuse_partial()
    kind = KINDS[arch_of(bundle, arch)]
    if isinstance(kind, GptKind):
        return gpt_kind(world, kind.arch)
    if world.is_sharded:
        raise InputError("--parallel fsdp: Muon needs whole matrices, found --arch flex_*. Use --parallel ddp.")
    return kind


def gpt_kind(world: World, arch: str = "gpt") -> ModelKind:
    """The GPT of this project on the ranks of a world; a new one has the choices of `arch`."""
    if not world.is_sharded:
        return KINDS[arch]
    from .sharded_gpt import ShardedGptKind  # imports torch.distributed, which one process does not need

    return ShardedGptKind(arch, world)
