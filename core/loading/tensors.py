"""From an open bundle to a live model: check its content, map the file, join what the plan joins, assign."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..bundle.bundle import TOKENIZER, Bundle
from ..bundle.contradictions import check_fit, rearrange_optimizer
from ..bundle.intact import read_headers
from ..bundle.optimizer_state import groups_of, names_in_order
from ..bundle.parts import Part, ShardedFile, once
from ..data.tokenizer import tokenizer_from_state
from ..errors import CheckpointError, CheckpointMismatch
from ..families.fused import Fusing
from ..model import GPT
from ..networks.device import resolve_device
from .mapped import Owner, map_tensors, read_shards
from .optimizer import load_optimizer_state


def read_part(part: Part) -> Any:
    """Load a part of a checkpoint, its tensors on the CPU, mapped from the ranges that the header names.

    No other reader sees the file: what was verified is what is loaded, and nothing is executed. Mapped tensors are
    private: writing to them copies the page, never the file.

    Raises: CheckpointError when the file names anything but data, CheckpointDamaged when it cannot be read.
    """
    part.source.refuse_foreign()
    if isinstance(part.source, ShardedFile):
        return part.of(read_shards(part.source))
    return map_tensors(part.source, part.content)


def read_through(bundle: Bundle) -> None:
    """Read every part of a step as loads do, for a step with a file that is not as it was saved; keep nothing.

    Raises: CheckpointError as a load would, and CheckpointMismatch when the parts of a GPT contradict each other.
    """
    read_headers(bundle)
    for part in bundle.torch_parts.values():
        if not bundle.is_sharded:
            read_part(part)
    if not bundle.state.frozen and bundle.config is not None:
        check_fit(bundle)


@contextlib.contextmanager
def room_for(path: Path, nbytes: int) -> Iterator[None]:
    """Explain a failure for lack of memory: `nbytes` are those of the weights at a path."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        raise CheckpointError(
            f"{path}: no memory for its {nbytes} bytes of weights. The file is as it was; free memory, use another "
            "device, or a machine with more."
        ) from error


def _room_for(bundle: Bundle) -> contextlib.AbstractContextManager[None]:
    weights = bundle.weights
    return room_for(weights.source.path, sum(spec.nbytes for spec in weights.tensors.values()))


