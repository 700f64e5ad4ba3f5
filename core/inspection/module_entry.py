"""What the record of a whole module shows of the model's config: its attributes, and the modules it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..containers.pickles.foreign import is_module
from ..containers.pickles.inert import Call, Global
from ..families.programs import MODULES
from .config_entry import config_entry

_ACTIVATIONS = {"torch.nn.modules.activation.ReLU": "relu", "torch.nn.modules.activation.GELU": "gelu"}


def module_entry(content: Any, key: str) -> tuple[str, dict[str, Any] | None]:
    """The place and fields of the config of a module that has the weights under `key`; ("", None) where none has.

    Activation and epsilon are told where all modules have the same.
    """
    name = key.removesuffix(".")
    module = content.get(name) if isinstance(content, Mapping) and name else content
    if not is_module(module):
        return "", None
    place, fields = config_entry({name: value for name, value in module.state.items() if not name.startswith("_")})
    parts = list(_modules(module))
    norms = [part for part in parts if _class(part) == "torch.nn.modules.normalization.LayerNorm"]
    shown = {
        "activation": {_activation(part) for part in parts} - {""},
        "norm_eps": {part.state.get("eps") for part in norms},
    }
    told = {field: values.pop() for field, values in shown.items() if len(values) == 1}
    return (MODULES, told) if fields is None else (f"its {place}", {**told, **fields})


def _modules(module: Call) -> Iterator[Call]:
    yield module
    for part in module.state["_modules"].values():
        if is_module(part):
            yield from _modules(part)


def _class(module: Call) -> str:
    return module.callable.path if isinstance(module.callable, Global) else ""


def _activation(module: Call) -> str:
    is_tanh = module.state.get("approximate") == "tanh"
    found = _ACTIVATIONS.get(_class(module), "")
    return f"{found}_tanh" if found == "gelu" and is_tanh else found
