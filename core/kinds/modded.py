"""modded-nanogpt as a kind of model: how each variant starts, resumes, learns and reads its data."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..bundle.bundle import Bundle
from ..bundle.commit import CONFIG
from ..bundle.storage import DISK
from ..config.modded import ModdedConfig
from ..config.variants import BLOCK, HEAD_SIZE, VARIANTS
from ..containers.json_files import parse_json
from ..data.corpus import Corpus
from ..data.dataloader import DataLoader, PackedLoader
from ..data.tokenizer import Tokenizer
from ..errors import CheckpointMismatch, InputError
from ..loading.modded import load_modded, refuse_large_tokenizer
from ..loading.tensors import load_moments
from ..networks.device import resolve_device
from ..networks.flex import GPTFlexAttention
from ..networks.muon import MuonWithAdamW, configure_muon
from .gpt import refuse_other_tokenizer
from .kind import MODDED_CLASS, Origin, Request, Say, Source, arch_of, refuse_other_fields
from .modded_moments import take_over
from .presets import MEDIUM_ON_CUDA, MODDED, MODDED_ON_CPU, SMALL_ON_CUDA

WISHES = ("block_size", "batch_size", "device")
"""Fields that a run may change: positions are angles, so no tensor depends on them."""


@dataclass(frozen=True)
class ModdedKind:
    """A variant of modded-nanogpt, trained on one packed sequence at a time by Muon and AdamW."""

    variant: str

    autocasts = False

    @property
    def arch(self) -> str:
        """Its name for --arch."""
        return f"flex_{self.variant}"

    def preset(self, on_cpu: bool) -> dict[str, Any]:
        """Upstream's sizes and settings; a toy of the same mathematics on a CPU."""
        large = {**(MEDIUM_ON_CUDA if self.variant == "medium" else SMALL_ON_CUDA), "dtype": "bf16", "compile": False}
        sized: dict[str, Any] = dict(MODDED_ON_CPU) if on_cpu else large
        rate = VARIANTS[self.variant].muon_rate
        return {**MODDED, **sized, "lr_decay_iters": sized["max_iters"], "learning_rate": rate}

    def refuse_contradictions(self, bundle: Bundle, given: Mapping[str, Any]) -> None:
        """Raise CheckpointMismatch when given fields differ from a step's; only headers are read."""
        refuse_other_fields(bundle.path(CONFIG), bundle.config_values, sizes(given), WISHES)

    def new(self, request: Request, folder: Path, source: Source, say: Say) -> GPTFlexAttention:
        """Make a model at step 0: initialised, or with the weights of another model's step or of an upstream file."""
        _refuse_fp16(request)
        given = sizes(request.given)
        alone = _config_alone(folder, self, given, say)
        if isinstance(source, Origin):
            model = _from_origin(source, {**request.preset, **alone}, given, request)
        elif source is not None:
            arch_of(source, self.arch)
            model = _from_bundle(source, {**alone, **given}, request, None)
        else:
            model = fresh(self.variant, {**request.preset, **alone, **given}, request)
        model.step = 0
        return model

    def load(self, bundle: Bundle, request: Request, say: Say) -> GPTFlexAttention:
        """Load the model of a step to train on."""
        _refuse_fp16(request)
        return _from_bundle(bundle, sizes(request.given), request, say)

    def optimizer(self, model: GPTFlexAttention, request: Request, source: Source, say: Say) -> MuonWithAdamW:
        """Make Muon and AdamW, with the moments of the step that is resumed, or of an upstream file."""
        decay = request.weight_decay
        if decay is None and isinstance(source, Bundle):
            decay = source.settings.get("weight_decay")
        optimizer = configure_muon(model, request.learning_rate, decay)
        if isinstance(source, Origin):
            for line in take_over(source.content, model, optimizer):
                say(line)
        elif source is not None:
            load_moments(source, model, optimizer, say)
        return optimizer

    def loader(self, corpus: Corpus, model: GPTFlexAttention, seed: int) -> DataLoader:
        """Make packed sequences of block_size."""
        return PackedLoader(corpus.train, corpus.val, block_size=model.config.block_size, seed=seed)


def _refuse_fp16(request: Request) -> None:
    if request.dtype == torch.float16:
        raise InputError("--dtype is fp16: these models have no loss scale. Use bf16 or fp32.")


def _from_origin(
    origin: Origin, preset: Mapping[str, Any], given: Mapping[str, Any], request: Request
) -> GPTFlexAttention:
    model, tokenizer = origin.model, _made(request)
    assert isinstance(model, GPTFlexAttention)
    refuse_large_tokenizer(tokenizer, model.config, str(origin.path))
    _wish(model, preset, given, str(origin.path), None)
    model.config.eos_token_id = _end_of_text(tokenizer, model.config.vocab_size)
    return _trainable(model, request)


def _made(request: Request) -> Tokenizer:
    """The tokenizer of a request, which train.py has made from its data."""
    assert not isinstance(request.tokenizer, str)
    return request.tokenizer


