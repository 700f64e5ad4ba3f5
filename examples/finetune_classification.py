"""Fine-tune a modded-nanogpt checkpoint to classify texts: the same command starts and resumes."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# A script of this folder finds the packages beside it no matter where it is started.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from core.bundle.tokenizer_state import describe
from core.checkpoint import CheckpointManager
from core.console.commandline import DONE, STOPPED, Parser, count, run
from core.console.progress import byte_bar, step_bar
from core.console.signals import StopSignal, reason
from core.console.words import is_shown, listed_names, printable
from core.data.randomness import mix
from core.data.tokenizer import Tokenizer, named_tokenizer
from core.errors import CheckpointMismatch, InputError, TrainingDiverged
from core.loading.modded import refuse_large_tokenizer
from core.loading.optimizer import configure_optimizer
from core.networks.batched import GPTBatched
from core.networks.classification import GPTClassification, accuracy, balanced_weights, class_scores, confusion, macro_f
from core.networks.device import changes, environment, resolve_device
from core.pretrained import load_pretrained_checkpoint
from core.training.schedule import Schedule
from examples.classification.encoded import EncodedTexts, encode
from examples.classification.labelled import read_splits

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WARM_UP = 20
"""Steps of linear warm-up; then the rate is constant, so that more epochs later follow the same curve."""

WEIGHT_DECAY = 0.01
GRAD_CLIP = 1.0
DROPOUT = 0x6472
"""Mixed into the seed, so that dropout is a stream of its own."""

FIXED = ("variant", "data", "classes", "text_columns", "tokenizer", "max_length", "batch_size", "seed")
"""Settings that a run cannot change: the data of its steps is a function of them."""

EPILOG = """examples:
  python examples/finetune_classification.py --dataset xnli_hi --pretrained_ckpt_path state_step001770.pt
  ... --dataset reviews.csv --text_columns review --label_column stars --tokenizer_name tokenizer.json
  ... --device cuda --dtype bfloat16 --batch_size 32 --num_epochs 3 --model_name xnli_hi

A dataset is a .csv, .tsv or .jsonl file, or a folder with train.*, validation.* and test.*; a tenth of the training
rows is used for validation where no file is. Ctrl-C finishes the step and saves (exit code 75); run again to continue.
"""


@dataclass(frozen=True)
class Score:
    """A model's results on some rows: the mean loss and the confusion matrix."""

    loss: float
    counts: Tensor  # int64 [K, K], rows are true classes


def main(argv: list[str]) -> int:
    """Fine-tune, print the scores, and return the exit code."""
    args = parse(argv)
    manager = CheckpointManager(args.model_name or "classification", args.checkpoint_root)
    schedule = Schedule("constant", args.learning_rate, WARM_UP)
    splits = read_splits(Path(args.dataset), args.text_columns, args.label_column, args.seed)
    classes = splits["train"].classes()
    if len(classes) < 2:
        raise InputError(f"{args.dataset}: one class ({classes[0]}) in the training rows, expected at least two.")
    device = resolve_device(args.device, "--device")
    pretrained = load_pretrained(args, device)
    tokenizer = choose_tokenizer(args, pretrained)
    examples = {
        split: encode(rows, classes, tokenizer, args.max_length, args.unknown) for split, rows in splits.items()
    }
    for split, rows in splits.items():
        say(f"{split}: {len(rows):,} rows of {rows.path.name}, {', '.join(rows.columns)}")
    weights = None
    if args.class_weights == "balanced":
        weights = balanced_weights(torch.from_numpy(examples["train"].labels), len(classes))
    torch.manual_seed(args.seed)  # of the new head
    model = GPTClassification(pretrained, len(classes), args.dropout, weights).to(device)
    settings = {
        "variant": pretrained.config.variant,
        "data": examples["train"].fingerprint(),
        "classes": classes,
        "text_columns": list(splits["train"].columns),
        "tokenizer": tokenizer.fingerprint,
        **{name: getattr(args, name) for name in ("max_length", "batch_size", "seed", "num_epochs", "learning_rate")},
        **{name: getattr(args, name) for name in ("dtype", "dropout", "class_weights")},
    }
    with manager:
        tuning = FineTuning(manager, model, tokenizer, examples, schedule, settings)
        stopped_by = tuning.train(args.num_epochs, args.save_interval)
    if stopped_by:
        say(f"stopped by {stopped_by} after step {tuning.step}, which is saved. Run the same command to continue.")
        return STOPPED
    split = "test" if "test" in examples else "validation"
    score = tuning.evaluate(examples[split], split)
    report = report_of(score, split, tuning.step, classes)
    print(json.dumps(report) if args.json else table(report), flush=True)
    return DONE


