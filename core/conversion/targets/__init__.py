"""What a conversion can write: for each format the families it holds, and the files it consists of."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from ...families.fused import FUSED
from ..pairs.decoder_settings import DECODERS
from ..pairs.litgpt import FAMILIES as LITGPT
from ..pairs.modded import BATCHED
from ..plan import Options, Plan, Source
from .bundle import plan_bundle
from .dcp import plan_dcp
from .hf import plan_hf
from .litgpt import plan_litgpt
from .megatron import plan_megatron
from .nanogpt import plan_nanogpt
from .safetensors import plan_safetensors
from .torch import plan_pt

HF = ("hf_gpt2", *DECODERS)
MEGATRON = ("megatron_gpt2", "megatron_llama", "megatron_qwen2", "megatron_qwen3")


@dataclass(frozen=True)
class Format:
    """A kind of output; without `families` any model, in the names that it has."""

    name: str
    what: str
    families: tuple[str, ...]
    plan: Callable[[Source, Options, Path], Plan]


FORMATS = (
    Format(
        "bundle",
        "a folder of ours: train.py resumes it, generate.py writes text with it",
        (FUSED, BATCHED),
        plan_bundle,
    ),
    Format("nanogpt", "a ckpt.pt that nanoGPT resumes and samples from", ("nanogpt",), plan_nanogpt),
    Format("hf", "a folder that transformers opens", HF, plan_hf),
    Format("megatron", "an exported_model.pt of Megatron, with the names of the local layers", MEGATRON, plan_megatron),
    Format("litgpt", "a folder that litgpt opens: lit_model.pth, model_config.yaml, tokenizer", LITGPT, plan_litgpt),
    Format("safetensors", "one .safetensors file, or a folder of them; names as they are", (), plan_safetensors),
    Format("pt", "one torch file of a state dict; names as they are", (), plan_pt),
    Format("dcp", "a folder that torch.distributed.checkpoint loads; names as they are", (), plan_dcp),
)
"""Everything that --to can be."""


def formats_of(families: Collection[str]) -> list[str]:
    """The names of the formats for a model that can become one of these families."""
    return [one.name for one in FORMATS if not one.families or not set(one.families).isdisjoint(families)]
