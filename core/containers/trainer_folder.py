"""Open the folder of a step that accelerate left, or transformers' Trainer with FSDP; and what lies beside any weights.

    pytorch_model_fsdp_0/  the model as DCP; pytorch_model_fsdp.bin where it is whole, pytorch_model_fsdp_rank0.bin, ...
    optimizer_0/           the same for the optimizer; optimizer.bin, or the Trainer's optimizer.pt
    scheduler.bin          scheduler.pt of the Trainer
    trainer_state.json     the Trainer's count of steps, epochs, its log

Random states, samplers and arguments lie there too; they are named, not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import CheckpointError, CheckpointNotFound
from .container import Container, listing, member
from .joined import join, put, read_json
from .pickles.inert import names_text

_MODEL = re.compile(r"pytorch_model_fsdp(?:_\d+|(?:_\d+)?(?:_rank\d+)?\.bin)")
_OPTIMIZER = re.compile(r"optimizer(?:_\d+|(?:_\d+)?\.(?:bin|pt))")
_SCHEDULERS = ("scheduler.pt", "scheduler.bin")
_STATE = "trainer_state.json"
_CONFIG = "config.json"
_OF_RUN = re.compile(
    r"scheduler(?:_\d+)?\.(?:pt|bin)|scaler\.pt|training_args\.bin|rng_state(?:_\d+)?\.pth|random_states_\d+\.pkl|"
    r"sampler(?:_\d+)?\.bin|dl_state_dict(?:_\d+)?\.bin|custom_checkpoint_\d+\.pkl|trainer_state\.json"
)

# readers are imported on demand: every folder is tested for being one of these


def is_of_run(name: str) -> bool:
    """Whether a file has the name of the state of a run, which is never a model."""
    return _OF_RUN.fullmatch(name) is not None


def is_trainer_folder(folder: Path) -> bool:
    """Whether a folder holds a model as accelerate saves those of FSDP."""
    return any(_MODEL.fullmatch(name) for name in listing(folder))


def open_trainer_folder(path: Path) -> Container:
    """Read the model and the optimizer of a step: tensors are called `model.…` and `optimizer.…`.

    Raises: CheckpointNotFound when there is no model, or several; CheckpointDamaged, CheckpointError as the readers of
        the model. An optimizer that cannot be read is a caveat.
    """
    names = listing(path)
    found = [name for name in names if _MODEL.fullmatch(name)]
    if not found:
        raise CheckpointNotFound(f"{path}: no model of accelerate here, expected pytorch_model_fsdp_0 and the like.")
    ranks = {name for name in found if "_rank" in name}
    if len(found) - len(ranks) + bool(ranks) > 1:
        raise CheckpointNotFound(f"{path}: holds {len(found)} models, {names_text(found, 5)}. Name one of them.")
    whole = Container("", path, {}, {}, {})
    if ranks:
        from .rank_files import open_ranks

        part = open_ranks(path, "model", {int(name.rpartition("rank")[2].removesuffix(".bin")): name for name in ranks})
    else:
        part = _open(member(path, found[0], str(path)))
    _add(whole, part, "model")
    if _CONFIG in names:
        put(whole, "config", read_json(path, _CONFIG, whole.files))
    add_run(whole, names)
    whole.kind = f"folder of accelerate's FSDP, {part.kind}"
    return whole


def add_run(whole: Container, names: Iterable[str]) -> None:
    """Add what the folder has of the run beside the weights: the optimizer, the scheduler, the state of the Trainer.

    What cannot be read is a caveat: the weights are whole without it.
    """
    names = list(names)
    optimizers = [name for name in names if _OPTIMIZER.fullmatch(name)]
    if len(optimizers) > 1:
        whole.caveats.append(f"{whole.path}: of {len(optimizers)} optimizers ({names_text(optimizers)}) none is read")
    found = {name: "optimizer" for name in optimizers if len(optimizers) == 1}
    found |= {name: "scheduler" for name in _SCHEDULERS if name in names}
    for name, word in found.items():
        try:
            part = _open(member(whole.path, name, str(whole.path)))
            acting = [call for call in part.foreign if not getattr(call, "is_record", False)]
            if acting:
                whole.caveats.append(f"its {word} is left out: {name} names {acting[0]}; nothing was executed")
            else:
                _add(whole, part, word)
        except CheckpointError as error:
            whole.caveats.append(f"its {word} is left out: {error}")
    if _STATE in names:
        try:
            put(whole, "trainer_state", read_json(whole.path, _STATE, whole.files))
        except CheckpointError as error:
            whole.caveats.append(f"its step is not known: {error}")


def _open(path: Path) -> Container:
    if path.is_dir():
        from .dcp.folder import open_dcp

        return open_dcp(path)
    from .torch_files.container import open_torch_single

    return open_torch_single(path)


def _add(whole: Container, part: Container, word: str) -> None:
    """Join a part under its word, which accelerate's DCP folders bring along."""
    has_word = part.path.is_dir() and isinstance(part.content, dict) and list(part.content) == [word]
    join(whole, part, "" if has_word else word)
    if has_word:
        put(whole, word, part.content[word])
