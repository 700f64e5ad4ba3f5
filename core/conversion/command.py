"""The command line of a conversion: its flags, and what it prints."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ..config.gpt import ACTIVATIONS, ATTENTION_SCALES, PLACEMENTS_OF_OLD
from ..console.commandline import DONE, FAILED, Parser, add_check_flags, count, positive, size, step
from ..console.progress import byte_bar
from ..console.words import printable
from ..errors import CheckpointMismatch
from ..families.choices import ACTIVATIONS as SPELLINGS
from ..families.choices import FLAGS as CHOICES
from .plan import DTYPES, Options, Plan

TO = ("bundle", "nanogpt", "hf", "megatron", "litgpt", "safetensors", "pt", "dcp")


def add_flags(parser: Parser) -> None:
    """Add the flags of a conversion."""
    group = parser.add_argument_group("conversion")
    group.add_argument("--to", choices=TO, metavar="FORMAT", help=f"the format of DST: {', '.join(TO)}")
    steps = "the step of SRC to convert: a number, or newest (of a model of ours a kept step)"
    group.add_argument("--step", metavar="N", type=step, help=steps)
    group.add_argument("--list", action="store_true", help="list the possible conversions")
    dtypes = "cast floating-point tensors, rounding to nearest even (default: keep)"
    group.add_argument("--dtype", choices=[*DTYPES, "keep"], default="keep", help=dtypes)
    group.add_argument(
        "--shard_size", metavar="SIZE", type=size, help="cut safetensors into files of at most 5GB, 500MB"
    )
    tied = group.add_mutually_exclusive_group()
    tied.add_argument("--tied", action="store_true", help="the head is the token table; refused when it is not")
    tied.add_argument("--untied", action="store_true", help="write the head as a tensor of its own")
    rows = "rows of the vocabulary: crop padding, or pad with zeros (default: as they are)"
    group.add_argument("--vocab_size", metavar="N", type=count, help=rows)
    optimizer = "include the optimizer state (--to bundle always does)"
    group.add_argument("--include_optimizer", action="store_true", help=optimizer)
    group.add_argument("--meta", metavar="FILE", type=Path, help="nanoGPT's meta.pkl: the characters of a vocabulary")
    ranks = "the file of GPT-2's ranks, of which --to hf makes tokenizer.json (default: those on this machine)"
    group.add_argument("--bpe_file", metavar="FILE", type=Path, help=ranks)
    add_choice_flags(parser)
    _add_megatron_flags(parser)
    add_sharded_flags(parser)
    add_check_flags(parser)
    average = "write the mean of the weights of all PATHs, as --output_path"
    group.add_argument("--average", action="store_true", help=average)
    group.add_argument("--overwrite", action="store_true", help="move an existing DST aside")
    group.add_argument("--no_verify", action="store_true", help="do not read the result back and compare it")


def add_choice_flags(parser: Parser, heads: bool = True) -> None:
    """Add flags for choices that a file may leave open; none of them has a default."""
    group = parser.add_argument_group("what the model computes, where the file does not show it")
    if heads:
        group.add_argument("--n_head", "--num_attention_heads", metavar="N", type=count, help="attention heads")
    activations = "of the feed-forward part: gelu (the exact form), gelu_tanh, relu"
    group.add_argument("--activation", metavar="NAME", type=_activation, help=activations)
    scale = "the factor of attention scores: head_size ** -0.5, n_embd ** -0.5, or a number"
    group.add_argument("--attention_scale", metavar="SCALE", type=_scale, help=scale)
    placement = "norms before attention and feed-forward, or after the sums"
    group.add_argument("--norm_placement", choices=PLACEMENTS_OF_OLD, help=placement)
    group.add_argument("--norm_eps", metavar="X", type=positive, help="epsilon of the norms")
    group.add_argument("--rope_theta", metavar="X", type=positive, help="base of the rotary embedding")


def _activation(text: str) -> str:
    if text not in SPELLINGS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(ACTIVATIONS)}")
    return SPELLINGS[text]


def _scale(text: str) -> str | float:
    return text if text in ATTENTION_SCALES else positive(text)


def _add_megatron_flags(parser: Parser) -> None:
    """Add flags for the settings that a Megatron file lacks; defaults that are used are printed."""
    group = parser.add_argument_group("Megatron models, for settings that no config beside the tensors has")
    scaling = "factor of Llama 3's scaling of the frequencies (off; 8 in a run with --use-rope-scaling)"
    group.add_argument("--rope_scaling_factor", metavar="X", type=positive, help=scaling)
    group.add_argument("--rotary_percent", metavar="X", type=positive, help="part of a head that is rotated (1)")
    group.add_argument(
        "--layernorm_1p", action="store_true", default=None, help="norm weights are stored as gamma - 1: add 1"
    )
    group.add_argument("--max_position_embeddings", metavar="N", type=count, help="longest text, of rotary positions")
    group.add_argument("--bos_token_id", metavar="N", type=int, help="token that begins a text (none)")
    group.add_argument("--eos_token_id", metavar="N", type=int, help="token that ends a text (none)")


def add_source_flags(parser: Parser, heads: bool = True) -> None:
    """Add the flags for what a checkpoint of another program leaves open, for scripts that open it as it is.

    Without `heads` the script has an --n_head of its own.
    """
    add_choice_flags(parser, heads)
    _add_megatron_flags(parser)


def flags_of_source(args: argparse.Namespace) -> list[str]:
    """The names of the flags of `add_source_flags`, and of --meta, that are given."""
    made = source_options(args)
    return [*made.choices, *made.more, *(["meta"] if made.meta else [])]


def source_options(args: argparse.Namespace) -> Options:
    """Make the options from the flags of `add_source_flags`, and --meta where there is one."""
    from .pairs.megatron_settings import FLAGS

    choices, more = (
        {name: value for name in names if (value := getattr(args, name)) is not None} for names in (CHOICES, FLAGS)
    )
    return Options(choices=choices, more=more, meta=getattr(args, "meta", None))


def options_of(args: argparse.Namespace) -> Options:
    """Make the options from the flags."""
    original = Path(args.match_original) if args.match_original else None
    parts = {"save_ema": args.save_ema, "match_original": original, "metadata_from": args.metadata_from}
    told = source_options(args)
    return replace(
        told,
        dtype=DTYPES.get(args.dtype),
        shard_size=args.shard_size,
        tied=True if args.tied else False if args.untied else None,
        vocab_size=args.vocab_size,
        include_optimizer=args.include_optimizer,
        bpe_file=args.bpe_file,
        more={**told.more, **parts},
        average_with=tuple(map(Path, args.paths[1:-1])),
    )


class Check(Protocol):
    """The result of proving a model by a text."""

    @property
    def line(self) -> str:
        """The result in one line."""

    @property
    def faults(self) -> list[str]:
        """What speaks against the model, a sentence each."""


def convert_one(parser: Parser, args: argparse.Namespace, check: Callable[[Plan], Check] | None = None) -> int:
    """Convert SRC to DST as the flags specify, with a progress bar when it takes time; returns the exit code.

    `check` proves what was written by a text.
    """
    if args.model_name:
        parser.error("--model_name selects a model to migrate; with --to name SRC and DST as paths")
    if len(args.paths) != 2 and not args.average:
        parser.error(f"--to takes two paths, SRC and DST; found {len(args.paths)}")
    from .planning import plan_conversion
    from .text import plan_facts, plan_text, summary
    from .writing import convert

    source, target = Path(args.paths[0]), Path(args.paths[-1])
    if args.step is not None:
        if args.average:
            parser.error("--step takes one step of SRC, and --average several checkpoints; leave one out")
        from ..bundle.step_place import step_place

        source = step_place(source, args.step)
    with ExitStack() as held:
        plan = plan_conversion(source, target, args.to, options_of(args), held)
        if args.paths[-1].endswith(os.sep) and not plan.is_folder:
            raise CheckpointMismatch(
                f"{args.paths[-1]}: names a folder, and --to {args.to} writes a file. Name the file."
            )
        if args.dry_run:
            print(json.dumps(plan_facts(plan), indent=2) if args.json else "\n".join(plan_text(plan)))
            return DONE
        verify = not args.no_verify
        with byte_bar("converting", plan.nbytes * (2 if verify else 1)) as bar:
            said = convert(plan, overwrite=args.overwrite, verify=verify, progress=bar.update)
        found = check(plan) if check is not None else None
    if args.bpe_file:
        from ..data.gpt2_ranks import keep_given

        keep_given(args.bpe_file)
    faults = found.faults if found is not None else []
    if args.json:
        proof = {} if found is None else {"check": {**vars(found), "faults": faults}}
        print(json.dumps({**plan_facts(plan), "verified": verify, "said": said, **proof}, indent=2))
    else:
        for line in [*summary(plan), *said]:
            print(printable(line))
        print("read back and compared with the source, bit for bit" if verify else "not compared with the source")
        if found is not None:
            print(printable(found.line))
    for fault in faults:
        print(f"error: {printable(fault)} {plan.target} was written.", file=sys.stderr)
    return FAILED if faults else DONE


def print_matrix(as_json: bool) -> int:
    """Print which programs' models can be converted to which formats; returns the exit code."""
    from .text import matrix, matrix_text

    print(json.dumps(matrix(), indent=2) if as_json else "\n".join(matrix_text()))
    return DONE


