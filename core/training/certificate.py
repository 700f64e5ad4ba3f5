"""The resume certificate: what the next step sees, draws and starts from, recorded at a save, compared at a resume.

Batches, dropout and learning rate are functions of (seed, step), so a resumed run needs none of this. It is the
proof that the functions and the state are still the same: each part is computed again from the live objects.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from ..bundle.bundle import EMA, OPTIMIZER
from ..bundle.commit import MODEL
from ..bundle.training_state import TrainingState
from ..containers.checksum import crc32
from ..containers.trees import leaves
from ..data.randomness import mix
from ..networks.device import changes, seed_generator
from ..networks.state_dict import export_optimizer_state, export_state_dict
from ..saving.torch_file import digest_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..data.dataloader import DataLoader
    from ..loading.known_sums import KnownSums
    from .ema import Ema
    from .pair_loader import PairLoader
    from .schedule import Schedule

EXACT = "resume is exact"
NOT_EXACT = "resume is not exact"
UNKNOWN = "cannot tell whether the resume is exact: step {step} was saved without a certificate"

_DRAWS = 4096
_NOT_SETTINGS = {"params", "param_names", "lr", "initial_lr", "momentum", "fused", "foreach", "capturable"}
"""Entries of a parameter group that the loop sets at each step, or that the environment records."""

BATCHES, NOISE = "The next batches differ", "Dropout differs"
DRAWN = "Batches and dropout are drawn differently"
UPDATES, KERNELS = "Updates are computed differently", "Kernels may differ in the last bits"
WEIGHTS, MOMENTS = "Training continues from other weights", "Training continues with other moments"
AVERAGE = "The average of the weights (EMA) differs"
"""The consequence of a difference."""

_FOLLOWS = {
    "seed": DRAWN,
    "batch_size": BATCHES,
    "block_size": BATCHES,
    "gradient_accumulation_steps": BATCHES,
    "dropout": NOISE,
    "ema": AVERAGE,
    "skip_steps": BATCHES,
}


def make_certificate(
    step: int,
    number: int,
    loader: DataLoader | PairLoader,
    model: nn.Module,
    accumulation: int,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Describe the step that follows `step` updates: digests of its tokens and of its dropout, and the settings.

    Its batches are those of `number` in the loader.

    Draws from the generator, which the loop seeds again for each batch.
    """
    rate = getattr(getattr(model, "config", None), "dropout", 0.0)
    device = next(model.parameters()).device
    batches = [loader.batch(number, micro) for micro in range(accumulation)] if loader.replays else None
    seed_generator(mix(loader.seed, step, 0), device)
    noise = F.dropout(torch.ones(_DRAWS, device=device), rate) if rate else torch.zeros(0)
    here = {
        "seed": loader.seed,
        "batch_size": loader.batch_size,
        "block_size": loader.block_size,
        "gradient_accumulation_steps": accumulation,
        "dropout": rate,
    }
    return {
        "step": step,
        "batch": None if batches is None else _digest(tensor for pair in batches for tensor in pair),
        "noise": _digest([noise]),
        "settings": json.loads(json.dumps({**here, **settings})),  # as JSON returns it: tuples become lists
    }


def settings_of(
    optimizer: torch.optim.Optimizer, schedule: Schedule | None, grad_clip: float, ema: Ema | None
) -> dict[str, Any]:
    """Collect what decides an update besides its batch: clipping, the schedule, and each group's settings."""
    curve = {f"schedule.{name}": value for name, value in schedule.to_dict().items()} if schedule else {}
    found: dict[str, Any] = {"grad_clip": grad_clip, "ema": ema.decay if ema else 0.0, **curve}
    if not schedule:
        found["learning_rate"] = optimizer.param_groups[0]["lr"]
    for name in sorted({name for group in optimizer.param_groups for name in group} - _NOT_SETTINGS):
        values = [group.get(name) for group in optimizer.param_groups]
        found[name] = values[0] if all(value == values[0] for value in values) else values
    return found


