"""The installed names: scripts with their imports renamed, commands as this user types them, one package alone."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
import types

import pytest

from core import scripts
from core.console.commands import SCRIPTS
from tests.conftest import ROOT

CORE = ROOT / "core"
WRITTEN = {
    "console/commands.py": 5,  # the table of them
    "containers/recognised.py": 1,  # typed where a row is used
    "conversion/pairs/gpt.py": 1,  # typed where it is used
    "conversion/targets/__init__.py": 1,  # typed where it is listed
    "conversion/targets/hf.py": 1,  # in a file, which is the same whoever wrote it
    "conversion/targets/nanogpt.py": 2,  # nanoGPT's own
    "training/flags.py": 3,  # of a Parser, which types its pages; and what is recorded
}
"""Texts that name a script and are not handed to `typed`, by module."""


@pytest.mark.parametrize("script", SCRIPTS.values())
def test_a_script_imports_the_installed_package_and_is_otherwise_the_same(script):
    source = (ROOT / script).read_text()
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not ast.unparse(node).startswith("sys.path.insert(")]
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module.split(".")[0] == "core"]
    for node in imports:
        node.module = f"gpt_checkpoints{node.module.removeprefix('core')}"
    assert ast.dump(ast.parse(scripts.renamed(source))) == ast.dump(tree) and len(imports) > 5


def test_text_that_only_looks_like_an_import_is_left_alone():
    source = (
        'from core_of import a\nimport scored\nprint("from core.x import y")\n# from core import z\n    import core\n'
    )
    assert scripts.renamed(source, "p") == source.replace("    import core", "    import p")


@pytest.fixture
def installed(monkeypatch):
    """core/console/commands.py under its installed name, started by the command on the PATH."""
    monkeypatch.setattr(sys, "orig_argv", ["python", "-c"])
    path = CORE / "console/commands.py"
    spec = importlib.util.spec_from_file_location("gpt_checkpoints.console.commands", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("python train.py --model_name a", "gpt-checkpoints train --model_name a"),
        ("Train one: python train.py --model_name a", "Train one: gpt-checkpoints train --model_name a"),
        ("inspect_model.py shows the file.", "gpt-checkpoints inspect shows the file."),
        ("let convert_checkpoints.py rebuild it", "let gpt-checkpoints convert rebuild it"),
        ("(made by data/prepare.py)", "(made by gpt-checkpoints prepare)"),
        ("  python generate.py gpt2/   a\n  python generate.py b", "  {0} gpt2/   a\n  {0} b"),
        ("torchrun --nproc_per_node=4 train.py --quiet", "torchrun --nproc_per_node=4 -m {1}.train --quiet"),
        ("those of core.data.resumable are", "those of gpt_checkpoints.data.resumable are"),
        ("train_gpt.py, old/train.py, retrain.py, score.data, core, core.", None),
    ],
)
def test_a_command_is_typed_as_this_user_has_it(said, expected, installed):
    from core.console.commands import typed

    assert typed(said) == said
    expected = said if expected is None else expected
    assert installed.typed(said) == expected.format("gpt-checkpoints generate", "gpt_checkpoints.scripts")


def test_the_command_is_its_path_where_a_shell_does_not_find_it_by_its_name(installed, monkeypatch, tmp_path):
    own, other = tmp_path / "my env/bin", tmp_path / "other"
    for folder in (own, other):
        folder.mkdir(parents=True)
        (folder / "gpt-checkpoints").write_text("#!/bin/sh\n")
        (folder / "gpt-checkpoints").chmod(0o755)
    monkeypatch.setattr(sys, "orig_argv", ["python", str(own / "gpt-checkpoints"), "train"])
    for path, expected in ((own, "gpt-checkpoints"), (other, f"'{own}/gpt-checkpoints'"), ("/nowhere",) * 2):
        monkeypatch.setenv("PATH", str(path))
        expected = f"'{own}/gpt-checkpoints'" if expected == "/nowhere" else expected
        assert installed.typed("python train.py") == f"{expected} train"


def passes(node: ast.AST) -> bool:
    """Whether what is in a node passes through `typed`, or is read by nobody who runs the program."""
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]) in ("EPILOG", "parser.usage")
    is_call = isinstance(node, ast.Call) and ast.unparse(node.func) in ("typed", "Parser")
    return is_call or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def untyped(source: str) -> list[str]:
    """Texts that name a script of ours as a clone has it, whoever reads them."""
    nodes = list(ast.walk(ast.parse(source)))
    named = re.compile(r"(?<![\w/.])(train|generate|inspect_model|convert_checkpoints|data/prepare)\.py\b")
    passed = {id(inner) for node in nodes if passes(node) for inner in ast.walk(node)}
    texts = [n for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in passed]
    return [node.value for node in texts if named.search(node.value)]


def test_every_message_that_names_a_script_names_the_one_that_the_user_has():
    found = {
        str(p.relative_to(CORE)): len(untyped(p.read_text())) for p in CORE.rglob("*.py") if p.parent.name != "scripts"
    }
    assert {name: count for name, count in found.items() if count} == WRITTEN
    assert untyped("f'{typed(\"python train.py\")} a'") == [] and len(untyped("say('python train.py a')")) == 1


@pytest.fixture
def package(monkeypatch):
    """Execute core/__init__.py under a name."""

    def load(name):
        module = types.ModuleType(name)
        module.__path__ = [f"/site/{name}"]
        monkeypatch.setitem(sys.modules, name, module)
        exec((CORE / "__init__.py").read_text(), vars(module))
        return module

    return load


@pytest.mark.parametrize(("first", "second"), [("core", "gpt_checkpoints"), ("gpt_checkpoints", "core")])
def test_both_names_in_one_process_are_refused_with_both_paths(first, second, package, monkeypatch):
    monkeypatch.delitem(sys.modules, "core")
    package(first)
    with pytest.raises(ImportError) as refused:
        package(second)
    said = str(refused.value)
    assert said.startswith(f"{first} (/site/{first}) and {second} (/site/{second}) are one package under two names")
    assert said.endswith("core in a clone's own scripts and gpt_checkpoints in everything else.") and "\n" not in said


def test_a_core_of_somebody_else_is_no_matter(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "core", types.ModuleType("core"))
    assert package("gpt_checkpoints").__version__


def started(words, monkeypatch, capsys):
    """What the installed command prints and exits with."""
    monkeypatch.setattr(sys, "argv", ["/bin/gpt-checkpoints", *words])
    with pytest.raises(SystemExit) as ended:
        scripts.main()
    return ended.value.code, *capsys.readouterr()


def test_without_a_command_the_commands_are_listed(monkeypatch, capsys):
    code, out, err = started([], monkeypatch, capsys)
    assert (code, out) == (2, "") and re.findall(r"^    (\w+)  ", err, re.MULTILINE) == list(SCRIPTS)
    assert started(["--help"], monkeypatch, capsys) == (0, err, "")


def test_an_unknown_command_is_wrong_use(monkeypatch, capsys):
    code, out, err = started(["trian"], monkeypatch, capsys)
    assert (code, out) == (2, "") and "'trian' (choose from" in err and "inspect" in err
    assert started(["--version"], monkeypatch, capsys) == (0, "gpt-checkpoints 0.2.0\n", "")


def test_a_module_of_a_clone_runs_the_script_of_the_clone(tmp_path):
    code = "import sys; sys.argv[1:] = ['inspect', '--version']; from core.scripts import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "gpt-checkpoints 0.2.0\n"), done.stderr


def test_the_package_needs_four_others_and_has_one_command():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.match(r"[\w-]+", one)[0] for one in project["dependencies"]]
    assert names == ["torch", "tiktoken", "numpy", "tqdm"]
    assert project["scripts"] == {"gpt-checkpoints": "gpt_checkpoints.scripts:main"}
    assert scripts.ABOUT.keys() == scripts.MODULES.keys() == SCRIPTS.keys()
    assert {f"{stem}.py" for stem in scripts.MODULES.values()} | {"__init__.py"} == {
        path.name for path in (CORE / "scripts").glob("*.py")
    }
