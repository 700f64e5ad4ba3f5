"""What docs/inspect.md says, held against real runs: its examples, its flags, and every field of its tables."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import inspect_model
from core.checkpoint import CheckpointManager
from core.containers.open import open_container
from core.inspection.flags import make_parser
from tests.conftest import ROOT
from tests.makers.models import flip, save_steps, started, train_and_save

PAGE = (ROOT / "docs/inspect.md").read_text(encoding="utf-8")
TABLES = {
    title: {row[0].strip("`"): row[1] for row in re.findall(r"^\| (`[^|]+`) \| ([^|]*?) \| ", text, re.MULTILINE)}
    for title, text in re.findall(
        r"^##+ (.*)\n((?:(?!#).*\n?)*)", PAGE[PAGE.index("### One checkpoint") :], re.MULTILINE
    )
}
EXAMPLES = [
    example for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL) for example in block.split("$ ")[1:]
]
KINDS: dict[str, Any] = {"text": str, "integer": int, "number": (int, float), "bool": bool, "object": dict}


@pytest.fixture
def there(shared, tmp_path, monkeypatch):
    """The checkpoints that the page speaks of."""
    fixtures = shared / "fixtures"
    monkeypatch.chdir(tmp_path)
    made, model, optimizer = started(Path("checkpoints"), keep=2)
    with made.writing():
        train_and_save(made, model, optimizer, 3, val_loss=lambda step: 4.0 - step)
    made, model, optimizer = started(Path("runs"), keep=2, keep_every=2)
    with made.writing():
        train_and_save(made, model, optimizer, 4, val_loss=lambda step: 4.0 - step / 2)
    made.go_back(2)
    made.close()
    model, _ = save_steps(Path("runs"), 3, keep=2, keep_every=2, val_loss=lambda step: 3.0 - step / 4)
    shutil.copytree(fixtures / "lecture_char/bundle", "checkpoints/lecture")
    Path("checkpoints/old").mkdir()
    Path("llama").mkdir()
    for source, target in (
        ("lecture_char/legacy/final.pt", "checkpoints/old/final.pt"),
        ("lecture_char/legacy/latest.pt", "latest.pt"),
        ("nanogpt_char_biasFalse/ckpt.pt", "ckpt.pt"),
        ("nanogpt_char_biasFalse/ckpt.pt", "damaged.pt"),
        ("hf_llama_gqa_untied/config.json", "llama/config.json"),
        ("hf_llama_gqa_untied/model.safetensors", "llama/model.safetensors"),
    ):
        shutil.copyfile(fixtures / source, target)
    changed = open_container(Path("ckpt.pt")).tensors["model.transformer.h.1.attn.c_attn.weight"]
    flip(Path("damaged.pt"), changed.offset + 402, bit=6)


def run(*words: str) -> str:
    """What a terminal shows."""
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.redirect_stderr(shown):
        inspect_model.main(list(words))
    return shown.getvalue()


def document(*words: str) -> Any:
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()):
        inspect_model.main([*words, "--json"])
    return json.loads(printed.getvalue())


def without_times(text: str) -> str:
    text = re.sub(r"_[0-9a-f]{16}\b|\d{4}(-\d\d){2} \d\d(:\d\d){2}", "TIME", text)
    return re.sub(r"in \d+\.\d\d s( \(.*?\))?|\d+ (days|hours|minutes|seconds) old", "TIME", text)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.partition("\n")[0])
@pytest.mark.usefixtures("there")
def test_examples_are_what_is_printed(example):
    command, _, expected = without_times(example).partition("\n")
    script, *words = shlex.split(command.removeprefix("python "))
    assert script == "inspect_model.py"
    shown = without_times(run(*words))
    pattern = "".join("(?:.*\n)*?" if line == "..." else re.escape(line) + "\n" for line in expected.splitlines())
    assert re.fullmatch(pattern, shown), f"{command} prints:\n{shown}"


def test_flags_are_those_of_the_script():
    flags = {flag for flag in make_parser()._option_string_actions if flag.startswith("--")}
    flags -= {"--help", "--help_all"}
    assert set(re.findall(r"^\| `(--\w+)", PAGE, re.MULTILINE)) == flags
    assert set(re.findall(r"(?<!train\.py )--\w+", PAGE)) <= flags


def fields(value: Any, table: dict[str, str], at: str = "") -> Iterator[tuple[str, Any]]:
    """Each field of a document in the notation of the page, and its value; where the table goes no deeper, whole."""
    if at in table:
        yield at, value
    below = any(name.startswith((f"{at}.", f"{at}[].")) for name in table) or not at
    if isinstance(value, dict) and f"{at}.*" in table:
        yield from ((f"{at}.*", item) for item in value.values())
    elif isinstance(value, dict) and below:
        for name, item in value.items():
            yield from fields(item, table, f"{at}.{name}" if at else name)
    elif isinstance(value, list) and below:
        for item in value:
            yield from fields(item, table, f"{at}[]")
    elif at not in table:
        yield at, value  # which the page does not have


def fits(value: Any, kind: str) -> bool:
    kind, _, null = kind.partition(", ")
    if value is None:
        return kind == "any" or bool(null)
    if kind.startswith("list of "):
        return isinstance(value, list) and all(fits(item, kind.removeprefix("list of ").rstrip("s")) for item in value)
    if kind == "any":
        return True
    return isinstance(value, KINDS[kind]) and (kind == "bool" or not isinstance(value, bool))


def assert_described(documents: list[Any], table: dict[str, str]) -> None:
    """Every field of the documents is in the table with its type, and every field of the table in the documents."""
    found = [pair for each in documents for pair in fields(each, table)]
    assert {field for field, _ in found} == table.keys()
    assert [(field, value) for field, value in found if not fits(value, table[field])] == []


@pytest.mark.usefixtures("there")
def test_fields_of_a_checkpoint_are_those_of_the_page():
    table = TABLES["One checkpoint"] | TABLES["With --verify"] | TABLES["With --stats"]
    with CheckpointManager("net", "own") as manager:
        manager.save(nn.Linear(1, 1), step=1, also={"seen": {"tokens": 8}})
    words = ("ckpt.pt", "llama", "checkpoints/dante", "checkpoints/old", "damaged.pt", "own/net")
    documents = document(*words, "--verify", "--stats")
    assert [each["location"] for each in documents] == [*words[:3], "checkpoints/old/final.pt", *words[4:]]
    assert_described(documents, table)


@pytest.mark.usefixtures("there")
def test_views_add_fields_to_a_checkpoint_only_when_asked():
    assert not {"verification", "stats"} & document("ckpt.pt").keys()


@pytest.mark.usefixtures("there")
def test_fields_of_a_history_are_those_of_the_page():
    documents = [document("runs/dante", "--history", *words) for words in (["--keep", "1"], ["--verify"])]
    assert_described(documents, TABLES["With --history"])


@pytest.mark.usefixtures("there")
def test_fields_of_a_folder_of_models_are_those_of_the_page():
    Path("checkpoints/broken").mkdir()
    Path("checkpoints/broken/config.json").write_text("{")
    Path("checkpoints/broken/model.pt").write_bytes(b"")
    assert_described([document("checkpoints")], TABLES["A folder of models"])


@pytest.mark.usefixtures("there")
def test_fields_of_checkpoints_below_a_folder_are_those_of_the_page():
    Path("below").mkdir()
    Path("llama").rename("below/llama")
    assert_described([document("below")], TABLES["Checkpoints below a folder"])


@pytest.mark.usefixtures("there")
def test_fields_of_a_comparison_are_those_of_the_page():
    found = [
        document("--diff", *pair, "--moments")
        for pair in (
            ("ckpt.pt", "damaged.pt"),
            ("ckpt.pt", "llama"),
            ("checkpoints/dante/step_00000001", "checkpoints/dante"),
            ("checkpoints/dante", "checkpoints/lecture"),
            ("checkpoints/lecture", "checkpoints/dante"),
        )
    ]
    assert_described(found, TABLES["With --diff"])
    assert all(each["a"].keys() == each["b"].keys() for each in found)
    values = [each[part] for each in found for part in ("config", "tokenizer", "step", "optimizer")]
    assert_described(values, TABLES["Values"])
    assert {frozenset(pair) for each in values for pair in each["different"].values()} == {frozenset("ab")}
    tensors = [each[part] for each in found for part in ("weights", "moments") if each[part] is not None]
    assert_described(tensors, TABLES["Tensors"])
    assert all(pair["a"].keys() == pair["b"].keys() for each in tensors for pair in each["different"])
    lone = [{frozenset(item) for each in tensors for item in each[side]} for side in ("only_a", "only_b")]
    assert lone[0] == lone[1] != set()
