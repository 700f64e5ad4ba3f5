"""The walls of the house: which room of core/ may import which, read from the source."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FLOORS = (
    "scripts adapters",
    "training pretrained",
    "checkpoint",
    "kinds",
    "saving loading",
    "model",
    "networks conversion",
    "data inspection logs",
    "bundle",
    "families",
    "containers",
    "config console",
    "errors",
)
"""From top to bottom; a room imports itself and what stands on a floor below it."""

ROOMS = {
    room: {room, *" ".join(FLOORS[level + 1 :]).split()} for level, floor in enumerate(FLOORS) for room in floor.split()
}
"""Each room, and the rooms that it may import."""

TORCH_FREE = {"config", "console", "containers", "families", "bundle", "inspection", "conversion"}
"""Rooms that must not import torch, and numpy only where a function needs it."""

LONGEST = 75  # lines of a function, its docstring included
CORE = ROOT / "core"
FILES = sorted(CORE.rglob("*.py"))
MODULES = {str(p.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): p for p in FILES}
SCRIPTS = [ROOT / f"{name}.py" for name in ("train", "generate", "inspect_model", "convert_checkpoints")]
READ = [*MODULES.values(), *SCRIPTS, *ROOT.glob("data/*.py"), *ROOT.glob("examples/**/*.py")]


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported(path: Path) -> set[str]:
    """Every module of core/ that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            inside = path.is_relative_to(CORE) and node.level
            base = ".".join(path.relative_to(ROOT).parent.parts[: -(node.level - 1) or None]) if inside else ""
            module = ".".join(filter(None, (base, node.module)))
            names = {f"{module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= names or ({module} & MODULES.keys())
    return found


def outside(path: Path, top_level_only: bool = False) -> set[str]:
    """The top names of the packages that a file imports absolutely."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.split(".")[0])
    return names


GRAPH = {module: imported(path) for module, path in MODULES.items()}


def test_core_has_these_rooms_and_nothing_else():
    found = {p.stem for p in CORE.iterdir() if not p.name.startswith(("__", "."))} - {"README", "py"}
    assert found == set(ROOMS) and len(ROOMS) == 20 and (CORE / "py.typed").read_bytes() == b""


def upward(graph: dict[str, set[str]]) -> list[str]:
    """The imports that a wall forbids."""
    return sorted(
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if room_of(module) and room_of(other) not in {*ROOMS[room_of(module)], ""}
    )


def test_no_room_imports_what_stands_above_or_beside_it():
    assert upward(GRAPH) == []
    assert sum(map(len, GRAPH.values())) > 800, "the imports were read"


def test_an_import_that_points_up_would_be_noticed():
    assert upward({"core.bundle.commit": {"core.checkpoint"}}) == ["core.bundle.commit imports core.checkpoint"]
    with pytest.raises(KeyError):
        upward({"core.attic.chest": {"core.errors"}})


def test_no_module_imports_itself_by_way_of_others():
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in GRAPH[module]:
                visit(other, (*way, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())
    assert len(done) == len(MODULES) > 200


def test_inside_core_imports_are_relative():
    """So that the folder can be installed under another name."""
    by_name = re.compile(r"""import_module\(f?["']core|bound\(["']core""")
    assert [m for m, p in MODULES.items() if "core" in outside(p) or by_name.search(p.read_text())] == []


def test_what_only_looks_imports_no_torch_and_numpy_only_where_a_function_needs_it():
    looking = {module: path for module, path in MODULES.items() if room_of(module) in TORCH_FREE}
    assert [m for m, p in looking.items() if "torch" in outside(p) or "numpy" in outside(p, top_level_only=True)] == []
    assert len(looking) > 120


def test_importing_all_of_what_only_looks_loads_neither_torch_nor_numpy():
    # Statistics and differences are of numbers, and are imported where these are asked for.
    names = [m for m in MODULES if room_of(m) in TORCH_FREE]
    code = f"import sys, {', '.join(names)}; print(sorted({{'torch', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_families_open_no_files():
    for path in sorted((CORE / "families").rglob("*.py")):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert not names & {"open", "Path", "os"} and "os" not in outside(path), path


def test_one_file_reads_the_variables_of_ranks():
    found = [
        p.name
        for p in [*CORE.rglob("*.py"), *ROOT.glob("*.py")]
        if re.search(r"[\"'](RANK|WORLD_SIZE)[\"']", p.read_text())
    ]
    assert found == ["distributed.py"]


def disk_calls(source: str) -> list[str]:
    """What renames, links, makes durable or removes a tree without a Storage."""
    modules = {"os": {"rename", "renames", "replace", "link", "fsync", "fdatasync"}, "shutil": {"rmtree", "move"}}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in modules:
            found += [a.name for a in node.names if a.name in modules[node.module]]
        elif isinstance(node, ast.Attribute):
            of = ast.unparse(node.value)
            is_method = node.attr in {"rename", "hardlink_to"} and not of.endswith(("DISK", "storage"))
            found += [f"{of}.{node.attr}"] if node.attr in modules.get(of, ()) or is_method else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "replace":
            found += [ast.unparse(node)] if len(node.args) == 1 and not node.keywords else []  # of a Path, not a str
    return found


def test_one_file_renames_and_syncs():
    found = {str(p.relative_to(CORE)): calls for p in FILES if (calls := disk_calls(p.read_text()))}
    assert list(found) == ["bundle/storage.py"] and len(found["bundle/storage.py"]) >= 5
    for line in ("part.rename(path)", "part.replace(path)", "call(os.fsync, fd)", "shutil.rmtree(part)"):
        assert len(disk_calls(line)) == 1, line
    assert disk_calls("from os import fsync, link") == ["fsync", "link"]
    assert disk_calls("self.storage.rename(a, b); name.replace('a', 'b'); replace(a, b=1)") == []


READS = {
    "console/files.py": 1,  # the function itself
    "containers/free_memory.py": 4,  # /proc and the files of control groups
    "bundle/owner.py": 2,  # /proc
    "inspection/html/document.py": 2,  # the page's own script and style
    "inspection/inspect.py": 1,  # an open file, once more
    "bundle/heartbeat.py": 2,
    "scripts/__init__.py": 1,  # the clone's own scripts
}
"""Calls that read a file without `open_regular`, by module."""


def reads(source: str) -> int:
    """How many calls open a file for reading by its name."""
    found = 0
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        is_read = name == "open" or (name.endswith(".open") and modes[:1] in (["r"], ["rb"]))
        is_read |= name.endswith((".read_text", ".read_bytes", "np.fromfile"))
        found += is_read and not any(mode[:1] in ("w", "a", "x") for mode in modes)
    return found


def test_one_function_opens_what_people_and_checkpoints_name():
    assert {str(p.relative_to(CORE)): n for p in FILES if (n := reads(p.read_text()))} == READS
    for path in (*SCRIPTS, *ROOT.glob("data/*.py"), *ROOT.glob("examples/**/*.py")):
        assert not reads(path.read_text()), path
    for line in ("open(p)", "p.open('rb')", "p.read_text()", "p.read_bytes()", "np.fromfile(p)"):
        assert reads(line) == 1, line
    assert reads("p.open('ab'); open(d, 'w'); held.open(p); DISK.open(p)") == 0


def test_every_method_that_is_bound_by_name_is_there():
    found = 0
    for module, path in MODULES.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for target, name in re.findall(r'bound\("([.\w]+)", "(\w+)", __package__\)', path.read_text()):
            assert callable(getattr(importlib.import_module(target, package), name))
            found += 1
    assert found >= 9


def test_the_package_itself_holds_only_the_version_and_its_other_name():
    assigned = [n for n in ast.parse((CORE / "__init__.py").read_text()).body if isinstance(n, ast.Assign)]
    assert [ast.unparse(n.targets[0]) for n in assigned] == ["__version__", "OTHER_NAME", "_other"]
    assert outside(CORE / "__init__.py") == {"sys"} and not imported(CORE / "__init__.py")


def test_the_doors_are_where_they_were():
    from core.checkpoint import CheckpointManager
    from core.config import GPTConfig
    from core.errors import CheckpointError
    from core.model import GPT, GPTBatched, GPTFlexAttention
    from core.pretrained import inspect_checkpoint, load_classifier, load_flex_checkpoint, load_pretrained_checkpoint

    doors = (CheckpointManager, GPTConfig, CheckpointError, GPT, GPTBatched, GPTFlexAttention)
    doors += (inspect_checkpoint, load_classifier, load_flex_checkpoint, load_pretrained_checkpoint)
    assert all(map(callable, doors))


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def test_no_function_is_longer_than_a_screen():
    lines = {(str(p), f.name): f.end_lineno - f.lineno + 1 for p in (*FILES, *SCRIPTS) for f in functions(p)}
    assert {name: length for name, length in lines.items() if length > LONGEST} == {} and len(lines) > 1500


def test_nothing_unpickles_what_a_checkpoint_says():
    for path in READ:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        loads = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
        assert all(any(k.arg == "weights_only" and k.value.value is True for k in n.keywords) for n in loads), path
        named = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
        assert not {"pickle.load", "pickle.loads", "pickle.Unpickler"} & named, path


def test_public_functions_say_what_they_do():
    kinds = (ast.FunctionDef, ast.ClassDef)
    silent = []
    for path in READ:
        tree = ast.parse(path.read_text())
        public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
        classes = [node for node in public if isinstance(node, ast.ClassDef)]
        public += [
            inner for node in classes for inner in node.body if isinstance(inner, kinds) and inner.name[0] != "_"
        ]
        silent += [f"{path}: {node.name}" for node in public if not ast.get_docstring(node)]
        silent += [str(path)] if not ast.get_docstring(tree) and path.name != "__init__.py" else []
    assert silent == []
