"""Write docs/api.md from the docstrings of what programs outside import.

    python -m tests.api [--check]

`make api` writes it; a test checks that it is current, and that it has every name which README and docs take from core.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import sys
import textwrap
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from core.networks.bound import bound

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/api.md"

PUBLIC: dict[str, dict[str, str]] = {
    "core.checkpoint": {
        "CheckpointManager": "of_folder load save log wait raise_failed add_metrics extra record wants saved_step "
        "go_back prune consolidate acquire close holding load_for_inference initialize_for_training start "
        "tokenizer_state get_path exists exists_new_format exists_legacy_format"
    },
    "core.training.ranks": {"WorldRanks": "joined"},
    "core.data": {"resumable": ""},
    "core.data.resumable_loader": {"ResumableLoader": "epoch start_at steps state_dict load_state_dict"},
    "core.model": {
        "GPT": "forward generate fit load load_legacy save save_checkpoint_bundle configure_optimizer features logits "
        "make_cache retie device",
        "GPTBatched": "from_pretrained_gpt forward features generate save_checkpoint_bundle",
        "GPTFlexAttention": "forward generate batched save_checkpoint_bundle",
    },
    "core.config": {"GPTConfig": "from_dict to_dict"},
    "core.pretrained": dict.fromkeys(
        ("load_pretrained_checkpoint", "inspect_checkpoint", "open_gpt", "load_classifier", "load_flex_checkpoint"), ""
    ),
    "core.training.fit": {"fit": "", "FitResult": ""},
    "core.data.dataloader": {"DataLoader": "batch val_batch"},
    "core.adapters.huggingface": {"TrainerCheckpoints": "resume_folder"},
    "core.adapters.accelerate": {"AcceleratorCheckpoints": "load save epochs batches"},
}
"""Functions and classes by module, and the members of these; other adapters and core.errors follow as they are."""

WITHIN = {"framework", "trainer_folder"}
"""Modules of core.adapters that only adapters use."""

INTRO = """# The public API

