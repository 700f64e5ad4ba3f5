"""training_state.json: what a committed step records about itself, with a checksum of its own."""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..config.fields import FORMAT_VERSION, NEWEST_VERSION
from ..containers.json_files import dump_json, parse_json
from ..errors import CheckpointDamaged, CheckpointMismatch

STATE = "training_state.json"
RESUMES = 1000
"""How many of the last resumes a step records."""

_LONGEST_NAME = 255  # characters of a file's name

Values = dict[str, Any]


@dataclass(frozen=True, eq=False)
class TrainingState(Mapping[str, Any]):
    """What a step records about itself: its fields as attributes, None where absent, and everything as a mapping.

    It is empty where nothing can be read. `unseal` checks the types of fields, and of entries that are read by name;
    what is in `training`, `certificate` and `extra` is checked where it is used.
    """

    # Written by every save
    step: int | None = None  # steps of the loop made so far
    optimizer_file: str | None = None  # name of the file or folder; None where the step has no optimizer state
    optimizer_removed: str | None = None  # the rule that made a kept step one of weights only, as "keep_optimizer 2"
    frozen: Values | None = None  # dtype, shape and crc32 of each tensor that model.pt leaves out, by name
    optimizer_class: str | Values | None = None  # the name of its class, or of each of several by their names
    format_version: int | None = None  # absent in version 1
    commit_id: str | None = None  # random; stays when the metrics change or the folder goes back
    parent: str | None = None  # commit_id of the step that it replaced at the top, or "crc32:" of a model without one
    run: str | None = None  # random; made by the first save of a run, and kept over every resume
    commit_number: int | None = None  # 1 more than the largest among the steps that were there
    branch: Values | None = None  # id, and step and commit_id where it left; the first save after going back
    saved_at: str | None = None  # local time with its offset from UTC
    best: Values | None = None  # step and val_loss (nats a token), or the run's own metric, of the best step so far
    retention: Values | None = None  # the rules of this run, and the step it resumed from
    resumes: list[int] | None = None  # the last steps from which a program went on, oldest first
    architecture: Values | None = None  # fields of a GPT's config that decide its tensors and its mathematics
    legacy: list[Values] | None = None  # single files that were there: name, size (bytes), mtime_ns, crc32
    # Other writers of a whole state
    migrated_from: Values | None = None  # name, size (bytes) and crc32 of the single file; the migration
    went_back: Values | None = None  # step and commit_id left, why, and what went aside; a folder that goes back
    # Facts of a run: the training loop, and train.py for the first three
    data: Values | None = None  # kind, path, bytes, mtime_ns and SHA-256 of the text or tokens
    training: Values | None = None  # settings, by the names of their flags
    command: list[str] | None = None  # the words of the command line that saved it
    schedule: Values | None = None  # of the learning rate: its kind and its numbers, in steps
    seed: int | None = None  # of batches and noise
    tokens_seen: int | None = None  # tokens trained on, over all resumes
    elapsed_seconds: float | None = None  # seconds of training, over all resumes
    environment: Values | None = None  # what bits depend on: torch, device, threads, compile, fused, dtype
    certificate: Values | None = None  # digests of what the next step sees and draws, and its settings
    scaler: Values | None = None  # of fp16: the state of the GradScaler
    # At the end
    extra: Values | None = None  # the caller's own
    integrity: Values | None = None  # files: size (bytes), crc32, digest of tensors of each; self: CRC32 of the state
    others: Values = field(default_factory=dict)  # metrics by name, and what other programs wrote
    names: tuple[str, ...] = ()  # what was read or given, in its order; a field that is None and not here is absent

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingState:
        """Take a document as it is: its order, its nulls and unknown entries come back from `to_dict`."""
        known = {name: value for name, value in values.items() if name in FIELDS}
        return cls(**known, others={n: v for n, v in values.items() if n not in FIELDS}, names=tuple(values))

    def to_dict(self) -> Values:
        """The document for JSON, without absent fields."""
        said = {f.name: getattr(self, f.name) for f in fields(self) if f.name in FIELDS} | self.others
        new = (name for name, value in said.items() if value is not None)
        return {name: said[name] for name in (*self.names, *new)}

    def having(self, /, **values: Any) -> TrainingState:
        """The same state with other values: each in the place of the old one, new ones at the end."""
        return TrainingState.from_dict({**self, **values})

    def committed(self, parent: str | None, **values: Any) -> TrainingState:
        """The state of a new commit, which gets an id of its own; `values` follow `parent` where they are new."""
        version = max(FORMAT_VERSION, self.format_version or 0)  # that of the model's config may be higher
        return self.having(format_version=version, commit_id=new_id(), parent=parent, **values)

    def descent(self, kept: Iterable[TrainingState] = ()) -> Values:
        """The fields by which the next commit records its descent from this state at the top and from kept steps."""
        said: Values = {"run": self.run or new_id(), "commit_number": 1 + max(state.order for state in (self, *kept))}
        if self.went_back is not None:
            said["branch"] = {"id": new_id(), "step": self.step, "commit_id": self.commit_id}
        elif self.branch is not None:
            said["branch"] = self.branch
        return said

    @property
    def files(self) -> Values:
        """What is recorded of each file by name: size in bytes, crc32, and the digest of its tensors if it has any."""
        found: Values = (self.integrity or {}).get("files", {})
        return found

    @property
    def val_loss(self) -> Any:
        """The validation loss of this step, in nats a token; None where it was not measured."""
        return self.others.get("val_loss")

    @property
    def has_optimizer(self) -> bool:
        """Whether the step may have an optimizer state: a training state without the entry is of an older program."""
        return self.optimizer_file is not None or "optimizer_file" not in self.names

    @property
    def size(self) -> int:
        """Bytes of the files that it lists; 0 where it lists none."""
        return sum(entry["size"] for entry in self.files.values())

    @property
    def order(self) -> int:
        """The place of a step on its branch: the newest is what was committed last, not what has the highest step.

        Steps from before commits were counted are placed by their step.
        """
        return int(self.commit_number if self.commit_number is not None else self.step or 0)

    def __getitem__(self, name: str) -> Any:
        return self.to_dict()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __len__(self) -> int:
        return len(self.to_dict())


