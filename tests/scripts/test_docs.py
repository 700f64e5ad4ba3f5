"""That the pages of docs name what is there: files, headings, tests, messages."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
from functools import cache
from pathlib import Path

import pytest

from core.console.commandline import Parser
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

OF_THE_READER = {"data/dante.txt", "data/gpt2.tiktoken", "data/book.txt", "data/dante/meta.pkl"}
"""Paths that a page names and a clone does not have."""


def prose(page: Path) -> str:
    """A page without what stands in its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower().strip()).replace(" ", "-") for heading in headings}


def faults_of_links(page: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            found.append(target)
    return found


def faults_of_paths(page: Path) -> list[str]:
    """The files, folders and tests that a page names and that are not there."""
    found = []
    spans = re.findall(r"`((?:core|tests|docs|benchmarks|data|examples)/[^`\s]*)`", page.read_text(encoding="utf-8"))
    plain = re.findall(r"(?<![\w/.`-])((?:core|tests|docs|benchmarks)/[\w/]+\.(?:py|md))", page.read_text("utf-8"))
    for named in {*spans, *plain} - OF_THE_READER:
        path, _, test = named.partition("::")
        there = list(ROOT.glob(path))
        if not there or (test and f"def {test}(" not in there[0].read_text(encoding="utf-8")):
            found.append(named)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_every_path_of_a_page_leads_somewhere(page):
    assert faults_of_links(page) + faults_of_paths(page) == []


def test_the_index_lists_every_page():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if page.name != "README.md" and f"]({page.name})" not in index] == []


def test_decisions_are_all_in_the_index_by_room():
    text = (ROOT / "docs/decisions.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert anchors(ROOT / "docs/decisions.md") - linked == {"decisions"}


def longest_known(message: str, source: str) -> int:
    """How many characters in a row of a message the source has."""
    length = 0
    for start in range(len(message)):
        while start + length < len(message) and message[start : start + length + 1] in source:
            length += 1
    return length


def test_messages_of_the_troubleshooting_page_are_those_of_the_program():
    source = "\n".join(
        node.value
        for path in [*(ROOT / "core").rglob("*.py"), *ROOT.glob("*.py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    # The rest of a message is values: a path, a number, the name of a tensor.
    least = {message: min(12, len(message) // 3) for message in messages}
    assert len(messages) > 25
    assert [message for message in messages if longest_known(message, source) < least[message]] == []


def parser_of(script: str, monkeypatch) -> Parser:
    """The parser of a script, whose main goes no further."""
    found = []

    def parse(self, argv):
        found.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Parser, "parse", parse)
    with pytest.raises(KeyboardInterrupt):
        runpy.run_path(str(ROOT / script))["main"]([])
    return found[0]


def test_the_scripts_of_the_seeds_have_a_row_with_a_command_or_function_of_ours(monkeypatch):
    page = (ROOT / "docs/migration.md").read_text(encoding="utf-8").partition("## Scripts of other projects")[2]
    rows = re.findall(r"^\| `(\w+\.py)([^|]*)\| (.*) \|$", page, re.MULTILINE)
    assert [name for name, *_ in rows] == [
        "load_checkpoint_helper.py",
        "test_checkpoint_loading.py",
        "finetune_hindi_xnli.py",
        "load_checkpoint_standalone.py",
        "load_checkpoint_with_megatron.py",
        "convert_megatron_to_pytorch.py",
        "convert_megatron_checkpoint.py",
        "convert_to_hf_format.py",
        "fsdp_checkpoint_manager.py",
    ]
    commands = re.findall(r"`python (\S+) ([^`]*)`", page)
    assert len(commands) == 10
    for script, words in commands:
        parser = parser_of(script, monkeypatch)
        assert parser.parse_known_args(shlex.split(words))[1] == [], words
    from core.pretrained import inspect_checkpoint, load_pretrained_checkpoint

    assert callable(inspect_checkpoint) and callable(load_pretrained_checkpoint)
