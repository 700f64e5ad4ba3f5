"""Convert a checkpoint of one program to the format of another: convert_checkpoints.py SRC DST --to FORMAT.

Without --to: migrate single-file checkpoints (latest.pt, final.pt) to bundles. Sources are never changed.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from core.bundle.foreign import foreign_checkpoint
from core.bundle.names import missing_model
from core.console.commandline import DONE, FAILED, Parser, run
from core.console.progress import byte_bar, token_bar
from core.console.words import columns, printable, size_text
from core.conversion.command import CHOICES, Check, add_flags, convert_one, print_matrix, take_spelling
from core.conversion.migration.plan import FAILED as NOT_MIGRATED
from core.conversion.migration.plan import Candidates, Outcome, find, plan, work
from core.conversion.plan import Plan
from core.errors import CheckpointError, CheckpointNotFound
from core.networks.distributed import rank_of_torchrun

COMMON = (
    *("model_name", "checkpoint_root", "config_file", "dry_run", "json", "quiet", "to", "step", "list", "dtype"),
    *("shard_size", "include_optimizer", "meta", "n_head", "check_text", "average", "output_path", "overwrite"),
)
"""The flags of --help."""

EPILOG = """examples:
  python convert_checkpoints.py ckpt.pt checkpoints/dante --to bundle --meta data/dante/meta.pkl
  python convert_checkpoints.py gpt2/ checkpoints/gpt2 --to bundle      fine-tune it: train.py --init_from_model gpt2
  python convert_checkpoints.py checkpoints/dante dante-hf --to hf      transformers opens the folder
  python convert_checkpoints.py gpt2/ gpt2.safetensors --to safetensors --dtype bf16
  python convert_checkpoints.py --list                                  the possible conversions
  python convert_checkpoints.py --model_name dante      latest.pt and final.pt of a model become bundles

more examples:
  python convert_checkpoints.py gpt2/ small/ --to safetensors --shard_size 1GB
  python convert_checkpoints.py ckpt.pt x --to hf --dry_run             every tensor: source, rule, target, shape, bytes
  python convert_checkpoints.py 0000002/ ema.safetensors --to safetensors --match_original BAGEL/ --save_ema
  python convert_checkpoints.py model.safetensors sharded/ --to dcp     torch.distributed.checkpoint loads the folder
  python convert_checkpoints.py a.pt b.pt c.pt --average --output_path mean.pt --to pt    the mean of their weights

  python convert_checkpoints.py --model_name dante --consolidate        plain files of a step in shards
  python convert_checkpoints.py                         migrate every latest.pt and final.pt below checkpoints/
  python convert_checkpoints.py old_runs old/final.pt   those in folders and files anywhere

A conversion is planned from headers, and the plan is checked completely before the first byte is written. It streams
tensor by tensor, in the memory of one tensor. The result is written beside DST under a hidden name, read back,
converted back by the inverse rules, compared with SRC bit for bit (--no_verify skips this), and then published by one
rename. SRC is only read.

