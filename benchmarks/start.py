"""Time to the first token of a 124M bundle: mapped and verified, against building, loading and copying.

The other way is that of nanoGPT's sample.py: build the model with random weights, torch.load the file, copy it in. Each
run is a process of its own; the imports are not counted. The file is in the page cache for both.

    python benchmarks/start.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.rows import Row, hand_over

BAR = 2.0
SIZES = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304}
FIELDS = {"tied_head": True, "head_bias": False, "bias": True, "dropout": 0.0, "device": "cpu"}
PROMPT = [464, 2068, 7586, 21831]


def make(folder: Path) -> None:
    """Write the bundle."""
    import torch

    from core.config.gpt import GPTConfig
    from core.model import GPT

    torch.manual_seed(1)
    GPT(GPTConfig.from_dict({**SIZES, **FIELDS})).save_checkpoint_bundle(folder / "large", step=1)


def ours(folder: Path) -> dict[str, float]:
    """Load as generate.py does, and draw a token."""
    from core.bundle.bundle import open_bundle
    from core.bundle.verify import verify
    from core.loading.tensors import load_model
    from core.networks.generation import stream

    marks = {"start": time.perf_counter()}
    with open_bundle(folder / "large") as bundle:
        marks["open"] = time.perf_counter()
        verify(bundle, ("model.pt", "tokenizer.json"))
        marks["verify"] = time.perf_counter()
        model = load_model(bundle)
        marks["map"] = time.perf_counter()
    next(stream(model, PROMPT, 1, temperature=0))
    marks["first token"] = time.perf_counter()
    return spans(marks)


def copying(folder: Path) -> dict[str, float]:
    """Build, load and copy, and draw a token with the same model and sampler."""
    import torch

    from core.config.gpt import GPTConfig
    from core.model import GPT
    from core.networks.generation import stream

    marks = {"start": time.perf_counter()}
    tensors = torch.load(folder / "large/model.pt", map_location="cpu", weights_only=True)
    marks["load"] = time.perf_counter()
    model = GPT(GPTConfig.from_dict({**SIZES, **FIELDS}))
    marks["build"] = time.perf_counter()
    model.load_state_dict(tensors)
    model.eval()
    marks["copy"] = time.perf_counter()
    next(stream(model, PROMPT, 1, temperature=0))
    marks["first token"] = time.perf_counter()
    return spans(marks)


def spans(marks: dict[str, float]) -> dict[str, float]:
    """Seconds of each part, and in all."""
    names, times = list(marks), list(marks.values())
    parts = {name: end - start for name, start, end in zip(names[1:], times, times[1:], strict=False)}
    return {**parts, "total": times[-1] - times[0]}


WAYS = {"ours": ours, "copying": copying}


def main() -> None:
    """Measure both in turn and print medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(WAYS[args.way](args.folder)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        make(Path(name))
        for turn in range(args.repeats + 1):
            for way, runs in found.items():
                command = [sys.executable, __file__, "--way", way, "--folder", name]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                if turn:
                    runs.append(json.loads(done.stdout))
    for way, runs in found.items():
        parts = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
        print(f"{way:8} " + "  ".join(f"{part} {seconds:.3f} s" for part, seconds in parts.items()))
    ratios = [b["total"] / a["total"] for a, b in zip(found["ours"], found["copying"], strict=True)]
    ours, peer = (f"{statistics.median(run['total'] for run in found[way]):.3g} s" for way in ("ours", "copying"))
    text = "first token of 124M, building, loading and copying"
    hand_over([Row(text, statistics.median(ratios), BAR, "x", True, ours, peer)])


if __name__ == "__main__":
    main()
