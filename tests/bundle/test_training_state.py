from __future__ import annotations

import json

import pytest

from core.bundle.training_state import seal, unseal
from core.containers.json_files import parse_json
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


def test_a_state_without_integrity_is_version_one_and_taken_as_it_is():
    assert unseal(b'{"step": 30, "optimizer_file": "optimizer.pt"}', "x") == {
        "step": 30,
        "optimizer_file": "optimizer.pt",
    }


def test_a_newer_format_is_refused_with_both_numbers():
    with pytest.raises(
        CheckpointMismatch, match=r"run/training_state.json: format_version 7, this program reads up to 2"
    ):
        unseal(b'{"step": 1, "format_version": 7}', "run/training_state.json")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "0 bytes"),
        (b'{"step": 1', "10 bytes that are no valid JSON"),
        (b"[1, 2]", "found a JSON list, expected an object"),
        (b'{"step": 1, "step": 2}', "the key 'step' occurs 2 times"),
        (b"\xff\xfe", "no valid JSON"),
        (b"[" * 100_000, "no valid JSON"),
    ],
)
def test_json_that_cannot_be_read_is_one_sentence_with_its_path(data, said):
    with pytest.raises(CheckpointDamaged, match=said) as error:
        parse_json(data, "run/config.json")
    assert str(error.value).startswith("run/config.json: ")
