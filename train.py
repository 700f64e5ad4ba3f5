"""Train a GPT on text, and go on where it stopped: the same line starts, resumes and continues."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.config.variants import VARIANTS
from core.console.commandline import (
    DONE,
    STOPPED,
    Parser,
    above_or_zero,
    below_one,
    count,
    positive,
    run,
    seed_number,
    size,
    spin_briefly,
    whole,
)
from core.console.signals import StopSignal
from core.networks.distributed import PARALLEL
from core.training.presets import RUN, preset

if TYPE_CHECKING:
    from core.bundle.bundle import Bundle
    from core.checkpoint import CheckpointManager
    from core.data.corpus import Corpus
    from core.model import GPT, GPTFlexAttention
    from core.training.ranked_checkpoint import RankedManager

ARCHS = ("gpt", "flex_small", "flex_small_2025_02", "flex_medium")
"""What --arch takes: our GPT, and the variants of modded-nanogpt."""

CONFIG_FLAGS = ("block_size", "n_layer", "n_head", "n_embd", "batch_size", "dropout", "device")
"""Flags that are fields of config.json."""

METAVARS: dict[Any, str] = {
    Path: "PATH",
    str: "NAME",
    count: "N",
    seed_number: "N",
    positive: "X",
    above_or_zero: "X",
    below_one: "X",
}
"""What stands for a value in --help, by its type."""

EPILOG = """examples:
  python train.py --model_name dante                          start, or resume: the same line
  python train.py --model_name dante --max_iters 4000         go on for longer
  python train.py --model_name mine --input_file my_book.txt  your own text
  python train.py --model_name big --compile --lr_schedule cosine --lr_decay_iters 5000 --warmup_iters 0.02
  python train.py --model_name fast --arch flex_small         a modded-nanogpt model: packed documents, Muon
  torchrun --nproc_per_node=4 train.py --model_name dante     on several GPUs, or processes: docs/distributed.md

