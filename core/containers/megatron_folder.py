"""Open a Megatron checkpoint: a folder for each iteration, in one of two formats.

    latest_checkpointed_iteration.txt   "100", or "release"
    iter_0000100/                       torch_dist: a DCP folder with metadata.json, and the arguments of the run in
                                        common.pt, or in the DCP folder itself as an object called common_state
    iter_0000100/mp_rank_00_001/        classic: model_optim_rng.pt of each tensor-parallel rank, and pipeline rank

(megatron/training/checkpointing.py and megatron/core/dist_checkpointing.)
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import CheckpointDamaged, CheckpointNotFound
from .container import Container, listing, member, reading
from .pickles.inert import as_text

LATEST = "latest_checkpointed_iteration.txt"

_VERL = re.compile(r"global_step_\d+")  # beside which it writes a file of Megatron's name
_ITERATION = re.compile(r"iter_[0-9]{7}|release")
_RANK = re.compile(r"mp_rank_[0-9]{2}(_[0-9]{3}){0,2}")
_CLASSIC = "model_optim_rng.pt"
_COMMON, _COMMON_STATE = "common.pt", "common_state/shard_0_1"
_MOST_RANKS, _MOST_NAMED = 4096, 20
_JSON = "metadata.json"
_DCP = ".metadata"

# readers are imported on demand: every folder is tested for being one of these


def is_megatron_folder(path: Path) -> bool:
    """Whether a folder was written by Megatron: that of one iteration, or of a run."""
    names = listing(path)
    run = any(map(_ITERATION.fullmatch, names)) or (LATEST in names and not any(map(_VERL.fullmatch, names)))
    return run or any(map(_RANK.fullmatch, names)) or names.keys() >= {_COMMON, _DCP} or _is_torch_dist(path, names)


def _is_torch_dist(path: Path, names: dict[str, int | None]) -> bool:
    """Whether the file that Megatron writes last marks a DCP folder as one of its iterations."""
    if not names.keys() >= {_JSON, _DCP}:
        return False
    with reading(member(path, _JSON, str(path))) as file:
        return b'"sharded_backend": "torch_dist"' in file.read(1000)


def open_megatron_folder(path: Path) -> Container:
    """Read one iteration; in a folder of several, the one that Megatron itself would load.

    Its content has the arguments of the run under `common`, or the content of each rank under the name of its folder.

    Raises: CheckpointNotFound when there is none, CheckpointDamaged, CheckpointError as the readers of its files.
    """
    names = listing(path)
    if not is_megatron_folder(path):
        raise CheckpointNotFound(
            f"{path}: not a Megatron folder, expected iter_0000100 and the like, {_DCP} with {_COMMON} or with "
            f"a {_JSON} that says torch_dist, or mp_rank_00/{_CLASSIC}."
        )
    iterations = [name for name, size in names.items() if size is None and _ITERATION.fullmatch(name)]
    if LATEST not in names and not iterations:
        return _open_iteration(path, names)
    chosen = _latest(path, iterations) if LATEST in names else max(iterations)
    place = member(path, chosen, str(path))
    found = _open_iteration(place, listing(place))
    others = [name for name in iterations if name != chosen]
    said = f"{LATEST} names it" if LATEST in names else "the last one"
    found.notes.append(f"{chosen} of {path}: {said}; also there: {', '.join(others) or 'no other'}.")
    return found


def _latest(path: Path, iterations: list[str]) -> str:
    """The folder of the iteration that the tracker file names."""
    where = str(path / LATEST)
    with reading(member(path, LATEST, str(path))) as file:
        text = file.read(64).decode("utf-8", "replace").strip()
    if not (text == "release" or (text.isascii() and text.isdecimal() and len(text) < 20)):
        raise CheckpointDamaged(f"{where}: says {as_text(text, 40)}, expected the number of an iteration or release.")
    name = text if text == "release" else f"iter_{int(text):07}"
    if name not in iterations:
        found = ", ".join(iterations) or "no iter_* folder"
        raise CheckpointDamaged(f"{where}: names {name}, found {found}. Name the folder of an iteration.")
    return name


def _open_iteration(path: Path, names: dict[str, int | None]) -> Container:
    if _DCP in names or any(name.endswith(".distcp") for name in names):
        return _open_torch_dist(path, names)
    ranks = [name for name, size in names.items() if size is None and _RANK.fullmatch(name)]
    if not ranks:
        raise CheckpointDamaged(f"{path}: holds no Megatron checkpoint: neither {_DCP} nor mp_rank_00/{_CLASSIC}.")
    return _open_classic(path, ranks)


def _open_torch_dist(path: Path, names: dict[str, int | None]) -> Container:
    """A DCP folder with the arguments of the run beside it, or among its items."""
    from .dcp.folder import open_dcp
    from .joined import join, put, read_json
    from .torch_files.container import open_torch_single

    folder = open_dcp(path)
    whole = Container("", path, {}, folder.content, {})
    join(whole, folder)
    state = whole.content.get(_COMMON_STATE)
    if names.get(_COMMON) is not None:
        join(whole, open_torch_single(member(path, _COMMON, str(path))), "common")
    elif isinstance(state, list) and len(state) == 1:
        put(whole, "common", state[0])
    else:
        whole.notes.append(f"{_COMMON} is missing: the arguments of the run are not known.")
    if names.get(_JSON) is not None:
        put(whole, "metadata", read_json(path, _JSON, whole.files))
    whole.kind = f"Megatron iteration (torch_dist), {folder.kind}"
    return whole


def _open_classic(path: Path, ranks: list[str]) -> Container:
    """Read the file of each rank; with several ranks, tensor names start with the folder of their rank."""
    from .joined import join
    from .torch_files.container import open_torch_single

    whole = Container("", path, {}, {}, {})
    for rank in ranks:
        held = listing(path / rank)
        if held.get(_CLASSIC) is None:
            raise CheckpointDamaged(f"{path / rank}: {_CLASSIC} is missing, found {as_text(list(held))}.")
        part = open_torch_single(member(path, f"{rank}/{_CLASSIC}", str(path)))
        if len(ranks) == 1:
            whole.content = part.content
        join(whole, part, rank if len(ranks) > 1 else "")
        whole.files |= {f"{rank}/{name}": size for name, size in held.items() if size is not None}
    lost = _missing(ranks, _sizes(whole.content, ranks))
    if lost:
        whole.notes.append(f"{', '.join(lost)} missing; there are {', '.join(ranks)}.")
    whole.kind = f"Megatron iteration (classic), {len(ranks)} rank{'s' * (len(ranks) != 1)}"
    why = (
        "no file says along which dimension its tensors were cut"
        if len(ranks) > 1
        else "it holds the program's own objects beside the tensors"
    )
    whole.notes.append(
        f"cannot be converted as it is: {why}. Export it with Megatron (tools/checkpoint/convert.py), or save it with "
        "--ckpt-format torch_dist."
    )
    return whole


def _sizes(content: Any, ranks: list[str]) -> list[int]:
    """The numbers of tensor-parallel and pipeline ranks in the arguments of the run; 1 each by default."""
    from .pickles.foreign import attributes

    part = content.get(ranks[0], content) if isinstance(content, dict) else {}
    args = attributes(part.get("args")) if isinstance(part, dict) else None
    found = [(args or {}).get(f"{kind}_model_parallel_size") for kind in ("tensor", "pipeline")]
    return [size if type(size) is int and 0 < size <= _MOST_RANKS else 1 for size in found]


def _missing(ranks: list[str], sizes: list[int]) -> list[str]:
    """Name the missing folders of ranks: below the sizes of the run, or between those that exist."""
    numbers = [tuple(map(int, name.split("_")[2:4])) for name in ranks]
    there = {(number, stage[0] if stage else 0) for number, *stage in numbers}
    tensor = max(sizes[0], *(number + 1 for number, _ in there))
    pipeline = max(sizes[1], *(stage + 1 for _, stage in there))
    lost = [(t, p) for t in range(tensor) for p in range(pipeline) if (t, p) not in there]
    return [f"mp_rank_{t:02}_{p:03}" if pipeline > 1 else f"mp_rank_{t:02}" for t, p in lost][:_MOST_NAMED]
