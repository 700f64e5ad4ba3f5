"""The config that a program leaves in a file beside its weights, found by the name of the weights' file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .blocks import read_whole
from .container import listing, member, reading
from .flat_yaml import parse_flat_yaml
from .joined import read_json
from .pickles.inert import as_name

_CONFIG = "config.json"
_RULES = (
    (re.compile(r"model_(\d+)\.pt"), r"meta_\1.json", "model_config"),  # nanochat
    (re.compile(r"consolidated\.\d+\.pth"), "params.json", ""),  # Meta
    (re.compile(r".+\.(?:pth|ckpt|bin|pt|safetensors)"), "model_config.yaml", ""),  # litgpt
    (re.compile(r".+\.(?:safetensors|bin|pt|pth)"), _CONFIG, ""),  # transformers
)
"""Of the weights, the name of the config, and the entry in it that is one."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_USUAL = ("model.safetensors", "pytorch_model.bin")
_OF_RUN = ("optimizer", "optim_", "scheduler", "training_args", "rng_state", "scaler")
_LARGEST = 1_000_000  # bytes of a YAML file


@dataclass(frozen=True)
class Beside:
    """A config, the name of its file, and the step that the file has."""

    place: str
    config: dict[str, Any]
    step: int | None = None


def config_beside(path: Path) -> tuple[Beside | None, str]:
    """The config beside a file of weights, and a sentence where there is one that cannot be read.

    config.json is that of transformers, and only of the file that it is for: one of the usual name, or the only one.
    """
    folder = path.parent
    for pattern, template, entry in _RULES:
        match = pattern.fullmatch(path.name)
        if match is None or not (folder / (name := match.expand(template))).is_file():
            continue
        try:
            values = _read(folder, name)
        except CheckpointError as error:
            return None, f"the config beside it is not read: {error}"
        config = values.get(entry) if entry else values
        if not isinstance(config, dict):
            return None, f"{folder / name}: has no {entry}, so nothing of it is used"
        if name == _CONFIG and not (isinstance(config.get("model_type"), str) and _is_for(path)):
            continue
        step = values.get("step")
        return Beside(as_name(name), config, step if type(step) is int and step >= 0 and entry else None), ""
    return None, ""


def _read(folder: Path, name: str) -> dict[str, Any]:
    if not name.endswith(".yaml"):
        return read_json(folder, name, {})
    path = member(folder, name, str(folder))
    with reading(path) as file:
        return parse_flat_yaml(read_whole(file, _LARGEST, str(path)), str(path))


def _is_for(path: Path) -> bool:
    """Whether a config.json is for this file: nothing else in the folder could be the model."""
    others = [name for name in listing(path.parent) if name.endswith(_WEIGHTS) and not name.startswith(_OF_RUN)]
    return path.name in _USUAL or others == [path.name]