def load_pretrained(args: argparse.Namespace, device: torch.device) -> GPTBatched:
    """Load the checkpoint with weights in fp32, which AdamW needs; sizes that are given must be the checkpoint's.

    Raises: CheckpointMismatch naming each size with both numbers.
    """
    path = named_checkpoint(args.pretrained_ckpt_path)
    model, info, _ = load_pretrained_checkpoint(path, device, torch.float32, say=say)
    sizes = {"n_layer": info["num_layers"], "n_head": info["num_heads"], "n_embd": info["model_dim"]}
    given = {name: value for name in sizes if (value := getattr(args, name)) is not None}
    if wrong := [f"--{n} is {v}, but the checkpoint has {sizes[n]}" for n, v in given.items() if v != sizes[n]]:
        raise CheckpointMismatch(f"{path}: {'; '.join(wrong)}. Leave the flags out: the checkpoint knows its sizes.")
    if args.vocab_size is not None:
        say(f"--vocab_size {args.vocab_size} is not needed: the checkpoint has {info['vocab_size']} rows")
    if args.max_length > model.config.block_size:
        raise InputError(f"--max_length: found {args.max_length}, expected at most {model.config.block_size}.")
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{path}: {', '.join(f'{n} {v}' for n, v in sizes.items())}, {parameters:,} parameters on {device}")
    return model


def named_checkpoint(word: str) -> str:
    """The checkpoint that a path names, or a pattern that a shell would expand (`runs/*/best_state_*.pt`).

    Raises: InputError when a pattern matches nothing, or several, which are listed.
    """
    path = Path(word)
    if path.exists() or not any(sign in word for sign in "*?["):
        return word
    found = sorted(map(str, Path(path.anchor).glob(str(path.relative_to(path.anchor)))))
    if not found:
        raise InputError(f"--pretrained_ckpt_path: nothing matches {word} (in {Path.cwd()}). Name the checkpoint.")
    if len(found) > 1:
        raise InputError(f"--pretrained_ckpt_path: {len(found)} match {word}: {listed_names(found, 10)}. Name one.")
    say(f"{word}: using {found[0]}, its only match")
    return found[0]


def choose_tokenizer(args: argparse.Namespace, model: GPTBatched) -> Tokenizer:
    """Take the specified tokenizer, else the one in the checkpoint, else GPT-2's.

    Raises: InputError when there is no tokenizer of that name; CheckpointMismatch when it has more ids than the model.
    """
    name = args.tokenizer_name
    if name not in (None, "gpt2") and not Path(name).is_file():
        raise InputError(f"--tokenizer_name: found no file {name}, expected gpt2 or a Hugging Face tokenizers JSON.")
    bpe_file = Path(args.bpe_file) if args.bpe_file else None
    tokenizer = model.tokenizer if name is None and model.tokenizer else named_tokenizer(name or "gpt2", bpe_file)
    refuse_large_tokenizer(tokenizer, model.config, name or "tokenizer")
    say(f"tokenizer: {describe(tokenizer.state())}")
    return tokenizer


