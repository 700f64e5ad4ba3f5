"""The diffs of docs/own_loop.md, applied to nanoGPT's and nanochat's own trainers, which are killed and go on."""

from __future__ import annotations

import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.makers.adapter_runs import differences
from tests.makers.ranks import kill

PAGE = (ROOT / "docs/own_loop.md").read_text(encoding="utf-8")
DIFFS = dict(zip(("nanoGPT", "nanochat"), re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL), strict=True))


@pytest.mark.parametrize("name", DIFFS)
def test_a_diff_has_at_most_twelve_lines(name):
    changed = [line for line in DIFFS[name].splitlines() if re.match(r"[+-](?![+-]{2} )", line)]
    assert len(changed) <= 12


def nanogpt(folder: Path) -> list[str]:
    """Make its data; return its command."""
    numpy = pytest.importorskip("numpy")
    data = folder / "data/tiny"
    data.mkdir(parents=True)
    for name, seed in (("train", 1), ("val", 2)):
        numpy.random.default_rng(seed).integers(0, 50, 4000).astype(numpy.uint16).tofile(data / f"{name}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 50}))
    sizes = "n_layer=2 n_head=2 n_embd=16 block_size=16 batch_size=4 gradient_accumulation_steps=2 dropout=0.2"
    run = "dataset=tiny device=cpu compile=False max_iters=120 eval_interval=5 eval_iters=2 warmup_iters=10"
    return ["train.py", *(f"--{word}" for word in f"{sizes} {run} lr_decay_iters=120".split())]


def nanochat(folder: Path) -> list[str]:
    """Make its data, its tokenizer, and what takes the place of packages that a run does not use."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    tiktoken = pytest.importorskip("tiktoken")
    base = folder / "base"
    (base / "base_data_climbmix").mkdir(parents=True)
    (base / "tokenizer").mkdir()
    for i in range(2):
        words = random.Random(i)
        texts = ["".join(words.choices("abcdefgh ", k=words.randrange(20, 60))) for _ in range(2000)]
        parquet.write_table(
            pa.table({"text": texts}), base / f"base_data_climbmix/shard_{i:05d}.parquet", row_group_size=100
        )
    ranks = {bytes([i]): i for i in range(256)}
    tokenizer = tiktoken.Encoding("bytes", pat_str=".", mergeable_ranks=ranks, special_tokens={"<|bos|>": 256})
    (base / "tokenizer/tokenizer.pkl").write_bytes(pickle.dumps(tokenizer))
    torch.save(torch.cat([torch.ones(256), torch.zeros(1)]).int(), base / "tokenizer/token_bytes.pt")
    for name in ("wandb", "rustbpe"):
        (folder / f"{name}.py").write_text("")
    sizes = "depth=2 aspect-ratio=16 head-dim=16 max-seq-len=32 window-pattern=L device-batch-size=2"
    run = "total-batch-size=128 num-iterations=40 save-every=4 eval-every=10 eval-tokens=128 warmup-steps=5"
    rest = "core-metric-every=-1 sample-every=-1 device-type=cpu"
    return ["-m", "scripts.base_train", *(f"--{word}" for word in f"{sizes} {run} {rest}".split())]


def start(folder: Path, command: list[str]) -> subprocess.Popen[bytes]:
    settings = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
        "NANOCHAT_BASE_DIR": str(folder / "base"),
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    with (folder / "log").open("ab") as log:
        command = [sys.executable, "-u", *command]
        return subprocess.Popen(command, cwd=folder, env={**os.environ, **settings}, stdout=log, stderr=log)


def losses(folder: Path) -> set[tuple[str, str]]:
    """Each step that was printed, with its loss: of a step that was made twice, both."""
    return set(
        re.findall(r"^(?:iter|step) (\d+)\S*.*? loss:? (\d\S+?)[, ]", (folder / "log").read_text(), re.MULTILINE)
    )


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "prepare", "model"),
    [("nanoGPT", nanogpt, "out/nanogpt"), ("nanochat", nanochat, "base/base_checkpoints/d2")],
    ids=["nanoGPT", "nanochat"],
)
def test_a_patched_trainer_that_was_killed_ends_with_the_bits_of_one_that_was_not(tmp_path, name, prepare, model):
    sources = Path(os.environ.get("UPSTREAM_SOURCES", ROOT.parent / "shared/upstream")) / name
    if not sources.is_dir():
        pytest.skip(f"no {sources}: set UPSTREAM_SOURCES to a folder with clones of nanoGPT and nanochat")
    steps = []
    for kills in (0, 4):
        folder = tmp_path / f"killed_{kills}"
        shutil.copytree(sources, folder, ignore=shutil.ignore_patterns(".git"))
        subprocess.run(["patch", "-p1", "-s"], input=DIFFS[name].encode(), cwd=folder, check=True)
        command, moments = prepare(folder), random.Random(7)
        for _ in range(kills):
            run = start(folder, command)
            before, limit = (folder / "log").stat().st_size, time.monotonic() + 200
            while run.poll() is None and b"saved step" not in (folder / "log").read_bytes()[before:]:
                assert time.monotonic() < limit
                time.sleep(0.01)
            time.sleep(moments.random() * 0.5)  # the moment is what is drawn here
            kill(run.pid, signal.SIGKILL)
            run.wait(60)
        assert start(folder, command).wait(250) == 0, (folder / "log").read_text()[-3000:]
        files = ("model.pt", "optimizer.pt", "also.pt")
        steps.append({file: torch.load(folder / model / file, weights_only=True) for file in files})
        for state in steps[-1]["also.pt"]["rng"]["states"]:
            del state["state"]["python"], state["state"]["numpy"]  # neither is seeded, nor drawn from
    assert differences(*steps) == []
    assert losses(tmp_path / "killed_0") == losses(tmp_path / "killed_4")
    assert len(losses(tmp_path / "killed_0")) >= 40
