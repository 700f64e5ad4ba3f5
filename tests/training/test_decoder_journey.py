"""A decoder of transformers comes in, trains, is killed, goes on and leaves, and transformers goes on as ours would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core.checkpoint import CheckpointManager
from core.conversion.hf_tokenizer import definition_of
from tests.conftest import ROOT
from tests.makers.conversions import converted
from tests.makers.hf_decoders import PEERS, SIZES
from tests.makers.limits import wait_until
from tests.makers.runs import bits, losses, same

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("one_thread")]
pytest.importorskip("transformers")

LETTERS = [chr(0x3B1 + i) for i in range(SIZES["vocab_size"])]
STEPS = 20
RUN = {"batch_size": 2, "block_size": 16, "eval_iters": 1, "save_interval": 5, "device": "cpu", "learning_rate": 3e-3}


def written(folder: Path, name: str) -> Path:
    """A folder of transformers whose tokens are letters, and a text of these."""
    theirs, _ = PEERS[name].make()
    theirs.save_pretrained(folder / "theirs")
    (folder / "theirs/tokenizer.json").write_text(json.dumps(definition_of(LETTERS)))
    drawn = torch.randint(0, len(LETTERS), (3000,), generator=torch.Generator().manual_seed(1))
    (folder / "text.txt").write_text("".join(LETTERS[i] for i in drawn))
    return folder / "theirs"


def losses_of_two_steps(model: torch.nn.Module, loss_of) -> list[float]:
    """The loss before and after one step of plain gradient descent."""
    optimizer, found = torch.optim.SGD(model.parameters(), 0.05), []
    for _ in range(2):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma2", "neox"])
def test_in_trained_killed_resumed_and_out_again(tmp_path, name):
    import transformers

    flags = {"init_from_checkpoint": written(tmp_path, name), "input_file": tmp_path / "text.txt", **RUN}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(model: str, end: int, **flags) -> list[str]:
        values = {"checkpoint_root": tmp_path, "model_name": model, "max_iters": end, **flags}
        return [sys.executable, str(ROOT / "train.py"), *(str(w) for k, v in values.items() for w in (f"--{k}", v))]

    state = tmp_path / "killed/training_state.json"
    run = subprocess.Popen(command("killed", 4000, **flags), env=environment)
    wait_until(lambda: state.exists() or run.poll() is not None)
    run.kill()
    assert run.wait() == -9
    end = json.loads(state.read_text())["step"] + STEPS
    subprocess.run(command("killed", end), env=environment, check=True)
    subprocess.run(command("once", end, **flags), env=environment, check=True)
    assert same(bits(tmp_path / "killed"), bits(tmp_path / "once"))
    assert losses(tmp_path, "killed") == losses(tmp_path, "once")

    converted(tmp_path / "killed", tmp_path / "hf", "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").train()
    assert type(theirs).__name__ == PEERS[name].model
    ours = CheckpointManager.load_for_inference("killed", tmp_path)
    for parameter in ours.parameters():
        parameter.requires_grad_(True)
    ids = torch.randint(0, len(LETTERS), (2, 17), generator=torch.Generator().manual_seed(2))
    expected = losses_of_two_steps(theirs, lambda model: model(ids, labels=ids).loss)
    found = losses_of_two_steps(ours, lambda model: model(ids[:, :-1], ids[:, 1:])[1])
    assert found == pytest.approx(expected, rel=1e-5) and expected[1] < expected[0]
