"""That docs/api.md is current, and has what README and docs take from core."""

from __future__ import annotations

import re

import pytest

from tests import api
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "data/README.md", *sorted((ROOT / "docs").glob("*.md"))]
HISTORY = {"decisions.md", "api.md", "architecture.md"}
"""Pages that are about the inside."""

OF_A_VARIABLE = {"manager": "CheckpointManager", "CheckpointManager": "CheckpointManager", "GPT": "GPT"}
OF_A_VARIABLE |= {name: name for name in ("GPTBatched", "GPTFlexAttention", "GPTConfig", "WorldRanks")}


def headings() -> set[str]:
    return set(re.findall(r"^#{2,4} (\S+)$", api.PAGE.read_text(encoding="utf-8"), re.MULTILINE))


def named(text: str) -> set[str]:
    """The names of core that a page uses."""
    found = set()
    for module, names in re.findall(r"^ *from (core[.\w]*) import ([\w, ]+)$", text, re.MULTILINE):
        found |= {module, *re.split(r",\s*", names.strip())}
    found |= set(re.findall(r"`core(?:\.[a-z_]+)+\.([A-Z]\w+)", text))
    methods = re.findall(rf"\b({'|'.join(OF_A_VARIABLE)})\.([a-z_]+)\(", text)
    return found | {f"{OF_A_VARIABLE[variable]}.{method}" for variable, method in methods}


def test_the_page_is_what_the_docstrings_say():
    assert api.PAGE.read_text(encoding="utf-8") == api.page(), "run `make api`"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=lambda page: page.name)
def test_every_name_that_a_page_uses_stands_in_it(page):
    assert named(page.read_text(encoding="utf-8")) - headings() == set()


def test_names_are_found_however_a_page_spells_them():
    text = "from core.model import GPT, Other\n`core.a.b.Thing`\nmanager.vanish(3)\n"
    assert named(text) == {"core.model", "GPT", "Other", "Thing", "CheckpointManager.vanish"}
    assert named((ROOT / "docs/own_loop.md").read_text()) >= {"CheckpointManager.load", "core.data", "resumable", "GPT"}


def test_every_public_function_and_method_says_what_it_does():
    assert "\n\n\n" not in api.PAGE.read_text(encoding="utf-8"), "nothing stands where a docstring should"
    assert len(headings()) > 60
