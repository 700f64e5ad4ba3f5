from __future__ import annotations

import json

import pytest

from core.bundle.training_state import _TYPES, FIELDS, TrainingState, seal, unseal
from core.errors import CheckpointDamaged, CheckpointMismatch

STATE = {
    "step": 1000,
    "optimizer_file": "optimizer.pt",
    "format_version": 2,
    "loss": 1.25e-3,
    "name": "Dante Ã",
    "integrity": {"files": {"model.pt": {"size": 12, "crc32": "0a0b0c0d"}}},
}


def test_a_sealed_state_reads_back_and_begins_with_what_people_look_for():
    data = seal(STATE)
    assert data.startswith(b'{\n  "step": 1000,\n  "optimizer_file": "optimizer.pt",\n')
    state = unseal(data, "x")
    assert {**state, "integrity": {"files": state["integrity"]["files"]}} == STATE


def test_reformatting_a_state_does_not_break_its_seal():
    state = json.loads(seal(STATE))
    assert unseal(json.dumps(state, sort_keys=True).encode(), "x") == state


def test_every_flipped_bit_of_a_state_is_detected():
    data = seal(STATE)
    for position in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        try:
            values = unseal(bytes(flipped), "x")
        except (CheckpointDamaged, CheckpointMismatch):
            continue
        assert values == json.loads(data), f"bit {position} changed a value in silence"


FOREIGN = {"zeta": None, "step": 3, "parent": None, "names": [1], "extra": {"a": 1}, "others": {}, "val_loss": 2.5}


def test_a_document_comes_back_as_it_was_with_its_order_its_nulls_and_what_is_not_known():
    state = TrainingState.from_dict(FOREIGN)
    assert list(state.to_dict().items()) == list(state.items()) == list(FOREIGN.items())
    assert (state.step, state.parent, state.extra, state.val_loss) == (3, None, {"a": 1}, 2.5)
    assert state == FOREIGN and state["zeta"] is None and state.get("seed", 7) == 7 and "seed" not in state
    assert not TrainingState() and dict(TrainingState()) == {} and TrainingState(step=1).to_dict() == {"step": 1}


def test_a_new_value_takes_the_place_of_the_old_one_and_a_new_field_comes_last():
    state = TrainingState.from_dict(FOREIGN).committed("abc", seed=None, step=4).having(self=1)
    new = [name for name in state if name not in FOREIGN]
    assert [*state][: len(FOREIGN)] == [*FOREIGN] and new == ["format_version", "commit_id", "seed", "self"]
    assert (state.parent, state.step, state["self"]) == ("abc", 4, 1)
    assert {"step", "seed", "extra"} < FIELDS and not {"val_loss", "names", "others"} & FIELDS


def test_a_state_that_does_not_say_may_have_an_optimizer():
    said = [{}, {"optimizer_file": None}, {"optimizer_file": "optimizer.pt"}]
    assert [TrainingState.from_dict(values).has_optimizer for values in said] == [True, False, True]


def test_a_state_without_integrity_is_version_one_and_taken_as_it_is():
    assert unseal(b'{"step": 30, "optimizer_file": "optimizer.pt"}', "x") == {
        "step": 30,
        "optimizer_file": "optimizer.pt",
    }


WRONG = {
    "a text": (5, True, [], {}),
    "a whole number of at least 0": (-1, True, 1.5, "1", 2**70, {}),
    "a number": (True, "1", 2**70, []),
    '"log" or a list of whole numbers of at least 0': (5, True, "every", {}, [-1], [1.5], ["1"]),
    '"val_loss", or a metric that ends in ":min" or ":max"': (5, True, "accuracy", "", ["val_loss"]),
    "a list of whole numbers of at least 0": (5, "x", {}, [-1], [True], [0.5]),
    "a list of texts": (5, "x", {}, [1], ["a", None]),
    "an object": (True, 5, "x", [], [{}]),
}
"""Values that are none of a kind."""


def leaves(types, inside=()):
    """Every entry whose type is known, and its kind."""
    for name, kind in types.items():
        yield (*inside, name), "an object" if isinstance(kind, dict) else kind
        if isinstance(kind, dict):
            yield from leaves(kind, (*inside, name))


@pytest.mark.parametrize(("path", "kind"), [*leaves(_TYPES)])
@pytest.mark.parametrize("is_old", [False, True])
def test_an_entry_of_another_type_is_named(path, kind, is_old):
    for value in WRONG[kind]:
        inner = {"step": 1, path[-1]: value} if path[:-1] == ("best",) else {path[-1]: value}
        state = {"step": 3, **(inner if len(path) == 1 else {path[0]: inner})}
        data = json.dumps(state).encode() if is_old else seal({**STATE, **state})
        with pytest.raises((CheckpointMismatch, CheckpointDamaged)) as caught:
            unseal(data, "runs/m/training_state.json")
        message = str(caught.value)
        assert message.startswith(f"runs/m/training_state.json: {'.'.join(path)} is "), message
        assert f"expected {kind}." in message


@pytest.mark.parametrize("best", [{}, {"val_loss": 1.0}, {"step": None}])
def test_the_best_step_has_a_step(best):
    with pytest.raises(CheckpointMismatch, match=r"best\.step is (absent|null), expected a whole"):
        unseal(json.dumps({"step": 4, "best": best}).encode(), "x")


def test_null_is_an_entry_that_is_absent():
    state = {"step": 4, **dict.fromkeys(_TYPES), "retention": {"keep": None}}
    assert unseal(json.dumps(state).encode(), "x") == state
