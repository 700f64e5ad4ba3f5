"""Train a GPT on text: the same command starts a run, resumes it and continues it."""

from __future__ import annotations

import argparse
import contextlib
from typing import TYPE_CHECKING, Any

from core.console.commandline import DONE, STOPPED, rules_given, run, spin_briefly
from core.console.signals import StopSignal, decide_exit_code
from core.console.streams import outlive_terminal
from core.console.words import tell
from core.conversion.command import source_options
from core.training.flags import CONFIG_FLAGS, parse

if TYPE_CHECKING:
    from core.bundle.bundle import Bundle
    from core.checkpoint import CheckpointManager
    from core.data.corpus import Corpus
    from core.data.source import Source
    from core.model import GPT, GPTFlexAttention
    from core.networks.distributed import World
    from core.training.fit import FitResult


def main(argv: list[str]) -> int:
    """Train, and return the exit code."""
    spin_briefly()
    args = parse(argv)
    with StopSignal(args.stop_after_minutes, owns_process=True) as stop:
        return prune_or_train(args, stop)


def prune_or_train(args: argparse.Namespace, stop: StopSignal) -> int:
    """Do what the flags request, as the only writer of the model."""
    from core.checkpoint import CheckpointManager
    from core.networks.distributed import open_world
    from core.training.pruning import prune
    from core.training.ranks import WorldRanks

    with open_world(args.parallel) as world:
        if args.prune:
            return prune(args, WorldRanks(world))
        manager = CheckpointManager(
            args.model_name or "default",
            args.checkpoint_root,
            verify=args.verify,
            allow_fresh=args.allow_fresh,
            save_policy=args.save_policy,
            stage_memory=args.stage_memory,
            ranks=WorldRanks(world),
            log_to=args.log,
        )
        with manager:
            if args.resume_from is not None:
                args.seed = manager.seed_in_use() if args.seed is None else args.seed
                manager.go_back(args.resume_from)
            with manager.newest_intact(args.init_from_checkpoint, to_train=True) or contextlib.nullcontext() as bundle:
                return train(manager, bundle, args, stop)


def train(manager: CheckpointManager, bundle: Bundle | None, args: argparse.Namespace, stop: StopSignal) -> int:
    """Train from an open step, or from scratch."""
    from core.kinds import kind_of
    from core.kinds.kind import Request
    from core.kinds.origin import open_origin
    from core.networks.device import DTYPES
    from core.training.fit import fit_with
    from core.training.report import say_preset, say_what_runs
    from core.training.settings import Settings, origin_of

    flags = {name: value for name, value in vars(args).items() if value is not None}
    world = manager.ranks.world

    # 1. The model and its device: the kind of the checkpoint, or of --arch.
    given = {name: flags[name] for name in CONFIG_FLAGS if name in flags}
    path = args.init_from_checkpoint if bundle is None else None
    origin = open_origin(path, args.arch, source_options(args), args.verify) if path else None
    kind = kind_of(bundle, origin.arch if origin else args.arch, world)
    device, given = choose_device(bundle, given, world)

    # 2. The settings: a flag wins over the run so far, which wins over the preset.
    so_far, preset = bundle.settings if bundle else {}, kind.preset(device.type == "cpu")
    settings = Settings.resolve(flags, so_far, preset, bundle.step if bundle else 0)
    world.refuse_fp16_shards(settings.dtype)
    if bundle and settings.is_done(bundle.state, so_far):
        kind.refuse_contradictions(bundle, given)
        tell(
            f"{manager.checkpoint_dir}: step {bundle.step}, and max_iters is {settings.max_iters}: nothing to do. "
            f"Continue with --max_iters {bundle.step + settings.max_iters}."
        )
        return DONE

    # 3. The data: text or tokens, and the tokenizer that a checkpoint or another model has.
    known_by = bundle or origin
    known = known_by.tokenizer if known_by else manager.tokenizer_state(args.init_from_model)
    source, corpus = open_data(manager.model_name, bundle, known, args)
    schedule = settings.schedule()

    # 4. The model and its optimizer: resumed, from other weights, or new.
    wish = flags.get("dtype") or (None if bundle else settings.dtype)
    request = Request(
        given,
        corpus.tokenizer,
        schedule.learning_rate,
        weight_decay=flags.get("weight_decay") if bundle else settings.weight_decay,
        preset=preset,
        seed=settings.seed,
        dtype=DTYPES[wish] if wish else None,
        init_from_model=args.init_from_model,
        origin=origin,
    )
    model, optimizer, start = manager.start(kind, request, bundle)

    # 5. The batches: a function of (seed, step).
    loader = kind.loader(corpus, model, settings.seed)

    # 6. The loop.
    say_what_runs(manager, model, corpus, start if bundle else None)
    if device.type == "cpu" and not (bundle or origin or args.init_from_model):
        say_preset(preset, given)
    manager.keep_as(bundle.state if bundle else {}, **rules_given(args))
    world.agree("data", source.record())
    manager.record(data=source.record(), training=settings.recorded(so_far), command=args.command)
    for line in [*(origin_of(bundle.state, so_far, settings) if bundle else []), *settings.changes(so_far)]:
        tell(line)
    dtype = DTYPES[settings.dtype if kind.autocasts else "fp32"]
    result = fit_with(settings, model, loader, optimizer, manager, schedule, dtype, stop=stop, world=world)

    # 7. The report.
    return report(manager, model, corpus, result, args)


