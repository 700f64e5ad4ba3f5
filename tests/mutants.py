"""Break the code on purpose, in small ways, and count how often a test notices.

    python -m tests.mutants --count 150 --seed N [--module core/bundle/commit.py] [--jobs N] [--at_least 95]

Lines are sampled over the modules that carry the promises, and of each line one mutation: a comparison turned, a call
left out, a number one more, `and` for `or`. Each is made in a copy of the checkout, in which the tests of its room run.
A survivor is a hole in the tests, or changes nothing that anyone could see.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

ROOMS = {
    "core/bundle/bundle.py": "bundle/test_verify_on_load bundle/test_damage bundle/test_commit bundle/test_bad_input",
    "core/bundle/commit.py": "bundle/test_commit bundle/test_damage bundle/test_rewind faults/test_crash_model",
    "core/bundle/intact.py": "bundle/test_damage bundle/test_choice bundle/test_rewind bundle/test_verify_on_load",
    "core/bundle/lock.py": "bundle/test_lock",
    "core/bundle/optimizer_state.py": "checkpoint/test_optimizer checkpoint/test_legacy_updates",
    "core/bundle/retention.py": "bundle/test_retention bundle/test_rewind",
    "core/bundle/rewind.py": "bundle/test_rewind bundle/test_damage",
    "core/bundle/storage.py": "bundle/test_storage bundle/test_commit bundle/test_damage checkpoint/test_torch_file",
    "core/containers/pickles/reader.py": "containers/test_pickles containers/test_foreign hostile/test_pickles",
    "core/containers/tensors/views.py": "families/test_rules containers/test_reading conversion/test_megatron",
    "core/containers/torch_files/zip.py": "containers/test_torch_zip "
    "containers/test_torch_zip_damage hostile/test_files",
    "core/conversion/pairs/decoder_settings.py": "conversion/test_decoders",
    "core/conversion/pairs/decoders.py": "conversion/test_decoders checkpoint/test_decoder_bundles",
    "core/conversion/pairs/gpt.py": "conversion/test_nanogpt conversion/test_hf_gpt2 conversion/test_refusals",
    "core/conversion/pairs/megatron.py": "conversion/test_llama conversion/test_megatron",
    "core/conversion/proof.py": "conversion/test_safety conversion/test_tensors conversion/test_hf_gpt2",
    "core/families/rules.py": "families/test_rules conversion/test_llama",
    "core/loading/optimizer.py": "checkpoint/test_optimizer checkpoint/test_legacy_updates",
    "core/loading/tensors.py": "checkpoint/test_tensors checkpoint/test_legacy_models bundle/test_address_space",
    "core/loading/mapped.py": "checkpoint/test_tensors checkpoint/test_sharded bundle/test_address_space",
    "core/networks/attention.py": "networks/test_decoder networks/test_generation",
    "core/networks/rotary.py": "networks/test_decoder",
    "core/networks/modded.py": "networks/test_modded_reference networks/test_modded_upstream networks/test_batched",
    "core/saving/snapshot.py": "checkpoint/test_snapshot checkpoint/test_checkpoint",
    "core/saving/step.py": "bundle/test_damage checkpoint/test_checkpoint training/test_failed_saves",
    "core/training/certificate.py": "training/test_certificate",
    "core/training/fit.py": "training/test_loop training/test_resume training/test_failed_saves training/test_signals",
    "core/training/loop.py": "training/test_loop training/test_resume training/test_fp16 training/test_signals "
    "training/test_distributed",
}
"""The modules that carry the promises, and for each the test files that must notice: the quick ones first."""

TURNED: dict[type[ast.cmpop], ast.cmpop] = {
    ast.Eq: ast.NotEq(), ast.NotEq: ast.Eq(), ast.Lt: ast.LtE(), ast.LtE: ast.Lt(), ast.Gt: ast.GtE(),
    ast.GtE: ast.Gt(), ast.In: ast.NotIn(), ast.NotIn: ast.In(), ast.Is: ast.IsNot(), ast.IsNot: ast.Is(),
}  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """A piece of a module, in bytes of its source, and what stands there instead."""

    line: int
    start: int
    end: int
    before: str
    after: str

    def apply(self, source: bytes) -> bytes:
        """Make the mutation."""
        return source[: self.start] + self.after.encode() + source[self.end :]

    def __str__(self) -> str:
        return " -> ".join(" ".join(text.split())[:90] for text in (self.before, self.after))


def mutations(source: bytes) -> list[Mutation]:
    """Every mutation of a module, in the order of its lines; annotations, docstrings and f-strings are left alone."""
    lines = source.splitlines(keepends=True)
    starts = [sum(map(len, lines[:k])) for k in range(len(lines) + 1)]
    found = []
    for node in _visible(ast.parse(source)):
        for after in _instead(node):
            start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            found.append(Mutation(node.lineno, start, end, source[start:end].decode(), after))
    return sorted(found, key=lambda one: (one.start, one.end, one.after))


def _visible(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that are computed and whose text may be replaced; a decorator's settings show in no behaviour."""
    if isinstance(node, ast.JoinedStr):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "type_params", "decorator_list"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _visible(child)


