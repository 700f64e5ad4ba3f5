"""Document: a page as one file that needs no network, and its appearance on the disk."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ...bundle.storage import DISK
from ...console.commands import typed
from ...console.files import open_regular
from ...console.words import printable
from ...errors import InputError
from .markup import escaped, json_text

_START = b"<!doctype html>\n<!-- made by inspect_model.py -->"
"""The mark of a page of ours: no other file is ever replaced."""


def document(title: str, body: Iterable[str], data: Any = None, *, live: str = "") -> str:
    """A page around a body; `data` is for its script. `live` is its version where a server watches for newer ones.

    Its policy forbids all loading, and all scripts but its own, so that a name in a hostile checkpoint could not run
    even if escaping failed.
    """
    here = Path(__file__)
    script = here.with_name("page.js").read_text("utf-8")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{allowed}'; style-src 'unsafe-inline'; img-src data:; "
        f"{'connect-src ' + chr(39) + 'self' + chr(39) + '; ' if live else ''}base-uri 'none'; form-action 'none'"
    )
    said = f' data-version="{escaped(live)}"' if live else ""
    return "\n".join(
        [
            _START.decode(),
            f'<html lang="en"{said}>',
            '<head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{escaped(title)}</title>",
            f"<style>\n{here.with_name('page.css').read_text('utf-8')}</style></head><body><main>",
            *body,
            f"</main><footer>Written by <code>{escaped(typed('inspect_model.py'))}</code>. Nothing of the checkpoint "
            "was executed, and this page loads nothing.</footer>",
            f'<script type="application/json" id="data">{json_text(data)}</script>',
            f"<script>{script}</script>",
            "</body></html>\n",
        ]
    )


def publish(file: Path, make: Callable[[], str], overwrite: bool = False) -> None:
    """Write the page that `make` returns; it appears complete or not at all, and is not made where it cannot.

    Raises: InputError when the file exists and must not be replaced, is not such a page, or cannot be written.
    """
    _refuse(file, overwrite)
    data = make().encode(errors="backslashreplace")
    try:
        with DISK.published(file, replace=overwrite) as part:
            DISK.write(part, data)
            _refuse(file, overwrite)  # again: it may have appeared in the meantime
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror}). Nothing was changed.") from error


def _refuse(file: Path, overwrite: bool) -> None:
    """Refuse to replace a file that is not a page of ours, or, without `overwrite`, one that is."""
    try:
        if not file.parent.is_dir():
            raise InputError(f"{file}: there is no folder {file.parent}. Create it first.")
        if not file.exists() and not file.is_symlink():
            return
        if not file.is_file() or not _begins_as_page(file):
            raise InputError(f"{file}: exists and is not a page of this program, so it stays. Give another name.")
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{printable(str(file))}: cannot be written ({reason}). Give another name.") from error
    if not overwrite:
        raise InputError(f"{file}: already exists. Give another name, or --overwrite to replace it.")


def _begins_as_page(file: Path) -> bool:
    with open_regular(file) as there:
        return there.read(len(_START)) == _START
