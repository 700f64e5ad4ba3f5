"""The sampler of mutants: what it changes, that it draws the same again, and that a test that notices is seen."""

from __future__ import annotations

import ast
import subprocess

import pytest

from tests.conftest import ROOT
from tests.mutants import ROOMS, Mutant, mutations, passes, room_of, sample

SOURCE = '''"""A docstring 1."""
x: Literal[1] = 2


def f(a: int = 3) -> bool:
    """Not a == b."""
    if not a or "ä" == a:
        raise ValueError(f"{a == 1}")
    print(a)
    return a < x
'''

EXPECTED = [
    (2, "2", "3"),
    (5, "3", "4"),
    (7, 'not a or "ä" == a', "(not a and 'ä' == a)"),
    (7, "not a", "(a)"),
    (7, '"ä" == a', "'ä' != a"),
    (8, 'raise ValueError(f"{a == 1}")', "pass"),
    (9, "print(a)", "pass"),
    (10, "return a < x", "return None"),
    (10, "a < x", "a <= x"),
]


def test_mutations_stand_where_they_say_and_leave_text_and_annotations_alone():
    found = mutations(SOURCE.encode())
    assert sorted((one.line, one.before, one.after) for one in found) == sorted(EXPECTED)
    for one in found:
        changed = one.apply(SOURCE.encode()).decode()
        lines = zip(SOURCE.splitlines(), changed.splitlines(), strict=True)
        assert [k for k, (a, b) in enumerate(lines, 1) if a != b] == [one.line]
        assert changed.splitlines()[one.line - 1] == SOURCE.splitlines()[one.line - 1].replace(one.before, one.after, 1)


def test_a_sample_is_the_same_for_the_same_seed_and_has_each_line_once():
    first, again, other = (sample(list(ROOMS), 60, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len({(one.module, one.mutation.line) for one in first}) == 60


@pytest.mark.parametrize("module", ROOMS)
def test_each_module_and_each_file_of_its_room_is_there_and_every_mutant_is_still_python(module):
    assert [name for name in room_of(module) if not (ROOT / name).is_file()] == []
    source = (ROOT / module).read_bytes()
    found = mutations(source)
    assert len(found) > 20
    for one in found[:: max(1, len(found) // 20)]:
        assert ast.dump(ast.parse(one.apply(source))) != ast.dump(ast.parse(source))


def test_a_test_that_notices_kills_the_mutant_and_the_working_tree_is_not_touched(tmp_path):
    root = tmp_path / "project"
    root.mkdir()
    (root / "adding.py").write_text("def add(a, b):\n    if a == 0:\n        return b\n    return a + b + 0\n")
    (root / "test_adding.py").write_text("from adding import add\n\n\ndef test_sum():\n    assert add(2, 3) == 5\n")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    before = {path: path.read_bytes() for path in root.glob("*.py")}
    fates = [
        (one.mutation.line, str(one.mutation), one.run(["test_adding.py"], 100, root))
        for one in (Mutant("adding.py", mutation) for mutation in mutations((root / "adding.py").read_bytes()))
    ]
    assert fates == [
        (2, "a == 0 -> a != 0", "killed"),
        (2, "0 -> 1", "survived"),
        (3, "return b -> return None", "survived"),
        (4, "return a + b + 0 -> return None", "killed"),
        (4, "0 -> 1", "killed"),
    ]
    assert before == {path: path.read_bytes() for path in root.glob("*.py")}


def test_what_hangs_is_killed(tmp_path):
    (tmp_path / "test_hang.py").write_text("import time\n\n\ndef test_hang():\n    time.sleep(600)\n")
    assert not passes(tmp_path, ["test_hang.py"], 5)
