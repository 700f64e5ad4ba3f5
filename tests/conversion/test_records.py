"""A value that is not understood does not take the tensors with it: it stays text, or is left out with its path."""

from __future__ import annotations

import decimal
import fractions
import functools
import importlib
import json
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import inspect_model
from core.checkpoint import CheckpointManager
from core.containers.open import open_container
from core.containers.pickles.foreign import attributes
from core.conversion.migration.migrate import migrate
from core.errors import CheckpointError
from tests.makers.conversions import converted, tensors_of
from tests.makers.doors import Shell, single
from tests.makers.generations import SIZES, FusedGPT, trained
from tests.makers.nanogpt_files import CONFIG, TODAY, ckpt
from tests.makers.vanished import vanishing

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated", "ignore:torch.quantize_per_tensor")

SOURCE = """
import dataclasses, decimal, enum

class Mode(enum.Enum):
    FAST = "fast"

class Bits(enum.IntFlag):
    A = 1
    B = 2

class Outer:
    class Inner(enum.Enum):
        ON = 1

    @dataclasses.dataclass
    class Settings:
        lr: float = 1e-3

class EasyDict(dict):
    def __init__(self, fields):
        dict.__init__(self, fields)
        self.__dict__.update(fields)

class CfgNode(dict):
    def __init__(self, fields):
        dict.__init__(self, fields)
        self.__dict__["__immutable__"] = False

class Held:
    def __init__(self, **state):
        self.__dict__.update(state)

class Slots:
    __slots__ = ("lr",)

@dataclasses.dataclass
class Hyperparameters:
    lr: float = 1e-3

def warm_up(step):
    return step
"""


def tree(module: Any, fields: dict[str, Any], parent: Any = None) -> Any:
    """What OmegaConf makes of a dict: nodes that know their parents."""
    made = module.Held(_metadata=None, _parent=parent)
    made._content = {
        name: tree(module, value, made) if isinstance(value, dict) else module.Held(_val=value, _parent=made)
        for name, value in fields.items()
    }
    return made


def slots(module: Any) -> Any:
    made = module.Slots()
    made.lr = decimal.Decimal("0.1")
    return made


VALUES: dict[str, Callable[[Any], Any]] = {
    "version": lambda m: torch.__version__,
    "enum": lambda m: m.Mode.FAST,
    "nested enum": lambda m: m.Outer.Inner.ON,
    "nested dataclass": lambda m: m.Outer.Settings(),
    "flag": lambda m: m.Bits.A | m.Bits.B,
    "dictionary of a class": lambda m: m.EasyDict({"lr": 1e-3}),
    "dataclass": lambda m: m.Hyperparameters(),
    "slots": slots,
    "decimal": lambda m: decimal.Decimal("0.1"),
    "fraction": lambda m: fractions.Fraction(1, 3),
    "function of a program": lambda m: m.warm_up,
    "function of torch": lambda m: functional.gelu,
    "function of Python": lambda m: max,
    "partial": lambda m: functools.partial(functional.gelu, approximate="tanh"),
    "class": lambda m: torch.nn.GELU,
    "class of nothing": lambda m: type(None),
    "cycle": lambda m: tree(m, {"lr": 1e-3, "model": {"n_layer": 1}}),
    "list in itself": lambda m: itself([]),
    "cycle through tuples": lambda m: itself([], (1,)),
    "cycle through a set": lambda m: through_set(m),
}


def itself(made: list[Any], beside: tuple[Any, ...] = ()) -> list[Any]:
    made.append((made, *beside) if beside else made)
    made.append([made[0], made])
    return made


def through_set(module: Any) -> Any:
    made = module.Held()
    made.held = {made, "x"}
    return made


def write(path: Path, place: str, value: Any, **options: Any) -> dict[str, torch.Tensor]:
    """A file of nanoGPT with a value at a place in it; its tensors as torch reads them."""
    torch.manual_seed(1)
    ckpt(path, order=TODAY)
    content = torch.load(path, weights_only=True)
    *before, last = place.split(".")
    functools.reduce(operator.getitem, before, content)[last] = value
    torch.save(content, path, **options)
    return torch.load(path, weights_only=False)["model"]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def same(found: dict[str, Any], expected: dict[str, torch.Tensor]) -> bool:
    whole = {name: t.contiguous().numpy().tobytes() for name, t in expected.items()}
    return {name: data for name, (_, _, data) in found.items()} == whole