class FineTuning:
    """A run: every step is a function of (seed, step), so that a resumed run makes the same bits."""

    def __init__(
        self,
        manager: CheckpointManager,
        model: GPTClassification,
        tokenizer: Tokenizer,
        examples: dict[str, EncodedTexts],
        schedule: Schedule,
        settings: dict[str, Any],
    ) -> None:
        self.manager, self.model, self.tokenizer = manager, model, tokenizer
        self.examples, self.settings = examples, settings
        self.seed, self.batch_size = settings["seed"], settings["batch_size"]
        self.device = next(model.parameters()).device
        dtype = DTYPES[settings["dtype"]]
        self.autocast = (
            contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype=dtype)
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.schedule = schedule
        self.optimizer = configure_optimizer(model, settings["learning_rate"], WEIGHT_DECAY)
        self.steps_per_epoch = math.ceil(len(examples["train"]) / self.batch_size)
        self.step = manager.load(model, self.optimizer)
        here = environment(self.device, dtype=dtype, compile=False, fused=bool(self.optimizer.param_groups[0]["fused"]))
        manager.facts = {"finetuning": settings, "seed": self.seed, "environment": here}
        if self.step:
            self._resume(here)

    def _resume(self, here: dict[str, Any]) -> None:
        """Check that this is the run that was saved, and restore its state besides weights and moments."""
        state, folder = self.manager.resumed, self.manager.checkpoint_dir
        so_far = state.get("finetuning")
        if not isinstance(so_far, dict):
            raise CheckpointMismatch(f"{folder}: step {self.step} is another program's. Choose another --model_name.")
        for name, value in self.settings.items():
            if so_far.get(name) == value:
                continue
            if name in FIXED:
                raise CheckpointMismatch(
                    f"{folder}: {name} is {str(so_far.get(name))[:60]} in the resumed run, and now "
                    f"{str(value)[:60]}. Use the same value, or choose another --model_name."
                )
            say(f"{name}: {so_far.get(name)} so far, {value} from now on")
        if found := changes(state.environment or {}, here):
            say(f"the state is exact, but kernels may differ in the last bits: {'; '.join(found.values())}")
        if self.scaler.is_enabled() and (scale := (state.extra or {}).get("grad_scaler")):
            self.scaler.load_state_dict(scale)
        say(f"{folder}: resuming at step {self.step}")

    def train(self, num_epochs: int, save_interval: int) -> str | None:
        """Train up to this number of epochs, evaluating after each; return the signal that stopped it, if one did."""
        total = num_epochs * self.steps_per_epoch
        stopped_by = None
        self.model.train()
        with (
            StopSignal(owns_process=True) as stop,
            step_bar(self.step, total, show=True) as bar,
        ):
            while self.step < total and not stopped_by:
                loss = self.update()
                stop.work_to_save = True
                bar.set_postfix_str(f"epoch {self.step / self.steps_per_epoch:.2f}, loss {loss:.3f}")
                bar.update()
                scores: dict[str, float] = {}
                if self.step % self.steps_per_epoch == 0 and not stop.requested:
                    scores = self._validate()
                wishes = stop.take()
                if scores or wishes or self.step % save_interval == 0:
                    self.save(scores)
                stopped_by = reason(wishes)
            self.manager.wait()
        return stopped_by if self.step < total else None

    def update(self) -> float:
        """Make one optimizer step, and return the loss of its batch."""
        rate = self.schedule.at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        tokens, mask, labels = self.examples["train"].step(self.seed, self.step, self.batch_size, self.device)
        torch.manual_seed(mix(self.seed, DROPOUT, self.step))
        with self.autocast:
            loss = self.model(tokens, mask, labels)[1]
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
        value = loss.item()
        # With a scaler a gradient may overflow: that step is skipped, and the scale halved.
        if not math.isfinite(value) or not (self.scaler.is_enabled() or torch.isfinite(norm)):
            raise TrainingDiverged(
                f"step {self.step + 1}: loss is {value}, gradient norm {norm.item()}. The last saved step is "
                f"{self.manager.saved_step() or 'none'}. Try a lower --learning_rate."
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.manager.log(self.step, loss=value, learning_rate=rate, grad_norm=norm.item())
        return value

    @torch.no_grad()
    def evaluate(self, examples: EncodedTexts, what: str) -> Score:
        """Classify rows in their order, and compare."""
        K, total = len(self.settings["classes"]), 0.0
        counts = torch.zeros(K, K, dtype=torch.int64)
        self.model.eval()
        starts = range(0, len(examples), self.batch_size)
        bar = byte_bar(what, len(starts), unit=" batches")
        for start in starts:
            numbers = np.arange(start, min(start + self.batch_size, len(examples)))
            tokens, mask, labels = examples.batch(numbers, self.device)
            with self.autocast:
                logits = self.model(tokens, mask)[0]
            total += F.cross_entropy(logits, labels, reduction="sum").item()
            counts += confusion(logits.argmax(-1), labels, K).cpu()
            bar.update()
        bar.close()
        self.model.train()
        return Score(total / len(examples), counts)

    def _validate(self) -> dict[str, float]:
        score = self.evaluate(self.examples["validation"], "validation")
        found = {
            "val_loss": score.loss,
            "val_accuracy": accuracy(score.counts),
            "val_macro_f": macro_f(score.counts),
        }
        self.manager.log(self.step, **found)
        loss, right, f_score = found.values()
        epoch = self.step // self.steps_per_epoch
        say(f"epoch {epoch}, step {self.step}: validation loss {loss:.4f}, accuracy {right:.4f}, macro F {f_score:.4f}")
        return found

    def save(self, scores: dict[str, float]) -> None:
        """Commit this step, its log lines first."""
        extra = {"pretrained_config": self.model.pretrained_model.config.to_dict("GPTBatched")}
        if self.scaler.is_enabled():
            extra["grad_scaler"] = self.scaler.state_dict()
        self.manager.save(
            self.model, self.optimizer, step=self.step, tokenizer=self.tokenizer, metrics=scores, extra=extra
        )


def report_of(score: Score, split: str, step: int, classes: list[str]) -> dict[str, Any]:
    """Collect the final report, as plain values for JSON."""
    by_class = dict(zip(classes, map(asdict, class_scores(score.counts)), strict=True))
    return {
        "split": split,
        "rows": int(score.counts.sum()),
        "step": step,
        "loss": score.loss,
        "accuracy": accuracy(score.counts),
        "macro_f": macro_f(score.counts),
        "classes": by_class,
    }


def table(report: dict[str, Any]) -> str:
    """Format a report for people."""
    names = {name: printable(name) for name in report["classes"]}
    width = max(len("accuracy"), *map(len, names.values()))
    lines = [
        f"{report['split']}: {report['rows']:,} rows, step {report['step']:,}, loss {report['loss']:.4f}",
        f"{'class':{width}}  precision  recall  F-score  rows",
    ]
    for name, shown in names.items():
        row = report["classes"][name]
        lines.append(
            f"{shown:{width}}  {row['precision']:9.4f}  {row['recall']:6.4f}  {row['f_score']:7.4f}  {row['support']:,}"
        )
    lines += [f"{'accuracy':{width}}  {report['accuracy']:.4f}", f"{'macro F':{width}}  {report['macro_f']:.4f}"]
    return "\n".join(lines)


def say(line: str) -> None:
    """Print to stderr, above a progress bar; only the result goes to stdout."""
    if is_shown(line):
        tqdm.write(line, file=sys.stderr)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line; wrong use exits with 2."""
    parser = Parser("finetune_classification.py", __doc__ or "", EPILOG)
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", metavar="PATH", help="a .csv, .tsv or .jsonl file, or a folder of train, test, ...")
    data.add_argument("--text_columns", metavar="A,B", help="one or more (premise,hypothesis, or text)")
    data.add_argument("--label_column", metavar="NAME", default="label", help="the column of the class (label)")
    data.add_argument(
        "--max_length", type=count, metavar="N", default=128, help="maximum number of tokens of a row (128)"
    )
    data.add_argument(
        "--unknown",
        choices=("error", "skip"),
        default="error",
        help="a character outside the vocabulary is an error, or skipped (default: error)",
    )
    start = parser.add_argument_group("pretrained model")
    checkpoint = "a .pt file of modded-nanogpt, a model's folder, or a quoted pattern"
    start.add_argument("--pretrained_ckpt_path", metavar="PATH", help=checkpoint)
    start.add_argument("--tokenizer_name", metavar="NAME", help="gpt2, or a Hugging Face tokenizers JSON file")
    start.add_argument(
        "--bpe_file", metavar="PATH", help="the file of GPT-2 ranks, for a machine without network access"
    )
    for name, text in (("n_layer", "layers"), ("n_head", "attention heads"), ("n_embd", "width")):
        start.add_argument(f"--{name}", type=count, metavar="N", help=f"{text}; compared with the checkpoint")
    start.add_argument("--vocab_size", type=count, metavar="N", help="not needed: the checkpoint has it")
    how = parser.add_argument_group("training")
    how.add_argument("--num_epochs", type=count, metavar="N", default=3, help="passes over the training rows (3)")
    how.add_argument("--batch_size", type=count, metavar="N", default=16, help="rows per step (16)")
    how.add_argument(
        "--learning_rate", type=float, metavar="X", default=5e-5, help="learning rate of AdamW after warm-up (5e-5)"
    )
    how.add_argument("--dropout", type=float, metavar="X", default=0.1, help="dropout of the head (0.1)")
    how.add_argument(
        "--class_weights", choices=("none", "balanced"), default="none", help="weights of classes in the loss (none)"
    )
    how.add_argument("--save_interval", type=count, metavar="N", default=200, help="steps between saves (200)")
    how.add_argument("--seed", type=int, metavar="N", default=1337, help="seed of order, dropout and the head (1337)")
    how.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda or cuda:N")
    how.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="dtype of the arithmetic; weights are float32"
    )
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    args = parser.parse(argv)
    for name in ("dataset", "pretrained_ckpt_path"):
        if not getattr(args, name):
            parser.error(f"--{name} is needed")
    if args.text_columns is not None:
        args.text_columns = [name.strip() for name in args.text_columns.split(",")]
        if not all(args.text_columns):
            parser.error("--text_columns takes names separated by commas")
    return args


if __name__ == "__main__":
    run(main)
