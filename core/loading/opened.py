"""A checkpoint of any program that becomes our GPT, opened in memory: the plan of its bundle, assigned, not written."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..bundle.bundle import OPTIMIZER
from ..bundle.commit import CONFIG, MODEL
from ..bundle.contradictions import DTYPES, tokenizer_fault
from ..bundle.training_state import TrainingState
from ..config.gpt import GPTConfig
from ..console.words import listed
from ..containers.json_files import parse_json
from ..containers.trees import map_leaves
from ..conversion.plan import Options, Plan, Ref, Source
from ..conversion.planning import plan_in_memory
from ..data.tokenizer import tokenizer_from_state
from ..errors import CheckpointDamaged
from ..families.fused import FUSED
from ..inspection.verification import verify_container
from ..model import GPT
from ..networks.device import resolve_device
from .tensors import room_for
from .views import TensorMaker


@dataclass(frozen=True)
class Opened:
    """A GPT in eval mode, and what came with it."""

    model: GPT
    program: str  # that wrote it, for people
    notes: list[str]  # sentences about what was taken, left out or is in doubt
    tokenizer: dict[str, Any] | None  # its state, as in tokenizer.json
    state: TrainingState  # what was recorded of its run
    optimizer: dict[str, Any] | None = None  # a state by names of our parameters, as a bundle has it


def open_gpt(
    path: str | Path,
    options: Options | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: bool = True,
    training: bool = False,
    verify: bool = True,
    bpe_file: Path | None = None,
) -> Opened:
    """Open a checkpoint of any program that the conversion engine carries to our GPT; nothing is written.

    Weights whose layout is ours, or transposed, stay mapped; rows in another order are read into memory once. For
    `training` everything is, in fp32 where it has 16 bits, and the optimizer state comes along. What is read is first
    compared with its checksums, where it has some, unless `verify` is off. Without `tokenizer` the model has none.

    Raises: CheckpointNotFound, CheckpointDamaged, CheckpointError as `plan_conversion`; CheckpointMismatch for a model
        that ours does not compute.
    """
    path = Path(path)
    with ExitStack() as held:
        plan = plan_in_memory(path, options or Options(), held)
        source = plan.model
        if source.family != FUSED:
            raise source.refuse(f"{source.program} is not computed by GPT. load_pretrained_checkpoint opens it.")
        config = GPTConfig.from_dict(parse_json(plan.texts[CONFIG], str(path)), str(path))
        _refuse_misfit(plan, config)
        made = None
        if tokenizer and source.tokenizer is not None:
            made = tokenizer_from_state(source.tokenizer, bpe_file, str(path))
        if verify:
            _verify(plan, training)
        target = resolve_device(device or config.device, str(path))
        with room_for(path, plan.nbytes), TensorMaker(writable=training) as maker:
            model = _assigned(plan, config, maker, dtype, training)
            model.to(device=target)
            moments = _optimizer(plan, maker) if training else None
    model.requires_grad_(True)
    model.step, model.tokenizer = source.step or 0, made
    return Opened(model.eval(), source.program, _notes(source), source.tokenizer, source.state, moments)


def _assigned(plan: Plan, config: GPTConfig, maker: TensorMaker, dtype: torch.dtype | None, training: bool) -> GPT:
    with torch.device("meta"):
        model = GPT(config)
    tensors = {}
    for target in next(file.targets for file in plan.files if file.name == MODEL):
        widened = torch.float32 if training and target.view.dtype in ("bfloat16", "float16") else None
        tensors[target.name] = maker.tensor(target.view, dtype or widened)
    if config.tied_head:
        tensors["lm_head.weight"] = tensors["token_embedding_table.weight"]
    model.load_state_dict(tensors, assign=True)
    model.retie()
    return model


def _optimizer(plan: Plan, maker: TensorMaker) -> dict[str, Any] | None:
    """The state that optimizer.pt of the bundle would hold; None where the checkpoint has none."""
    file = next((file for file in plan.files if file.name == OPTIMIZER), None)
    if file is None:
        return None
    tensors = {target.path: maker.tensor(target.view) for target in file.targets}
    return map_leaves(lambda leaf: tensors[leaf.path] if isinstance(leaf, Ref) else leaf, file.content)


def _notes(source: Source) -> list[str]:
    """What there is to say of the weights: nothing of the settings of its run, which does not go on."""
    of_run = source.run.notes if source.run is not None else []
    doubts = [f"WARNING: {choice.warning}" for choice in source.choices if choice.warning]
    return [note for note in source.notes if note not in of_run] + doubts


def _refuse_misfit(plan: Plan, config: GPTConfig) -> None:
    """Refuse weights of integers, and a tokenizer of another model, as a load of the bundle does.

    Raises: CheckpointMismatch.
    """
    source = plan.model
    wrong = [
        f"{target.name} is {target.dtype}, expected {', '.join(DTYPES)}"
        for target in plan.targets
        if target.is_weight and target.dtype not in DTYPES
    ]
    if wrong:
        raise source.refuse(f"{listed(wrong, 3)}.")
    if source.tokenizer is not None and (fault := tokenizer_fault(source.tokenizer, config.vocab_size)):
        raise source.refuse(f"its tokenizer has {fault}. It does not fit this model.")


def _verify(plan: Plan, training: bool) -> None:
    """Compare what is read with its checksums.

    Raises: CheckpointDamaged naming the tensor.
    """
    read = [target for target in plan.targets if target.is_weight or training]
    used = {name for target in read for name in target.view.names}
    found = verify_container(plan.model.container, used=used)
    if found.damaged:
        raise CheckpointDamaged(found.damaged[0])
    plan.model.notes += [f"WARNING: {line} It is used as it is." for line in found.replaced]