flex_* models see the windows that upstream has at the end of training, from the first step on.
Ctrl-C and SIGTERM finish the step, save, and say how to go on (exit code 75); a second Ctrl-C ends at once (130).
SIGUSR1 saves and goes on. docs/clusters.md has lines for batch queues.
A flag wins over the model's own config and training state, which win over the preset.
"""


def main(argv: list[str]) -> int:
    """Train, and return the exit code."""
    spin_briefly()
    parser = make_parser()
    args = parser.parse(argv)
    if args.prune and args.resume_from is not None:
        parser.error("--prune trains nothing, and goes back to nothing: leave out --resume_from or --prune")
    flags = {name: value for name, value in vars(args).items() if value is not None}

    with StopSignal(args.stop_after_minutes, owns_process=True) as stop:
        return prune_or_train(args, flags, stop)


def prune_or_train(args: argparse.Namespace, flags: dict[str, Any], stop: StopSignal) -> int:
    """Do what the flags ask for, as the only writer of the model."""
    from core.errors import CheckpointNotFound
    from core.networks.distributed import open_world
    from core.training.ranked_checkpoint import RankedManager

    with open_world(args.parallel) as world:
        manager = RankedManager(
            args.model_name or "default",
            args.checkpoint_root,
            world=world,
            verify=args.verify,
            allow_fresh=args.allow_fresh,
            save_policy=args.save_policy,
            stage_memory=args.stage_memory,
        )
        if args.prune and not manager.checkpoint_dir.is_dir():
            raise CheckpointNotFound(f"{manager.checkpoint_dir}: no such folder, so nothing to prune.")
        with manager:
            if args.prune:
                return prune(manager, args)
            return train(manager, args, flags, stop)


def prune(manager: RankedManager, args: argparse.Namespace) -> int:
    """Remove what lies aside, and kept steps that no rule keeps where --keep or --keep_every is given."""
    from core.console.words import size_text

    freed = manager.prune(args.keep, args.keep_every) if manager.world.is_first else 0
    print(f"{freed} bytes freed ({size_text(freed)})")
    return DONE


def train(manager: RankedManager, args: argparse.Namespace, flags: dict[str, Any], stop: StopSignal) -> int:
    """Resume or start the model of a manager that holds its lock."""
    if args.resume_from is not None:
        manager.go_back(args.resume_from)
    with manager.newest_intact() or contextlib.nullcontext() as bundle:
        return train_from(manager, bundle, args, flags, stop)


def train_from(
    manager: RankedManager, bundle: Bundle | None, args: argparse.Namespace, flags: dict[str, Any], stop: StopSignal
) -> int:
    """Train on from an open bundle, or anew."""
    from core.bundle.commit import CONFIG
    from core.bundle.evolution import old_settings
    from core.bundle.retention import Retention
    from core.checkpoint import CheckpointManager
    from core.data.corpus import find_source, open_corpus
    from core.data.dataloader import DataLoader, PackedLoader
    from core.data.tokenizer import tokenizer_from_state
    from core.errors import InputError
    from core.kinds.gpt import refuse_other_architecture
    from core.kinds.modded import Wanted, open_origin, refuse_other_sizes, sizes, start_speedrun, variant_to_train
    from core.networks.device import DTYPES, resolve_device
    from core.training.fit import fit
    from core.training.schedule import Schedule

    state, world = bundle.state if bundle else {}, manager.world
    rules = Retention.of(state).given(args.keep, args.keep_every)
    manager.keep, manager.keep_every = rules.keep, rules.keep_every
    variant, origin = variant_to_train(bundle, args.arch), None
    if variant and world.is_sharded:
        raise InputError("--parallel fsdp: Muon needs whole matrices, found --arch flex_*. Use --parallel ddp.")
    if world.is_sharded and args.dtype == "fp16":
        raise InputError("--parallel fsdp: found --dtype fp16, whose scale each shard would choose. Use bf16.")
    if args.init_from_checkpoint and bundle is None:
        origin = open_origin(args.init_from_checkpoint, args.arch)
        variant = origin.model.config.variant
    recorded_device = (
        bundle.config.device if bundle and bundle.config else bundle and bundle.config_values.get("device")
    )
    wish = flags.get("device") or recorded_device or "auto"
    whose_device = "--device" if "device" in flags or bundle is None else str(bundle.path(CONFIG))
    if world.size > 1:
        flags["device"] = wish = world.device_of(wish)
    device = resolve_device(wish, whose_device)
    defaults = preset(variant, VARIANTS[variant].muon_rate if variant else None, device.type == "cpu")
    moments = bundle.optimizer.content if bundle and bundle.optimizer and not variant else None
    so_far = state.get("training") or old_settings(moments)
    settings = {**RUN, **defaults, **so_far, **flags}
    start = bundle.step if bundle else 0
    given = {name: flags[name] for name in CONFIG_FLAGS if name in flags}
    if bundle and start >= settings["max_iters"]:
        if variant:
            refuse_other_sizes(str(bundle.path(CONFIG)), bundle.config_values, sizes(given))
        else:
            refuse_other_architecture(bundle, given)
        print(
            f"{manager.checkpoint_dir}: step {start}, and max_iters is {settings['max_iters']}: nothing to do. "
            f"Train on with --max_iters {start + settings['max_iters']}.",
            file=sys.stderr,
        )
        return DONE

    source = find_source(args.input_file, args.dataset_dir, state.get("data"), manager.model_name)
    say(source.line())
    if changed := source.changed(state.get("data")):
        say(f"WARNING: {changed}")
    tokenization, recorded = flags.get("tokenization"), bundle.tokenizer if bundle else manager.tokenizer_state()
    if recorded is None and args.init_from_model:
        recorded = CheckpointManager(args.init_from_model, args.checkpoint_root).tokenizer_state()
    if recorded is not None and tokenization in (None, recorded.get("token_kind")):
        tokenization = tokenizer_from_state(recorded, flags.get("bpe_file"))
    corpus = open_corpus(source, tokenization, bpe_file=flags.get("bpe_file"), unknown=flags.get("unknown", "error"))
    for note in corpus.notes:
        say(note)
    schedule = make_schedule(settings, Schedule)
    model: GPT | GPTFlexAttention
    optimizer: Any
    if variant:
        dtype = flags.get("dtype") or (None if bundle else settings["dtype"])
        wanted = Wanted(
            variant=variant,
            given=given,
            preset=defaults,
            tokenizer=corpus.tokenizer,
            learning_rate=schedule.learning_rate,
            weight_decay=settings["weight_decay"],
            seed=settings["seed"],
            dtype=DTYPES[dtype] if dtype else None,
        )
        model, optimizer, start = start_speedrun(manager, wanted, bundle, origin, args.init_from_model)
        length, settings["dtype"] = model.config.block_size, "fp32"  # its embeddings have the dtype: no autocast
        loader: DataLoader = PackedLoader(corpus.train, corpus.val, block_size=length, seed=settings["seed"])
    else:
        model, optimizer, start = manager.initialize_for_training(
            given,
            corpus.tokenizer,
            None,
            schedule.learning_rate,
            args.init_from_model,
            preset=defaults,
            weight_decay=flags.get("weight_decay") if bundle else settings["weight_decay"],
            seed=settings["seed"],
            bundle=bundle,
        )
        config = model.config
        loader = DataLoader(
            corpus.train, corpus.val, block_size=config.block_size, batch_size=config.batch_size, seed=settings["seed"]
        )
    device = next(model.parameters()).device
    say_what_runs(
        manager,
        model,
        corpus,
        start if bundle or start else None,
        device,
        toy=device.type == "cpu" and not (state or origin),
    )
    world.agree("data", source.record())
    manager.facts = {
        "data": source.record(),
        "training": {name: settings[name] for name in (*RUN, "max_iters", "learning_rate", "warmup_iters")},
    }
    if so_far and "training" not in state:
        shown = ", ".join(f"{name} {value}" for name, value in so_far.items())
        say(f"going on as the program that wrote it, unless a flag says otherwise: {shown}")
    for name, old in so_far.items():
        if name != "max_iters" and old is not None and settings[name] != old:
            say(f"{name}: {old} so far, {settings[name]} from now on")
    result = fit(
        model,
        data_loader=loader,
        optimizer=optimizer,
        max_iters=settings["max_iters"],
        manager=manager,
        schedule=schedule,
        eval_interval=settings["eval_interval"],
        eval_iters=settings["eval_iters"],
        save_interval=settings["save_interval"],
        save_every_minutes=settings["save_every_minutes"],
        max_failed_saves=args.max_failed_saves,
        grad_clip=settings["grad_clip"],
        gradient_accumulation_steps=settings["gradient_accumulation_steps"],
        dtype=DTYPES[settings["dtype"]],
        compile=settings["compile"],
        ema=settings["ema"],
        strict_resume=args.strict_resume,
        stop=stop,
        world=world,
    )
    if result.stopped_by:
        line = "the same line" if args.resume_from is None else "the same line without --resume_from"
        say(f"stopped by {result.stopped_by} at step {result.step}, saved. Go on with {line}.")
        return STOPPED
    if args.consolidate:
        manager.consolidate()
    if world.is_first:
        finish(manager, model, corpus, result.val_loss, samples=not world.is_sharded)
    return DONE


def make_schedule(settings: dict[str, Any], kind: Any) -> Any:
    """Build the learning rate schedule; a fraction of warm-up is one of --lr_decay_iters, never of max_iters."""
    from core.errors import InputError

    warmup, decay = settings["warmup_iters"], settings["lr_decay_iters"]
    if 0 < warmup < 1:
        if decay is None:
            raise InputError(f"--warmup_iters {warmup} is a fraction of --lr_decay_iters, which is not given.")
        warmup = warmup * decay
    if settings["lr_schedule"] == "cosine" and decay is None:
        raise InputError("--lr_schedule cosine needs --lr_decay_iters: the step at which the rate is lowest.")
    return kind(settings["lr_schedule"], settings["learning_rate"], round(warmup), decay)


def say(line: str) -> None:
    """Print to stderr, where everything but the result goes."""
    print(line, file=sys.stderr)


def say_what_runs(
    manager: CheckpointManager,
    model: GPT | GPTFlexAttention,
    corpus: Corpus,
    resumed: int | None,
    device: Any,
    toy: bool,
) -> None:
    """Say in two or three lines what is trained."""
    from core.bundle.tokenizer_state import describe

    parameters = sum(p.numel() for p in model.parameters())
    how = "a new model" if resumed is None else f"resuming at step {resumed}"
    say(f"{manager.checkpoint_dir}: {how}, {parameters:,} parameters on {device}")
    vocabulary = describe(corpus.tokenizer.state())
    say(f"tokens: {len(corpus.train):,} to train on, {len(corpus.val):,} to validate with, {vocabulary}")
    if toy:
        config = model.config
        say(
            f"no GPU: a small preset ({config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, "
            f"block {config.block_size}); every size is a flag"
        )


def finish(
    manager: CheckpointManager,
    model: GPT | GPTFlexAttention,
    corpus: Corpus,
    val_loss: float | None,
    samples: bool,
) -> None:
    """Show what was learned, and what to do with it."""
    from core.errors import CheckpointError

    uniform = math.log(corpus.tokenizer.vocab_size)
    if val_loss is not None:
        say(f"done: step {model.step}, validation loss {val_loss:.4f} (a uniform guess has {uniform:.2f})")
    try:
        if samples:  # a model in shards would need all ranks for it
            sample = model.generate("", max_new_tokens=200, temperature=0.8, top_k=200, seed=1)
            say("a sample:")
            print(sample.strip("\n"), flush=True)
    except CheckpointError as error:  # a dataset of GPT-2 tokens trains without the ranks that turn them into text
        say(f"no sample: {error}")
    where = (
        ""
        if manager.checkpoint_dir.parent == Path("checkpoints")
        else f" --checkpoint_root {manager.checkpoint_dir.parent}"
    )
    name = f"--model_name {manager.model_name}{where}"
    say(
        f"next:\n  python generate.py {name} --prompt 'The '\n  python inspect_model.py {name}\n"
        f"  python train.py {name} --max_iters {2 * model.step}"
    )


def make_parser() -> Parser:
    """Describe the flags, grouped as one screen."""
    parser = Parser("train.py", "Train a GPT on text. The same line starts, resumes and continues.", EPILOG)
    parser.usage = "train.py [--FLAG VALUE ...]"  # the groups below show each flag, once

    def group(title: str, *flags: tuple[str, Callable[[str], Any], str]) -> argparse._ArgumentGroup:
        made = parser.add_argument_group(title)
        for flag, kind, text in flags:
            made.add_argument(flag, type=kind, help=text, metavar=METAVARS[kind])
        return made

    data = group(
        "data",
        ("--input_file", Path, "a text file, or a folder of them"),
        ("--dataset_dir", Path, "a folder of data/prepare.py, nanoGPT (train.bin) or modded-nanogpt (*.bin shards)"),
        ("--tokenization", str, "char (default), gpt2, or a Hugging Face tokenizers JSON file"),
        ("--bpe_file", Path, "the GPT-2 ranks, for a machine without network"),
    )
    data.add_argument("--unknown", choices=("error", "skip"), help="what a character without a place does (error)")
    group(
        "model (a checkpoint knows its own; these start a new one)",
        ("--n_layer", count, "layers"),
        ("--n_head", count, "attention heads"),
        ("--n_embd", count, "width, a multiple of the heads"),
        ("--block_size", count, "longest context, in tokens"),
        ("--dropout", below_one, "share of activations dropped while training"),
        ("--init_from_model", str, "start from the weights of another model below the root"),
        ("--init_from_checkpoint", Path, "start from a state_step*.pt of modded-nanogpt"),
    ).add_argument("--arch", choices=ARCHS, metavar="NAME", help=f"{', '.join(ARCHS)} (gpt)")
    group(
        "optimization",
        ("--max_iters", count, "optimizer steps in all"),
        ("--batch_size", count, "sequences per step and accumulation"),
        ("--gradient_accumulation_steps", count, "batches per optimizer step"),
        ("--learning_rate", positive, "peak learning rate of AdamW; of Muon for flex_*, the rest in proportion"),
        ("--warmup_iters", above_or_zero, "steps of linear warm-up, or a fraction of --lr_decay_iters"),
        ("--lr_decay_iters", count, "step at which a cosine is lowest; independent of --max_iters"),
        ("--weight_decay", above_or_zero, "of matrices"),
        ("--grad_clip", above_or_zero, "largest gradient norm; 0 for none"),
        ("--ema", below_one, "keep an average of the weights of this decay, like 0.999; 0 for none"),
    ).add_argument("--lr_schedule", choices=("constant", "cosine"), help="after warm-up (constant)")
    saving = group(
        "evaluation and saving",
        ("--eval_interval", count, "steps between evaluations (250)"),
        ("--eval_iters", count, "batches per evaluation (20)"),
        ("--save_interval", count, "steps between saves (as --eval_interval)"),
        ("--save_every_minutes", positive, "save as well when the last save was this long ago"),
        ("--stop_after_minutes", positive, "finish the step, save and exit with 75 this long after the start"),
    )
    saving.add_argument(
        "--save_policy", choices=("wait", "skip"), default="wait", help="of a save while one is written (wait)"
    )
    saving.add_argument(
        "--max_failed_saves", type=count, metavar="N", default=3, help="failed saves in a row that end the run (3)"
    )
    saving.add_argument(
        "--stage_memory",
        type=lambda word: size(word, least=0),
        metavar="SIZE",
        help="memory for a step on its way to disk: 2GB, 500MB, 0 for 48 MB (half of what is free)",
    )
    saving.add_argument("--keep", type=whole, metavar="N", help="older steps to keep besides the best (1)")
    saving.add_argument("--keep_every", type=count, metavar="N", help="keep every step that N divides")
    saving.add_argument("--strict_resume", action="store_true", help="refuse to go on where the resume is not exact")
    past = parser.add_argument_group("the past of a run (inspect_model.py --history shows it)")
    past.add_argument(
        "--resume_from", type=whole, metavar="STEP", help="go back to a kept step; what came after it is kept aside"
    )
    past.add_argument(
        "--prune", action="store_true", help="remove what lies aside (and, with --keep, older steps), and train nothing"
    )
    past.add_argument(
        "--allow_fresh", action="store_true", help="where no checkpoint is intact, move all aside and start anew"
    )
    past.add_argument("--no_verify", action="store_false", dest="verify", help="do not compare checksums on resume")
    machine = group("machine", ("--seed", seed_number, "of data order, dropout and initialisation (1337)"))
    saving.add_argument("--consolidate", action="store_true", help="at the end, make plain files of shards (fsdp)")
    machine.add_argument("--parallel", choices=PARALLEL, help="under torchrun: a whole model per rank, or shards (ddp)")
    machine.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    machine.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="arithmetic of the forward pass; weights stay fp32 (flex_*: but for embeddings)",
    )
    machine.add_argument("--compile", action="store_true", default=None, help="use torch.compile")
    machine.add_argument("--no_compile", action="store_false", dest="compile", help="do not")
    return parser


if __name__ == "__main__":
    run(main)
