"""Flags of a conversion for sharded checkpoints, and the spelling of the converter that BAGEL's users know."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..console.commandline import Parser


def add_sharded_flags(parser: Parser) -> None:
    """Add the flags that sharded checkpoints need."""
    group = parser.add_argument_group("sharded checkpoints")
    group.add_argument("--save_ema", action="store_true", help="take the EMA weights instead of the main ones")
    match = "write the names, shapes and dtypes of this model's safetensors, and take from it what SRC lacks"
    group.add_argument("--match_original", metavar="DIR", nargs="?", const="", help=match)
    like = "rebuild a lost .metadata after this folder (default: the one beside it), or a torch file of the model"
    group.add_argument("--metadata_from", metavar="PATH", type=Path, help=like)
    group.add_argument("--checkpoint_dir", metavar="SRC", help="another spelling of SRC, with --output_path")
    group.add_argument("--output_path", metavar="DST", help="another spelling of DST; --to safetensors is understood")
    group.add_argument("--model_path", metavar="DIR", help="the folder for a --match_original without one")


def take_spelling(parser: Parser, args: argparse.Namespace) -> None:
    """Turn --checkpoint_dir, --output_path and --model_path into SRC, DST and the folder of --match_original."""
    if (args.checkpoint_dir is None) != (args.output_path is None):
        parser.error("--checkpoint_dir and --output_path go together; without them name SRC and DST")
    if args.checkpoint_dir is not None:
        if args.paths:
            parser.error(f"--checkpoint_dir and --output_path are SRC and DST; found {args.paths[0]} as well")
        args.paths = [args.checkpoint_dir, args.output_path]
        args.to = args.to or "safetensors"
    if args.model_path is not None and args.match_original is None:
        parser.error("--model_path is for --match_original, which is not there")
    if args.match_original == "":
        if args.model_path is None:
            parser.error("--match_original needs the folder of the model, behind it or as --model_path")
        args.match_original = args.model_path
    elif args.model_path not in (None, args.match_original):
        parser.error("--match_original and --model_path name two models; give one")


def more_of(args: argparse.Namespace) -> dict[str, Any]:
    """What these flags ask for, as `Options.more`."""
    original = Path(args.match_original) if args.match_original else None
    return {"save_ema": args.save_ema, "match_original": original, "metadata_from": args.metadata_from}
