"""What a conversion can write: for each format the families it holds, and the files it consists of."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...bundle.bundle import OPTIMIZER, TOKENIZER
from ...bundle.commit import CONFIG, MODEL, new_id
from ...bundle.contradictions import MOST_PADDING, fits_characters
from ...bundle.training_state import seal
from ...config.gpt import FORMAT_VERSION
from ...containers.hf_folder import BESIDE
from ...containers.json_files import dump_json
from ...containers.plain import plain
from ...containers.tensors.views import View
from ...families.fused import FUSED
from ..pairs.modded import BATCHED
from ..plan import TORCH_ENDINGS, Model, Options, Plan, Ref, Target, WeightFile, target_of
from ..sharded import add_optimizer
from ..vocabulary import definition_of, tokens_of
from .dcp import in_dcp
from .megatron import plan_megatron
from .model_card import card
from .safetensors import add_weights, beside, plan_safetensors, ties

CKPT = "ckpt.pt"
HF = ("hf_gpt2", "hf_llama", "hf_qwen2", "hf_qwen3")
MEGATRON = ("megatron_gpt2", "megatron_llama", "megatron_qwen2", "megatron_qwen3")


@dataclass(frozen=True)
class Format:
    """A kind of output; without `families` any model, in the names that it has."""

    name: str
    what: str
    families: tuple[str, ...]
    plan: Callable[[Model, Options, Path], Plan]


def plan_pt(model: Model, options: Options, target: Path) -> Plan:
    """Plan one torch file: a state dict, or with an optimizer `{"model", "optimizer"}`."""
    if options.include_optimizer and not model.along:
        return _torch_file(model, options, target, "pt", {})
    targets = [target_of(model, name, target.name, options) for name in model.tensors]
    content = {one.path: Ref(one.path) for one in targets}
    file = WeightFile(target.name, targets, content, ties=options.tied is not False)
    if model.along:
        add_optimizer(model, file)
    return Plan(model, target, "pt", [file], is_folder=False)


def plan_dcp(model: Model, options: Options, target: Path) -> Plan:
    """Plan a folder of torch.distributed.checkpoint, nested as the torch file of the same model."""
    return in_dcp(plan_pt(model, options, target))


def _torch_file(model: Model, options: Options, target: Path, kind: str, more: dict[str, Any]) -> Plan:
    """Plan a torch file of `model`, `optimizer` where it is asked for, and further entries."""
    file = target.name if target.suffix in TORCH_ENDINGS else CKPT
    targets = [target_of(model, name, file, options, f"model.{name}") for name in model.tensors]
    content: dict[str, Any] = {"model": {one.name: Ref(one.path) for one in targets}}
    if options.include_optimizer:
        order = _parameters(model)
        state, others = optimizer_content(model, options, order, file, "optimizer", named=kind == "pt")
        content["optimizer"] = state
        targets += others
    content |= more
    return Plan(model, target, kind, [WeightFile(file, targets, content)], is_folder=file != target.name)


def _parameters(model: Model) -> list[str]:
    aliases = ties(model)
    return [name for name in model.tensors if name not in aliases]


def optimizer_content(
    model: Model, options: Options, order: list[str], file: str, prefix: str, named: bool
) -> tuple[dict[str, Any], list[Target]]:
    """Lay out the moments as torch.optim does, in the order of the parameters in each group.

    Raises: CheckpointMismatch when the source has none, or they are of other parameters.
    """
    moments = model.moments
    if moments is None:
        raise model.refuse("it has no optimizer state. Leave out --include_optimizer.")
    before = f"{prefix}." if prefix else ""
    group_of = {name: g for g, group in enumerate(moments.groups) for name in group["names"]}
    firsts = {name: _first_source(model, name, group_of) for name in order}
    state: dict[int, dict[str, Any]] = {}
    targets: list[Target] = []
    groups: list[dict[str, Any]] = []
    number = 0
    for g, group in enumerate(moments.groups):
        mine = [name for name in order if group_of.get(firsts[name]) == g]
        for k, name in enumerate(mine, number):
            others = moments.others.get(firsts[name], {})
            moved = {key: views[name] for key, views in moments.views.items() if name in views}
            for key, value in (others | moved).items():
                path = f"{before}state.{k}.{key}"
                if isinstance(value, View):
                    rule = model.rules.get(name, "copy") if key in moved else "copy"
                    targets.append(Target(f"{name}: {key}", path, file, value.dtype, value, rule, is_weight=False))
                state.setdefault(k, {})[key] = Ref(path) if isinstance(value, View) else value
        rest = {key: value for key, value in group.items() if key != "names"}
        numbers = list(range(number, number + len(mine)))
        groups.append({**rest, "params": numbers, **({"param_names": mine} if named else {})})
        number += len(mine)
    return {"state": state, "param_groups": groups}, targets


def _first_source(model: Model, name: str, group_of: dict[str, int]) -> str:
    """The parameter of the source that one of the target's begins with; "" for one that was filled in."""
    raw = model.tensors[name].names
    for source, view in model.sources.items():
        if raw and source in group_of and view.names == raw[:1]:
            return source
    return ""


