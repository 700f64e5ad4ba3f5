"""The target that nanoGPT resumes."""

from __future__ import annotations

from pathlib import Path

from ..plan import Options, Plan, Source
from .torch import plan_torch_file


def plan_nanogpt(model: Source, options: Options, target: Path) -> Plan:
    """Plan a ckpt.pt that nanoGPT resumes and samples from."""
    best = (model.state.best or {}).get("val_loss")
    more = {
        "model_args": model.config,
        "iter_num": model.step or 0,
        "best_val_loss": best if isinstance(best, float) else 1e9,
        "config": {"dataset": "converted", "init_from": "resume"},
    }
    if model.moments is not None and options.include_optimizer:
        _decayed_first(model)
    return plan_torch_file(model, options, target, "nanogpt", more)


def _decayed_first(model: Source) -> None:
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