def sizes(given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the specified fields: heads and width determine each other, and there is one sequence.

    Raises: InputError for fields that these models do not have.
    """
    made = dict(given)
    if made.get("batch_size", 1) != 1:
        raise InputError(
            f"--batch_size is {made['batch_size']}: these models train on one packed sequence at a time, expected 1. "
            "Make it longer with --block_size, or use several in a step with --gradient_accumulation_steps."
        )
    if made.pop("dropout", 0.0):
        raise InputError(f"--dropout is {given['dropout']}: these models have none. Leave it out.")
    for name in ("tied_head", "head_bias"):
        if made.pop(name, False):
            raise InputError(f"--{name}: these models have a head of their own, without a bias. Leave it out.")
    if "n_head" in made:
        made.setdefault("n_embd", HEAD_SIZE * made["n_head"])
    elif "n_embd" in made:
        made["n_head"] = max(1, made["n_embd"] // HEAD_SIZE)
    return made


def fresh(variant: str, values: Mapping[str, Any], request: Request) -> GPTFlexAttention:
    """Initialise a new model, the same for the same seed, and leave the caller's random state alone."""
    known = {f.name for f in fields(ModdedConfig)} - {"unknown"}
    tokenizer = _made(request)
    rows = _rows(tokenizer, variant)
    config = ModdedConfig.from_dict(
        {
            "vocab_size": rows,
            "head_rows": math.ceil(rows / BLOCK) * BLOCK,
            "eos_token_id": _end_of_text(tokenizer, rows),
            **{name: value for name, value in values.items() if name in known},
            "variant": variant,
        },
        "config of the new model",
    )
    refuse_large_tokenizer(tokenizer, config, "config of the new model")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(request.seed)
        model = GPTFlexAttention.of_config(config)
    return _trainable(model, request)


def _rows(tokenizer: Tokenizer, variant: str) -> int:
    """Rows of the embeddings, as upstream has them: train_gpt.py of 2025-06 pads them like those of the head."""
    ids = tokenizer.vocab_size
    return math.ceil(ids / BLOCK) * BLOCK if tokenizer.kind not in ("char", "symbols") and variant == "small" else ids


def _end_of_text(tokenizer: Tokenizer, rows: int) -> int:
    """The id that begins a document; without one, an id that never occurs, so that all text is one document."""
    found = getattr(tokenizer, "end_of_text", None)
    return rows if found is None else int(found)


def _from_bundle(bundle: Bundle, given: Mapping[str, Any], request: Request, say: Say | None) -> GPTFlexAttention:
    refuse_other_tokenizer(bundle, request.tokenizer)
    device = given.get("device") or bundle.config_values.get("device")
    model = load_modded(bundle, writable=True, device=device)
    assert isinstance(model, GPTFlexAttention)
    _wish(model, {}, given, str(bundle.path(CONFIG)), say)
    return _trainable(model, request)


def _wish(
    model: GPTFlexAttention,
    preset: Mapping[str, Any],
    given: Mapping[str, Any],
    where: str,
    say: Say | None,
) -> None:
    """Apply the fields that a run may change to a loaded model, and refuse those that its tensors decide."""
    values = model.config.to_dict(MODDED_CLASS)
    refuse_other_fields(where, values, given, WISHES)
    wishes = {name: value for name, value in {**preset, **given}.items() if name in WISHES}
    if say is not None and (length := wishes.get("block_size")) not in (None, values["block_size"]):
        say(f"block_size: {values['block_size']} so far, {length} from now on")
    model.config = ModdedConfig.from_dict({**values, **wishes}, where)


def _trainable(model: GPTFlexAttention, request: Request) -> GPTFlexAttention:
    """Move a model to where it trains: matrices, head and scalars in fp32, embeddings in the dtype of the run."""
    model.to(resolve_device(model.config.device, "config"))
    for name, p in model.named_parameters():
        dtype = (request.dtype or p.dtype) if "embed" in name else torch.float32
        p.data = p.data.to(dtype, copy=p.dtype == dtype)  # never the pages of a mapped file
        p.requires_grad_(True)
    model.tokenizer = _made(request)
    return model.train()


def _config_alone(folder: Path, kind: ModdedKind, given: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Read a config.json that stands without weights: the architecture of a new model."""
    path = folder / CONFIG
    values: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        values = parse_json(DISK.read(path), str(path))
    if not values:
        return {}
    name, found = values.get("model_class", "GPT"), values.get("variant")
    faults = [
        f"{key} is {given[key]} here and {values[key]} there"
        for key in given
        if values.get(key, given[key]) != given[key]
    ]
    if (name, found) != (MODDED_CLASS, kind.variant):
        faults.insert(0, f"it describes a {name}{f' ({found})' if found else ''}, this run has --arch {kind.arch}")
    if faults:
        raise CheckpointMismatch(f"{path}: {'; '.join(faults)}. Remove the file, or train under another --model_name.")
    say(f"{path}: no weights beside it; training a new model of this architecture")
    return values