def state_digests(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None = None, sums: KnownSums | None = None
) -> dict[str, str]:
    """Digests of the live weights, moments and average as a save would write them; one pass over their bytes.

    Where what verification read into memory is unchanged, its `sums` are taken. Empty for a model that is sharded over
    ranks: no rank could compute them.
    """
    if any(hasattr(p, "device_mesh") for p in model.parameters()):
        return {}
    contents = {MODEL: export_state_dict(model), OPTIMIZER: export_optimizer_state(optimizer, model)}
    contents |= {EMA: ema.tensors()} if ema else {}
    known = sums.of(leaf for leaf in leaves(contents) if isinstance(leaf, torch.Tensor)) if sums else {}
    return {name: digest_of(content, known) for name, content in contents.items()}


def differences(state: TrainingState, now: Mapping[str, Any], live: Mapping[str, str]) -> dict[str, list[str]]:
    """List the differences from the training state of a step, by their consequence; empty for an exact resume.

    `now` is what the continued run would record: `certificate`, `environment`, `data`; `live` are the digests of its
    state. For a step without a certificate, only the environment is compared.
    """
    then = certificate_of(state)
    found = {} if then is None else _compare(state, then, now, live)
    if kernels := changes(state.environment or {}, now["environment"]):
        found[KERNELS] = list(kernels.values())
    return found


def _compare(
    state: TrainingState, then: Mapping[str, Any], now: Mapping[str, Any], live: Mapping[str, str]
) -> dict[str, list[str]]:
    today, found = now["certificate"], dict[str, list[str]]()

    def differs(follows: str, what: str) -> None:
        found.setdefault(follows, []).append(what)

    recorded = state.files
    if _in_shards(recorded):
        live = {}  # blocks of shards have checksums of their own, which were compared when they were read
    for name, follows in ((MODEL, WEIGHTS), (OPTIMIZER, MOMENTS), (EMA, AVERAGE)):
        digest = recorded.get(name, {}).get("tensors")
        if name in live and digest != live[name] and (name != EMA or then["settings"].get("ema")):
            was = f"digest {digest}" if digest else "nothing recorded"
            differs(follows, f"the tensors of {name} differ from those that were saved ({was}, now {live[name]})")
    for name, what in changes(then["settings"], today["settings"]).items():
        differs(_FOLLOWS.get(name, UPDATES), what)
    texts = [(data or {}).get("digest") for data in (state.data, now.get("data"))]
    if None not in texts and texts[0] != texts[1]:
        differs(BATCHES, f"the text or tokens of {now['data'].get('path')} were changed")
    if today["batch"] is None:
        differs(BATCHES, "their DataLoader gives them in an order of its own")
    elif then["batch"] != today["batch"] and not {BATCHES, DRAWN} & found.keys():
        differs(BATCHES, f"other tokens in step {then['step'] + 1} (digest {then['batch']} then, {today['batch']} now)")
    if then["noise"] != today["noise"] and not {NOISE, DRAWN} & found.keys():
        differs(NOISE, f"the generator draws other numbers (digest {then['noise']} then, {today['noise']} now)")
    return found


def certificate_of(state: TrainingState) -> Mapping[str, Any] | None:
    """The certificate in a training state; None unless it is this step's and has the digests of its tensors."""
    found, files = state.certificate, state.files
    if not isinstance(found, dict) or found.get("step") != state.step:
        return None
    if not _in_shards(files) and "tensors" not in files.get(MODEL, {}):
        return None
    whole = isinstance(found.get("settings"), dict) and {"batch", "noise"} <= found.keys()
    return found if whole else None


def _in_shards(files: Mapping[str, Any]) -> bool:
    return any("/" in name for name in files)


def verdict(state: TrainingState, found: Mapping[str, list[str]]) -> str:
    """Report in one line whether the resume of a step is exact, and if not, what differs and the consequence."""
    known = certificate_of(state) is not None
    if known and not found:
        return EXACT
    kept = "" if {WEIGHTS, MOMENTS} & found.keys() else "; its weights and moments are"
    said = f"{NOT_EXACT}{kept}" if known else UNKNOWN.format(step=state.step)
    return " ".join([f"{said}.", *(f"{follows}: {'; '.join(what)}." for follows, what in found.items())])


def _digest(tensors: Iterable[Tensor]) -> str:
    crc = 0
    for tensor in tensors:
        crc = crc32(tensor.cpu().numpy().data, crc)
    return f"{crc:08x}"
