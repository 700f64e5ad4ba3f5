"""The flags of train.py: those of Settings, and those that choose data, model, history and machine."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..config.decoders import DECODERS
from ..config.variants import VARIANTS
from ..console.commandline import (
    Parser,
    above_or_zero,
    add_rule_flags,
    below_one,
    count,
    duration,
    positive,
    seed_number,
    size,
    whole,
)
from ..conversion.command import add_source_flags, flags_of_source
from ..errors import InputError
from ..logs.loggers import names_of
from ..networks.distributed import PARALLEL
from .settings import Settings
from .skips import step_ranges

ARCHS = ("gpt", *DECODERS, *(f"flex_{name}" for name in VARIANTS))
"""The values of --arch: GPT as GPT-2 and as later families have it, and the variants of modded-nanogpt."""

CONFIG_FLAGS = (
    *("block_size", "n_layer", "n_head", "n_embd", "tied_head", "head_bias"),
    *("batch_size", "dropout", "device"),
)
"""Flags that are fields of config.json."""

METAVARS: dict[Any, str] = {
    Path: "PATH",
    str: "NAME",
    duration: "TIME",
    **dict.fromkeys((count, seed_number, whole), "N"),
    **dict.fromkeys((positive, above_or_zero, below_one), "X"),
}
"""The placeholder of a value in --help, by its type."""

COMMON = (
    *("model_name", "checkpoint_root", "config_file", "input_file", "dataset_dir", "tokenization"),
    *("n_layer", "n_head", "n_embd", "block_size", "arch", "init_from_checkpoint"),
    *("max_iters", "batch_size", "learning_rate", "lr_schedule", "eval_interval", "save_interval", "keep"),
    *("resume_from", "seed", "device", "dtype", "compile", "quiet"),
)
"""The flags of --help."""

EPILOG = """examples:
  python train.py --model_name dante                          start, or resume: the same command
  python train.py --model_name dante --max_iters 4000         train for longer
  python train.py --model_name mine --input_file my_book.txt  your own text
  torchrun --nproc_per_node=4 train.py --model_name dante     on several GPUs, or processes: docs/distributed.md

more examples:
  python train.py --model_name big --compile --lr_schedule cosine --lr_decay_iters 5000 --warmup_iters 0.02
  python train.py --model_name modern --arch llama            rotary positions, RMSNorm, SwiGLU, grouped heads; or qwen3
  python train.py --model_name fast --arch flex_small         a modded-nanogpt model: packed documents, Muon

flex_* models use, from the first step on, the attention windows that upstream reaches at the end of training.
Ctrl-C and SIGTERM finish the step, save, and exit with 75; run the same command to continue. A second Ctrl-C ends the
run at once (130). SIGUSR1 saves and continues. docs/clusters.md has commands for batch queues.
A flag wins over the model's own config and training state, which win over the preset.
"""

_SETTINGS = {f.name: f.metadata for f in fields(Settings)}


class _Joined(argparse.Action):
    """A flag that may be repeated: what it is given is joined by commas."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, f"{before},{values}" if before else values)


def _add(group: argparse._ArgumentGroup, name: str, kind: Any, text: str, **more: Any) -> None:
    """Add a flag by its type, the tuple of its choices, or as a switch (None); only flags that were typed are set."""
    if kind is None:
        group.add_argument(f"--{name}", action="store_true", default=None, help=text)
    elif isinstance(kind, tuple):
        group.add_argument(f"--{name}", choices=kind, help=text, **more)
    else:
        group.add_argument(f"--{name}", type=kind, help=text, **{"metavar": METAVARS.get(kind), **more})


