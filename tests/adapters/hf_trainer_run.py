"""A training run of Hugging Face's Trainer that saves through TrainerCheckpoints: started again, it goes on.

`python -m tests.adapters.hf_trainer_run FOLDER [key=value ...]` trains a tiny GPT-2 with dropout, of shuffled batches,
with accumulation, evaluation and several epochs, and writes FOLDER/result.pt when it is done: weights, optimizer, log.
Each key is one of Trainer's arguments; under torchrun it runs on several processes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import EarlyStoppingCallback, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from core.adapters.huggingface import TrainerCheckpoints

TIMES = ("runtime", "per_second", "flos")
"""Parts of the names of what differs from run to run."""


def make_trainer(folder: Path, **changed: object) -> Trainer:
    """A Trainer of a tiny model, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ids = torch.randint(0, 32, (42, 8), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 3,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "metric_for_best_model": "loss",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return Trainer(
        GPT2LMHeadModel(config),
        TrainingArguments(str(folder / "trainer"), **{**arguments, **changed}),
        train_dataset=data[:36],
        eval_dataset=data[36:],
        callbacks=[EarlyStoppingCallback(50)],
    )


def result(trainer: Trainer) -> dict[str, object]:
    """What two runs must have in common, bit for bit."""
    log = [{k: v for k, v in line.items() if not any(t in k for t in TIMES)} for line in trainer.state.log_history]
    return {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "log": [line for line in log if "train_loss" not in line],
        "callbacks": [one.state() for one in trainer.callback_handler.callbacks if hasattr(one, "state")],
        "flos": trainer.state.total_flos,
        "noise": torch.get_rng_state(),
    }


if __name__ == "__main__":
    changed = {key: json.loads(value) for key, value in (word.split("=", 1) for word in sys.argv[2:])}
    rules = {key: changed.pop(key) for key in ("keep", "keep_every") if key in changed}
    trainer = make_trainer(Path(sys.argv[1]), **changed)
    checkpoints = TrainerCheckpoints(trainer, "tiny", Path(sys.argv[1]) / "checkpoints", **rules)
    trainer.train(resume_from_checkpoint=checkpoints.resume_folder())
    if trainer.is_world_process_zero():
        torch.save(result(trainer), Path(sys.argv[1]) / "result.pt")
