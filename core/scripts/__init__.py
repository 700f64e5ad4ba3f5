"""The scripts as modules of the installed package, and `gpt-checkpoints`, which starts them.

A wheel has the scripts themselves here, renamed by setup.py. In a clone, and where pip installed one with -e, a module
of this folder runs the clone's script.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import CodeType

from .. import __version__
from ..console.commands import PACKAGE, PROGRAM, SCRIPTS

MODULES = {word: Path(script).stem for word, script in SCRIPTS.items()}
"""The module of each script, by the word that starts it."""

ABOUT = {
    "train": "train a model; the same command resumes it",
    "generate": "write text with a model",
    "inspect": "look inside checkpoints; nothing in them is executed",
    "convert": "turn a checkpoint of one program into another's",
    "prepare": "tokenize texts into a dataset for train",
}


def main() -> None:
    """Start the script that the first word names; without one, print the words and exit with 2."""
    word = sys.argv[1] if len(sys.argv) > 1 else None
    if word in MODULES:
        import runpy

        del sys.argv[1]
        runpy.run_module(f"{__name__}.{MODULES[word]}", run_name="__main__", alter_sys=True)
        return
    import argparse

    parser = argparse.ArgumentParser(PROGRAM, description="A PyTorch trainer whose checkpoints survive anything.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands (COMMAND --help shows its flags)", metavar="COMMAND")
    for name, about in ABOUT.items():
        commands.add_parser(name, help=about)
    parser.parse_args()
    parser.print_help(sys.stderr)
    sys.exit(2)


def renamed(source: str, package: str = "gpt_checkpoints") -> str:
    """A script's source with its imports of core under another name, and without a search path for them."""
    source = re.sub(r"^( *)(from|import) core\b", rf"\1\2 {package}", source, flags=re.MULTILINE)
    return re.sub(r"^(#.*\n)?sys\.path\.insert\(.*\n", "", source, flags=re.MULTILINE)


def of_clone(script: str) -> CodeType:
    """The code of a script of the clone, whose imports are of this package."""
    path = Path(__file__).parents[2] / script
    return compile(renamed(path.read_text("utf-8"), PACKAGE), str(path), "exec", dont_inherit=True)