What programs outside may import. Made from the docstrings by `make api`; a test checks that it is current. Everything
else in `core/` may change from one version to the next; these names, their arguments and what they return change only
[by the rule](../CONTRIBUTING.md#deprecating-a-name). Guides with examples: [own_loop.md](own_loop.md),
[models.md](models.md), [convert.md](convert.md). `Modules` is a module, or a dict or list of them, `Optimizers`
likewise; B is batch, T positions, V vocabulary.
"""


def page() -> str:
    """The whole page."""
    parts = [INTRO]
    for module, names in {**PUBLIC, **adapters()}.items():
        parts.append(f"## {module}\n")
        there = importlib.import_module(module)
        parts += [part for name, inside in names.items() for part in entry(getattr(there, name), inside.split())]
    errors = importlib.import_module("core.errors")
    parts.append("## core.errors\n")
    parts += [of_error(getattr(errors, name)) for name in everything_of("core.errors") if name[0].isupper()]
    return "\n".join(parts).rstrip() + "\n"


def everything_of(module: str) -> list[str]:
    """The public functions and classes that a module defines, in their order."""
    there = vars(importlib.import_module(module))
    return [name for name, value in there.items() if name[0] != "_" and getattr(value, "__module__", "") == module]


def adapters() -> dict[str, dict[str, str]]:
    """What each adapter to another trainer offers, with all its methods; importing one imports no framework."""
    found = {}
    for path in sorted((ROOT / "core/adapters").glob("[!_]*.py")):
        there = importlib.import_module(module := f"core.adapters.{path.stem}")
        if path.stem in WITHIN or module in PUBLIC:
            continue
        found[module] = {name: methods(getattr(there, name)) for name in everything_of(module)}
    return found


def methods(thing: Any) -> str:
    """The public methods that a class defines itself; none of a function."""
    there = vars(thing) if inspect.isclass(thing) else {}
    return " ".join(name for name, value in there.items() if name[0] != "_" and not inspect.isclass(value))


def entry(thing: Any, inside: list[str]) -> Iterator[str]:
    """A function, or a class with its attributes and those of its members that are public."""
    name = thing.__name__
    if not inspect.isclass(thing):
        yield from described(name, thing)
        return
    yield f"### {name}\n"
    if "__init__" in vars(thing) and (made := signature(name, vars(thing)["__init__"])):
        yield made
    yield text_of(thing)
    yield from fields_of(thing)
    for member in inside:
        yield from described(f"{name}.{member}", inspect.getattr_static(thing, member))


def of_error(error: type) -> str:
    """An error in one line, with what it is a kind of."""
    return f"- **{error.__name__}** ({error.__base__.__name__}): {text_of(error).splitlines()[0]}"


def described(name: str, value: Any) -> Iterator[str]:
    """The heading, signature and docstring of a function, method or property."""
    function = value.function() if isinstance(value, bound) else getattr(value, "__func__", value)
    function = getattr(function, "fget", None) or getattr(function, "func", function)
    yield f"#### {name}\n" if "." in name else f"### {name}\n"
    if not isinstance(value, (property, cached_property)):
        yield signature(name.rpartition(".")[2], function)
    yield text_of(function)


def signature(name: str, function: Any) -> str:
    """How a function is called, as the source has it, in a block of code."""
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except OSError:  # a dataclass made it; its fields follow
        return ""
    assert isinstance(node, ast.FunctionDef)
    groups = node.args.posonlyargs or node.args.args
    if groups and groups[0].arg in ("self", "cls"):
        groups.pop(0)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and name[0].islower() else ""
    told = arguments(node.args)
    line = f"{name}({', '.join(told)}){returns}"
    if len(line) > 110:
        line = "\n".join((f"{name}(", *(f"    {one}," for one in told), f"){returns}"))
    return f"```python\n{line}\n```\n"


def arguments(args: ast.arguments) -> list[str]:
    """The arguments of a function, as the source has them."""
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + [*args.defaults]
    lines = [argument(*pair) for pair in zip(plain, defaults, strict=True)]
    lines += [f"*{argument(args.vararg)}"] if args.vararg else ["*"] if args.kwonlyargs else []
    lines += [argument(*pair) for pair in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    lines += [f"**{argument(args.kwarg)}"] if args.kwarg else []
    return lines


def argument(arg: ast.arg, default: ast.expr | None = None) -> str:
    """One argument with its type and default."""
    return ast.unparse(arg) + (f" = {ast.unparse(default)}" if default is not None else "")


def fields_of(thing: type) -> Iterator[str]:
    """The attributes of a class that its source describes, or the fields of a dataclass."""
    lines: list[str] = []
    for one in (one for one in thing.__mro__ if one.__module__.startswith("core")):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(node, ast.ClassDef)
        made = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
        lines += described_in(made[0].body if made else node.body)
        if "__dataclass_fields__" in vars(one):
            lines += [f"- `{ast.unparse(field)}`" for field in node.body if is_field(field)]
    if lines:
        yield "\n".join(lines) + "\n"


def is_field(node: ast.stmt) -> bool:
    """Whether a statement in a dataclass makes a field."""
    return isinstance(node, ast.AnnAssign) and not ast.unparse(node.annotation).startswith("ClassVar")


def described_in(body: list[ast.stmt]) -> Iterator[str]:
    """Attributes that a docstring follows."""
    for before, after in itertools.pairwise(body):
        target = before.target if isinstance(before, ast.AnnAssign) else getattr(before, "targets", [None])[0]
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        name = getattr(target, "attr", getattr(target, "id", "_"))
        if is_text and name[0].islower():
            yield f"- `{name}`: {' '.join(str(after.value.value).split())}"


def text_of(thing: Any) -> str:
    """A docstring as a paragraph for each of its own."""
    return f"{inspect.getdoc(thing) or ''}\n"


def main() -> int:
    """Write the page, or with --check compare: 1 where it is not current."""
    new = page()
    if "--check" in sys.argv:
        return int(PAGE.read_text(encoding="utf-8") != new)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
