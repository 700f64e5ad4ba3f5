"""Pruning from the command line: one model, or each below a root, with the bytes that it frees."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..bundle.names import model_names
from ..checkpoint import CheckpointManager
from ..console.commandline import DONE, FAILED, rules_given
from ..console.words import size_text, tell
from ..errors import CheckpointLocked, CheckpointNotFound
from ..saving.ranks import Ranks


def prune(args: argparse.Namespace, ranks: Ranks) -> int:
    """Prune the model that is named, or all below the root, by the rules given; print the bytes, return the exit code.

    Of several models, one that another program trains is reported and passed over.

    Raises: CheckpointNotFound where there is none, CheckpointLocked when the one that is named is being trained.
    """
    root = Path(args.checkpoint_root)
    names = [args.model_name] if args.model_name else model_names(root)
    if not names:
        raise CheckpointNotFound(f"{root}: no models here, so nothing to prune.")
    freed, code = 0, DONE
    for name in names:
        manager = CheckpointManager(name, root, ranks=ranks)
        if not manager.checkpoint_dir.is_dir():
            raise CheckpointNotFound(f"{manager.checkpoint_dir}: no such folder, so nothing to prune.")
        try:
            with manager:
                freed += manager.prune(dry_run=bool(args.dry_run), **rules_given(args))
        except CheckpointLocked as error:
            if args.model_name:
                raise
            tell(f"error: {error}")
            code = FAILED
    if ranks.world.is_first:
        print(f"{size_text(freed)} {'would be ' if args.dry_run else ''}freed")
    return code
