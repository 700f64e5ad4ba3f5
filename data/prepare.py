"""Tokenize a text, or a folder of texts, into memory-mapped shards for `train.py --dataset_dir`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# A script in this folder finds the packages beside it when started from anywhere.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.bundle.tokenizer_state import describe
from core.console.commandline import DONE, Parser, run, spelled
from core.console.commands import typed
from core.data.corpus import choose_tokenizer, prepare
from core.data.gpt2_ranks import keep_given
from core.data.source import find_source
from core.data.token_shards import MANIFEST, SHARD_TOKENS, SPLITS, read_manifest
from core.errors import InputError


def main(argv: list[str]) -> int:
    """Prepare one dataset; progress goes to stderr, the result to stdout."""
    args = parse(argv)
    folder = Path(args.output_dir).absolute() if args.output_dir in ("", ".", "..") else Path(args.output_dir)
    source = find_source(args.input, None, None, "")
    tokenizer = choose_tokenizer(source, args.tokenization, Path(args.bpe_file) if args.bpe_file else None)
    if not (folder / MANIFEST).exists():
        prepare(
            source,
            tokenizer,
            folder,
            unknown=args.unknown,
            val_fraction=args.val_fraction,
            shard_tokens=args.shard_tokens,
        )
    keep_given(Path(args.bpe_file) if args.bpe_file else None)
    made = read_manifest(folder)
    origin = made["source"] if isinstance(made["source"], dict) else {}
    wanted = {"tokenizer": tokenizer.state(), "val_fraction": args.val_fraction, "unknown": args.unknown}
    if origin.get("digest") != source.digest or any(made.get(name) != value for name, value in wanted.items()):
        raise InputError(
            f"{folder}: holds another dataset (of {origin.get('path')}, {describe(made['tokenizer'])}, "
            f"val_fraction {made.get('val_fraction')}). Name a new folder; nothing was changed."
        )
    train, val = (sum(entry["tokens"] for entry in made[split]) for split in SPLITS)
    print(f"{folder}: {train:,} tokens to train on, {val:,} to validate with, {describe(tokenizer.state())}")
    print(f"next: {typed('python train.py')} {spelled('--dataset_dir', folder)}")
    return DONE


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line; wrong use exits with 2."""
    parser = Parser("data/prepare.py", __doc__ or "", model=False)
    parser.add_argument("input", metavar="INPUT", help="a UTF-8 text file, or a folder of .txt, .md and .py files")
    parser.add_argument("--output_dir", metavar="DIR", required=True, help="the new dataset folder")
    parser.add_argument(
        "--tokenization",
        metavar="KIND",
        default="char",
        help="char (default), gpt2, a Hugging Face tokenizers JSON file, or the tokenizer.json of a checkpoint",
    )
    parser.add_argument("--bpe_file", metavar="FILE", help="GPT-2's ranks (r50k_base.tiktoken)")
    parser.add_argument(
        "--val_fraction", metavar="F", type=_fraction, default=0.1, help="validation part (default: 0.1)"
    )
    parser.add_argument(
        "--shard_tokens",
        metavar="N",
        type=_count,
        default=SHARD_TOKENS,
        help=f"tokens per file (default: {SHARD_TOKENS:,})",
    )
    parser.add_argument(
        "--unknown",
        choices=("error", "skip"),
        default="error",
        help="a character outside the vocabulary is an error, or skipped (default: error)",
    )
    return parser.parse(argv)


def _fraction(word: str) -> float:
    if not 0 <= float(word) < 1:
        raise argparse.ArgumentTypeError(f"found {word}, expected a number of at least 0 and below 1")
    return float(word)


def _count(word: str) -> int:
    # The header of a shard counts in 32 bits.
    if not 0 < int(word) < 2**31:
        raise argparse.ArgumentTypeError(f"found {word}, expected a whole number from 1 to {2**31 - 1}")
    return int(word)


if __name__ == "__main__":
    run(main)