def _instead(node: ast.AST) -> Iterator[str]:
    """What may stand in the place of a node."""
    match node:
        case ast.Compare(left, [op], others):
            yield ast.unparse(ast.Compare(left, [TURNED[type(op)]], others))
        case ast.BoolOp(op, values):
            other = ast.And() if isinstance(op, ast.Or) else ast.Or()
            yield f"({ast.unparse(ast.BoolOp(other, values))})"
        case ast.UnaryOp(ast.Not(), operand):
            yield f"({ast.unparse(operand)})"
        case ast.Constant(bool(value)):
            yield str(not value)
        case ast.Constant(int(value) | float(value)):
            yield repr(value + 1)
        case ast.Expr(ast.Call()) | ast.AugAssign() | ast.Raise():
            yield "pass"
        case ast.Return(value) if value is not None and not isinstance(value, ast.Constant):
            yield "return None"


@dataclass(frozen=True)
class Mutant:
    """A mutation of a module, and what became of it."""

    module: str
    mutation: Mutation

    def run(self, tests: list[str], limit: float, root: Path = ROOT) -> str:
        """Make the mutation in a copy of the checkout, run the tests there, and say "killed" or "survived"."""
        with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
            checkout = copy_checkout(root, Path(folder))
            path = checkout / self.module
            path.write_bytes(self.mutation.apply(path.read_bytes()))
            return "survived" if passes(checkout, tests, limit) else "killed"


def copy_checkout(root: Path, folder: Path) -> Path:
    """Copy what git does not ignore, with the fixtures beside it; the working tree is never touched."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        target = folder / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (root / name).exists():  # deleted and not yet committed
            shutil.copy2(root / name, target)
    if (root.parent / "shared").is_dir():
        (folder / "shared").symlink_to(root.parent / "shared")
    return folder / "checkout"


def passes(checkout: Path, tests: list[str], limit: float) -> bool:
    """Whether the tests pass in time; what hangs is killed with all it started."""
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests]
    run = subprocess.Popen(
        words, cwd=checkout, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    try:
        return run.wait(limit) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def sample(modules: list[str], count: int, seed: int, root: Path = ROOT) -> list[Mutant]:
    """Draw lines over all modules, each once, and of each line one mutation: the same for the same seed."""
    sites: dict[tuple[str, int], list[Mutation]] = {}
    for module in sorted(modules):
        for one in mutations((root / module).read_bytes()):
            sites.setdefault((module, one.line), []).append(one)
    chance = random.Random(seed)
    drawn = sorted(chance.sample(sorted(sites), min(count, len(sites))))
    return [Mutant(module, chance.choice(sites[module, line])) for module, line in drawn]


def unbroken(module: str) -> tuple[str, float]:
    """Run the tests of a module's room as they are, and say how long a mutant may take: thrice that, and a minute."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        start = time.monotonic()
        if not passes(copy_checkout(ROOT, Path(folder)), room_of(module), 3600):
            sys.exit(f"{module}: its tests fail without any mutation: {' '.join(room_of(module))}")
        return module, 60 + 3 * (time.monotonic() - start)


def room_of(module: str) -> list[str]:
    """The test files of a module's room."""
    return [f"tests/{name}.py" for name in ROOMS[module].split()]


def main(argv: list[str]) -> int:
    """Run a sample of mutants and print the score."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--module", action="append", choices=ROOMS, metavar="PATH", help="only of this one")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--at_least", type=int, default=0, metavar="PERCENT", help="exit code 1 when fewer are killed")
    args = parser.parse_args(argv)
    mutants = sample(args.module or list(ROOMS), args.count, args.seed)
    tally: dict[str, Counter[str]] = {module: Counter() for module in sorted({one.module for one in mutants})}
    with ThreadPoolExecutor(args.jobs) as pool:
        limits = dict(pool.map(unbroken, tally))
        runs = [pool.submit(partial(one.run, room_of(one.module), limits[one.module])) for one in mutants]
        for one, run in zip(mutants, runs, strict=True):
            tally[one.module][run.result()] += 1
            if run.result() == "survived":
                print(f"survived: {one.module}:{one.mutation.line}: {one.mutation}", flush=True)
    for module, counts in tally.items():
        print(f"{module}: {counts['killed']} killed, {counts['survived']} survived")
    killed = sum(counts["killed"] for counts in tally.values())
    print(f"seed {args.seed}: {killed} of {len(mutants)} killed, {killed / len(mutants):.0%}")
    return int(100 * killed < args.at_least * len(mutants))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
