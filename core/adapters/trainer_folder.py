"""The folder from which Hugging Face's Trainer resumes, made from a step; and what of it Trainer does not check."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..bundle.bundle import OPTIMIZER, Bundle
from ..bundle.commit import MODEL
from ..bundle.storage import DISK
from ..containers.json_files import with_infinities
from ..errors import CheckpointMismatch, InputError
from ..loading.tensors import read_part
from ..networks.stateful import AllGenerators
from ..networks.wrappers import class_names, optimizers_by_name, parameter_names, plain_tensors
from .framework import framework, of_rank, put_file

STATE = "trainer_state.json"
ORDER = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "data_seed",
    "dataloader_drop_last",
    "ignore_data_skip",
)
"""Arguments of Trainer that decide, with the numbers of processes and samples, which batches follow a step."""


def order_of(trainer: Any) -> dict[str, Any]:
    """What decides which batches follow a step."""
    args, data = trainer.args, trainer.train_dataset
    facts = {"processes": args.world_size, "samples": len(data) if hasattr(data, "__len__") else None}
    return facts | {key: getattr(args, key) for key in ORDER}


def make_folder(folder: Path, bundle: Bundle, trainer: Any, states: Mapping[str, Any]) -> None:
    """Make the folder of a step, its large files as hard links; `states` are those of also.pt, as they lie there."""
    extra = with_infinities(bundle.state.extra or {})
    put_weights(folder, bundle, trainer.model)
    put_file(bundle.path(OPTIMIZER), folder / OPTIMIZER)
    for name in {"scheduler", "scaler"} & states.keys():
        torch.save(of_rank(states[name], 0), folder / f"{name}.pt")
    ranks = extra["order"]["processes"]
    for rank in range(ranks):
        one = of_rank(states["rng"], rank)
        kept = {"python": one["python"], "numpy": one["numpy"], "cpu": one["torch"]}
        if gpus := one["cuda"]:  # all of them in a group of processes, else that of the model
            kept["cuda"] = gpus if ranks > 1 else gpus[trainer.args.device.index or 0]
        torch.save(kept, folder / (f"rng_state_{rank}.pth" if ranks > 1 else "rng_state.pth"))
    DISK.write(folder / STATE, json.dumps(extra["trainer_state"], indent=2).encode())


def put_weights(folder: Path, bundle: Bundle, model: Any) -> None:
    """Begin a folder anew, with the weights of a step under the names of a model, which may be wrapped or tied."""
    if folder.is_dir():  # a process that was killed has left it
        DISK.remove_tree(folder)
    DISK.make_folders(folder)
    saved, target = read_part(bundle.weights), folder / "pytorch_model.bin"
    names = dict(zip(model.state_dict(), plain_tensors(model), strict=True))
    if names == {name: name for name in saved}:
        put_file(bundle.path(MODEL), target)
    else:
        torch.save({name: saved[plain] for name, plain in names.items() if plain in saved}, target)


def refuse_own_folders(output_dir: str, checkpoint_dir: Path) -> None:
    """Refuse to begin anew beside a folder that Trainer itself has saved.

    Raises: InputError with the call that goes on from it.
    """
    for folder in (checkpoint_dir, Path(output_dir)):
        newest = framework("transformers.trainer_utils").get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if own := str(folder) if (folder / STATE).is_file() else newest:
            raise InputError(
                f"{own}: a checkpoint of Trainer's own, and {checkpoint_dir} has no step. Go on from it with "
                f"trainer.train(resume_from_checkpoint={own!r}), or begin anew with allow_fresh=True."
            )


def give_back(trainer: Any, resumed: Mapping[str, Any], where: Path) -> None:
    """Give a Trainer what it does not read from the folder: what callbacks have counted, and losses not yet logged.

    Raises: CheckpointMismatch for an optimizer of another class or order of parameters: Trainer goes by order alone.
    """
    here = class_names(optimizers_by_name(trainer.optimizer) or {})
    names = parameter_names(trainer.model)
    same = resumed["optimizer"] == here
    for group in trainer.optimizer.param_groups:
        own = [names[id(parameter)] for parameter in group["params"]]
        same &= group.pop("param_names", own) == own  # the names of the step, which Trainer has put there
    if not same:
        raise CheckpointMismatch(
            f"{where}: found the state of {resumed['optimizer']}, expected that of {here} with the same parameters in "
            "the same groups. Train with the optimizer that was saved, or under another name."
        )
    saved = resumed["trainer_state"]["stateful_callbacks"]
    left = {name: list(states) if isinstance(states, list) else [states] for name, states in saved.items()}
    for one in trainer.callback_handler.callbacks:
        if states := left.get(type(one).__name__):
            vars(one).update(states.pop(0)["attributes"])
    trainer._tr_loss += resumed["loss"].to(trainer._tr_loss.device)
    trainer._total_loss_scalar -= resumed["loss"].item()  # that of this call of train() alone is reported
    trainer._globalstep_last_logged = resumed["logged"]


def draw_from(states: dict[str, Any] | None) -> None:
    """Set the generators of the CPU, where there is something to set; Trainer sets those of the GPUs."""
    if states is not None:
        AllGenerators().load_state_dict({**states, "cuda": AllGenerators().state_dict()["cuda"]})