@pytest.mark.parametrize("place", ["hook", "config.hook"])
@pytest.mark.parametrize("kind", VALUES)
def test_tensors_beside_any_value_are_converted(tmp_path, kind, place):
    source, stream = tmp_path / "ckpt.pt", place == "hook"
    with vanishing(SOURCE) as module:
        expected = write(source, place, VALUES[kind](module), _use_new_zipfile_serialization=not stream)
    held = {name: one for name, one in tensors_of(source).items() if name.startswith("model.")}
    assert same({name.removeprefix("model."): one for name, one in held.items()}, expected)
    facts = converted(source, tmp_path / "out.pt", "pt")
    assert same(tensors_of(tmp_path / "out.pt"), expected)
    if not stream:
        converted(source, tmp_path / "bundle", "bundle")
        assert read(tmp_path / "bundle/training_state.json")["step"] == 40
    (said,) = [note for note in facts["notes"] if note.startswith("no plain data, so it stays text or is left out: ")]
    assert f": {place}" in said


@pytest.mark.parametrize("kind", ["EasyDict", "CfgNode", "Held", "OmegaConf", "ml_collections"])
def test_the_fields_of_a_config_of_any_class_are_the_config(tmp_path, kind):
    with vanishing(SOURCE) as module:
        made = {
            "EasyDict": module.EasyDict,
            "CfgNode": module.CfgNode,
            "Held": lambda fields: module.Held(**fields),
            "OmegaConf": lambda fields: tree(module, fields),
            "ml_collections": lambda fields: module.Held(_fields=fields, _locked=True),
        }[kind]
        write(tmp_path / "ckpt.pt", "config", made(CONFIG))
        sizes = {"n_layer": 1, "n_head": 4, "n_embd": 32, "block_size": 8, "vocab_size": 65, "bias": False}
        write(tmp_path / "args.pt", "model_args", made({**sizes, "dropout": 0.0}))
    facts = converted(tmp_path / "ckpt.pt", tmp_path / "a", "bundle")
    assert "config" not in facts["dropped"]
    training = read(tmp_path / "a/training_state.json")["training"]
    assert (training["learning_rate"], training["grad_clip"], training["max_iters"]) == (1e-2, 1.0, 100)
    converted(tmp_path / "args.pt", tmp_path / "b", "bundle")
    assert read(tmp_path / "b/config.json")["n_head"] == 4


@pytest.mark.parametrize("field", ["n_head", "block_size", "vocab_size"])
def test_a_record_that_the_model_needs_is_named_by_its_field(tmp_path, field):
    write(tmp_path / "ckpt.pt", f"model_args.{field}", decimal.Decimal(8))
    with pytest.raises(CheckpointError, match=rf"ckpt\.pt: {field} is 'decimal\.Decimal.*' in the config, not a"):
        converted(tmp_path / "ckpt.pt", tmp_path / "b", "bundle")