def plan_bundle(model: Model, options: Options, target: Path) -> Plan:
    """Plan a bundle: model.pt, config, tokenizer, training state, and the optimizer where there is one."""
    characters, rows = tokens_of(model.tokenizer), model.sizes.get("vocab_size", 0)
    if (model.tokenizer or {}).get("token_kind") == "char" and not fits_characters(characters, rows):
        raise model.refuse(
            f"{rows} rows for {characters} characters: a bundle has as many, or up to a multiple of 8 fewer than "
            f"{MOST_PADDING} more. Leave --vocab_size out."
        )
    aliases = ties(model) if options.tied is False else {}
    targets = [target_of(model, name, MODEL, options) for name in model.tensors]
    weights = {one.path: Ref(one.path) for one in targets}
    files = [WeightFile(MODEL, targets, weights, ties=options.tied is not False)]
    if model.moments is not None and options.vocab_size is None and not aliases:
        content, moments = optimizer_content(model, options, _parameters(model), OPTIMIZER, "", named=True)
        if moments:
            files.append(WeightFile(OPTIMIZER, moments, content))
    texts = {CONFIG: dump_json({**model.config, "format_version": FORMAT_VERSION})}
    if model.tokenizer is not None:
        texts[TOKENIZER] = dump_json(model.tokenizer)
    rounded = () if options.dtype is None else ("checkpoint_dtype", "model_dtype_at_save")
    kept = {name: value for name, value in model.state.items() if name not in ("integrity", *rounded)}
    state = {
        **plain(kept),
        "step": model.step or 0,
        "optimizer_file": OPTIMIZER if len(files) > 1 else None,
        "format_version": FORMAT_VERSION,
        "commit_id": new_id(),
        "parent": None,
        "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "legacy": [],
        "extra": {**plain(kept.get("extra") or {}), "converted_from": str(model.path), "program": model.program},
    }

    def sealed(recorded: dict[str, dict[str, Any]]) -> dict[str, bytes]:
        return {"training_state.json": seal({**state, "integrity": {"files": recorded}})}

    return Plan(model, target, "bundle", files, texts, seal=sealed)


def plan_nanogpt(model: Model, options: Options, target: Path) -> Plan:
    """Plan a ckpt.pt that nanoGPT resumes and samples from."""
    best = (model.state.get("best") or {}).get("val_loss")
    more = {
        "model_args": model.config,
        "iter_num": model.step or 0,
        "best_val_loss": best if isinstance(best, float) else 1e9,
        "config": {"dataset": "converted", "init_from": "resume"},
    }
    if model.moments is not None and options.include_optimizer:
        _decayed_first(model)
    return _torch_file(model, options, target, "nanogpt", more)


def _decayed_first(model: Model) -> None:
    """nanoGPT has two groups: what has at least two sides decays, the rest does not.

    Raises: CheckpointMismatch for an optimizer of other groups, or with parameters that were filled in.
    """
    assert model.moments is not None
    groups = model.moments.groups
    sides = {name: len(view.shape) for name, view in model.sources.items()}
    kinds = [{sides.get(name, 0) >= 2 for name in group["names"]} for group in groups]
    filled = [name for name, view in model.tensors.items() if view.is_constant]
    if sorted(map(list, kinds)) != [[False], [True]]:
        found = f"{len(groups)} groups of parameters, which are not"
    elif filled:
        found = f"no moments for {filled[0]}, which is filled in; nanoGPT has groups of"
    else:
        groups.sort(key=lambda group: sides[group["names"][0]] < 2)
        return
    raise model.refuse(f"its optimizer has {found} all matrices and all the rest. Leave out --include_optimizer.")


def plan_hf(model: Model, options: Options, target: Path) -> Plan:
    """Plan a folder that transformers opens: weights, config.json, generation_config.json, tokenizer, model card."""
    plan = Plan(model, target, "hf", [])
    add_weights(plan, options)
    stored_as = {one.dtype for one in plan.targets}
    dtype = next(iter(stored_as)) if len(stored_as) == 1 else "float32"
    plan.copies = beside(model, BESIDE)
    config = {**model.config, "torch_dtype": dtype, "dtype": dtype}
    ids: dict[str, Any] = {
        name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config
    }
    plan.texts[CONFIG] = dump_json(config)
    if "generation_config.json" not in plan.copies:
        plan.texts["generation_config.json"] = dump_json({"_from_model_config": True, **ids})
    if model.tokenizer is not None and "tokenizer.json" not in plan.copies:
        plan.texts |= _tokenizer_for_hf(model.tokenizer, model.sizes.get("block_size"))
    plan.texts["README.md"] = card(plan).encode(errors="backslashreplace")
    return plan


def _tokenizer_for_hf(state: dict[str, Any], context: int | None) -> dict[str, bytes]:
    """The files of a tokenizer, with which AutoTokenizer opens it; GPT-2's is named in the card instead."""
    definition = state.get("definition")
    if state.get("token_kind") == "char":
        definition = definition_of(state["chars"])
    if not isinstance(definition, dict):
        return {}
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {"model_max_length": context} if context else {}
    text = json.dumps(definition, ensure_ascii=False, indent=1).encode()
    return {"tokenizer.json": text, "tokenizer_config.json": dump_json(settings)}


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
    Format("safetensors", "one .safetensors file, or a folder of them; names as they are", (), plan_safetensors),
    Format("pt", "one torch file of a state dict; names as they are", (), plan_pt),
    Format("dcp", "a folder that torch.distributed.checkpoint loads; names as they are", (), plan_dcp),
)
"""Everything that --to can be."""