A migration turns the file with the highest step of a folder into its bundle, and the others into kept steps. No file is
changed or deleted; a second run skips what is done. Exit code 1 when something could not be converted or migrated.
"""

MIGRATION = {"paths", "dry_run", "json", "quiet", "list", "to", "model_name", "checkpoint_root", "config_file"}
"""Flags that are allowed without --to."""


def main(argv: list[str]) -> int:
    """Migrate the places that the command line names, and print the outcome; returns the exit code."""
    parser = Parser("convert_checkpoints.py", __doc__ or "", EPILOG, common=COMMON)
    parser.usage = "convert_checkpoints.py [SRC DST --to FORMAT | PATH ...] [--FLAG VALUE ...]"
    words = "SRC DST with --to; otherwise the places to migrate: a model folder, a folder of models, or a .pt file"
    parser.add_argument("paths", metavar="PATH", nargs="*", help=words)
    parser.add_argument("--dry_run", action="store_true", help="print the plan and change nothing")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    whole = "rewrite the sharded newest step of PATH, or of --model_name, as plain files"
    parser.add_argument("--consolidate", action="store_true", help=whole)
    add_flags(parser)
    args = parser.parse(argv)
    if rank_of_torchrun():
        return DONE  # the first rank does the work, which needs no others
    if args.list:
        return print_matrix(args.json)
    if args.consolidate:
        return consolidate_all(_places(args.paths, args.model_name, Path(args.checkpoint_root)))
    take_spelling(parser, args)
    if args.to is not None:
        if args.check_loss is not None and args.check_text is None:
            parser.error("--check_loss needs --check_text, the text whose loss it is")
        if args.dry_run and args.check_text is not None:
            parser.error("--check_text computes what was written, and --dry_run writes nothing; leave one out")
        return convert_one(parser, args, proof_by(args) if args.check_text is not None else None)
    set_ = (name for name, value in vars(args).items() if value != parser.get_default(name))
    if asked := [f"--{name}" for name in set_ if name not in MIGRATION]:
        parser.error(f"{', '.join(asked)}: only for a conversion, not a migration. Add --to (--list shows the formats)")
    if args.paths and args.model_name:
        parser.error("PATH and --model_name both name models to migrate; give only one of them")
    places = _places(args.paths, args.model_name, Path(args.checkpoint_root))
    found = find(places)
    for line in found.passed:
        print(f"WARNING: {printable(line)} It was skipped.", file=sys.stderr)
    outcomes = plans(found) if args.dry_run else migrations(found)
    where = ", ".join(map(str, places))
    if args.json:
        print(json.dumps({"dry_run": args.dry_run, "files": [facts(o) for o in outcomes]}, indent=2))
    elif outcomes:
        print("\n".join(text_of(outcomes, args.dry_run)))
    else:
        print(f"{where}: no single-file checkpoint here; nothing to migrate")
        for said in filter(None, map(foreign_checkpoint, places)):
            print(printable(said))
    for error in dict.fromkeys(o.error for o in outcomes if o.error):
        print(f"error: {printable(error)}", file=sys.stderr)
    return FAILED if any(o.error for o in outcomes) else DONE


def proof_by(args: argparse.Namespace) -> Callable[[Plan], Check]:
    """What proves a conversion by the text of --check_text; torch is imported for it alone."""
    from core.loading.check_text import TOKENS, beginning_of, check_text

    beginning_of(args.check_text)  # one that cannot be read is refused before anything is written

    def check(plan: Plan) -> Check:
        with token_bar("computing", TOKENS) as bar:
            return check_text(
                plan.target,
                args.check_text,
                args.check_loss,
                choices={choice.name: choice.value for choice in plan.model.choices if choice.name in CHOICES},
                tokenizer=plan.model.tokenizer,
                state=plan.model.state,
                bpe_file=args.bpe_file,
                progress=bar.update,
            )

    return check


def consolidate_all(places: list[Path]) -> int:
    """Rewrite the newest step of each model as plain files, and report it."""
    from core.bundle.commit import ModelFolder
    from core.bundle.writing import lock
    from core.saving.consolidate import consolidate

    for place in places:
        folder = ModelFolder(place)
        with lock(folder):
            made = consolidate(folder)
        if made is None:
            print(f"{place}: its newest step is already in plain files")
            continue
        with made:
            print(f"{place}: step {made.step} is in plain files now ({size_text(sum(made.sizes.values()))})")
    return DONE


def convert_checkpoint(
    model_name: str, legacy_file: str = "latest.pt", checkpoint_root: str | Path = "checkpoints"
) -> None:
    """Migrate one file of a model, and report the outcome; a missing file is not an error.

    Raises: CheckpointError when it cannot be migrated; in that case nothing is changed.
    """
    path = Path(checkpoint_root) / model_name / legacy_file
    if not path.is_file():
        print(f"No legacy checkpoint found: {path}")
        return
    print(f"Converting {model_name}/{legacy_file}...")
    (outcome,) = migrations(find([path]))
    if outcome.error:
        raise CheckpointError(outcome.error)
    for note in outcome.notes:
        print(f"note: {note}")
    print(f"Converted to new format at {outcome.target}" if outcome.is_made else f"{path}: {outcome.became}")


def _places(paths: list[str], name: str | None, root: Path) -> list[Path]:
    """The places to search: the paths, one model, or the checkpoint root.

    Raises: CheckpointNotFound when the root or the model does not exist.
    """
    if paths:
        return [Path(path) for path in paths]
    if not root.is_dir():
        raise CheckpointNotFound(f"{root}: no such folder. --checkpoint_root names the folder of all models.")
    if name is None:
        return [root]
    if not (root / name).is_dir():
        raise missing_model(root / name)
    return [root / name]


def plans(found: Candidates) -> list[Outcome]:
    """Plan the outcome of every file found."""
    return [outcome for folder, paths in found.folders.items() for outcome in plan(folder, paths)]


def migrations(found: Candidates) -> list[Outcome]:
    """Migrate every file found, folder by folder, with a progress bar when it takes time."""
    if not found.folders:
        return []
    from core.conversion.migration.migrate import migrate  # a plan does not need the writers

    outcomes: list[Outcome] = []
    total = sum(work(outcome) for outcome in plans(found))
    with byte_bar("migrating", total) as bar:
        for folder, paths in found.folders.items():
            outcomes += migrate(folder, paths, bar.update)
    return outcomes


def facts(outcome: Outcome) -> dict[str, Any]:
    """One file's entry of the JSON document."""
    return {
        "file": str(outcome.path),
        "generation": outcome.generation,
        "step": outcome.step,
        "action": outcome.action,
        "became": outcome.became,
        "target": str(outcome.target) if outcome.target else None,
        "bytes_before": outcome.size,
        "bytes_after": outcome.size_after,
        "notes": outcome.notes,
        "may_be_deleted": outcome.may_be_deleted,
        "error": outcome.error,
    }


def text_of(outcomes: list[Outcome], dry_run: bool) -> Iterable[str]:
    """Write the actual or planned outcome of files for people, line by line."""
    yield from columns([_heading(dry_run), *(_row(outcome, dry_run) for outcome in outcomes)])
    for note in dict.fromkeys(note for outcome in outcomes for note in outcome.notes):
        yield f"note: {printable(note)}"
    if dry_run:
        return
    free = [outcome for outcome in outcomes if outcome.may_be_deleted]
    if free:
        yield ""
        size = size_text(sum(outcome.size for outcome in free))
        yield f"You may delete these now ({size}); their content is in the bundles, compared bit for bit:"
        yield from (f"  {printable(str(outcome.path))}" for outcome in free)


def _heading(dry_run: bool) -> tuple[str, ...]:
    return ("file", "generation", "step", "becomes" if dry_run else "became", "size", *(() if dry_run else ("now",)))


def _row(outcome: Outcome, dry_run: bool) -> tuple[str, ...]:
    after = size_text(outcome.size_after) if outcome.size_after is not None else "-"
    return (
        printable(str(outcome.path)),
        outcome.generation,
        str(outcome.step) if outcome.step is not None else "-",
        outcome.became if outcome.action != NOT_MIGRATED else "not migrated: see below",
        size_text(outcome.size),
        *(() if dry_run else (after,)),
    )


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # print names that the terminal's encoding lacks
    run(main)
