"""Load changed torch files by both readers, ours and torch's: `python -m tests.fuzz.side_by_side --seconds 60`.

A difference is a file that ours loads, and that `torch.load(weights_only=True)` loads as something else. What one of
them refuses is no difference. With atheris, an optional extra, `--atheris CORPUS` lets it look for inputs that reach
new code; without, `tests.fuzz.mutations` changes files by their structure. The counts are printed at the end.
"""

from __future__ import annotations

import argparse
import collections
import io
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch

from core.bundle.parts import Part, TorchFile
from core.containers.pickles.inert import Call, Global
from core.errors import CheckpointError
from core.loading.tensors import read_part
from tests.fuzz.mutations import mutate

ROOM = 16 << 30
"""Bytes of address space: what torch is asked to make of a file may be any size."""

REFUSED, BOTH_REFUSE, TORCH_REFUSES, EQUAL = "ours refuses", "both refuse", "torch refuses", "both load the same"


def ours(path: Path) -> Any:
    """What this project loads.

    Raises: CheckpointError for what it refuses.
    """
    with path.open("rb") as file:
        return read_part(Part(TorchFile(file, path)))


def torchs(path: Path, mmap: bool) -> Any:
    """What torch loads; raises whatever it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def compare(path: Path) -> str:
    """One of the four verdicts above, or a sentence that describes a difference."""
    try:
        mine, refused = ours(path), False
    except CheckpointError:
        mine, refused = None, True
    verdicts = set()
    for mmap in (False, True):
        try:
            theirs = torchs(path, mmap)
        except Exception:  # whatever the parts of torch raise
            verdicts.add(BOTH_REFUSE if refused else TORCH_REFUSES)
            continue
        if refused:
            return REFUSED
        if fault := difference(mine, theirs):
            return f"difference{' mapped' * mmap}: {fault}"
        verdicts.add(EQUAL)
    return EQUAL if EQUAL in verdicts else verdicts.pop()


def difference(mine: Any, theirs: Any, path: str = "") -> str:
    """Say where two loaded values differ; "" where they are equal. What ours leaves a record is equal to anything."""
    if isinstance(mine, (Call, Global)):
        return ""
    if isinstance(mine, torch.Tensor) or isinstance(theirs, torch.Tensor):
        return "" if _same_tensor(mine, theirs) else f"{path or 'the content'} is {_brief(mine)}, and {_brief(theirs)}"
    if isinstance(mine, dict) and isinstance(theirs, dict):
        pairs = list(zip(dict.items(mine), dict.items(theirs), strict=False))
        inner = (difference(a, b, f"{path}.{k!r:.40}") for (k, a), (j, b) in pairs if _same(k, j))
        same = len(mine) == len(theirs) and all(_same(k, j) for (k, _), (j, _) in pairs)
        return next(filter(None, inner), "") if same else f"{path or 'the content'} has other keys"
    if isinstance(mine, (list, tuple)) and isinstance(theirs, (list, tuple)):
        if len(mine) != len(theirs) or isinstance(mine, list) != isinstance(theirs, list):
            return f"{path or 'the content'} is {_brief(mine)}, and {_brief(theirs)}"
        inner = (difference(a, b, f"{path}.{i}") for i, (a, b) in enumerate(zip(mine, theirs, strict=True)))
        return next(filter(None, inner), "")
    return "" if _same(mine, theirs) else f"{path or 'the content'} is {_brief(mine)}, and {_brief(theirs)}"


def _same(a: Any, b: Any) -> bool:
    if _has_record(a):
        return True
    if isinstance(a, (set, frozenset)):
        return a == b or sorted(map(repr, a)) == sorted(map(repr, b))
    return type(a) is type(b) and (repr(a) == repr(b) or a == b)  # nan is not itself


def _has_record(value: Any) -> bool:
    if isinstance(value, (tuple, set, frozenset)):
        return any(map(_has_record, value))
    return isinstance(value, (Call, Global))


def _same_tensor(a: Any, b: Any) -> bool:
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    if (a.dtype, a.shape, a.layout) != (b.dtype, b.shape, b.layout):
        return False
    if a.numel() > 1 << 20:  # an expanded one
        return a.stride() == b.stride()
    bits = [t.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*bits)


def _brief(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.reshape(-1)[:4].tolist() if value.numel() < 1e6 else ''}"
    return repr(value)[:80]


def seeds() -> list[bytes]:
    """Sound files of both formats."""
    numbers = torch.arange(6.0).reshape(2, 3)
    contents: list[Any] = [
        {"w": numbers, "b": numbers.t(), "n": torch.arange(4), "e": torch.empty(0, 3)},
        {"w": torch.nn.Parameter(numbers.clone()), "h": numbers.half(), "f": numbers.to(torch.float8_e4m3fn)},
        {"model": {"w": numbers[1:]}, "step": 7, "set": {1, "a"}, "device": torch.device("cpu"), "size": numbers.shape},
        collections.OrderedDict(a=[numbers, (1 + 2j, b"\0\xff")], d=torch.bfloat16, bits=bytearray(b"abc")),
        torch.nn.Linear(2, 2).state_dict(),
    ]
    found = []
    for content in contents:
        for zipped in (True, True, False):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            found.append(file.getvalue())
    return found


class Counts:
    """How often each verdict came, and the differences; printed by `report`."""

    def __init__(self, keep: Path | None) -> None:
        self.verdicts: collections.Counter[str] = collections.Counter()
        self.differences: list[str] = []
        self.keep = keep

    def add(self, path: Path) -> None:
        verdict = compare(path)
        if verdict.startswith("difference"):
            self.differences.append(verdict)
            if self.keep and len(self.differences) <= 20:
                self.keep.mkdir(parents=True, exist_ok=True)
                (self.keep / f"difference_{len(self.differences)}.pt").write_bytes(path.read_bytes())
        self.verdicts[verdict.partition(":")[0]] += 1

    def report(self) -> None:
        for verdict, count in self.verdicts.most_common():
            print(f"{count:>8}  {verdict}")
        print(f"{self.verdicts.total():>8}  files; {len(self.differences)} differences", flush=True)
        for line in self.differences[:20]:
            print(f"  {line}")


def run(examples: list[bytes], first: int, count: int, seed: int, seconds: float, use: Callable[[bytes], None]) -> None:
    """Give `count` changed files to `use`; a change is a function of the seed and its number."""
    stop = time.monotonic() + seconds
    for number in range(first, first + count):
        if time.monotonic() > stop:
            return
        rng = random.Random(f"{seed}/{number}")
        use(mutate(examples[number % len(examples)], rng, examples))


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    """The functions and methods that a module defines."""
    owners = [module, *(kind for kind in vars(module).values() if isinstance(kind, type))]
    for owner in owners:
        for value in vars(owner).values():
            if isinstance(value, FunctionType) and value.__module__ == module.__name__:
                yield value


def guided(corpus: Path, use: Callable[[bytes], None]) -> None:
    """Let atheris choose the files, until `use` ends the process."""
    import atheris  # type: ignore[import-not-found]

    corpus.mkdir(parents=True, exist_ok=True)
    if not any(corpus.iterdir()):
        for i, data in enumerate(seeds()):
            (corpus / f"seed_{i}").write_bytes(data)
    for name, module in list(sys.modules.items()):
        if name.startswith("core.containers.") or name == "torch._weights_only_unpickler":
            for function in _functions(module):
                atheris.instrument_func(function)  # in its place; all of torch would take minutes
    atheris.Setup([sys.argv[0], str(corpus), "-rss_limit_mb=0", "-timeout=60"], use)
    atheris.Fuzz()


def main(argv: list[str]) -> int:
    """Compare the readers; returns 1 when there is a difference."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz.side_by_side", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--count", type=int, default=1_000_000_000, metavar="N")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first change")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="stop after this time")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write twenty of the differences there")
    parser.add_argument("--atheris", type=Path, metavar="CORPUS", help="let atheris choose; a folder that it fills")
    args = parser.parse_args(argv)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (ROOM, ROOM))
    counts = Counts(args.keep)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "x.pt"

        def use(data: bytes) -> None:
            path.unlink(missing_ok=True)  # what was mapped keeps its file
            path.write_bytes(data)
            counts.add(path)

        if args.atheris:
            stop = time.monotonic() + args.seconds

            def use_in_time(data: bytes) -> None:
                use(data)
                if time.monotonic() > stop:
                    counts.report()
                    os._exit(1 if counts.differences else 0)  # atheris runs nothing at its own end

            guided(args.atheris, use_in_time)
        else:
            run(seeds(), args.first, args.count, args.seed, args.seconds, use)
            counts.report()
    return 1 if counts.differences else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
