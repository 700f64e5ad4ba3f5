"""What people write with transformers' Trainer and its own saving: python hf_trainer.py FOLDER"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint


class Words(torch.utils.data.Dataset):
    """Sixteen sequences of random words."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, number: int):
        if number >= 16:
            raise IndexError(number)
        words = torch.randint(0, 20, (8,), generator=torch.Generator().manual_seed(number))
        return {"input_ids": words, "labels": words.clone()}


class SayWhere(TrainerCallback):
    """Prints the step that training begins at."""

    def on_train_begin(self, args, state, control, **_):
        """Print it."""
        print(f"resumed at step {state.global_step}", flush=True)


def main(folder: Path) -> None:
    """Train six steps, saving every second; go on from the last checkpoint that the library finds."""
    set_seed(1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    how = TrainingArguments(
        output_dir=str(folder), max_steps=6, save_steps=2, per_device_train_batch_size=4, use_cpu=True,
        report_to=[], logging_steps=1, seed=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=how, train_dataset=Words(), callbacks=[SayWhere()])
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    state = Path(last or folder, "trainer_state.json")
    if state.exists() and json.loads(state.read_text())["global_step"] == how.max_steps:
        print("resumed at step 6")  # the Trainer would train a seventh step
    else:
        trainer.train(resume_from_checkpoint=last)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
