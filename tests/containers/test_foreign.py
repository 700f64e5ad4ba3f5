"""Real pickles of objects: which are mere data and what attributes they have, and which name anything else."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import functools
import importlib
import io
import pathlib
import pickle
import sys
import types
import uuid

import numpy as np
import pytest
import torch

from core.containers.pickles.foreign import attributes, foreign_calls
from core.containers.pickles.inert import Call, Global, as_text
from core.containers.pickles.reader import parse_pickle, read_pickle
from core.containers.torch_files.file import open_torch_file

PROTOCOLS = range(6)
FIELDS = {"n_layer": 2, "n_head": 4, "dropout": 0.25, "device": "cuda", "betas": (0.9, 0.95), "extra": None}

CLASSES = {
    "dataclass": """
from dataclasses import dataclass
@dataclass
class GPTConfig:
    n_layer: int
    n_head: int
    dropout: float
    device: str
    betas: tuple
    extra: object = None
""",
    "plain class": """
class GPTConfig:
    def __init__(self, **fields):
        self.__dict__.update(fields)
""",
    "class with slots": """
class GPTConfig:
    __slots__ = ("n_layer", "n_head", "dropout", "device", "betas", "extra")
    def __init__(self, **fields):
        for name, value in fields.items():
            setattr(self, name, value)
""",
    "dataclass with slots": """
from dataclasses import dataclass
@dataclass(slots=True)
class GPTConfig:
    n_layer: int
    n_head: int
    dropout: float
    device: str
    betas: tuple
    extra: object = None
""",
    "slots and attributes": """
class Base:
    __slots__ = ("n_layer", "n_head")
class GPTConfig(Base):
    def __init__(self, **fields):
        for name, value in fields.items():
            setattr(self, name, value)
