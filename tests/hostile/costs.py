"""What the worst files cost at every door: `python -m tests.hostile.costs [--size BYTES] [WORD ...]`.

One line for each kind whose name has one of the words: seconds of processor time and megabytes of inspect_model.py as
a whole process, for each view. The bar for four megabytes is a second and 200 MB, on a machine that counts to ten
million in a third of a second; a slower one is allowed as much more. The exit code is 1 when anything is above the bar.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.conftest import ROOT
from tests.hostile.assemble import FOUR, Record, blocks, index, metadata, place, safetensors, torch_stream, zipped
from tests.hostile.bombs import PICKLES, bomb, names_of
from tests.hostile.case import SOUND_TENSORS, file, folder_of

VIEWS = ((), ("--json",), ("--tensors",), ("--verify",))

MEASURED = """
import json, resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(json.dumps([used.ru_utime + used.ru_stime, peak / 1000]), file=sys.stderr)
"""
"""Runs a script and says what it took, last: `ru_maxrss` would count this process too, which it was forked from."""

CONFIG = b'{"model": "GPT", "vocab_size": 1, "block_size": 1, "n_layer": 1, "n_head": 1, "n_embd": 1, "a": '


def repeated(before: bytes, each: bytes, behind: bytes, size: int) -> bytes:
    return before + each * (size // len(each)) + behind


def entries(before: str, each: str, behind: str, size: int) -> bytes:
    """JSON with as many entries as fit, each of a name of its own."""
    return (before + ",".join([each % i for i in range(size // (len(each) + 4))]) + behind).encode()


def many_tensors(size: int) -> bytes:
    """As many tensors as torch.save puts into so many bytes of pickle."""
    out = io.BytesIO()
    torch.save({f"{i:x}": part for i, part in enumerate(torch.zeros(size // 80).split(1))}, out)
    return out.getvalue()


def many_blocks(size: int) -> bytes:
    """A .metadata of many tensors in one block each."""
    count = range(size // 1500)
    whole = {f"w{i}": blocks((2, 2), [((0, 0), (2, 2))]) for i in count}
    return metadata(whole, [(index(name, (0, 0)), place("a.distcp", 0, 16)) for name in whole])


FILES: dict[str, Callable[[int], bytes]] = {
    **{which: (lambda size, which=which: bomb(which, size)) for which in PICKLES},
    "stream of pairs": lambda n: torch_stream(PICKLES["pairs"](n)),
    "stream of everything": lambda n: torch_stream(PICKLES["some of everything"](n)),
    "tensors of torch.save": many_tensors,
    "records of a zip": lambda n: zipped([Record(f"x/data/{i:x}") for i in range(n // 120)]),
}
"""Files of torch by what they have much of, made of a size in bytes."""


def many_layers(size: int) -> bytes:
    """A GPT of 20,000 layers in four megabytes, most of whose tensors are missing."""
    names = [f"transformer.h.{i}.{part}.weight" for i in range(size // 200) for part in ("ln_1", "ln_2")]
    shape = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return safetensors(json.dumps(dict.fromkeys(names, shape), separators=(",", ":")).encode())


HEADERS: dict[str, Callable[[int], bytes]] = {
    "safetensors": names_of,
    "layers": many_layers,
    "safetensors with texts": lambda n: safetensors(entries('{"__metadata__":{', '"%x":""', "}}", n)),
    "safetensors of lists": lambda n: safetensors(repeated(b'{"a":[', b"[[123456789012345]],", b"0]}", n)),
}
"""Files of safetensors."""

FOLDERS: dict[str, Callable[[int], dict[str, bytes | str]]] = {
    "an index": lambda n: {"model.safetensors.index.json": entries('{"weight_map":{', '"%x":"a"', "}}", n)},
    "an index of files": lambda n: {"model.safetensors.index.json": entries('{"weight_map":{', '"%x":"%%x"', "}}", n)},
    "config.json of lists": lambda n: {
        "config.json": repeated(CONFIG + b"[", b"[[123456789012345]],", b"0]}", n),
        "model.safetensors": SOUND_TENSORS,
    },
    "config.json of entries": lambda n: {
        "config.json": entries(CONFIG.decode() + "{", '"%x":0', "}}", n),
        "model.safetensors": SOUND_TENSORS,
    },
    ".metadata of pairs": lambda n: {".metadata": PICKLES["pairs"](n), "a.distcp": FOUR},
    ".metadata": lambda n: {".metadata": many_blocks(n), "a.distcp": FOUR},
}
"""Folders of other programs."""


def written(which: str, folder: Path, size: int) -> Path:
    """Write one kind into an empty folder; returns what to open."""
    if which in FOLDERS:
        return folder_of(FOLDERS[which](size))(folder)
    return file(HEADERS[which](size), "x.safetensors")(folder) if which in HEADERS else file(FILES[which](size))(folder)


def measured(*words: object) -> tuple[float, float]:
    """Seconds of processor time and megabytes that inspect_model.py takes as a process."""
    command = [sys.executable, "-c", MEASURED, str(ROOT / "inspect_model.py"), *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    seconds, megabytes = json.loads(done.stderr.splitlines()[-1])
    return seconds, megabytes


def speed() -> float:
    """Seconds of processor time that counting to ten million takes; a third of one on a machine that is not busy."""
    start, total = time.process_time(), 0
    for i in range(10_000_000):
        total += i
    return time.process_time() - start


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.costs", description=(__doc__ or "").split(":")[0])
    parser.add_argument("words", metavar="WORD", nargs="*", help="part of the name of a kind")
    parser.add_argument("--size", type=int, default=4_000_000, metavar="BYTES")
    args = parser.parse_args(argv)
    above = 0
    for which in [*FILES, *HEADERS, *FOLDERS]:
        if args.words and not any(word in which for word in args.words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = written(which, Path(folder), args.size)
            slow = speed()
            taken = [measured(path, *view) for view in VIEWS]
            slow = max(1.0, slow / 0.33, speed() / 0.33)
        wrong = any(seconds > slow or megabytes > 200 for seconds, megabytes in taken)
        above += wrong
        print(
            f"{which:<36}",
            *(f"{seconds / slow:6.2f} s {megabytes:4.0f} MB" for seconds, megabytes in taken),
            *(["  above the bar"] if wrong else []),
            flush=True,
        )
    print(f"{above} kinds are above the bar")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
