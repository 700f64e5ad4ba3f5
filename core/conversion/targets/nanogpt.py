"""The target that nanoGPT resumes and samples from: ckpt.pt, and the meta.pkl of a vocabulary of characters.

nanoGPT's sample.py takes the vocabulary from data/DATASET/meta.pkl, by the dataset's name in the file's config, and
without that file decodes tokens as GPT-2's. Its train.py reads no setting of `config`: a resumed run has its flags.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...console.words import listed_names
from ...containers.torch_files.layout import pickled
from ...errors import CheckpointError
from ..plan import Options, Plan, Source
from ..run import Run, config_of
from ..vocabulary import vocabulary_of
from .torch import CKPT, plan_torch_file

META = "meta.pkl"

DECISIVE = ("learning_rate", "decay_lr", "grad_clip", "batch_size", "gradient_accumulation_steps", "dtype")
"""Settings that decide an update; decay_lr comes with the schedule."""


def plan_nanogpt(model: Source, options: Options, target: Path) -> Plan:
    """Plan a ckpt.pt that nanoGPT resumes and samples from."""
    best = (model.state.best or {}).get("val_loss")
    config = {"init_from": "resume", "dataset": dataset_of(model), **_settings(model, options)}
    more = {
        "model_args": model.config,
        "iter_num": model.step or 0,
        "best_val_loss": best if isinstance(best, float) else 1e9,
        "config": config,
    }
    if model.moments is not None and options.include_optimizer:
        _decayed_first(model)
    plan = plan_torch_file(model, options, target, "nanogpt", more)
    _add_vocabulary(plan, config["dataset"])
    _say_how_to_resume(plan, options, config)
    return plan


def dataset_of(model: Source) -> str:
    """The name of the dataset that a model was trained on; the model's own where that is not recorded."""
    content = model.container.content if isinstance(model.container.content, Mapping) else {}
    config, data = content.get("config"), model.state.data or {}
    theirs = config.get("dataset") if isinstance(config, Mapping) and model.family_of_source == "nanogpt" else None
    ours = Path(str(data["path"])).stem if data.get("path") else model.path.resolve().stem
    name = re.sub(r"[^\w.-]+", "_", theirs if isinstance(theirs, str) and theirs else ours)
    return f"text_{name}" if not name[:1].isalpha() else name  # nanoGPT's flags take 2026 for a number


def _settings(model: Source, options: Options) -> dict[str, Any]:
    """The model's sizes and the settings of its run, as far as they are recorded, by nanoGPT's names."""
    sizes = {name: value for name, value in model.config.items() if name != "vocab_size"}
    group = model.moments.groups[0] if model.moments is not None and model.moments.groups else {}
    config, rest = config_of(model.run or Run(), group.get("betas"))
    if rest:
        shown = ", ".join(f"{name} {value!r}" for name, value in rest.items())
        model.notes.append(f"nanoGPT's config has no place for {shown}")
    if options.include_optimizer and (lost := [name for name in DECISIVE if name not in config]):
        model.notes.append(f"WARNING: not recorded, so nanoGPT resumes with its own: {', '.join(lost)}")
    return sizes | config


def _add_vocabulary(plan: Plan, dataset: str) -> None:
    """Add the meta.pkl of characters, beside ckpt.pt, and a note where sample.py looks for it."""
    model = plan.model
    kind = (model.tokenizer or {}).get("token_kind")
    place = f"data/{dataset}/{META}"
    chars = list((model.tokenizer or {}).get("chars" if kind == "char" else "symbols") or ())
    if chars:
        itos = dict(enumerate(chars))
        meta = pickled({"vocab_size": len(chars), "itos": itos, "stoi": {char: i for i, char in itos.items()}})
        folder = plan.target if plan.is_folder else plan.target.parent
        if plan.is_folder:
            plan.texts[META] = meta
        elif not _holds(folder / META, chars):
            plan.texts_beside[META] = meta
        model.notes.append(
            f"its characters are in {folder / META}; copy it to {place} in nanoGPT's folder, where sample.py looks for "
            "them: without them it decodes tokens as GPT-2's"
        )
        if (rows := model.sizes["vocab_size"]) > len(chars):
            model.notes.append(
                f"WARNING: {rows - len(chars)} rows have no character, and sample.py fails when it draws one. "
                f"--vocab_size {len(chars)} crops them"
            )
    elif kind == "gpt2":
        model.notes.append(f"sample.py decodes its tokens as GPT-2's; nanoGPT's folder must have no {place}")
    else:
        what = _UNREAD.get(str(kind), "not known")
        model.notes.append(
            f"WARNING: its tokenizer is {what}: without a {place} sample.py decodes its tokens as GPT-2's. "
            + ("--to hf keeps it" if kind in ("hf", "tiktoken") else "--meta FILE includes one of characters")
        )


def _holds(path: Path, chars: list[str]) -> bool:
    """Whether a meta.pkl is there with these characters, whoever pickled it."""
    with contextlib.suppress(CheckpointError):
        held = vocabulary_of(path, None)
        return bool(held.get("chars", held.get("symbols")) == chars)
    return False


def _say_how_to_resume(plan: Plan, options: Options, config: Mapping[str, Any]) -> None:
    """Add the command with which nanoGPT goes on, or what it takes to have one."""
    model = plan.model
    if not options.include_optimizer:
        if model.moments is not None:
            model.notes.append("sample.py opens it; nanoGPT's train.py resumes it when --include_optimizer is given")
        return
    folder = plan.target if plan.is_folder else plan.target.parent
    flags = {"init_from": "resume", "out_dir": str(folder.absolute()), **config}
    fixed = ("n_layer", "n_head", "n_embd", "bias")  # these it takes from the file
    shown = " ".join(shlex.quote(f"--{name}={value}") for name, value in flags.items() if name not in fixed)
    named = "" if plan.is_folder or plan.target.name == CKPT else f" (rename {plan.target.name} to {CKPT})"
    model.notes.append(f"nanoGPT takes the settings of a resumed run from its flags{named}: python train.py {shown}")


def _decayed_first(model: Source) -> None:
    """nanoGPT has two groups: what has at least two sides decays; the rest, with biases that are filled in, does not.

    Raises: CheckpointMismatch for an optimizer of other groups.
    """
    assert model.moments is not None
    groups = model.moments.groups
    sides = {name: len(view.shape) for name, view in model.sources.items()}
    kinds = [{sides.get(name, 0) >= 2 for name in group["names"]} for group in groups]
    if sorted(map(list, kinds)) != [[False], [True]]:
        raise model.refuse(
            f"its optimizer has {len(groups)} groups of parameters, which are not all matrices and all the rest. "
            "Leave out --include_optimizer."
        )
    groups.sort(key=lambda group: sides[group["names"][0]] < 2)
    if filled := [name for name, view in model.tensors.items() if view.is_constant]:
        groups[1]["names"] += filled
        names = listed_names(filled, 3)
        model.notes.append(f"no moments for {names}, which are filled in: nanoGPT starts them at its next step")


_UNREAD = {
    "hf": "a Hugging Face tokenizer, which nanoGPT cannot read",
    "tiktoken": "another one of tiktoken than GPT-2's",
    "symbols": "a number of ids without symbols",
}
"""Tokenizers that sample.py does not have, by kind."""
