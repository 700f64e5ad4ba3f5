"""Saved means loadable: whatever `save` takes comes back equal, and anything else is refused with its path."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import functools
import io
import pathlib
import random
import types
import uuid
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.bundle.bundle import open_bundle
from core.bundle.commit import ModelFolder
from core.containers.trees import map_leaves
from core.errors import CheckpointError, InputError, SaveFailed
from core.loading.tensors import read_optimizer
from core.networks.distributed import World
from core.networks.state_dict import copy_others
from core.saving.loadable import _fault, is_plain, refuse_unloadable
from core.saving.sharded_step import ShardedStepSave
from core.saving.shards import Shard, image_of
from core.saving.step import StepContent
from core.saving.torch_file import records_of, write_torch_zip
from tests.makers.models import manager, state_of

Pair = collections.namedtuple("Pair", "a b")


class Color(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Word(str):
    __slots__ = ()


class Marked(torch.Tensor):
    """A tensor of a class of its own."""


class Explosive:
    def __reduce__(self):
        raise OSError("no thanks")


def nested(levels):
    return functools.reduce(lambda inner, _: [inner], range(levels), 1)


def cycle():
    made = []
    made.append(made)
    return made


def with_attribute(value):
    made = torch.ones(2)
    made.said = value
    return made


def quietly(make, *args):
    """Make a tensor of a kind that torch warns about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args)


numbers = torch.arange(6.0).reshape(2, 3)

SAVED = {
    "None": None,
    "bool": True,
    "int": -5,
    "longest int": 1 << 2038,
    "float": float("-inf"),
    "text": "é\ud800",
    "complex": 1 + 2j,
    "bytes": b"\0\xff",
    "bytearray": bytearray(b"abc"),
    "set": {1, "a", (2, 3)},
    "empty set": set(),
    "OrderedDict": collections.OrderedDict(a=1),
    "defaultdict": collections.defaultdict(lambda: 0, a=1),
    "Counter": collections.Counter("abb"),
    "namedtuple": Pair(1, [2]),
    "mapping": types.MappingProxyType({"a": 1}),
    "keys": {1: 2, "1": 3, (1, 2): 4, None: 5, 1.5: 6, b"a": 7, torch.float32: 8},
    "random state": random.Random(1).getstate(),
    "numpy float": np.float64(0.5),
    "numpy float32": np.float32(0.5),
    "numpy int": np.int64(5),
    "numpy bool": np.bool_(True),
    "numpy text": np.str_("a"),
    "numpy complex": np.complex64(1j),
    "dtype": torch.bfloat16,
    "device": torch.device("cuda", 1),
    "layout": torch.strided,
    "Size": torch.Size([2, 3]),
    "parameter": torch.nn.Parameter(numbers.clone()),
    "buffer": torch.nn.Buffer(numbers.clone()),
    "float8": numbers.to(torch.float8_e4m3fn),
    "uint16": numbers.to(torch.uint16),
    "complex64": numbers.to(torch.complex64),
    "transposed": numbers.t(),
    "expanded": torch.ones(1).expand(5),
    "empty": torch.empty(0, 3),
    "0-d": torch.tensor(1.5),
    "with attribute": with_attribute("a"),
    "needs a gradient": torch.ones(2, requires_grad=True) * 2,
    "nested 150 times": nested(150),
}

