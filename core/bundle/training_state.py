"""training_state.json: what a committed step says of itself, with a checksum of its own."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable
from typing import Any

from ..config.gpt import FORMAT_VERSION
from ..containers.json_files import dump_json, parse_json
from ..errors import CheckpointDamaged, CheckpointMismatch

STATE = "training_state.json"
_LONGEST_NAME = 255  # characters of a file's name

FIELDS = {"step", "optimizer_file", "format_version", "commit_id", "parent", "saved_at", "best", "data", "training"}
FIELDS |= {"schedule", "seed", "tokens_seen", "elapsed_seconds", "environment", "extra", "legacy", "migrated_from"}
FIELDS |= {"run", "commit_number", "branch", "went_back", "retention", "integrity"}
FIELDS |= {"certificate", "scaler", "architecture"}
"""What these names mean here; an entry of an older program that has one of them means something else."""


def seal(state: dict[str, Any]) -> bytes:
    """Write a training state with the CRC32 of its own values as the last entry of `integrity`.

    The CRC covers the values in a canonical form, so that reformatting the file does not break it.
    """
    before = {name: value for name, value in state.items() if name != "integrity"}  # what people read comes first
    unsealed = {**before, "integrity": {**state["integrity"], "self": None}}
    return dump_json({**before, "integrity": {**state["integrity"], "self": _own_crc(unsealed)}})


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """Read a training state; one without an `integrity` entry is of format version 1, and taken as it is.

    Raises: CheckpointDamaged when its own CRC32 does not fit, CheckpointMismatch for a format of the future.
    """
    state = parse_json(data, where)
    check_version(state, where)
    integrity = state.get("integrity")
    step = state.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        found = f"step is {step!r}" if "step" in state else "no step in it"
        raise CheckpointDamaged(f"{where}: {found}, expected a whole number from 0.")
    if integrity is None and "format_version" not in state:
        return state
    if not isinstance(integrity, dict) or not isinstance(integrity.get("files"), dict):
        raise CheckpointDamaged(f"{where}: no list of files in its integrity entry.")
    number = state.get("commit_number", 0)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise CheckpointDamaged(f"{where}: commit_number is {number!r}, expected a whole number from 0.")
    recorded = integrity.get("self")
    found = _own_crc({**state, "integrity": {**integrity, "self": None}})
    if recorded != found:
        raise CheckpointDamaged(f"{where} is damaged (CRC32 {found}, recorded {recorded}).")
    _check_files(integrity["files"].items(), where, depth=2)
    seen = state.get("legacy", [])
    if not isinstance(seen, list) or not all(isinstance(entry, dict) and "name" in entry for entry in seen):
        raise CheckpointDamaged(f"{where}: legacy is no list of files.")
    _check_files(((entry["name"], entry) for entry in seen), where)
    return state


def _check_files(listed: Iterable[tuple[Any, Any]], where: str, depth: int = 1) -> None:
    """A training state is not trusted: what it lists has to lie in its own folder, with a size and a checksum.

    With a `depth` of 2, a file may lie in a folder there.
    """
    for name, entry in listed:
        parts = name.split("/") if isinstance(name, str) else []
        if not 1 <= len(parts) <= depth or not all(map(_is_plain, parts)):
            raise CheckpointDamaged(f"{where}: lists {str(name)[:80]!r}, expected the names of files in its folder.")
        size, crc32 = (entry.get("size"), entry.get("crc32")) if isinstance(entry, dict) else (None, None)
        known = isinstance(crc32, str) and re.fullmatch("[0-9a-f]{8}", crc32)
        if not isinstance(size, int) or isinstance(size, bool) or size < 0 or not known:
            raise CheckpointDamaged(
                f"{where}: of {name} it lists {str(entry)[:80]}, expected its size and 8 digits of CRC32."
            )


def _is_plain(name: str) -> bool:
    return name.isprintable() and 0 < len(name) <= _LONGEST_NAME and name not in (".", "..") and "\\" not in name


def check_version(values: dict[str, Any], where: str) -> None:
    """Raise CheckpointMismatch when a file is of a newer format than this program knows."""
    version = values.get("format_version", 1)
    if not isinstance(version, int) or version < 1:
        raise CheckpointDamaged(f"{where}: format_version is {version!r}, expected a whole number from 1.")
    if version > FORMAT_VERSION:
        raise CheckpointMismatch(
            f"{where}: format_version {version}, this program reads up to {FORMAT_VERSION}. Update the program."
        )


def _own_crc(state: dict[str, Any]) -> str:
    text = json.dumps(state, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"{zlib.crc32(text.encode()):08x}"