def planned(plan: Fusing, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Make the tensors of a model from those of a file; tensors that are only renamed are not copied."""
    return {
        name: tensors[parts[0]] if len(parts) == 1 else torch.cat([tensors[part] for part in parts])
        for name, parts in plan.sources.items()
    }


def load_weights(bundle: Bundle) -> dict[str, torch.Tensor]:
    """Load the tensors of a GPT under this project's names.

    Raises: CheckpointDamaged, CheckpointMismatch.
    """
    tensors = read_part(bundle.weights)
    with _room_for(bundle):
        return planned(bundle.evidence.plan, tensors)


def load_model(
    bundle: Bundle,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    writable: bool = False,
    with_optimizer: bool = True,
    bpe_file: Path | None = None,
) -> GPT:
    """Build the model of a bundle in eval mode, with its tokenizer and step.

    The model is built without memory, and the mapped tensors replace its own. Training writes to them: `writable`
    copies those that verification has not read into memory. Weights that were rounded for the file get the dtype back
    that the model had.

    Raises: CheckpointMismatch when config, tokenizer, weights and optimizer state contradict each other, before
    anything is allocated.
    """
    config = check_fit(bundle, with_optimizer)
    dtype = dtype or recorded_dtype(bundle)
    target = resolve_device(device or config.device, str(bundle.path("config.json")))
    tokenizer = None
    if bundle.tokenizer is not None:
        tokenizer = tokenizer_from_state(bundle.tokenizer, bpe_file, str(bundle.path(TOKENIZER)))
    tensors = load_weights(bundle)
    if config.tied_head:
        _tie(bundle, tensors)
    if writable and target.type == "cpu":
        with _room_for(bundle):
            owner = Owner(bundle.weights.source.filled is not None)
            tied = {id(tensor): tensor for tensor in tensors.values()}
            owned = {key: owner.own(tensor, dtype) for key, tensor in tied.items()}
        tensors = {name: owned[id(tensor)] for name, tensor in tensors.items()}
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(tensors, assign=True)
    model.retie()
    with _room_for(bundle):
        model.to(device=target, dtype=dtype)
    model.requires_grad_(True)
    model.step = bundle.step
    model.tokenizer = tokenizer
    return model.eval()


def recorded_dtype(bundle: Bundle) -> torch.dtype | None:
    """The dtype of the model whose weights were saved in another one; None where nothing was rounded."""
    content = bundle.weights.source.header.content
    beside = content if isinstance(content, dict) and bundle.weights.key else {}
    if (beside.get("checkpoint_dtype") or bundle.state.get("checkpoint_dtype")) is None:
        return None
    name = beside.get("model_dtype") or bundle.state.get("model_dtype_at_save")
    found = getattr(torch, name, None) if isinstance(name, str) else None
    return found if isinstance(found, torch.dtype) else None


def _tie(bundle: Bundle, tensors: dict[str, torch.Tensor]) -> None:
    """Tie the head to the table; a head with other values means that the file is another model's."""
    table = tensors["token_embedding_table.weight"]
    head = tensors.get("lm_head.weight", table)
    if head.data_ptr() != table.data_ptr() and not torch.equal(head, table):
        raise CheckpointMismatch(
            f"{bundle.path('config.json')}: tied_head is true, but lm_head.weight in {bundle.weights.source.path.name} "
            "has other values than token_embedding_table.weight. Set tied_head to false."
        )
    tensors["lm_head.weight"] = table


def load_optimizer(bundle: Bundle) -> dict[str, Any] | None:
    """Load the optimizer state of a GPT, mapped, for the parameters of the model; None where the step has none.

    Raises: CheckpointMismatch when it is another model's.
    """
    state = read_optimizer(bundle)
    if state is None:
        return None
    assert bundle.optimizer is not None and bundle.config is not None
    try:
        return rearrange_optimizer(bundle, state, torch.cat, bundle.config)
    except CheckpointMismatch as error:
        raise CheckpointMismatch(f"{bundle.optimizer.source.path}: {error}") from error


def read_optimizer(bundle: Bundle) -> dict[str, Any] | None:
    """Load the optimizer state of any module as it was saved, mapped; None where the step has none."""
    if not bundle.has_optimizer or bundle.optimizer is None:
        return None
    state = read_part(bundle.optimizer)
    if isinstance(bundle.optimizer.source, ShardedFile) and "param_groups" in state:
        state.setdefault("state", {})  # an empty dict is no item of a shard: no step was made yet
    return state


def load_averages(bundle: Bundle, module: nn.Module) -> dict[str, torch.Tensor] | None:
    """Map the average of a step's weights, sharded like its model; None where the step has none."""
    if bundle.ema is None:
        return None
    parameters = dict(module.named_parameters(remove_duplicate=False))  # an average has both names of a tied head
    if not any(hasattr(parameter, "device_mesh") for parameter in parameters.values()):
        return read_part(bundle.ema)
    from .spread import block_like, filled_like  # imports torch.distributed, which one process does not need

    if isinstance(bundle.ema.source, ShardedFile):
        return filled_like(bundle.ema.source, parameters)
    whole = read_part(bundle.ema)
    return {name: block_like(whole[name], parameter) for name, parameter in parameters.items()}


def load_moments(
    bundle: Bundle,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    say: Callable[[str], None],
    strict: bool = True,
) -> None:
    """Fill the optimizer of a module from a bundle, by name; report where its moments start from zero.

    Raises: CheckpointMismatch when it is another model's; the optimizer is unchanged then.
    """
    state = load_optimizer(bundle) if isinstance(module, GPT) else read_optimizer(bundle)
    say_without_moments(bundle, state, say)
    if state is None or bundle.optimizer is None:
        return
    try:
        names = names_in_order(groups_of(state), once(bundle.weights.tensors))
        lines = load_optimizer_state(optimizer, state, names, model=module, strict=strict)
    except CheckpointMismatch as error:
        raise CheckpointMismatch(f"{bundle.optimizer.source.path}: {error}") from error
    for line in lines:
        say(f"{bundle.optimizer.source.path}: {line}")


def say_without_moments(bundle: Bundle, state: dict[str, Any] | None, say: Callable[[str], None]) -> None:
    """Report that the moments of a step start from zero, where it has none."""
    if state is None and bundle.step:
        place = bundle.path(bundle.single) if bundle.single else bundle.folder
        say(f"{place}: no optimizer state; its moments start from zero at step {bundle.step}")
