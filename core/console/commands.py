"""Our commands as a user types them: `python train.py` in a clone, `gpt-checkpoints train` where pip installed them."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

PACKAGE = __name__.partition(".")[0]
"""`core` in a clone, `gpt_checkpoints` where it is installed."""

PROGRAM = "gpt-checkpoints"
"""The installed command."""

SCRIPTS = {
    "train": "train.py",
    "generate": "generate.py",
    "inspect": "inspect_model.py",
    "convert": "convert_checkpoints.py",
    "prepare": "data/prepare.py",
}
"""The scripts of a clone, by the words that the installed command has for them."""

_WORDS = {script: word for word, script in SCRIPTS.items()}
_NAMED = re.compile(
    rf"(?P<ranks>torchrun [^\n]*?)?(?:python )?(?<![\w/.])(?P<script>{'|'.join(map(re.escape, _WORDS))})\b"
    r"|(?<![\w/.])core(?=\.[a-z_]+\b)"
)


def typed(text: str) -> str:
    """Spell the scripts and modules in a text of ours as this user has them; the text itself names those of a clone.

    The text holds nothing of a user's: what a file or a flag says stays as it is. A script after `torchrun` becomes a
    module, which torchrun can start.
    """
    return text if PACKAGE == "core" else _NAMED.sub(_installed, text)


def _installed(found: re.Match[str]) -> str:
    script = found["script"]
    if script is None:
        return PACKAGE
    if found["ranks"]:
        return f"{found['ranks']}-m {PACKAGE}.scripts.{Path(script).stem}"
    return f"{_program()} {_WORDS[script]}"


def _program() -> str:
    """The installed command: by its name where a shell finds this one by it, else by the path it was started by."""
    from shutil import which  # costs some milliseconds, and most runs print no command

    started = next((word for word in sys.orig_argv[:2] if Path(word).name == PROGRAM), None)
    found = which(PROGRAM)
    if started is None or (found is not None and Path(found).resolve() == Path(started).resolve()):
        return PROGRAM
    return shlex.quote(started)