def choose_device(bundle: Bundle | None, given: dict[str, Any], world: World) -> tuple[Any, dict[str, Any]]:
    """The device, and the given fields; with several ranks, each is given its own device."""
    from core.bundle.folder import CONFIG
    from core.networks.device import resolve_device

    recorded = bundle.config_values.get("device") if bundle else None
    if bundle and bundle.config:
        recorded = bundle.config.device
    wish = given.get("device") or recorded or "auto"
    where = str(bundle.path(CONFIG)) if bundle and "device" not in given else "--device"
    if world.size > 1:
        wish = world.device_of(wish)
        given = {**given, "device": wish}
    return resolve_device(wish, where), given


def open_data(name: str, bundle: Bundle | None, recorded: Any, args: argparse.Namespace) -> tuple[Source, Corpus]:
    """Find the text or tokens of a run, and read them with the recorded tokenizer of its model."""
    from core.data.corpus import open_corpus
    from core.data.gpt2_ranks import keep_given
    from core.data.source import find_source
    from core.data.tokenizer import tokenizer_from_state

    so_far = bundle.state.data if bundle else None
    weights = bundle.folder if bundle else None
    source = find_source(args.input_file, args.dataset_dir, so_far, name, weights=weights)
    tell(source.line())
    if changed := source.changed(so_far):
        tell(f"WARNING: {changed}")
    tokenization = args.tokenization
    if recorded is not None and tokenization in (None, recorded.get("token_kind")):
        tokenization = tokenizer_from_state(recorded, args.bpe_file)
    corpus = open_corpus(source, tokenization, bpe_file=args.bpe_file, unknown=args.unknown or "error")
    keep_given(args.bpe_file)
    for note in corpus.notes:
        tell(note)
    return source, corpus


def report(
    manager: CheckpointManager,
    model: GPT | GPTFlexAttention,
    corpus: Corpus,
    result: FitResult,
    args: argparse.Namespace,
) -> int:
    """Report how a run ended, and return the exit code."""
    if result.stopped_by:
        command = "the same command" if args.resume_from is None else "the same command without --resume_from"
        tell(f"stopped by {result.stopped_by} after step {result.step}, which is saved. Run {command} to continue.")
        return STOPPED
    if args.consolidate:
        manager.consolidate()
    if manager.ranks.world.is_first:
        from core.training.report import say_result

        say_result(manager, model, corpus.tokenizer, result.val_loss)
    return DONE


if __name__ == "__main__":
    outlive_terminal()
    decide_exit_code()
    run(main)
