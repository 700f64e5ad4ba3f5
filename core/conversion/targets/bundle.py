"""The target that is a bundle of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...bundle.bundle import OPTIMIZER, TOKENIZER
from ...bundle.commit import CONFIG, MODEL
from ...bundle.contradictions import MOST_PADDING, fits_characters
from ...bundle.training_state import STATE, TrainingState, seal, time_of
from ...containers.json_files import dump_json
from ...containers.plain import plain
from ..plan import Options, Plan, Ref, Source, WeightFile, target_of
from ..vocabulary import tokens_of
from .safetensors import ties
from .torch import optimizer_content, parameters_of


def plan_bundle(model: Source, options: Options, target: Path) -> Plan:
    """Plan a bundle: model.pt, config, tokenizer, training state, and the optimizer where there is one."""
    characters, rows = tokens_of(model.tokenizer), model.sizes.get("vocab_size", 0)
    if (model.tokenizer or {}).get("token_kind") in ("char", "symbols") and not fits_characters(characters, rows):
        remedy = "Leave --vocab_size out" if options.vocab_size else f"--vocab_size {characters} crops them"
        raise model.refuse(
            f"{rows} rows for {characters} characters: a bundle has as many, or up to a multiple of 8 fewer than "
            f"{MOST_PADDING} more. {remedy}."
        )
    aliases = ties(model) if options.tied is False else {}
    targets = [target_of(model, name, MODEL, options) for name in model.tensors]
    weights = {one.path: Ref(one.path) for one in targets}
    files = [WeightFile(MODEL, targets, weights, ties=options.tied is not False)]
    if model.moments is not None and aliases:
        model.notes.append("its optimizer state is left out: --untied adds a parameter that it does not know")
    elif model.moments is not None:
        content, moments = optimizer_content(model, parameters_of(model), OPTIMIZER, "", named=True)
        if moments:
            files.append(WeightFile(OPTIMIZER, moments, content))
    config, state = _going_on(model)
    texts = {CONFIG: dump_json(config)}
    if model.tokenizer is not None:
        texts[TOKENIZER] = dump_json(model.tokenizer)
    rounded = () if options.dtype is None else ("checkpoint_dtype", "model_dtype_at_save")
    kept = {name: value for name, value in state.items() if name not in ("integrity", "optimizer_removed", *rounded)}
    kept |= {"format_version": config.get("format_version"), "step": model.step or 0}
    kept["optimizer_file"] = OPTIMIZER if len(files) > 1 else None
    made = TrainingState.from_dict(plain(kept)).committed(
        None,
        saved_at=time_of(),
        legacy=[],
        extra={
            **plain(kept.get("extra") or {}),
            "converted_from": str(model.path),
            **({"averaged": list(map(str, model.averaged))} if model.averaged else {}),
            "program": model.program,
            "choices": [str(choice) for choice in model.choices],
        },
    )
    return Plan(model, target, "bundle", files, texts, seal=lambda recorded: {STATE: seal(made, recorded)})


def _going_on(model: Source) -> tuple[dict[str, Any], TrainingState]:
    """The config and training state with which train.py goes on as the program that wrote a checkpoint."""
    if model.run is None:
        return model.config, model.state
    model.notes += model.run.notes
    batch = {} if model.run.batch_size is None else {"batch_size": model.run.batch_size}
    return {**model.config, **batch}, model.state.having(training=model.run.settings)