def test_a_record_among_the_weights_is_needed(tmp_path):
    write(tmp_path / "ckpt.pt", "model.extra", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
    for to, target in (("pt", "out.pt"), ("bundle", "out")):
        with pytest.raises(CheckpointError) as caught:
            converted(tmp_path / "ckpt.pt", tmp_path / target, to)
        said = str(caught.value)
        assert said.startswith(f"{tmp_path / 'ckpt.pt'}: model.extra is torch._utils._rebuild_qtensor(")
        assert said.endswith("which is not read as a tensor. Load the file with the program that wrote it, and save a "
                             "state dict of plain tensors.")  # fmt: skip
        assert not (tmp_path / target).exists()


def test_a_tensor_of_another_kind_that_is_no_weight_is_left_out(tmp_path):
    beside = {"calibration": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}
    expected = write(tmp_path / "ckpt.pt", "beside", beside)
    facts = converted(tmp_path / "ckpt.pt", tmp_path / "out.pt", "pt")
    assert same(tensors_of(tmp_path / "out.pt"), expected)
    assert any("beside.calibration is torch._utils._rebuild_qtensor(" in note for note in facts["notes"])


def test_an_optimizer_with_a_record_is_left_out_with_the_reason_and_refused_where_it_is_asked_for(tmp_path):
    source = tmp_path / "ckpt.pt"
    ckpt(source, order=TODAY)
    with vanishing(SOURCE) as module:
        content = torch.load(source, weights_only=True)
        content["optimizer"]["param_groups"][0]["mode"] = module.Mode.FAST
        torch.save(content, source)
    facts = converted(source, tmp_path / "b", "bundle")
    reason = "its optimizer state is left out: its group has vanished_program.Mode"
    assert any(note.startswith(reason) and note.endswith("as mode.") for note in facts["notes"])
    with pytest.raises(CheckpointError, match=f"{reason}.* as mode. Leave out --include_optimizer."):
        converted(source, tmp_path / "x", "nanogpt", include_optimizer=True)


class Method:
    """Calls a function of the library of Python that acts on something."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (Shell("x"), r"posix\.system"),
        (Method(importlib.import_module, "antigravity"), r"importlib\.import_module"),
        (Method(torch.load, "x"), r"torch\.serialization\.load"),
        (Method(getattr, Path, "__init__"), r"getattr"),
        (open, r"io\.open|builtin"),
    ],
    ids=["shell", "import", "load", "getattr", "open"],
)  # fmt: skip
def test_what_may_act_on_a_reader_is_refused_as_ever(tmp_path, value, said):
    write_unread(tmp_path / "ckpt.pt", value)
    with pytest.raises(CheckpointError, match=rf"its pickle names .*({said}).*and nothing is converted"):
        converted(tmp_path / "ckpt.pt", tmp_path / "out.pt", "pt")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def write_unread(path: Path, value: Any) -> None:
    torch.save({"w": torch.zeros(2), "x": value}, path)


def test_few_records_are_named_on_the_terminal_and_all_in_json(tmp_path, capsys):
    with vanishing(SOURCE) as module:
        write_unread(tmp_path / "x.pt", tree(module, {f"field{i}": i for i in range(9)}))
    assert inspect_model.main([str(tmp_path / "x.pt")]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and all(line.endswith("; nothing was executed") for line in said)
    more = "more records of classes and functions, which --json lists; nothing was executed"
    assert said[-1].startswith(f"WARNING: {tmp_path / 'x.pt'}: and ") and said[-1].endswith(more)


# Files of the real packages


def of_omegaconf(fields: dict[str, Any]) -> Any:
    return pytest.importorskip("omegaconf").OmegaConf.create(fields)


def of_easydict(fields: dict[str, Any]) -> Any:
    return pytest.importorskip("easydict").EasyDict(fields)


def of_yacs(fields: dict[str, Any]) -> Any:
    return pytest.importorskip("yacs.config").CfgNode(fields)


def of_ml_collections(fields: dict[str, Any]) -> Any:
    made = pytest.importorskip("ml_collections").ConfigDict(fields)
    made.decay = made.get_ref("weight_decay")
    return made


def of_frozen(fields: dict[str, Any]) -> Any:
    return pytest.importorskip("ml_collections").FrozenConfigDict(fields)


@pytest.mark.full
@pytest.mark.parametrize("make", [of_omegaconf, of_easydict, of_yacs, of_ml_collections, of_frozen])
def test_a_file_with_a_config_of_a_real_package_is_converted_with_its_settings(tmp_path, make):
    expected = write(tmp_path / "ckpt.pt", "config", make({**CONFIG, "model": {"n_layer": 1}}))
    fields = attributes(open_container(tmp_path / "ckpt.pt").content["config"])
    assert {name: fields[name] for name in CONFIG if name != "weight_decay"} == {
        name: value for name, value in CONFIG.items() if name != "weight_decay"
    }
    converted(tmp_path / "ckpt.pt", tmp_path / "out.pt", "pt")
    assert same(tensors_of(tmp_path / "out.pt"), expected)
    converted(tmp_path / "ckpt.pt", tmp_path / "b", "bundle")
    training = read(tmp_path / "b/training_state.json")["training"]
    assert (training["learning_rate"], training["weight_decay"], training["max_iters"]) == (1e-2, 0.1, 100)


def test_a_single_file_of_ours_with_such_values_is_migrated_and_they_are_named(tmp_path):
    model = FusedGPT(**SIZES)
    with vanishing(SOURCE) as module:
        values = {"mode": module.Mode.FAST, "version": torch.__version__, "settings": module.EasyDict({"lr": 1e-3})}
        path = single(tmp_path / "m", model, trained(model), **values)
        single(tmp_path / "m2", model, None, **values)
    (outcome,) = migrate(tmp_path / "m", [path])
    assert outcome.error is None and outcome.left == ["mode", "version"]
    assert read(tmp_path / "m/training_state.json")["settings"] == {"lr": 1e-3}
    held = {name: data for name, (_, _, data) in tensors_of(tmp_path / "m/model.pt").items()}
    assert held == {name: t.numpy().tobytes() for name, t in model.state_dict().items() if name in held}
    assert held.keys() >= {name for name, _ in model.named_parameters()}
    with pytest.raises(CheckpointError, match=r"its pickle names vanished_program\.Mode.* and nothing is loaded"):
        CheckpointManager.load_for_inference("m2", tmp_path)
