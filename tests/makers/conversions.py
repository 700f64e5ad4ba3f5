"""Conversions as tests make and compare them."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from core.bundle.storage import DISK
from core.containers.container import Container
from core.containers.open import open_container
from core.containers.spec import ITEM_SIZES, TensorSpec, dense_strides
from core.containers.tensors.reading import Gatherer
from core.containers.tensors.views import View, stored
from core.conversion.plan import Options
from core.conversion.planning import plan_conversion
from core.conversion.writing import convert
from core.model import GPT
from tests.makers.torch_files import bits


def converted(source: Path, target: Path, to: str, *, verify: bool = True, overwrite: bool = False, **options) -> dict:
    """Convert, and say what the plan was."""
    from core.conversion.text import plan_facts

    with ExitStack() as held:
        plan = plan_conversion(source, target, to, Options(**options), held)
        convert(plan, verify=verify, overwrite=overwrite)
        return plan_facts(plan)


def texts(facts: dict) -> list[str]:
    """The choices of a plan, as a person reads them."""
    return [choice["text"] for choice in facts["choices"]]


def tensors_of(path: Path, prefix: str = "") -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a file or folder: dtype, shape, bytes."""
    container = open_container(path)
    found = {}
    with Gatherer() as gatherer:
        for name, spec in container.tensors.items():
            data = b"".join(piece.tobytes() for piece in gatherer.pieces(stored(container, spec)))
            found[name.removeprefix(prefix)] = (spec.dtype, tuple(spec.shape), data)
    return found


def same(found: dict, expected: dict) -> bool:
    """Whether the tensors of two state dicts have equal names, types, shapes and bits."""
    return found.keys() == expected.keys() and all(
        (found[n].dtype, found[n].shape) == (t.dtype, t.shape) and torch.equal(bits(found[n]), bits(t))
        for n, t in expected.items()
    )


def read(view: View) -> np.ndarray:
    """The elements of a view, as unsigned numbers of their size."""
    with Gatherer() as gatherer:
        data = b"".join(piece.tobytes() for piece in gatherer.pieces(view))
    return np.frombuffer(data, f"u{ITEM_SIZES[view.dtype]}").reshape(view.shape)


class Scratch:
    """A file into which tensors are put one after the other, as views."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.container = Container("scratch", path, {}, {}, {path.name: 0})
        path.write_bytes(b"")

    def put(self, name: str, array: np.ndarray, dtype: str = "float32") -> View:
        with self.path.open("ab") as file:
            offset = file.tell()
            file.write(array.tobytes())
        spec = TensorSpec(name, dtype, array.shape, dense_strides(array.shape), offset, array.nbytes, name)
        return stored(self.container, spec)


def hf_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a folder as transformers computes them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(ids).logits


def our_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a bundle as our GPT computes them."""
    model = GPT.load(folder)[0].eval()
    with torch.no_grad():
        return model(ids)[0]


def expected(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids and logits that lie beside a fixture."""
    found = load_file(folder / "expected.safetensors")
    return found["input_ids"].long(), found["logits_fp32"]


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the range of what is expected."""
    return float((found - expected).abs().max() / (expected.max() - expected.min()))


def index_of(folder: Path) -> dict:
    return json.loads((folder / "model.safetensors.index.json").read_text())


class Killed(BaseException):
    """The end of the process."""


class MortalDisk:
    """The disk of a process that may be killed: it counts the calls that change it, and after `left` none does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.left, real = 0, sys.maxsize, DISK.change

        def change(call, *args):
            if self.calls >= self.left:
                raise Killed
            self.calls += 1
            return real(call, *args)

        monkeypatch.setattr(DISK, "change", change)

    def live(self, calls: int = sys.maxsize) -> None:
        """Let so many calls pass from now on."""
        self.calls, self.left = 0, calls
