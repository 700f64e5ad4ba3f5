"""torch.save(model): its tensors are listed by attribute, and converted where its paths are those of a known family."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import inspect_model
from core.containers.open import open_container
from core.errors import CheckpointError
from core.inspection.inspect import inspect_path
from core.inspection.marks import choices
from tests.makers.conversions import converted, tensors_of
from tests.makers.vanished import vanishing

LECTURE = """
import torch
from torch import nn

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(16, 8, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(8, 8)))

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.proj = nn.ModuleList([Head(), Head()]), nn.Linear(16, 16)

class Feed(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), activation, nn.Linear(64, 16))

class Block(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.sa, self.ffwd = Attention(), Feed(activation)
        self.ln1, self.ln2 = nn.LayerNorm(16, eps=1e-6), nn.LayerNorm(16, eps=1e-6)

class GPTLanguageModel(nn.Module):
    def __init__(self, activation=nn.ReLU()):
        super().__init__()
        self.token_embedding_table, self.position_embedding_table = nn.Embedding(10, 16), nn.Embedding(8, 16)
        self.blocks, self.ln_f = nn.Sequential(Block(activation)), nn.LayerNorm(16, eps=1e-6)
        self.lm_head = nn.Linear(16, 10)
        self.parent = [self]
        self.settings = {"lr": 1e-3}

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3)
        self.register_buffer("cache", torch.ones(7), persistent=False)
        self.table = torch.ones(5)
"""


def saved(
    path: Path, kind: str = "GPTLanguageModel", *args: Any, wrap: Any = lambda model: model, **options: Any
) -> dict:
    """A file with a whole module of a class that is gone; its state dict."""
    torch.manual_seed(0)
    with vanishing(LECTURE, "course.notebook") as module:
        model = getattr(module, kind)(*args)
        torch.save(wrap(model), path, **options)
        return model.state_dict()


def bits(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: t.contiguous().numpy().tobytes() for name, t in state.items()}


FLAGS = {"choices": {"attention_scale": "head_size", "norm_placement": "before"}}


@pytest.mark.parametrize("stream", [False, True], ids=["zip", "stream"])
@pytest.mark.parametrize(
    "wrap", [lambda m: m, lambda m: {"model": m, "epoch": 3}, nn.DataParallel], ids=["", "dict", "DP"]
)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated", "ignore:Couldn't retrieve source code")
def test_a_module_of_a_known_family_becomes_the_bundle_of_its_state_dict(tmp_path, wrap, stream):
    state = saved(tmp_path / "whole.pt", wrap=wrap, _use_new_zipfile_serialization=not stream)
    torch.save(state, tmp_path / "state.pt")
    held = {
        name.removeprefix("model.").removeprefix("module."): data
        for name, (_, _, data) in tensors_of(tmp_path / "whole.pt").items()
    }
    assert held == bits(state) and list(held) == list(state)
    converted(tmp_path / "whole.pt", tmp_path / "a", "bundle", **FLAGS)
    converted(
        tmp_path / "state.pt",
        tmp_path / "b",
        "bundle",
        choices=FLAGS["choices"] | {"activation": "relu", "norm_eps": 1e-6},
    )
    assert (tmp_path / "a/model.pt").read_bytes() == (tmp_path / "b/model.pt").read_bytes()
    assert json.loads((tmp_path / "a/config.json").read_text()) == json.loads((tmp_path / "b/config.json").read_text())


@pytest.mark.parametrize(
    ("module", "activation"), [(nn.ReLU(), "relu"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh")]
)
def test_activation_and_epsilon_are_those_of_its_modules(tmp_path, module, activation):
    saved(tmp_path / "whole.pt", "GPTLanguageModel", module)
    made = {one.name: str(one) for one in choices(inspect_path(tmp_path / "whole.pt"))}
    assert made["activation"] == f"activation {activation} (from its modules)"
    assert made["norm_eps"] == "norm epsilon 1e-06 (from its modules)"
    assert made["attention_scale"] == "attention scale ? (not in the file)"


@pytest.mark.parametrize("to", ["pt", "safetensors", "bundle"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_module_of_an_unknown_program_is_refused_with_the_two_lines(tmp_path, to, inside):
    path = tmp_path / "net.pt"
    saved(path, "Net", wrap=(lambda m: {"net": m}) if inside else lambda m: m)
    with pytest.raises(CheckpointError) as caught:
        converted(path, tmp_path / f"out.{to}" if to != "bundle" else tmp_path / "out", to)
    name, at = ("net", "['net']") if inside else ("its content", "")
    lines = f"model = torch.load({str(path)!r}, weights_only=False){at}; torch.save(model.state_dict(), 'weights.pt')."
    assert str(caught.value) == (
        f"{path}: {name} is a whole module (course.notebook.Net), whose code is not in the file and is not imported. "
        f"Where that code is, two lines make a file of its tensors: {lines}"
    )


def test_inspection_lists_what_a_state_dict_would_and_tensors_that_are_attributes(tmp_path, capsys):
    state = saved(tmp_path / "net.pt", "Net")
    found = open_container(tmp_path / "net.pt")
    assert list(found.tensors) == [*state, "table"]
    assert inspect_model.main([str(tmp_path / "net.pt")]) == 0
    shown = capsys.readouterr()
    assert "conv.weight" in shown.out and "_modules" not in shown.out and "_parameters" not in shown.out + shown.err
    assert "note: net.pt: its content is a whole module (course.notebook.Net)" in shown.out
    assert len(shown.err.splitlines()) <= 4 and "its pickle names course.notebook.Net(...); nothing was" in shown.err


def test_a_module_beside_the_weights_is_left_out_with_its_path(tmp_path):
    with vanishing(LECTURE, "course.notebook") as module:
        model = module.GPTLanguageModel()
        torch.save({"model": model.state_dict(), "teacher": module.Net()}, tmp_path / "x.pt")
    facts = converted(tmp_path / "x.pt", tmp_path / "b", "bundle", choices=FLAGS["choices"] | {"activation": "relu"})
    assert any("teacher is course.notebook.Net() with" in note for note in facts["notes"])


def test_a_module_of_pickle_itself_is_refused_with_the_two_lines(tmp_path):
    path = tmp_path / "model-01.pkl"
    with vanishing(LECTURE, "course.notebook") as module:
        path.write_bytes(pickle.dumps(module.GPTLanguageModel()))
    with pytest.raises(CheckpointError) as caught:
        open_container(path)
    assert str(caught.value).startswith(f"{path}: a pickle without the magic number of torch")
    lines = f"model = pickle.load(open({str(path)!r}, 'rb')); torch.save(model.state_dict(), 'weights.pt')."
    assert str(caught.value).endswith(lines)
