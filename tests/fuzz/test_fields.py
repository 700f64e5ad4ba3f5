"""Every field of a model's files with a wrong value, before every view and script: an error of ours, or none."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.fields import OPTIMIZER, STATE, WRONG, changed, documents, fault, paths_in, trained_folder, views, write


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return trained_folder(tmp_path_factory.mktemp("fields"))


def cases(folder: Path, each: int, seed: int) -> list[tuple[str, tuple[Any, ...], Any, bool]]:
    """A file, a path in it, a value for it, and whether the training state is of the first format.

    Of each field, so many values, in the order of a random number.
    """
    rng, found = random.Random(seed), []
    for name, document in documents(folder).items():
        for path in paths_in(document):
            found += [(name, path, value, name == STATE and rng.random() < 0.5) for value in rng.sample(WRONG, each)]
    rng.shuffle(found)
    return found


def tried(sound: Path, place: Path, chosen: list[tuple[str, tuple[Any, ...], Any, bool]]) -> list[str]:
    """What is raised that is no error of ours."""
    found = []
    for number, (name, path, value, old) in enumerate(chosen):
        folder, out = place / str(number) / "m", place / str(number) / "out"
        shutil.copytree(sound, folder, ignore=shutil.ignore_patterns(".lock"))
        out.mkdir()
        write(folder, name, changed(documents(sound)[name], path, value), old=old)
        for view, look in views(folder, sound, out).items():
            if error := fault(look):
                found.append(f"{view}: {name} {path} = {str(value)[:40]!r}, old={old}: {error!r}")
        shutil.rmtree(folder.parent)
    return found


def test_a_sound_model_passes_every_view(sound, tmp_path):
    (tmp_path / "out").mkdir()
    folder = shutil.copytree(sound, tmp_path / "copy/m", ignore=shutil.ignore_patterns(".lock"))
    assert {name: view() for name, view in views(folder, sound, tmp_path / "out").items()} == dict.fromkeys(
        views(folder, sound, tmp_path), 0
    )
    assert {name for name, *_ in cases(sound, 1, 0)} == {*documents(sound)} and OPTIMIZER in documents(sound)


def test_some_fields_with_wrong_values_give_errors_of_ours(sound, tmp_path):
    assert tried(sound, tmp_path, cases(sound, 1, 1)[:10]) == []


@pytest.mark.full
@pytest.mark.slow
def test_every_field_with_a_wrong_value_gives_an_error_of_ours(sound, tmp_path):
    assert tried(sound, tmp_path, cases(sound, 1, 2)) == []


@pytest.mark.nightly
@pytest.mark.slow
def test_every_field_with_every_wrong_value_gives_an_error_of_ours(sound, tmp_path):
    assert tried(sound, tmp_path, cases(sound, len(WRONG), 3)) == []
