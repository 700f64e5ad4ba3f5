from __future__ import annotations

import json
import signal
import sys

import pytest
import torch

from core.data.dataloader import DataLoader
from core.data.tokens import Tokens
from core.errors import InputError
from core.networks.distributed import World, open_world
from tests.conftest import ROOT
from tests.makers.models import TEXT
from tests.makers.ranks import (
    arguments,
    finished,
    kill,
    losses,
    output_of,
    processes,
    same,
    saved,
    start,
    torchrun,
    train,
    wait_for,
)

BOUND = 2e-6
"""How far losses of about 3 may be apart after 20 steps at dropout 0: sums in another order, 8 units of float32."""


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 40)
    return path


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 12])
def test_the_ranks_of_any_world_share_the_rows_of_the_global_batch(size):
    B, micro_steps = 6, 4
    tokens = Tokens([torch.arange(500).numpy().astype("uint16")], vocab_size=500, where="tokens")
    loader = DataLoader(tokens, tokens, block_size=8, batch_size=B, seed=5)
    whole = torch.cat([loader.batch(3, micro)[0] for micro in range(micro_steps)])
    parts = {}
    for rank in range(size):
        share = World(rank, size).share(B, micro_steps)
        for micro in share.micro_steps:
            first, stop, _ = share.rows.indices(B)
            for row, inputs in zip(range(first, stop), loader.batch(3, micro, share.rows)[0], strict=True):
                assert (micro, row) not in parts, "each row is one rank's"
                parts[micro, row] = inputs
    assert torch.equal(torch.stack([parts[key] for key in sorted(parts)]), whole)


def test_a_world_that_cannot_share_equally_is_refused_with_the_numbers():
    with pytest.raises(InputError, match=r"8 ranks share batch_size 6 x gradient_accumulation_steps 2: found 4 ranks"):
        World(0, 8).share(6, 2)


def test_parallel_without_torchrun_says_how_to_start(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match=r"torchrun --nproc_per_node=N train.py"), open_world("ddp"):
        pass


def test_one_two_and_four_ranks_have_the_same_losses(tmp_path, text):
    flags = {"max_iters": 20, "eval_interval": 10, "gradient_accumulation_steps": 2, "learning_rate": 0.01}
    found, measured = {}, {}
    for ranks in (0, 2, 4):
        done = train(tmp_path, text, ranks, model_name=f"of{ranks}", **flags)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("done: step 20") == 1, "one rank prints"
        found[ranks] = losses(tmp_path, f"of{ranks}")
        measured[ranks] = losses(tmp_path, f"of{ranks}", "val_loss")  # of 3 batches, which no number of ranks divides
    assert list(found[0]) == list(found[2]) == list(found[4]) == list(range(1, 21))
    assert list(measured[0]) == list(measured[2]) == list(measured[4]) == [10, 20]
    for ranks in (2, 4):
        for here, alone in ((found[ranks], found[0]), (measured[ranks], measured[0])):
            assert max(abs(here[step] - loss) for step, loss in alone.items()) <= BOUND


def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_the_same_line_goes_on(tmp_path, text):
    flags = {"max_iters": 2000, "eval_interval": 2000, "save_interval": 20}
    run = start(tmp_path, text, 2, **flags)
    wait_for(run, tmp_path, 20)
    kill(processes(run)[1], signal.SIGTERM)
    assert run.wait(60) == 1  # torchrun's own, for a rank that ended with 75
    assert "stopped by SIGTERM after step" in output_of(tmp_path)
    step = torch.load(tmp_path / "dante/optimizer.pt", weights_only=True)["state"][0]["step"].item()
    assert 20 < step < 2000 and len(losses(tmp_path)) == step
    done = train(tmp_path, text, 2, **{**flags, "max_iters": int(step) + 2})
    assert done.returncode == 0 and f"resuming at step {int(step)}" in done.stderr


FAILS = "raise InputError('tokens.bin: cannot be read.')"
UNDER_WAY = f"(torch.distributed.all_reduce(torch.ones(1), async_op=True), exec({FAILS!r}))"
SAYS_NOTHING = "(signal.signal(signal.SIGTERM, signal.SIG_DFL), time.sleep(600))"


@pytest.mark.parametrize("first, second", [("None", FAILS), (SAYS_NOTHING, UNDER_WAY)], ids=["at a step", "under way"])
def test_an_error_on_one_rank_ends_all_with_one_message(tmp_path, text, first, second):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, time\n"
        "if 'RANK' in os.environ:\n"
        "    import torch\n"
        "    import core.data.dataloader as d\n"
        "    from core.errors import InputError\n"
        "    real = d.DataLoader.batch\n"
        "    def batch(self, step, *more):\n"
        f"        if step == 3: exec(({first!r}, {second!r})[int(os.environ['RANK'])])\n"
        "        return real(self, step, *more)\n"
        "    d.DataLoader.batch = batch\n"
    )
    words = [*torchrun(2), *arguments(tmp_path, text, max_iters=20)]
    done = finished(words, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 1
    assert done.stderr.count("error: rank 1: tokens.bin: cannot be read.") == done.stderr.count("error: ") == 1
    assert "Traceback (most recent call last)" not in done.stderr.split("torch/distributed/elastic")[0]


def test_a_rank_that_is_killed_comes_back_and_the_run_ends_where_it_would_have(tmp_path, text):
    flags = {"max_iters": 60, "eval_interval": 30, "save_interval": 5, "dropout": 0.1}
    assert train(tmp_path, text, 2, model_name="whole", **flags).returncode == 0
    run = start(tmp_path, text, 2, restarts=3, **flags)
    wait_for(run, tmp_path, 10)
    assert kill(processes(run)[1], signal.SIGKILL)
    assert run.wait(120) == 0, output_of(tmp_path)
    assert "resuming at step" in output_of(tmp_path)
    assert same(saved(tmp_path), saved(tmp_path, "whole"))
    assert losses(tmp_path) == losses(tmp_path, "whole")


@pytest.mark.full
def test_shards_reduce_gradients_behind_the_last_micro_step_alone(tmp_path):
    done = finished([sys.executable, "-m", "tests.makers.forked", "2", "tests.makers.micro_steps_ranks", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    for rank in "01":
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == {"reduced": [False, False, True], "unlike": []}
