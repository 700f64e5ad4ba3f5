"""Where a modded-nanogpt model starts training: a bundle that is resumed, weights of another run, or fresh ones."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..bundle import intact
from ..bundle.bundle import OPTIMIZER, Bundle
from ..bundle.commit import CONFIG
from ..checkpoint import CheckpointManager
from ..config.modded import SpeedrunConfig
from ..config.variants import BLOCK, HEAD_SIZE
from ..containers.json_files import parse_json
from ..data.tokenizer import Tokenizer
from ..errors import CheckpointMismatch, InputError
from ..loading.modded import load_flex_checkpoint, load_speedrun, refuse_large_tokenizer
from ..loading.tensors import load_moments
from ..networks.device import resolve_device
from ..networks.flex import GPTFlexAttention
from ..networks.muon import MuonWithAdamW, configure_muon
from .gpt import refuse_other_tokenizer
from .modded_moments import take_over

MODEL_CLASS = "GPTFlexAttention"
ANOTHER = "Leave it out, or train under another --model_name."
WISHES = ("block_size", "batch_size", "device")
"""Fields that a run may change: no tensor depends on them, since positions are angles."""


@dataclass(frozen=True)
class Origin:
    """A file of upstream's that a new run starts from."""

    model: GPTFlexAttention
    content: Any
    path: Path


@dataclass(frozen=True)
class Wanted:
    """What a run asks for."""

    variant: str
    given: Mapping[str, Any]  # fields of the config that a person named
    preset: Mapping[str, Any]
    tokenizer: Tokenizer
    learning_rate: float
    weight_decay: float | None
    seed: int
    dtype: torch.dtype | None  # of the embeddings, which activations follow; None as they are, fp32 if new


def open_origin(path: Path, arch: str | None) -> Origin:
    """Read the upstream file that --init_from_checkpoint names.

    Raises: CheckpointMismatch when it is of another variant than --arch; CheckpointNotFound, CheckpointDamaged.
    """
    model, _, content = load_flex_checkpoint(path)
    found = model.config.variant
    if arch not in (None, f"flex_{found}"):
        raise CheckpointMismatch(
            f"{path}: its tensors are those of --arch flex_{found}, this run has --arch {arch}. Another architecture "
            "computes something else from them; use the file's, or leave --arch out."
        )
    return Origin(model, content, path)


def variant_to_train(bundle: Bundle | None, arch: str | None) -> str | None:
    """Which variant a run trains; None is a GPT. A checkpoint decides, and --arch may only agree.

    Raises: CheckpointMismatch naming both.
    """
    wish = arch.removeprefix("flex_") if arch not in (None, "gpt") else None
    if bundle is None:
        return wish
    values = bundle.config_values
    name = values.get("model_class", "GPT")
    found = SpeedrunConfig.from_dict(values, str(bundle.path(CONFIG))).variant if name == MODEL_CLASS else None
    if arch is not None and (name not in ("GPT", MODEL_CLASS) or found != wish):
        kind = f"{name} ({found})" if found else name
        raise CheckpointMismatch(
            f"{bundle.path(CONFIG)}: the checkpoint is a {kind}, this run has --arch {arch}. {ANOTHER}"
        )
    if name == "GPTBatched":
        raise CheckpointMismatch(
            f"{bundle.path(CONFIG)}: model_class is GPTBatched; train.py trains GPT and {MODEL_CLASS}. "
            "Train under another --model_name."
        )
    return found


