"""What is saved beside model and optimizer: schedulers, scalers, generators, nested values."""

from __future__ import annotations

import collections
import json
import math
import random
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel

import convert_checkpoints
from core.bundle.also import MARK
from core.checkpoint import CheckpointManager
from core.errors import CheckpointDamaged, CheckpointMismatch, InputError
from core.inspection.inspect import inspect_path
from core.inspection.report import facts_of
from core.inspection.report_text import text_of
from core.networks.marked import unmarked
from tests.makers.own_loop import SCHEDULERS
from tests.makers.ranks import finished


def made(scheduler="StepLR"):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.4), nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    return net, optimizer, SCHEDULERS[scheduler](optimizer)


def train(net, optimizer, scheduler, steps):
    for _ in range(steps):
        loss = net(torch.rand(2, 4) * random.random() + np.random.rand()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(*([loss.item()] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


@pytest.fixture(autouse=True)
def own_generators():
    """Leave the generators of the process as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_with_scheduler_and_generators_5_steps_and_5_after_a_load_are_10(tmp_path, scheduler):
    net, optimizer, schedule = made(scheduler)
    with CheckpointManager("net", tmp_path) as manager:
        train(net, optimizer, schedule, 5)
        manager.save(net, optimizer, step=5, also={"schedule": schedule, "rng": "all"})
        manager.wait()
        train(net, optimizer, schedule, 5)
    again, anew, other = made(scheduler)
    random.seed(1)
    np.random.seed(1)
    with CheckpointManager("net", tmp_path) as manager:
        assert manager.load(again, anew, also={"schedule": other, "rng": "all"}) == 5
        train(again, anew, other, 5)
    assert anew.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


KINDS = {
    "torch": lambda seed: torch.Generator().manual_seed(seed),
    "numpy": np.random.default_rng,
    "mt19937": lambda seed: np.random.Generator(np.random.MT19937(seed)),
    "legacy": np.random.RandomState,
    "python": random.Random,
}
DRAW = {
    "torch": lambda one: torch.rand(3, generator=one).tolist(),
    "python": lambda one: [one.gauss(0, 1) for _ in range(3)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_goes_on_where_it_was(tmp_path, kind):
    one, other, draw = KINDS[kind](3), KINDS[kind](4), DRAW.get(kind, lambda one: one.normal(size=3).tolist())
    draw(one)
    with CheckpointManager("net", tmp_path) as manager:
        manager.save(nn.Linear(1, 1), step=1, also={"one": {"inside": [one]}})
        manager.wait()
        expected = draw(one)
        manager.load(nn.Linear(1, 1), also={"one": {"inside": [other]}})
    assert draw(other) == expected


def test_objects_and_values_come_back_in_place(tmp_path):
    net = nn.Linear(2, 2)
    average = AveragedModel(torch.compile(net, backend="eager"))
    average.update_parameters(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))
    seen = {"ids": np.arange(6, dtype=">i4").reshape(2, 3), "left": collections.deque([1], 4), MARK: "mine", "old": 1}
    tensor, array, counts = torch.arange(3.0), np.array([True, False]), [1, {"a": torch.ones(1)}]
    also = {"average": average, "scaler": scaler, "seen": seen, "tensor": tensor, "array": array, "counts": counts}
    with CheckpointManager("net", tmp_path) as manager:
        manager.save(net, step=1, also=also)
        tensor += 1  # the copies were made by `save`
        array[:] = False
        seen["ids"][0, 0] = 9
        manager.wait()
        seen.pop("old")
        seen["new"] = 2
        counts.append(3)
        ids, inside = seen["ids"], counts[1]
        fresh = {**also, "average": AveragedModel(nn.Linear(2, 2)), "scaler": torch.amp.GradScaler("cpu")}
        assert manager.load(net, also=fresh) == 1
    assert torch.equal(fresh["average"].module.weight, net.weight) and fresh["average"].n_averaged == 1
    assert fresh["scaler"].get_scale() == 8.0
    assert tensor.tolist() == [0, 1, 2] and array.tolist() == [True, False]
    assert seen["ids"] is ids and ids.tolist() == [[0, 1, 2], [3, 4, 5]] and ids.dtype == np.dtype(">i4")
    assert (seen["left"], seen["left"].maxlen, seen[MARK], seen["old"]) == (collections.deque([1]), 4, "mine", 1)
    assert list(seen) == ["ids", "left", MARK, "old"]
    assert len(counts) == 2 and torch.equal(counts[1]["a"], torch.ones(1)) and inside["a"].item() == 1


PLAIN = st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats() | st.text() | st.binary(min_size=1)
DTYPES = (
    arrays.scalar_dtypes()  # also of texts and times, and of both byte orders
    .filter(lambda dtype: dtype.itemsize > 0)
    .filter(lambda dtype: dtype.kind != "O")
)
ARRAYS = DTYPES.flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, min_side=0, max_side=3)))
VALUES = st.recursive(
    PLAIN | ARRAYS | st.lists(PLAIN, max_size=2).map(tuple),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text() | st.integers(-99, 99) | st.just(MARK), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(a, b):
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.dictionaries(st.text(), VALUES, max_size=3))
def test_any_nested_values_come_back_equal(tmp_path_factory, values):
    root, loaded = tmp_path_factory.mktemp("any"), {}
    with CheckpointManager("net", root, say=lambda _: None) as manager:
        manager.save(nn.Linear(1, 1), step=1, also={"values": values})
        manager.load(nn.Linear(1, 1), also={"values": loaded})
    assert same(values, loaded)
    torch.load(root / "net/also.pt", weights_only=True)


@pytest.mark.parametrize(
    ("also", "said"),
    [
        ({"n": 3}, "also: n is of type int, which `load` could not change in place. Expected are objects with"),
        ({"t": (1, 2)}, "also: t is of type tuple, which `load` could not change"),
        ({"f": {"x": [print]}}, "also.pt: f.x.0 is a function (builtins.print), which `load` could not give back"),
        ({"s": {"x": torch.eye(2).to_sparse()}}, "also.pt: s.x is a sparse tensor"),
        ({"a": np.array([{}], dtype=object)}, "also.pt: a is an array of object, whose values no tensor holds"),
        ({"o": torch.optim.SGD([nn.Parameter(torch.ones(1))])}, "also.pt: o is an optimizer: pass it as `optimizer`"),
        ({3: {}}, "also: found the name 3, expected a text"),
        ([1], "also is of type list, expected a dict of objects by name"),
    ],
)
def test_what_could_not_be_restored_is_refused_before_anything_is_written(tmp_path, also, said):
    with CheckpointManager("net", tmp_path) as manager:
        with pytest.raises(InputError) as error:
            manager.save(nn.Linear(1, 1), step=1, also=also)
        assert said in str(error.value)
        assert not (tmp_path / "net/model.pt").exists()
        circle = {}
        circle["me"] = circle
        with pytest.raises(InputError, match="also: c contains itself"):
            manager.save(nn.Linear(1, 1), step=1, also={"c": circle})


def broken_sequence(optimizer):
    return lr_scheduler.SequentialLR(optimizer, [lr_scheduler.LinearLR(optimizer)], [])


WRONG = {
    "scheduler": (
        lambda o: {"s": lr_scheduler.StepLR(o, 2)},
        "also.pt: s was saved from SequentialLR, expected StepLR.",
    ),
    "missing": (
        lambda o: {"t": {}},
        "also.pt: found s, g, v, expected t as well. Load without t, to begin anew with what you have.",
    ),
    "structure": (lambda o: {"v": {}, "s": broken_sequence(o)}, "also.pt: s: SequentialLR does not take the state"),
    "kind": (
        lambda o: {"g": np.random.Generator(np.random.MT19937())},
        "also.pt: g: Generator does not take the state",
    ),
    "value": (lambda o: {"v": []}, "also.pt: v was saved from a dict, expected a list."),
    "inside": (lambda o: {"v": {"x": {"y": random.Random()}}}, "also.pt: v: found no x, expected a dict."),
    "shape": (lambda o: {"v": {}, "s": o}, "also.pt: s was saved from SequentialLR, expected SGD."),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_another_object_is_refused_in_one_sentence_and_nothing_is_changed(tmp_path, wrong):
    net, optimizer, schedule = made("SequentialLR")
    with CheckpointManager("net", tmp_path) as manager:
        train(net, optimizer, schedule, 2)
        also = {"s": schedule, "g": np.random.default_rng(1), "v": {"a": 1}}
        manager.save(net, optimizer, step=2, also=also)
        manager.wait()
        other = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.4), nn.Linear(3, 1))
        sgd = torch.optim.SGD(other.parameters(), lr=0.5)
        objects, said = WRONG[wrong][0](sgd), WRONG[wrong][1]
        before = str([other.state_dict(), sgd.state_dict()])
        states = str([one.state_dict() if hasattr(one, "state_dict") else one for one in objects.values()])
        with pytest.raises(CheckpointMismatch) as error:
            manager.load(other, also=objects)
        assert said in str(error.value) and str(error.value).endswith("Nothing was changed.")
        assert str([other.state_dict(), sgd.state_dict()]) == before
        assert str([one.state_dict() if hasattr(one, "state_dict") else one for one in objects.values()]) == states


def test_when_the_optimizer_is_another_one_the_objects_are_taken_back(tmp_path):
    net, optimizer, schedule = made()
    with CheckpointManager("net", tmp_path) as manager:
        train(net, optimizer, schedule, 2)
        manager.save(net, optimizer, step=2, also={"s": schedule, "v": {"a": 1}, "t": torch.ones(1)})
        manager.wait()
        other, _, _ = made()
        sgd = torch.optim.SGD(other.parameters(), lr=0.5)
        fresh, values, tensor = lr_scheduler.StepLR(sgd, 9), {"b": 2}, torch.zeros(1)
        with pytest.raises(CheckpointMismatch, match=r"found the state of AdamW, expected that of SGD"):
            manager.load(other, sgd, also={"s": fresh, "v": values, "t": tensor})
    assert (fresh.step_size, fresh.last_epoch, values, tensor.item()) == (9, 0, {"b": 2}, 0)


def test_what_only_one_side_has_is_reported_by_name(tmp_path):
    lines, net = [], nn.Linear(1, 1)
    with CheckpointManager("net", tmp_path, say=lines.append) as manager:
        manager.save(net, step=1, also={"a": {}, "b": {}})
        manager.wait()
        values = {"kept": 1}
        assert manager.load(net, also={"c": values, "b": {}}, strict=False) == 1
        assert values == {"kept": 1}
    path = tmp_path / "net/also.pt"
    assert lines[-2:] == [
        f"{path}: found a, b, expected c as well; what is missing stays as it is",
        f"{path}: left out, because nobody asked for it: a",
    ]
    with CheckpointManager("net", tmp_path, say=lines.append) as manager:
        manager.save(net, step=2)
        manager.wait()
        assert not path.exists() and (tmp_path / "net/step_00000001/also.pt").exists()
        with pytest.raises(
            CheckpointMismatch, match=r"also.pt: found nothing beside model and optimizer, expected a as"
        ):
            manager.load(net, also={"a": {}})


def test_the_file_belongs_to_its_step(tmp_path):
    net, optimizer, schedule = made()
    with CheckpointManager("net", tmp_path, keep=2) as manager:
        for step in (1, 2):
            train(net, optimizer, schedule, 1)
            manager.save(net, optimizer, step=step, also={"s": schedule, "rng": "all", "seen": {"n": step}})
        manager.wait()
        manager.go_back(1)
        seen = {}
        assert manager.load(net, optimizer, also={"s": schedule, "seen": seen}) == 1
        assert seen == {"n": 1} and schedule.last_epoch == 1
    with inspect_path(tmp_path / "net") as found:
        facts = facts_of(found)
    assert facts["also"] == {"s": "StepLR", "rng": "all generators", "seen": "dict"}
    assert "also      : s (StepLR), rng (all generators), seen (dict), in also.pt" in "\n".join(text_of(facts))
    with CheckpointManager("net", tmp_path) as manager:  # a kept step shares its bytes with the top
        manager.save(net, optimizer, step=3, also={"s": schedule})
        manager.wait()
    path = tmp_path / "net/also.pt"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-40] + bytes(40))
    lines = []
    with CheckpointManager("net", tmp_path, say=lines.append) as manager:
        assert manager.load(net, optimizer) == 1
    assert any(str(path) in line and "damaged" in line for line in lines)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_each_rank_has_its_own_generators_and_what_differs(tmp_path, parallel):
    launch = [sys.executable, "-m", "tests.makers.forked", "2", "tests.makers.also_ranks"]
    done = finished([*launch, str(tmp_path), parallel])
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for rank, told in enumerate(ranks):
        assert told["loaded"] == told["saved"]
        assert told["own"] == [rank, [rank, rank]] and told["same"] == {"epoch": 3}
    assert ranks[0]["saved"] != ranks[1]["saved"]
    unlike, of_one, alone = [line for line in ranks[0]["lines"] if "also: " in line]
    assert unlike == "also: found of1 on rank 1, expected of0 as on rank 0. Nothing was written."
    assert of_one.startswith("rank 1: also: x is of type builtin_function_or_method")
    assert alone.startswith('also: rng is "all" in a group of 2 processes, and the manager is of one')
    saved_by_two = torch.load(tmp_path / "net/also.pt", weights_only=True)
    assert saved_by_two["same"] == {"epoch": 3} and len(saved_by_two["rng"]["states"]) == 2
    before, lines = (tmp_path / "net/also.pt").read_bytes(), []
    with CheckpointManager("net", tmp_path, say=lines.append) as manager:
        manager.consolidate()
        manager.load(nn.Sequential(nn.Linear(4, 4)), also={"rng": "all"})
    assert (tmp_path / "net/also.pt").read_bytes() == before
    assert f"{tmp_path / 'net/also.pt'}: rng is of 2 processes, here are 1; each takes that of its rank" in lines[-1]


def test_a_conversion_says_that_it_leaves_the_file_out(tmp_path, capsys):
    with CheckpointManager("net", tmp_path) as manager:
        manager.save(nn.Linear(1, 1), step=1, also={"seen": {}, "rng": "all"})
    words = [str(tmp_path / "net"), str(tmp_path / "out"), "--to", "safetensors"]
    assert convert_checkpoints.main(words) == 0
    said = capsys.readouterr()
    assert "also.pt is left out (seen, rng): it belongs to the loop that saved it" in said.out + said.err


MARKS = st.sampled_from(["array", "counter", "deque", "dict", "object", "ranks", "none", ""])
ANY = st.none() | st.integers(-3, 3) | st.text(max_size=3) | st.lists(st.integers(-3, 3), max_size=3)
TENSORS = st.just(torch.ones(3)) | st.sampled_from([torch.zeros(2, dtype=torch.bfloat16), torch.empty(0)])
FORMS = st.dictionaries(
    st.sampled_from(["items", "maxlen", "dtype", "shape", "tensor", "class", "state", "states"]),
    ANY | TENSORS | st.sampled_from(["<f4", "O", "V9", "{'names': ['a']}", "f4,O", [["a"]], [[1, 2]], {}, [3]]),
)


@settings(max_examples=200, deadline=None)
@given(mark=MARKS | ANY, form=FORMS)
def test_a_mark_of_another_form_is_damage(mark, form):
    try:
        unmarked({"x": {MARK: mark, **form}}, "also.pt")
    except CheckpointDamaged as error:
        assert str(error).startswith("also.pt.x is marked as ")


def test_extra_keeps_numbers_that_json_has_not(tmp_path):
    with CheckpointManager("net", tmp_path) as manager:
        assert manager.extra == {}
        extra = {"a": [math.inf, {"b": -math.inf}], "c": math.nan, "d": 1.5, "e": np.float32(math.inf)}
        manager.save(nn.Linear(1, 1), step=1, extra=extra)
        manager.wait()
        manager.load(nn.Linear(1, 1))
        assert manager.extra["a"] == [math.inf, {"b": -math.inf}] and math.isnan(manager.extra["c"])
        assert (manager.extra["d"], manager.extra["e"]) == (1.5, math.inf)
    json.loads((tmp_path / "net/training_state.json").read_text(), parse_constant=lambda word: pytest.fail(word))