def _add_settings(group: argparse._ArgumentGroup, *names: str) -> None:
    """Add the flags of fields of Settings."""
    for name in names:
        _add(group, name, _SETTINGS[name]["kind"], _SETTINGS[name]["help"])


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line of train.py; flags that contradict each other end the program, as wrong use."""
    parser = make_parser()
    args = parser.parse(argv)
    if args.prune and args.resume_from is not None:
        parser.error("--prune only removes folders: leave out --resume_from or --prune")
    try:
        args.log = names_of(args.log) if args.log else ()
    except InputError as error:
        parser.error(f"--log: {error}")
    if args.dry_run and not args.prune:
        parser.error("--dry_run is for --prune, which is missing; training has no dry run")
    asked = [name for name in flags_of_source(args) if name not in CONFIG_FLAGS]
    if asked and args.init_from_checkpoint is None:
        parser.error(f"--{asked[0]}: for a file that --init_from_checkpoint names and that does not show it")
    args.command = ["train.py", *argv]
    return args


def make_parser() -> Parser:
    """Describe every flag of train.py, in groups."""
    about = "Train a GPT on text. The same command starts, resumes and continues."
    parser = Parser("train.py", about, EPILOG, common=COMMON)
    parser.usage = "train.py [--FLAG VALUE ...]"  # the groups below show each flag, once
    _add_data(parser.add_argument_group("data"))
    _add_model(parser.add_argument_group("model (for a new one; a checkpoint keeps its own)"))
    group = parser.add_argument_group("optimization")
    _add_settings(group, "max_iters")
    _add(group, "batch_size", count, "sequences per step and accumulation")
    _add_settings(group, "gradient_accumulation_steps", "learning_rate", "warmup_iters", "lr_decay_iters", "min_lr")
    _add_settings(group, "weight_decay", "grad_clip", "ema", "lr_schedule")
    _add(group, "skip_steps", step_ranges, _SETTINGS["skip_steps"]["help"], metavar="A:B", action=_Joined)
    _add_saving(parser.add_argument_group("evaluation and saving"))
    _add_history(parser.add_argument_group("the past of a run (inspect_model.py --history shows it)"))
    _add_machine(parser.add_argument_group("machine"))
    add_source_flags(parser, heads=False)
    return parser


def _add_data(group: argparse._ArgumentGroup) -> None:
    _add(group, "input_file", Path, "a text file, or a folder of them")
    text = "a folder of data/prepare.py, nanoGPT (train.bin) or modded-nanogpt (*.bin shards)"
    _add(group, "dataset_dir", Path, text)
    _add(group, "tokenization", str, "char (default), gpt2, or a Hugging Face tokenizers JSON file")
    _add(group, "bpe_file", Path, "the file of GPT-2 ranks, for a machine without network access")
    text = "a character outside the vocabulary is an error, or skipped (default: error)"
    _add(group, "unknown", ("error", "skip"), text)


def _add_model(group: argparse._ArgumentGroup) -> None:
    _add(group, "n_layer", count, "layers")
    _add(group, "n_head", count, "attention heads")
    _add(group, "n_embd", count, "width, a multiple of the heads")
    _add(group, "block_size", count, "longest context, in tokens")
    _add(group, "dropout", below_one, "fraction of activations dropped during training")
    _add(group, "tied_head", None, "the head is the token table, as nanoGPT's (the default)")
    names, text = ("--untied_head", "--no_tied_head"), "a head of its own, which --to nanogpt cannot hold"
    group.add_argument(*names, action="store_false", dest="tied_head", default=None, help=text)
    _add(group, "head_bias", None, "a bias in the head, which --to nanogpt and --to hf cannot hold")
    _add(group, "init_from_model", str, "start from the weights of another model below the root")
    _add(group, "init_from_checkpoint", Path, "start from the weights of a checkpoint of any program")
    _add(group, "arch", ARCHS, f"{', '.join(ARCHS)} (gpt)", metavar="NAME")


def _add_saving(group: argparse._ArgumentGroup) -> None:
    _add_settings(group, "eval_interval", "eval_iters", "save_interval", "save_every_minutes", "lose_at_most")
    _add(group, "stop_after_minutes", positive, "this long after the start, finish the step, save, and exit with 75")
    text = "when a save is due while another is being written: wait for it, or skip this one (default: wait)"
    _add(group, "save_policy", ("wait", "skip"), text, default="wait")
    _add_settings(group, "max_failed_saves")
    text = "who gets losses as they are committed: csv, tensorboard, wandb, module:function; several with commas"
    _add(group, "log", str, text, metavar="LOGGER", action=_Joined)
    text = "memory for a step on its way to disk: 2GB, 500MB, or 0 for 48 MB (default: half of what is free)"
    _add(group, "stage_memory", lambda word: size(word, least=0), text, metavar="SIZE")
    add_rule_flags(group)
    _add_settings(group, "strict_resume")
    _add(group, "consolidate", None, "at the end, write plain files from the shards (fsdp)")


def _add_history(group: argparse._ArgumentGroup) -> None:
    _add(group, "resume_from", whole, "go back to a kept step; later steps are set aside", metavar="STEP")
    text = "remove what was set aside (with --keep, older steps too); without --model_name of all models"
    _add(group, "prune", None, text)
    _add(group, "dry_run", None, "with --prune: say what would be removed, and change nothing")
    _add(group, "allow_fresh", None, "when no checkpoint is intact, set all aside and start from scratch")
    text = "do not compare checksums when resuming"
    group.add_argument("--no_verify", action="store_false", dest="verify", help=text)


def _add_machine(group: argparse._ArgumentGroup) -> None:
    _add_settings(group, "seed")
    _add(group, "parallel", PARALLEL, "under torchrun: a whole model per rank, or shards (ddp)")
    _add(group, "device", str, "auto, cpu, cuda or cuda:N")
    _add_settings(group, "dtype", "compile")
    group.add_argument("--no_compile", action="store_false", dest="compile", help="do not use torch.compile")
