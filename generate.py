"""Write text with a trained model: text goes to stdout as it is generated, everything else to stderr."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from core.bundle.find import add_legacy_flag, choose_model, legacy_path
from core.console.commandline import DONE, Parser, above_or_zero, number, run, seed_number
from core.console.streams import unguarded
from core.console.words import tell
from core.containers.step_parents import NEWEST
from core.conversion.command import add_source_flags, flags_of_source, source_options

if TYPE_CHECKING:
    from core.model import GPT, GPTBatched

SEPARATOR = "-" * 40

COMMON = (
    *("model_name", "checkpoint_root", "config_file", "step", "tokenization", "device", "dtype"),
    *("prompt", "stop", "max_new_tokens", "num_samples", "temperature", "top_k", "top_p", "seed"),
    *("no_stream", "out", "json", "quiet"),
)
"""The flags of --help."""

EPILOG = """examples:
  python generate.py                                            the only model there is, from an empty prompt
  python generate.py --model_name dante --prompt "The "         continue a prompt
  python generate.py --model_name dante --step best             the kept step with the best validation loss
  python generate.py gpt2/ --prompt "The "                      a checkpoint of any program, as it lies there

more examples:
  python generate.py --model_name dante --temperature 0         always the likeliest token: the same text each time
  python generate.py state_step001770.pt --tokenization gpt2    --checkpoint PATH is another spelling
  python generate.py --model_name dante --prompt "The " --stop .    up to the first full stop, without it
  python generate.py --model_name dante --top_k 20 --seed 1 --num_samples 3 --json > samples.jsonl
  python generate.py --model_name dante --num_samples 20 --out texts    texts/0001.txt to texts/0020.txt