def sizes(given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the fields that a person named: heads and width follow each other, and there is one sequence.

    Raises: InputError for what these models do not have.
    """
    made = dict(given)
    if made.get("batch_size", 1) != 1:
        raise InputError(
            f"--batch_size is {made['batch_size']}: these models train on one packed sequence at a time, expected 1. "
            "Make it longer with --block_size, or take several for a step with --gradient_accumulation_steps."
        )
    if made.pop("dropout", 0.0):
        raise InputError(f"--dropout is {given['dropout']}: these models have none. Leave it out.")
    if "n_head" in made:
        made.setdefault("n_embd", HEAD_SIZE * made["n_head"])
    elif "n_embd" in made:
        made["n_head"] = max(1, made["n_embd"] // HEAD_SIZE)
    return made


def start_speedrun(
    manager: CheckpointManager,
    wanted: Wanted,
    bundle: Bundle | None,
    origin: Origin | None = None,
    init_from_model: str | None = None,
) -> tuple[GPTFlexAttention, MuonWithAdamW, int]:
    """Resume a model, or start it from an upstream file, another model's weights, or fresh; also optimizer and step.

    Raises: CheckpointMismatch when architecture or tokenizer contradict the checkpoint; both are shown.
    """
    if wanted.dtype == torch.float16:
        raise InputError("--dtype is fp16: these models have no loss scale. Take bf16 or fp32.")
    manager.acquire()
    given = sizes(wanted.given)
    if bundle is not None:
        model = _from_bundle(bundle, given, wanted, manager)
        optimizer = configure_muon(model, wanted.learning_rate, wanted.weight_decay)
        if load_moments(bundle, model, optimizer, manager.say) is None and bundle.step:
            manager.say(f"{bundle.path(OPTIMIZER)}: no optimizer state; its moments start from zero")
        manager.went_on_from(bundle)
        return model, optimizer, model.step
    if origin is not None and init_from_model:
        raise InputError("--init_from_checkpoint and --init_from_model: a run has one start. Leave one out.")
    alone = _config_alone(manager, wanted.variant, given)
    if origin is not None:
        model = origin.model
        refuse_large_tokenizer(wanted.tokenizer, model.config, str(origin.path))
        _wish(model, {**wanted.preset, **alone}, given, str(origin.path), None)
        model.config.eos_token_id = _end_of_text(wanted.tokenizer, model.config.vocab_size)
        model = _trainable(model, wanted)
        manager.say(f"starting from the weights of {origin.path}, a new run at step 0")
    elif init_from_model:
        other = CheckpointManager(init_from_model, manager.checkpoint_dir.parent)
        with intact.open_chosen(other.checkpoint_dir, manager.say, check=manager.verify) as source:
            variant_to_train(source, f"flex_{wanted.variant}")
            model = _from_bundle(source, {**alone, **given}, wanted, None)
            manager.say(f"starting from the weights of {init_from_model}, step {source.step}")
    else:
        model = fresh({**wanted.preset, **alone, **given}, wanted)
    model.step = 0
    optimizer = configure_muon(model, wanted.learning_rate, wanted.weight_decay)
    if origin is not None:
        for line in take_over(origin.content, model, optimizer):
            manager.say(line)
    return model, optimizer, 0


def fresh(values: Mapping[str, Any], wanted: Wanted) -> GPTFlexAttention:
    """Initialise a new model, the same for the same seed, without touching the caller's random state."""
    known = {f.name for f in fields(SpeedrunConfig)} - {"unknown"}
    rows = _rows(wanted.tokenizer, wanted.variant)
    config = SpeedrunConfig.from_dict(
        {
            "vocab_size": rows,
            "head_rows": math.ceil(rows / BLOCK) * BLOCK,
            "eos_token_id": _end_of_text(wanted.tokenizer, rows),
            **{name: value for name, value in values.items() if name in known},
            "variant": wanted.variant,
        },
        "config of the new model",
    )
    refuse_large_tokenizer(wanted.tokenizer, config, "config of the new model")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(wanted.seed)
        model = GPTFlexAttention.of_config(config)
    return _trainable(model, wanted)


def _rows(tokenizer: Tokenizer, variant: str) -> int:
    """Rows of the embeddings as upstream has them: train_gpt.py of 2025-06 pads them like those of the head."""
    ids = tokenizer.vocab_size
    return math.ceil(ids / BLOCK) * BLOCK if tokenizer.kind != "char" and variant == "small" else ids


def _end_of_text(tokenizer: Tokenizer, rows: int) -> int:
    """The id that begins a document; where the tokenizer has none, one that never occurs: all is one document."""
    found = getattr(tokenizer, "end_of_text", None)
    return rows if found is None else int(found)


def _from_bundle(
    bundle: Bundle, given: Mapping[str, Any], wanted: Wanted, manager: CheckpointManager | None
) -> GPTFlexAttention:
    refuse_other_tokenizer(bundle, wanted.tokenizer)
    device = given.get("device") or bundle.config_values.get("device")
    model = load_speedrun(bundle, writable=True, device=device)
    assert isinstance(model, GPTFlexAttention)
    _wish(model, {}, given, str(bundle.path(CONFIG)), manager)
    return _trainable(model, wanted)


def _wish(
    model: GPTFlexAttention,
    preset: Mapping[str, Any],
    given: Mapping[str, Any],
    where: str,
    manager: CheckpointManager | None,
) -> None:
    """Give a loaded model what a run may choose, and refuse what its tensors decide."""
    values = model.config.to_dict(MODEL_CLASS)
    refuse_other_sizes(where, values, given)
    wishes = {name: value for name, value in {**preset, **given}.items() if name in WISHES}
    if manager is not None and (length := wishes.get("block_size")) not in (None, values["block_size"]):
        manager.say(f"block_size: {values['block_size']} so far, {length} from now on")
    model.config = SpeedrunConfig.from_dict({**values, **wishes}, where)


def refuse_other_sizes(where: str, values: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise CheckpointMismatch when a given field is not the checkpoint's and its tensors decide it."""
    faults = [
        f"{name} is {given[name]} here and {values[name]} in the checkpoint"
        for name in given
        if name in values and name not in WISHES and given[name] != values[name]
    ]
    if faults:
        raise CheckpointMismatch(f"{where}: {'; '.join(faults)}. {ANOTHER}")


def _trainable(model: GPTFlexAttention, wanted: Wanted) -> GPTFlexAttention:
    """Put a model where it trains: its matrices, head and scalars in fp32, its embeddings as the run wants them."""
    model.to(resolve_device(model.config.device, "config"))
    for name, p in model.named_parameters():
        dtype = (wanted.dtype or p.dtype) if "embed" in name else torch.float32
        p.data = p.data.to(dtype, copy=p.dtype == dtype)  # never the pages of a mapped file
        p.requires_grad_(True)
    model.tokenizer = wanted.tokenizer
    return model.train()


def _config_alone(manager: CheckpointManager, variant: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Read a config.json that stands without weights: the architecture of a new model."""
    path = manager.checkpoint_dir / CONFIG
    values: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        values = parse_json(path.read_bytes(), str(path))
    if not values:
        return {}
    name, found = values.get("model_class", "GPT"), values.get("variant")
    faults = [
        f"{key} is {given[key]} here and {values[key]} there"
        for key in given
        if values.get(key, given[key]) != given[key]
    ]
    if (name, found) != (MODEL_CLASS, variant):
        faults.insert(0, f"it is of a {name}{f' ({found})' if found else ''}, this run has --arch flex_{variant}")
    if faults:
        raise CheckpointMismatch(f"{path}: {'; '.join(faults)}. Remove the file, or train under another --model_name.")
    manager.say(f"{path}: no weights beside it; training a new model of this architecture")
    return values
