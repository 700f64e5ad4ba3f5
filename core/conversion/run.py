"""How a program trained: the settings of nanoGPT's file in the terms of train.py, and back, and what has no place.

nanoGPT's learning rate is that of our cosine: a linear warm-up, half a cosine from learning_rate to min_lr at
lr_decay_iters, and constant, without a warm-up, when decay_lr is off. Its optimizer records the rate of the step at
which the file was saved, which shows whether the config is really that of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..console.commands import typed

OF_NANOGPT = ("nanogpt", "meta_llama")
"""Families whose checkpoints have the entries of nanoGPT's; llama2.c has its train.py."""


@dataclass
class Run:
    """How a run trained, by the names of train.py's flags; `batch_size` belongs into a bundle's config.json."""

    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    batch_size: int | None = None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_size(value: Any) -> bool:
    return _is_number(value) and value >= 0


_SAME: dict[str, Callable[[Any], bool]] = {
    "max_iters": _is_count,
    "learning_rate": lambda value: _is_number(value) and value > 0,
    "weight_decay": _is_size,
    "grad_clip": _is_size,
    "batch_size": _is_count,
    "gradient_accumulation_steps": _is_count,
    "eval_interval": _is_count,
    "eval_iters": _is_count,
}
"""Entries that mean the same in both programs, and the values that train.py takes."""

_SCHEDULE = ("decay_lr", "warmup_iters", "lr_decay_iters", "min_lr")
_MODEL = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
_BETAS = ("beta1", "beta2")
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

DECISIVE = ("lr_schedule", "warmup_iters", "grad_clip", "batch_size", "gradient_accumulation_steps", "dtype")
"""Settings that decide an update; train.py has its own for those that a file does not show."""


def run_of(config: Mapping[str, Any], step: int, rate: Any, *, has_moments: bool, is_old: bool) -> Run:
    """Take over what a nanoGPT config records, and note every entry that is not taken over, with its value.

    `step` is the number of updates made, `rate` the learning rate that the optimizer recorded for the next one;
    `is_old` says that the order of the optimizer's parameters is that before 2023-05-06.
    """
    run, refused = Run(), dict[str, Any]()
    for name, fits in _SAME.items():
        if name in config and fits(config[name]):
            run.settings[name] = config[name]
        elif name in config:
            refused[name] = config[name]
    run.batch_size = run.settings.pop("batch_size", None)
    _take_schedule(run, config, rate)
    _take_dtype(run, config, refused)
    _compare_rate(run, step, rate)
    if is_old and run.settings.get("gradient_accumulation_steps"):
        run.notes.append(
            f"WARNING: gradient_accumulation_steps {run.settings['gradient_accumulation_steps']} may be that of each "
            "process: nanoGPT before 2023-03-25 multiplied it by their number, which it did not record "
            "(--gradient_accumulation_steps)"
        )
    known = {*_SAME, *_SCHEDULE, *_MODEL, "dtype", *(_BETAS if has_moments else ())}
    refused |= {name: value for name, value in config.items() if name not in known}
    if refused:
        shown = ", ".join(f"{name} {value!r}" for name, value in refused.items())
        run.notes.append(f"not taken over from its config: {shown}")
    run.notes += missing(run)
    anew = typed("train.py draws batches and dropout anew")
    run.notes.append(f"it records neither a seed nor a position in its data: {anew}")
    return run