The seed is printed on stderr, so that a text can be generated again; sample i of a run uses seed + i.
With an empty prompt the text starts after a line break (char) or the end-of-text token (gpt2).
When the context is full, its older half is dropped.
"""


def main(argv: list[str]) -> int:
    """Generate, and return the exit code."""
    parser = make_parser()
    args = parser.parse(argv)
    if args.legacy_checkpoint and args.step is not None:
        parser.error("--legacy_checkpoint and --step name two checkpoints; give one of them")
    path = args.path or args.checkpoint
    if args.path and args.checkpoint:
        parser.error(f"PATH and --checkpoint both name a checkpoint: {args.path}, {args.checkpoint}; give one of them")
    if path and (args.legacy_checkpoint or args.model_name):
        parser.error("PATH or --checkpoint names a file or folder: leave out --model_name and --legacy_checkpoint")
    if args.ema and args.legacy_checkpoint:
        parser.error("--ema takes the average in a model's folder; a single file has none")
    if args.seed is None:
        args.seed = secrets.randbelow(2**31)
    if args.out:
        refuse_full_folder(args.out)
    replace_what_stdout_lacks()
    if path and not is_model_of_ours(path):
        return write_samples(open_foreign(parser, path, args), str(path), args)
    if given := flags_of_source(args):
        parser.error(f"--{given[0]}: for a checkpoint of another program that does not show it; leave it out")
    single = legacy_path(parser, args)
    name = str(path or single or "") or choose_model(args)

    from core.checkpoint import CheckpointManager
    from core.data.tokenizer import named_tokenizer
    from core.errors import InputError
    from core.model import GPTFlexAttention

    folder = single.absolute().parent if single else path.absolute() if path else Path(args.checkpoint_root) / name
    model = CheckpointManager.load_for_inference(
        folder.name,
        folder.parent,
        legacy_filename=single.name if single else None,
        load_dtype=args.dtype,
        device=args.device,
        step=None if args.step == NEWEST else args.step,
        bpe_file=args.bpe_file,
        verify=args.verify,
        ema=args.ema,
    )
    if model.tokenizer is None and args.tokenization:
        model.tokenizer = named_tokenizer(args.tokenization, args.bpe_file)
    if model.tokenizer is None:
        raise InputError(
            f"{single or folder}: no tokenizer with it, expected one to turn tokens into text. Give --tokenization."
        )
    return write_samples(model.batched() if isinstance(model, GPTFlexAttention) else model, name, args)


def is_model_of_ours(path: Path) -> bool:
    """Whether a path is the folder of a model of ours, which has steps."""
    from core.bundle.step_place import is_ours

    return path.is_dir() and is_ours(path)


def open_foreign(parser: Parser, path: Path, args: argparse.Namespace) -> GPT | GPTBatched:
    """Open the checkpoint of another program at a path, with the tokenizer that is found beside it or named."""
    from core.bundle.step_place import step_place
    from core.data.tokenizer import named_tokenizer
    from core.errors import InputError
    from core.loading.modded import refuse_large_tokenizer
    from core.networks.device import resolve_dtype
    from core.pretrained import open_checkpoint

    if args.ema or args.step == "best":
        parser.error(f"{'--ema' if args.ema else '--step best'}: only a folder of ours has it, which {path} is not")
    model = open_checkpoint(
        path if args.step is None else step_place(path, args.step),
        source_options(args),
        device=args.device or "auto",
        dtype=resolve_dtype(args.dtype),
        tokenizer=args.tokenization is None,
        say=tell,
        verify=args.verify,
        bpe_file=args.bpe_file,
    )
    if args.tokenization:
        model.tokenizer = named_tokenizer(args.tokenization, args.bpe_file)
        refuse_large_tokenizer(model.tokenizer, model.config, f"--tokenization {args.tokenization}")
    if model.tokenizer is None:
        raise InputError(
            f"{path}: no tokenizer in it or beside it. Give --tokenization gpt2, or a Hugging Face tokenizers JSON "
            "file, or --meta FILE, the characters of nanoGPT."
        )
    return model


def write_samples(model: GPT | GPTBatched, name: str, args: argparse.Namespace) -> int:
    """Print all samples, and on stderr the model that wrote them and its speed."""
    from core.data.gpt2_ranks import keep_given

    keep_given(args.bpe_file)
    assert model.tokenizer is not None
    parameters = sum(p.numel() for p in model.parameters())
    tell(f"{name}: step {model.step}, {parameters / 1e6:.2f} M parameters, {model.device}, seed {args.seed}")
    ids = [int(i) for i in model.tokenizer.encode(args.prompt, unknown=args.unknown, where="--prompt")]
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    started, tokens = time.perf_counter(), 0
    for sample in range(args.num_samples):
        tokens += write_sample(model, name, ids, sample, args)
    seconds = time.perf_counter() - started
    tell(f"{tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.1f} tokens/s)")
    if args.out:
        tell(f"{args.num_samples} {'text' if args.num_samples == 1 else 'texts'} in {args.out}")
    return DONE


def write_sample(model: GPT | GPTBatched, name: str, ids: list[int], nth: int, args: argparse.Namespace) -> int:
    """Write one sample: token by token, as a whole, as one line of JSON, or to a file; returns its tokens."""
    from core.networks.generation import start_ids, stream, text_after, until

    assert model.tokenizer is not None
    ids = ids or start_ids(model.tokenizer)
    seed = args.seed + nth
    new = stream(
        model,
        ids,
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=seed,
    )
    text, count = text_after(model.tokenizer, ids), 0

    def decoded() -> Iterator[str]:
        nonlocal count
        for token in new:
            count += 1
            yield text.push(token)
        yield text.flush()

    pieces = until(decoded(), args.stop or [])
    out = sys.stdout if sys.stdout.isatty() else unguarded(sys.stdout)  # a file gets every character as it is
    if args.stream and not (args.json or args.out):
        if nth:
            print(SEPARATOR)
        for piece in itertools.chain([args.prompt], pieces):
            print(piece, end="", flush=True, file=out)
        print(flush=True, file=out)
        return count
    written = "".join(pieces)
    page = args.prompt + written
    if args.json:
        sample = {"model": name, "step": model.step, "seed": seed, "prompt": args.prompt, "text": written}
        page = json.dumps(sample, ensure_ascii=False)
    if args.out:
        path = args.out / f"{nth + 1:04d}.{'json' if args.json else 'txt'}"
        with path.open("x", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(page + "\n")
    elif args.json:
        print(page, flush=True)
    else:
        print((SEPARATOR + "\n" if nth else "") + page, flush=True, file=out)
    return count


def refuse_full_folder(folder: Path) -> None:
    """Raise InputError for a place of --out that is no folder, or holds something: nothing is overwritten."""
    from core.errors import InputError

    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder}: is not empty, expected a new or empty folder for --out. Nothing was written.")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, expected a new or empty folder for --out. Nothing was written.")


def replace_what_stdout_lacks() -> None:
    """Let stdout replace characters that its encoding lacks: a model may draw any character of its vocabulary."""
    if isinstance(stream := unguarded(sys.stdout), io.TextIOWrapper):
        stream.reconfigure(errors="replace")


def step_or_best(word: str) -> int | str:
    """Read --step."""
    if word in ("best", NEWEST) or (word.isascii() and word.isdigit()):
        return int(word) if word.isdigit() else word
    raise argparse.ArgumentTypeError(f"found {word!r}, expected a step number or best, or {NEWEST}")


def some_text(word: str) -> str:
    """Read --stop, which would end every text at once if it were empty."""
    if not word:
        raise argparse.ArgumentTypeError("found no text, expected one that ends what is written")
    return word


COUNT = number(int, 0, 2**31, "a whole number of at least 0")
POSITIVE = number(int, 1, 2**31, "a whole number of at least 1")
SHARE = number(float, sys.float_info.min, 1, "a number above 0 and at most 1")


def make_parser() -> Parser:
    """Describe the flags, grouped as one screen."""
    parser = Parser("generate.py", "Write text with a trained model.", EPILOG, common=COMMON)
    parser.usage = "generate.py [PATH] [--FLAG VALUE ...]"
    what = "a checkpoint of any program, or a model's folder anywhere"
    parser.add_argument("path", type=Path, nargs="?", metavar="PATH", help=what)
    loading = parser.add_argument_group("loading")
    loading.add_argument(
        "--step", type=step_or_best, metavar="N|best", help="a kept step, or the best one (default: the newest)"
    )
    loading.add_argument("--ema", action="store_true", help="use the average of the weights, from a run with --ema")
    add_legacy_flag(loading)
    loading.add_argument("--checkpoint", type=Path, metavar="PATH", help="another spelling of PATH")
    loading.add_argument(
        "--tokenization", metavar="NAME", help="gpt2, or a Hugging Face tokenizers JSON file, if none is saved"
    )
    loading.add_argument("--meta", type=Path, metavar="FILE", help="nanoGPT's meta.pkl, if it is not beside PATH")
    loading.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: as in config.json)")
    loading.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="dtype of the weights (default: as saved)")
    loading.add_argument(
        "--bpe_file", type=Path, metavar="FILE", help="the file of GPT-2 ranks, for a machine without network access"
    )
    loading.add_argument(
        "--no_verify", action="store_false", dest="verify", help="do not compare the checksums of what is loaded"
    )
    _add_text_flags(parser)
    add_source_flags(parser)
    return parser


def _add_text_flags(parser: Parser) -> None:
    """Describe the flags of the text, of how it is drawn and of how it is printed."""
    text = parser.add_argument_group("text")
    text.add_argument("--prompt", default="", metavar="TEXT", help="the beginning of the text (default: empty)")
    text.add_argument(
        "--unknown",
        choices=("error", "skip"),
        default="error",
        help="a character outside the vocabulary is an error, or skipped (default: error)",
    )
    text.add_argument("--max_new_tokens", type=COUNT, default=200, metavar="N", help="tokens to add (default: 200)")
    stop = "end a text before this one; may be repeated"
    text.add_argument("--stop", type=some_text, action="append", metavar="TEXT", help=stop)
    text.add_argument("--num_samples", type=POSITIVE, default=1, metavar="N", help="texts to write (default: 1)")
    drawing = parser.add_argument_group("sampling")
    drawing.add_argument(
        "--temperature",
        type=above_or_zero,
        default=0.8,
        metavar="T",
        help="lower is safer; 0 always takes the likeliest token (default: 0.8)",
    )
    drawing.add_argument(
        "--top_k", type=POSITIVE, metavar="K", help="sample from the K likeliest tokens (default: all)"
    )
    drawing.add_argument(
        "--top_p",
        type=SHARE,
        metavar="P",
        help="sample from the likeliest tokens whose probabilities reach P (default: all)",
    )
    drawing.add_argument(
        "--seed", type=seed_number, metavar="N", help="the same seed gives the same text (default: a new seed)"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--stream", action="store_true", default=True, help="print each token as it is generated (the default)"
    )
    output.add_argument("--no_stream", action="store_false", dest="stream", help="print each text when it is complete")
    folder = "write each text to a file in this folder, which must be new or empty"
    output.add_argument("--out", type=Path, metavar="DIR", help=folder)
    output.add_argument(
        "--json", action="store_true", help="print one JSON object per text: model, step, seed, prompt, text"
    )


if __name__ == "__main__":
    run(main)