def add_sharded_flags(parser: Parser) -> None:
    """Add the flags for sharded checkpoints."""
    group = parser.add_argument_group("sharded checkpoints")
    group.add_argument("--save_ema", action="store_true", help="convert the EMA weights instead of the main ones")
    match = "write the names, shapes and dtypes of this model's safetensors, and take tensors that SRC lacks from it"
    group.add_argument("--match_original", metavar="DIR", nargs="?", const="", help=match)
    like = "rebuild a lost .metadata from this folder (default: the one beside it), or from a torch file of the model"
    group.add_argument("--metadata_from", metavar="PATH", type=Path, help=like)
    group.add_argument("--checkpoint_dir", metavar="SRC", help="another spelling of SRC, with --output_path")
    group.add_argument("--output_path", metavar="DST", help="another spelling of DST; --to safetensors is understood")
    group.add_argument("--model_path", metavar="DIR", help="the folder for a --match_original without one")


def take_spelling(parser: Parser, args: argparse.Namespace) -> None:
    """Turn --checkpoint_dir, --output_path and --model_path into SRC, DST and the folder of --match_original."""
    if args.average:
        _take_average(parser, args)
    elif (args.checkpoint_dir is None) != (args.output_path is None):
        parser.error("--checkpoint_dir and --output_path go together; without them name SRC and DST")
    elif args.checkpoint_dir is not None:
        if args.paths:
            parser.error(f"--checkpoint_dir and --output_path are SRC and DST; found {args.paths[0]} as well")
        args.paths = [args.checkpoint_dir, args.output_path]
        args.to = args.to or "safetensors"
    if args.model_path is not None and args.match_original is None:
        parser.error("--model_path is for --match_original, which is missing")
    if args.match_original == "":
        if args.model_path is None:
            parser.error("--match_original needs the folder of the model, as its value or as --model_path")
        args.match_original = args.model_path
    elif args.model_path not in (None, args.match_original):
        parser.error("--match_original and --model_path name two models; give one")


def _take_average(parser: Parser, args: argparse.Namespace) -> None:
    """Put DST of --average behind its sources."""
    if args.output_path is None or args.checkpoint_dir is not None or len(args.paths) < 2:
        parser.error("--average takes two or more checkpoints as PATHs, and --output_path DST")
    if args.include_optimizer or args.match_original is not None:
        flag = "--include_optimizer" if args.include_optimizer else "--match_original"
        parser.error(f"--average is of weights as they are; leave out {flag}")
    args.paths = [*args.paths, args.output_path]
    args.to = args.to or "safetensors"