def in_nanogpts_words(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Write the config of llama2.c's train.py as nanoGPT's: without model_args, with what its code sets afterwards."""
    fixed = {"lr_decay_iters": config.get("max_iters"), "min_lr": 0.0}
    return {name: value for name, value in config.items() if name not in arguments} | fixed


def missing(run: Run) -> list[str]:
    """Report the decisive settings that are not recorded."""
    found = run.settings if run.batch_size is None else {**run.settings, "batch_size": run.batch_size}
    names = [name for name in DECISIVE if name not in found]
    said = typed("WARNING: not recorded, so train.py has its own")
    return [f"{said}: {', '.join(names)} (flags set them)"] if names else []


def _take_schedule(run: Run, config: Mapping[str, Any], rate: Any) -> None:
    """Take over the learning rate of every step, or keep the one of this step and say why."""
    if config.get("decay_lr") is False:
        run.settings |= {"lr_schedule": "constant", "warmup_iters": 0.0}
        return
    if config.keys().isdisjoint(_SCHEDULE):
        return
    peak, warmup, decay, lowest = (config.get(name) for name in ("learning_rate", *_SCHEDULE[1:]))
    if fault := _fault_of(config, peak, warmup, decay, lowest):
        run.settings |= {"lr_schedule": "constant", "warmup_iters": 0.0}
        if _is_number(rate) and rate > 0:
            run.settings["learning_rate"] = rate
        run.notes.append(
            f"WARNING: its learning-rate schedule is not taken over, because {fault}: "
            f"{typed('train.py')} goes on at a constant "
            f"{run.settings.get('learning_rate', 'rate of its own')}, unless --lr_schedule and its flags say otherwise"
        )
        return
    run.settings |= {"lr_schedule": "cosine", "warmup_iters": float(warmup or 0)}
    run.settings |= {"lr_decay_iters": decay, "min_lr": lowest}


def _fault_of(config: Mapping[str, Any], peak: Any, warmup: Any, decay: Any, lowest: Any) -> str | None:
    """Why a schedule has no form in train.py, or None."""
    if config.get("decay_lr") is not True or not (_is_size(peak) and peak > 0):
        return f"decay_lr is {config.get('decay_lr')!r} and learning_rate {peak!r}"
    if not (_is_size(warmup) and warmup == int(warmup) and _is_count(decay) and _is_size(lowest)):
        return f"warmup_iters is {warmup!r}, lr_decay_iters {decay!r} and min_lr {lowest!r}"
    if decay <= warmup:
        return f"lr_decay_iters {decay} is not above warmup_iters {warmup}"
    return f"min_lr {lowest} is above learning_rate {peak}" if lowest > peak else None


def _take_dtype(run: Run, config: Mapping[str, Any], refused: dict[str, Any]) -> None:
    """Take over the arithmetic: nanoGPT casts on CUDA only, whatever its dtype is elsewhere."""
    if "dtype" not in config:
        return
    device = config.get("device", "cuda")
    if config["dtype"] not in _DTYPES:
        refused["dtype"] = config["dtype"]
    elif isinstance(device, str) and "cuda" not in device:
        run.settings["dtype"] = "fp32"
    else:
        run.settings["dtype"] = _DTYPES[config["dtype"]]


def _compare_rate(run: Run, step: int, rate: Any) -> None:
    """Compare the rate that the optimizer recorded with the schedule of the config at the same step."""
    here = rate_at(run.settings, step)
    if here is None or not _is_number(rate) or math.isclose(rate, here, rel_tol=1e-6):
        return
    warmup = run.settings["warmup_iters"]
    if step < warmup and math.isclose(rate, run.settings["learning_rate"] * step / warmup, rel_tol=1e-6):
        run.notes.append(
            f"its warm-up is that of nanoGPT before 2024-12-09, learning_rate * step / warmup_iters: step {step} has "
            f"{rate:.6g} there and {here:.6g} here, which divides step + 1 by warmup_iters + 1; from step "
            f"{warmup:.0f} on both are the same"
        )
        return
    run.notes.append(
        f"WARNING: its optimizer has the learning rate {rate:.6g}, its config at step {step} {here:.6g}: "
        f"{typed('train.py')} follows the config"
    )


def config_of(run: Run, betas: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a run by nanoGPT's names, of the types that its flags require, and those without a place there.

    A constant rate after a warm-up is a cosine between equal rates, which nanoGPT computes.
    """
    found: dict[str, Any] = {**run.settings, "batch_size": run.batch_size}
    fitting = {name: found[name] for name, fits in _SAME.items() if fits(found.get(name))}
    config: dict[str, Any] = {name: _TYPES.get(name, int)(value) for name, value in fitting.items()}
    placed = {*config, "batch_size"}
    kind, rate, warmup = found.get("lr_schedule"), config.get("learning_rate"), found.get("warmup_iters") or 0
    decay, lowest = found.get("lr_decay_iters") or 0, found.get("min_lr")
    warmup = round(warmup * decay if 0 < warmup < 1 else warmup)
    if kind == "constant" and not warmup:
        config |= {"decay_lr": False}
    elif kind == "constant" and rate is not None:
        decay = max(config.get("max_iters", 0), warmup + 1)
        config |= {"decay_lr": True, "warmup_iters": warmup, "lr_decay_iters": decay, "min_lr": rate}
    elif kind == "cosine" and rate is not None and _is_count(decay):
        lowest = rate / 10 if lowest is None else float(lowest)
        config |= {"decay_lr": True, "warmup_iters": warmup, "lr_decay_iters": decay, "min_lr": lowest}
    if "decay_lr" in config:
        placed |= {"lr_schedule", "warmup_iters", "lr_decay_iters", "min_lr"}
    names = {ours: name for name, ours in _DTYPES.items()} | {name: name for name in _DTYPES}
    if found.get("dtype") in names:
        config["dtype"] = names[found["dtype"]]
        placed.add("dtype")
    if isinstance(betas, (list, tuple)) and len(betas) == len(_BETAS) and all(map(_is_size, betas)):
        config |= dict(zip(_BETAS, map(float, betas), strict=True))
    return config, {name: value for name, value in found.items() if name not in placed and value}


_TYPES: dict[str, type] = dict.fromkeys(("learning_rate", "weight_decay", "grad_clip"), float)


def rate_at(settings: Mapping[str, Any], step: int) -> float | None:
    """The learning rate of the update after `step` updates, by settings; None where they do not show it."""
    if "lr_schedule" not in settings or "learning_rate" not in settings:
        return None
    peak: float = settings["learning_rate"]
    if settings["lr_schedule"] == "constant":
        return peak
    warmup, decay, lowest = settings["warmup_iters"], settings["lr_decay_iters"], settings["min_lr"]
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    part = min(1.0, (step - warmup) / (decay - warmup))
    return float(lowest + (peak - lowest) * (1 + math.cos(math.pi * part)) / 2)