FIELDS = {f.name for f in fields(TrainingState)} - {"others", "names"}
"""Names with a meaning here; an older program's entry under one of them means something else."""


def new_id() -> str:
    """Make a random commit id."""
    return os.urandom(8).hex()


def time_of(seconds: float | None = None) -> str:
    """Format a time, in seconds since 1970, as in `saved_at`; now unless given."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))


def seal(state: Mapping[str, Any], files: Mapping[str, Any] | None = None) -> bytes:
    """Write a training state with the CRC32 of its own values as the last entry of `integrity`.

    `files` is the record of each file, for a state that has none itself. The CRC covers the values in a
    canonical form, so that reformatting the file does not break it.
    """
    before = {name: value for name, value in state.items() if name != "integrity"}  # what people read stands first
    integrity = state["integrity"] if files is None else {"files": files}
    own = _own_crc({**before, "integrity": {**integrity, "self": None}})
    return dump_json({**before, "integrity": {**integrity, "self": own}})


def unseal(data: bytes, where: str) -> TrainingState:
    """Read a training state; one without an `integrity` entry is of format version 1, and taken as it is.

    Raises: CheckpointDamaged when its own CRC32 does not fit; CheckpointMismatch for a newer format, and for a field of
        another type than it has.
    """
    state = parse_json(data, where)
    integrity = state.get("integrity")
    inside = integrity if isinstance(integrity, dict) else {}
    recorded, found = inside.get("self"), _own_crc({**state, "integrity": {**inside, "self": None}})
    if recorded in (None, found):  # else it is damaged, of whatever version it seems to be
        check_version(state, where)
    step = state.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        found = f"step is {step!r}" if "step" in state else "no step in it"
        raise CheckpointDamaged(f"{where}: {found}, expected a whole number of at least 0.")
    if integrity is None and "format_version" not in state:
        _check_types(state, _TYPES, where)
        return TrainingState.from_dict(state)
    if not isinstance(integrity, dict) or not isinstance(integrity.get("files"), dict):
        raise CheckpointDamaged(f"{where}: no list of files in its integrity entry.")
    number = state.get("commit_number", 0)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise CheckpointDamaged(f"{where}: commit_number is {number!r}, expected a whole number of at least 0.")
    if recorded != found:
        raise CheckpointDamaged(f"{where} is damaged (CRC32 {found}, recorded {recorded}).")
    _check_files(integrity["files"].items(), where, depth=2)
    seen = state.get("legacy", [])
    if not isinstance(seen, list) or not all(isinstance(entry, dict) and "name" in entry for entry in seen):
        raise CheckpointDamaged(f"{where}: legacy is not a list of files.")
    _check_files(((entry["name"], entry) for entry in seen), where)
    _check_types(state, _TYPES, where)
    return TrainingState.from_dict(state)


_TEXT, _COUNT, _NUMBER, _OBJECT = "a text", "a whole number of at least 0", "a number", "an object"
_RANKING = '"val_loss", or a metric that ends in ":min" or ":max"'
_STEPS = '"log" or a list of whole numbers of at least 0'
_COUNTS, _TEXTS = "a list of whole numbers of at least 0", "a list of texts"

_TYPES: dict[str, Any] = {
    "optimizer_file": _TEXT,
    "optimizer_removed": _TEXT,
    "frozen": _OBJECT,
    "commit_id": _TEXT,
    "parent": _TEXT,
    "run": _TEXT,
    "commit_number": _COUNT,
    "branch": {"id": _TEXT, "step": _COUNT, "commit_id": _TEXT},
    "saved_at": _TEXT,
    "best": {"step": _COUNT, "val_loss": _NUMBER},
    "retention": {
        **dict.fromkeys(("keep", "keep_every", "resumed_from", "keep_best", "keep_optimizer", "keep_within"), _COUNT),
        "best_by": _RANKING,
        "keep_steps": _STEPS,
    },
    "resumes": _COUNTS,
    "architecture": _OBJECT,
    "migrated_from": {"name": _TEXT, "size": _COUNT, "crc32": _TEXT},
    "went_back": {"step": _COUNT, "commit_id": _TEXT},
    "data": {"kind": _TEXT, "path": _TEXT, "bytes": _COUNT, "mtime_ns": _NUMBER, "digest": _TEXT},
    "training": _OBJECT,
    "command": _TEXTS,
    "schedule": _OBJECT,
    "seed": _COUNT,
    "tokens_seen": _COUNT,
    "elapsed_seconds": _NUMBER,
    "environment": _OBJECT,
    "certificate": _OBJECT,
    "scaler": _OBJECT,
    "extra": _OBJECT,
    "val_loss": _NUMBER,
}
"""The types of entries; null stands for an entry that is absent."""

_NEEDED = {"best.step"}
"""Entries without which the object that they are in means nothing."""


def _check_types(values: Mapping[str, Any], types: Mapping[str, Any], where: str, inside: str = "") -> None:
    """Raise CheckpointMismatch naming the entry that has another type."""
    for name, expected in types.items():
        path, value = inside + name, values.get(name)
        kind = _OBJECT if isinstance(expected, dict) else expected
        if value is None and path not in _NEEDED:
            continue
        if not _is_a(kind, value):
            found = json.dumps(value) if path in _NEEDED or name in values else "absent"
            raise CheckpointMismatch(f"{where}: {path} is {found[:80]}, expected {kind}. Restore the file.")
        if isinstance(expected, dict) and isinstance(value, dict):
            _check_types(value, expected, where, f"{path}.")


def _is_a(kind: str, value: Any) -> bool:
    if kind in (_COUNT, _NUMBER):
        is_whole = type(value) is int and abs(value) < 1 << 63
        return (is_whole and value >= 0) if kind == _COUNT else (is_whole or type(value) is float)
    if kind == _RANKING:
        return isinstance(value, str) and (value == "val_loss" or value.endswith((":min", ":max")))
    if kind in (_COUNTS, _TEXTS):
        each = _COUNT if kind == _COUNTS else _TEXT
        return isinstance(value, list) and all(_is_a(each, one) for one in value)
    if kind == _STEPS:
        return value == "log" or _is_a(_COUNTS, value)
    return isinstance(value, str if kind == _TEXT else dict)


def _check_files(listed: Iterable[tuple[Any, Any]], where: str, depth: int = 1) -> None:
    """Check the files that a training state lists: each must lie in its own folder and have a size and a checksum.

    With a `depth` of 2, a file may lie in a folder of that folder.
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
        raise CheckpointDamaged(f"{where}: format_version is {version!r}, expected a whole number of at least 1.")
    if version > NEWEST_VERSION:
        raise CheckpointMismatch(
            f"{where}: format_version {version}, this program reads up to {NEWEST_VERSION}. Update the program."
        )


def _own_crc(state: dict[str, Any]) -> str:
    text = json.dumps(state, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"{zlib.crc32(text.encode()):08x}"
