"""What may import what, read from the source: the walls of the house."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

CORE_MODULES = """
bundle.bundle inspection.diff.change containers.checksum bundle.choice console.commandline bundle.commit
inspection.diff.comparison inspection.diff.text config.gpt inspection.html.curve console.listing
conversion.migration.equality errors bundle.evolution bundle.contradictions bundle.folder inspection.inspect
bundle.legacy bundle.lineage bundle.lock conversion.migration.plan bundle.optimizer_state inspection.html.page
bundle.parts inspection.history inspection.history_text containers.plain inspection.report inspection.report_text
inspection.report_views bundle.retention console.words inspection.diff.side inspection.statistics bundle.storage
inspection.tensor_table bundle.training_state inspection.verification
"""

TORCH_FREE = [
    "inspect_model.py",
    "convert_checkpoints.py",
    *(f"core/{name.replace('.', '/')}.py" for name in CORE_MODULES.split()),
    *(str(p.relative_to(ROOT)) for p in (ROOT / "core/families").rglob("*.py")),
    *(str(p.relative_to(ROOT)) for p in (ROOT / "core/containers").rglob("*.py")),
]
SCRIPTS = ("core/**/*.py", "*.py", "data/*.py", "examples/*.py")
FILE_MODULES = {
    "core.bundle.storage",
    "core.bundle.bundle",
    "core.bundle.commit",
    "core.checkpoint",
    "core.bundle.lock",
    "core.bundle.training_state",
}


def imports(path, everywhere=False):
    tree = ast.parse((ROOT / path).read_text())
    nodes = ast.walk(tree) if everywhere else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", TORCH_FREE)
def test_what_looks_into_files_imports_neither_torch_nor_numpy(path):
    assert not {name.split(".")[0] for name in imports(path)} & {"torch", "numpy"}


def test_importing_all_of_it_loads_neither_torch_nor_numpy():
    modules = [path.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for path in TORCH_FREE]
    code = f"import sys, {', '.join(modules)}; print(sorted({{'torch', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_the_model_imports_nothing_that_touches_files():
    assert not set(imports("core/model.py")) & FILE_MODULES


@pytest.mark.parametrize("path", [p for p in TORCH_FREE if "families" in p])
def test_families_open_no_files(path):
    names = {node.id for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.Name)}
    assert not names & {"open", "Path", "os"} and not set(imports(path, everywhere=True)) & FILE_MODULES


def test_the_package_itself_holds_only_the_version():
    (statement,) = ast.parse((ROOT / "core/__init__.py").read_text()).body
    assert isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__version__"


@pytest.mark.parametrize("path", [p for glob in SCRIPTS for p in ROOT.glob(glob)], ids=str)
def test_nothing_unpickles_what_a_checkpoint_says(path):
    loads = [
        n
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"
    ]
    assert all(any(k.arg == "weights_only" and k.value.value is True for k in call.keywords) for call in loads)
    assert not {"pickle.load", "pickle.loads", "pickle.Unpickler"} & {
        ast.unparse(n) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)
    }


@pytest.mark.parametrize("path", [p for glob in SCRIPTS for p in ROOT.glob(glob)], ids=str)
def test_public_functions_say_what_they_do(path):
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    classes = [node for node in public if isinstance(node, ast.ClassDef)]
    public += [inner for node in classes for inner in node.body if isinstance(inner, kinds) and inner.name[0] != "_"]
    assert [node.name for node in public if not ast.get_docstring(node)] == []
    assert ast.get_docstring(tree) or path.name == "__init__.py"