""",
}


@contextlib.contextmanager
def module(folder, source):
    """A module that exists only within the block."""
    path = folder / "vanished_trainer.py"
    path.write_text(source)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield importlib.import_module("vanished_trainer")
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("vanished_trainer", None)
        path.unlink()


def gone(data: bytes):
    """What is read from a pickle whose module no longer exists."""
    with pytest.raises(ModuleNotFoundError):
        pickle.loads(data)
    return read_pickle(data, "x.pkl")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", CLASSES)
def test_a_config_of_a_module_that_no_longer_exists_gives_its_attributes(tmp_path, kind, protocol):
    with module(tmp_path, CLASSES[kind]) as vanished:
        config = vanished.GPTConfig(**FIELDS)
        if "slots" in kind and protocol < 2:
            with pytest.raises(TypeError):  # Python itself does not pickle slots in these protocols
                pickle.dumps(config, protocol)
            return
        data = pickle.dumps(config, protocol)
    value = gone(data)
    assert attributes(value) == FIELDS
    assert foreign_calls({"config": value}) == []
    assert "vanished_trainer.GPTConfig" in as_text(value)


def test_a_frozen_dataclass_with_slots_writes_no_names(tmp_path):
    source = CLASSES["dataclass with slots"].replace("slots=True", "slots=True, frozen=True")
    with module(tmp_path, source) as vanished:
        data = pickle.dumps(vanished.GPTConfig(**FIELDS))
    value = gone(data)
    assert attributes(value) is None
    assert foreign_calls(value) == []


def test_instances_of_python_2_give_their_attributes():
    instance = b"(i__main__\nGPTConfig\n(dS'n_layer'\nI2\nsb."
    reconstructed = b"ccopy_reg\n_reconstructor\n(c__main__\nGPTConfig\nc__builtin__\nobject\nNtR(dS'n_layer'\nI2\nsb."
    for data in (instance, reconstructed):
        value = read_pickle(data, "x.pkl")
        assert attributes(value) == {"n_layer": 2}
        assert foreign_calls(value) == []


def test_objects_without_names_have_no_attributes():
    for value in (None, 3, "text", [1], ("a", 1), Global("a", "Config"), Call(Global("a", "Config"), ())):
        assert attributes(value) is None
    for value in (np.arange(3), io.BytesIO(b"x"), pathlib.PurePosixPath("a"), datetime.date(2024, 2, 3)):
        assert attributes(read_pickle(pickle.dumps(value), "x.pkl")) is None


def test_a_dict_is_its_own_attributes():
    config = {"n_layer": 2}
    assert attributes(config) is config


def test_keywords_are_attributes():
    assert attributes(read_pickle(b"\x80\x04ca\nConfig\n)}X\x01\x00\x00\x00kK\x07s\x92.", "x.pkl")) == {"k": 7}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", [argparse.Namespace, types.SimpleNamespace])
def test_a_namespace_gives_its_attributes(kind, protocol):
    value = read_pickle(pickle.dumps(kind(**FIELDS, inner=kind(lr=1e-3)), protocol), "x.pkl")
    named = attributes(value)
    assert attributes(named.pop("inner")) == {"lr": 1e-3}
    assert named == FIELDS
    assert foreign_calls(value) == []


DATA = {
    "numpy numbers": [np.float32(1.5), np.int64(3), np.longdouble(2), np.complex64(1j), np.str_("a"), np.bool_(True)],
    "numpy arrays": [np.arange(6).reshape(2, 3), np.asfortranarray(np.ones((2, 2))), np.array(["a"]), np.array([])],
    "object array": np.array([{"a": argparse.Namespace(b=1)}], dtype=object),
    "structured array": np.zeros(2, dtype=[("a", "f4"), ("b", "i8")]),
    "numpy dtypes": [np.dtype("float32"), np.dtype(">i2"), np.float32, np.bool_],
    "paths": [pathlib.Path("a/b"), pathlib.PurePosixPath("/x"), pathlib.PureWindowsPath("c:/x")],
    "ordered dict": collections.OrderedDict(b=1, a=2),
    "default dicts": [collections.defaultdict(int, a=1), collections.defaultdict(list), collections.defaultdict(None)],
    "counter and deque": [collections.Counter("aab"), collections.deque([1, 2]), collections.deque([1], maxlen=5)],
    "bytes io": io.BytesIO(b"abc"),
    "times": [
        datetime.datetime(2024, 2, 3, tzinfo=datetime.timezone(datetime.timedelta(hours=1))),
        datetime.date(2024, 2, 3),
        datetime.time(1, 2),
        datetime.timedelta(seconds=5),
    ],
    "uuid": uuid.UUID(int=7),
    "numbers": [1 + 2j, range(3), slice(1, 2), 10**50],
    "types": [int, float, str, list, dict, object],
    "torch": [torch.device("cpu"), torch.Size([2]), torch.bfloat16, torch.strided],
    "nested tuples as keys": {((1, 2), (3, (4,))): 1},
    "random state": [np.random.default_rng(1).bit_generator.state, np.random.RandomState(1).get_state()],
    "plain": {"a": [1, 2.5, None, True, "text", b"bytes", {1}, frozenset({2}), (3,)]},
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", DATA)
def test_values_of_well_known_classes_are_mere_data(kind, protocol):
    if kind == "bytes io" and protocol < 2:
        with pytest.raises(TypeError):  # Python itself does not pickle it in these protocols
            pickle.dumps(DATA[kind], protocol)
        return
    data = pickle.dumps(DATA[kind], protocol)
    parsed = parse_pickle(data, "x.pkl")
    assert foreign_calls([parsed.value, parsed.unused]) == []
    old = data.replace(b"numpy._core", b"numpy.core")  # the spelling of numpy 1, one character shorter
    if b"_core" in data and protocol < 4:
        assert foreign_calls(read_pickle(old, "x.pkl")) == []
        assert "numpy.core." in as_text(read_pickle(old, "x.pkl"), 10**6) or kind == "numpy numbers"


def test_paths_of_newer_pythons_are_data():
    assert foreign_calls(read_pickle(b"cpathlib._local\nPosixPath\n(S'a'\ntR.", "x.pkl")) == []


def test_content_that_stays_inert_is_shown():
    value = read_pickle(pickle.dumps({"a": np.arange(2, dtype="i1"), "p": pathlib.PurePosixPath("runs/a")}), "x.pkl")
    text = as_text(value)
    assert "numpy.ndarray" in text and '"i1"' in text
    assert as_text(value["p"]) == 'pathlib.PurePosixPath("runs", "a")'


# what is no data

NAMED = {
    b"cbuiltins\neval\n.": ["builtins.eval"],
    b"cbuiltins\neval\nU\x01x\x85R.": ['builtins.eval("x")'],
    b"cbuiltins\ngetattr\nccollections\nOrderedDict\nU\x01k\x86R.": ['builtins.getattr(collections.OrderedDict, "k")'],
    b"cbuiltins\ngetattr\ncbuiltins\n__import__\nU\x02os\x85RU\x06system\x86RU\x02ls\x85R.": [
        'builtins.getattr(builtins.__import__("os"), "system")("ls")',
        'builtins.getattr(builtins.__import__("os"), "system")',
        'builtins.__import__("os")',
    ],
    b"ccopyreg\n_reconstructor\ncmodel\nTrainer\ncbuiltins\nobject\nN\x87R.": [
        "copyreg._reconstructor(model.Trainer, builtins.object, None)"
    ],
    b"ccopyreg\n__newobj__\ncposix\nsystem\nU\x01x\x86R.": ['copyreg.__newobj__(posix.system, "x")'],
    b"ccopyreg\n_reconstructor\n)R.": ["copyreg._reconstructor()"],
    b"cmodel\nGPTConfig\nU\x01x\x85R.": ['model.GPTConfig("x")'],  # made with arguments
    b"cmodel\nConfigMaker\n)R.": ["model.ConfigMaker()"],
    b"ccollections\ndefaultdict\ncposix\nsystem\n\x85R.": ["posix.system"],
    b"ctorch._utils\n_rebuild_qtensor\n)R.": ["torch._utils._rebuild_qtensor()"],
    b"cnumpy.core.multiarray\n_reconstruct\ncmodel\nArray\n\x85R.": ["model.Array"],
    b"cnumpy\nload\nU\x01x\x85R.": ['numpy.load("x")'],
    b"c__main__\ne\xcc\x81\x1b[2J\n.": ["__main__.e\\u0301\\u001b[2J"],
}


@pytest.mark.parametrize("data", NAMED)
def test_what_is_not_known_to_be_data_is_named(data):
    assert foreign_calls(read_pickle(data, "x.pkl")) == NAMED[data]


def test_functions_and_objects_of_other_classes_are_named():
    content = [len, functools.partial(print, 1), collections.UserDict(a=1), types.SimpleNamespace]
    names = foreign_calls(read_pickle(pickle.dumps(content), "x.pkl"))
    assert [name.partition("(")[0] for name in names] == [
        "builtins.len",
        "functools.partial",
        "builtins.print",
        "collections.UserDict",
    ]


def test_twenty_are_named_each_once_and_each_on_one_short_line_and_the_others_are_counted():
    calls = [Call(Global("a", "f"), (i // 2, "x" * 1000)) for i in range(100)]
    found = foreign_calls({"calls": calls})
    assert len(found) == len(set(found)) == 21
    assert found[-1] == "61 more calls and names"  # the other half of the twentieth is said again
    assert len(foreign_calls({"calls": calls[:39]})) == 20
    assert foreign_calls([Global("a", f"f{i}") for i in range(23)])[-1] == "3 more calls and names"
    assert found[0].startswith('a.f(0, "xxx')
    assert all(len(text) <= 200 and text.isascii() for text in found)


def test_shared_parts_are_walked_once():
    value: list = [Call(Global("posix", "system"), ("ls",))]
    for _ in range(100):
        value = [value, value]
    assert foreign_calls(value) == ['posix.system("ls")']


def test_unusual_tensors_are_named_as_nothing_can_load_them():
    buffer = io.BytesIO()
    torch.save({"sparse": torch.eye(2).to_sparse(), "w": torch.ones(2), "s": torch.ones(2).untyped_storage()}, buffer)
    archive = open_torch_file(buffer, "x.pt")
    names = [text.partition("(")[0] for text in foreign_calls([archive.content, archive.unused])]
    assert names == ["torch._utils._rebuild_sparse_tensor", "torch.storage.UntypedStorage"]