REFUSED = {
    "too long int": (1 << 2039, "x.1 is a whole number of 2040 bits, of which 2039 can be read"),
    "far too long int": (1 << 20000, "x.1 is a whole number of 20001 bits"),
    "no bytes": (b"", "x.1 is empty bytes"),
    "frozenset": (frozenset({1}), "x.1 is of type frozenset"),
    "set of frozensets": ({frozenset({1})}, "x.1 is a set with such values"),
    "deque": (collections.deque([1]), "x.1 is of type collections.deque"),
    "range": (range(3), "x.1 is of type range"),
    "slice": (slice(1), "x.1 is of type slice"),
    "ellipsis": (..., "x.1 is of type ellipsis"),
    "enum": (Color.RED, f"x.1 is of type {__name__}.Color"),
    "IntEnum": (Level.LOW, f"x.1 is of type {__name__}.Level"),
    "kind of text": (Word("a"), f"x.1 is of type {__name__}.Word"),
    "path": (pathlib.PurePosixPath("a"), "x.1 is of type pathlib"),
    "date": (datetime.date(2020, 1, 1), "x.1 is of type datetime.date"),
    "Decimal": (decimal.Decimal(1), "x.1 is of type decimal.Decimal"),
    "uuid": (uuid.UUID(int=1), "x.1 is of type uuid.UUID"),
    "file": (io.BytesIO(b"a"), "x.1 is of type _io.BytesIO"),
    "memoryview": (memoryview(b"a"), "x.1 is of type memoryview"),
    "object": (types.SimpleNamespace(a=1), "x.1 is of type types.SimpleNamespace"),
    "cannot be pickled": (Explosive(), f"x.1 is of type {__name__}.Explosive"),
    "function": (print, "x.1 is a function (builtins.print)"),
    "lambda": (lambda: 0, f"x.1 is a function ({__name__}.<lambda>)"),
    "class": (int, "x.1 is a class (builtins.int)"),
    "module": (torch.nn.Linear(1, 1), "x.1 is of type torch.nn.modules.linear.Linear"),
    "optimizer": (torch.optim.SGD([torch.ones(1)], 0.1), "x.1 is of type torch.optim.sgd.SGD"),
    "generator": (torch.Generator(), "x.1 is of type torch._C.Generator"),
    "memory format": (torch.contiguous_format, "x.1 is of type torch.memory_format"),
    "storage": (quietly(torch.ones(2).untyped_storage), "x.1 is of type torch.storage.UntypedStorage"),
    "numpy array": (np.arange(3), "x.1 is of type numpy.ndarray"),
    "numpy dtype": (np.dtype("f4"), "x.1 is of type numpy.dtype"),
    "numpy date": (np.datetime64("2020-01-01"), "x.1 is of type datetime.date"),
    "long double": (np.longdouble(1), "x.1 is of type numpy.longdouble"),
    "quantized": (quietly(torch.quantize_per_tensor, numbers, 0.1, 0, torch.quint8), "x.1 is a quantized tensor"),
    "meta": (numbers.to("meta"), "x.1 is a tensor on the meta device, without values"),
    "conjugate": (torch.tensor([1 + 2j]).conj(), "x.1 is a view that conjugates another tensor"),
    "negative": (torch.tensor([1 + 2j]).conj().imag, "x.1 is a view that negates another tensor"),
    "sparse": (numbers.to_sparse(), "x.1 is a sparse tensor (torch.sparse_coo)"),
    "sparse rows": (quietly(numbers.to_sparse_csr), "x.1 is a sparse tensor (torch.sparse_csr)"),
    "nested tensor": (quietly(torch.nested.nested_tensor, [numbers[0], numbers[1, :2]]), "x.1 is a nested tensor"),
    "bits": (torch.empty(2, dtype=torch.bits8), "x.1 is a tensor of bits8"),
    "tensor class": (numbers.as_subclass(Marked), f"x.1 is a tensor of class {__name__}.Marked"),
    "uninitialized": (torch.nn.UninitializedParameter(), "x.1 is a parameter that is not initialized yet"),
    "function on a tensor": (with_attribute(print), "x.1 is a tensor with attributes (said)"),
    "cycle": (cycle(), "x.1.0.0.0.0.0.0.0"),
    "nested 250 times": (nested(250), "is nested deeper than 200 levels, or contains itself"),
    "key: function": ({print: 1}, "x.1 has the key <built-in function print> of type builtin_function_or_method"),
    "key: enum": ({Color.RED: 1}, f"x.1 has the key Color.RED of type {__name__}.Color"),
    "key: numpy int": ({np.int64(3): 4}, "x.1 has the key 3 of type numpy.int64"),
    "key: frozenset": ({frozenset({1}): 4}, "x.1 has the key {1} of type frozenset"),
    "key: long int": ({1 << 70: 4}, "x.1 has the key 1180591620717411303424 of type int"),
    "two names": ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, 'two tensors are called "x.1.a.b"'),
    "endless name": ({"n" * 2000: torch.ones(1)}, 'a tensor has the endless name "x.1.nnnnn'),
}


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*bits)
    if isinstance(a, collections.abc.Mapping):
        return len(a) == len(b) and all(k in b and same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return isinstance(a, list) == isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a.item() if isinstance(a, np.generic) else a) is type(b) and a == b


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A manager with a committed step 1, and a module to save."""
    module = torch.nn.Linear(2, 2)
    with manager(tmp_path_factory.mktemp("loadable")) as held:
        held.save(module, step=1)
        held.wait()
        yield held, module


@pytest.fixture(scope="module")
def back(tmp_path_factory):
    """What is read of all that can be saved: by our load, and by plain torch."""
    root = tmp_path_factory.mktemp("back")
    with manager(root) as held:
        held.save(torch.nn.Linear(1, 1), SAVED, step=1)
    with open_bundle(root / "dante") as bundle:
        found = read_optimizer(bundle)
    return found, torch.load(root / "dante/optimizer.pt", weights_only=True)


@pytest.mark.parametrize("key", SAVED)
def test_what_is_saved_comes_back_equal_by_our_load_and_by_plain_torch(back, key):
    ours, theirs = back
    assert same(SAVED[key], ours[key]) and same(ours[key], theirs[key])


@pytest.mark.parametrize(("value", "said"), REFUSED.values(), ids=REFUSED)
def test_what_would_not_come_back_is_refused_with_its_path_and_nothing_is_written(made, value, said):
    held, module = made
    before = sorted(path.name for path in held.checkpoint_dir.rglob("*"))
    with pytest.raises((SaveFailed, InputError)) as caught:
        held.save(module, {"x": ["a", value]}, step=2)
        held.wait()
    text = str(caught.value)
    assert f"optimizer.pt: {said}" in text or (said in text and "optimizer.pt: x.1." in text)
    assert ", which `load` could not give back. Expected " in text
    if isinstance(caught.value, SaveFailed):
        assert text.startswith(f"{held.checkpoint_dir}: save of step 2 failed: optimizer.pt: ")
        assert text.endswith("leave it out, or save what it is made of. Step 1 is intact.")
    assert state_of(held.checkpoint_dir)["step"] == 1
    assert sorted(path.name for path in held.checkpoint_dir.rglob("*")) == before


TENSORS = st.sampled_from([torch.ones(2), torch.nn.Parameter(torch.zeros(1)), torch.arange(4)[::2], torch.empty(0)])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | TENSORS
SIMPLE = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=2) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=10,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=2), SIMPLE, max_size=3))
def test_a_plain_content_which_is_not_read_back_would_come_back(content):
    if is_plain(content):
        assert _fault(records_of(content)[0][1], "optimizer.pt") is None


@pytest.mark.parametrize(
    "value", [{"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, 1 << 70, [b""], torch.int8, {1.5: 1}]
)
def test_a_content_with_anything_else_is_read_back(value):
    assert is_plain({"x": [1, "a", {0: torch.ones(1)}]})
    assert not is_plain({"x": [1, value]}) and not is_plain({"x": {"y": (value,)}})


good = st.sampled_from([key for key in SAVED if not key.startswith("nested")]).map(SAVED.get)
trees = st.recursive(
    good,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("abc.", max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)
BAD = [value for key, (value, _) in REFUSED.items() if not key.startswith(("cycle", "nested", "two", "endless"))]


@settings(max_examples=60, deadline=None)
@given(st.lists(trees, min_size=1, max_size=3), st.sampled_from(BAD), st.lists(st.sampled_from("ab01"), max_size=4))
def test_one_bad_value_anywhere_is_found_by_its_path(values, bad, keys):
    try:
        content = copy_others({"good": values}, None, {}, "optimizer.pt")
        records = records_of(content)
        refuse_unloadable("optimizer.pt", content, records[0][1])
    except InputError as error:  # two names that are one, which hypothesis finds
        assert "two tensors are called" in str(error)
    else:
        sink = io.BytesIO()
        write_torch_zip(_Sink(sink), content)
        sink.seek(0)
        assert same({"good": values}, torch.load(sink, weights_only=True))
    held = functools.reduce(lambda inner, key: [inner] if key.isdigit() else {key: inner}, keys, bad)
    path = ".".join(["bad", *("0" if key.isdigit() else key for key in reversed(keys))])
    with pytest.raises(InputError, match=rf"optimizer\.pt: {path} (is|has the key) "):
        content = copy_others({"bad": held}, None, {}, "optimizer.pt")
        try:
            records = records_of(content)
        except Exception:
            refuse_unloadable("optimizer.pt", content, b"")
        refuse_unloadable("optimizer.pt", content, records[0][1])


class _Sink:
    def __init__(self, file):
        self.file, self.size = file, 0

    def write(self, data):
        self.file.write(data)
        self.size += len(data)
        return zlib.crc32(data)


@pytest.mark.parametrize("make", [lambda made: [], lambda made: (made.state_dict(),), lambda made: print])
def test_only_optimizers_or_a_mapping_are_taken_for_a_state(made, make):
    held, module = made
    given = make(torch.optim.SGD(module.parameters()))
    with pytest.raises(InputError) as caught:
        held.save(module, given, step=2)
    assert str(caught.value) == (
        f"optimizer is of type {type(given).__name__}, expected an optimizer, a dict or list of optimizers, or a dict "
        'of states by name, such as {"adam": adam.state_dict()}. Nothing was written.'
    )
    held.save(module, {"g": {"kept": made}}, step=2)
    with pytest.raises(SaveFailed, match=r"optimizer\.pt: g\.kept\.0 is of type core\.checkpoint\.CheckpointManager"):
        held.wait()


def test_state_of_a_live_optimizer_and_buffers_are_named_too(made):
    held, module = made
    optimizer = torch.optim.SGD(module.parameters(), momentum=0.9)
    optimizer.state[module.bias]["hook"] = print
    held.save(module, optimizer, step=2)
    with pytest.raises(SaveFailed, match=r"optimizer\.pt: state\.1\.hook is a function \(builtins\.print\), which"):
        held.wait()
    optimizer.state[module.bias]["hook"] = torch.ones(2).to_sparse()
    with pytest.raises(InputError, match=r"optimizer\.pt: state\.1\.hook is a sparse tensor"):
        held.save(module, optimizer, step=2)
    changed = torch.nn.Sequential(torch.nn.Linear(1, 1))
    changed.register_buffer("phase", torch.ones(2, dtype=torch.complex64).conj())
    with pytest.raises(InputError, match=r"model\.pt: phase is a view that conjugates another"):
        held.save(changed, step=2)
    with pytest.raises(InputError, match=r"ema\.pt: a is a quantized tensor"):
        held.save(module, step=2, ema={"a": REFUSED["quantized"][0]})
    with pytest.raises(InputError, match=r"model\.pt: weight is a parameter that is not initialized yet"):
        held.save(torch.nn.LazyLinear(2), step=2)
    held.save(module, step=2)
    held.wait()
    assert state_of(held.checkpoint_dir)["step"] == 2


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (print, "state.w.hook: a builtin_function_or_method cannot be written into a torch file. Expected are tensors"),
        ({"a": {1, 2}}, "state.w.hook: a set cannot be written into a torch file."),
        (1 << 4000, "state.w.hook: a number of 501 bytes cannot be written into a torch file."),
        (nested(250), "is nested deeper than 200 levels"),
    ],
)
def test_a_shard_that_would_not_come_back_is_named(value, said):
    with pytest.raises(InputError) as caught:
        image_of("optimizer_sharded", [Shard(("state", "w", "hook"), value)])
    assert str(caught.value).startswith("optimizer_sharded: state.w.hook") and said in str(caught.value)


def test_names_of_shards_are_compared_with_those_of_plain_files():
    content = map_leaves(lambda leaf: leaf, {"a": [1, (2, "b")], "c": None})
    refuse_unloadable("x", content, records_of(content)[0][1])
    with pytest.raises(CheckpointError, match=r"^x: its pickle names builtins\.print"):
        refuse_unloadable("x", {}, b"\x80\x02cbuiltins\nprint\n.")


def test_a_sharded_save_refuses_tensors_and_names_like_a_plain_one(tmp_path):
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters(), momentum=0.9)
    held = optimizer.state[module.bias]

    def begin():
        return ShardedStepSave(World(), ModelFolder(tmp_path / "dante"), StepContent(module, optimizer, 1))

    held.update({"a.b": 1, "a": {"b": 2}})
    with pytest.raises(InputError) as caught:
        begin()
    assert str(caught.value) == "optimizer.pt: two entries are called state.bias.a.b. Rename one; nothing was written."
    held.clear()
    held["phase"] = torch.ones(2, dtype=torch.complex64).conj()
    with pytest.raises(
        InputError, match=r"^optimizer\.pt: state\.bias\.phase is a view that conjugates another tensor"
    ):
        begin()
    held.clear()
    held["scale"] = np.float32(0.5)
    save = begin()
    assert next(shard.value for shard in save._shards["optimizer_sharded/__0_0.distcp"]) == 0.5
    held["hook"] = print
    save = begin()
    with pytest.raises(InputError, match=r"^optimizer_sharded: state\.bias\.hook: a builtin_function_or_method cannot"):
        save.snapshot.plan()
    save.snapshot.close()
    assert not (tmp_path / "dante").exists()
