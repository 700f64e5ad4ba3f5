"""Damage, or a person's work: decided by what training states record of each file, not by how reading it failed."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterable
from typing import Any

from ..config.gpt import EDITABLE
from ..console.files import LARGEST
from ..containers.checksum import crc32_file, flipped_bit
from ..containers.json_files import dump_json
from ..errors import CheckpointDamaged, CheckpointError, CheckpointNotFound, InputError
from .bundle import Bundle, KeptStep, history
from .commit import CONFIG, ModelFolder
from .folder import OpenStep, shown, top_state
from .storage import DISK
from .training_state import STATE
from .verify import tensors_digest, verify_records


class Mixed(CheckpointDamaged):
    """The files of a step are of two saves."""


WITH_STATE = 2
"""The first format version whose steps all have a training state."""


def behind(place: ModelFolder, error: CheckpointError) -> CheckpointError | None:
    """The damage that keeps the newest step from being read: `error` itself, or the file that is behind it.

    None where every file is as it was saved, where a person edited config.json, and where the system failed.
    """
    if isinstance(error, (CheckpointDamaged, CheckpointNotFound)):
        return error
    if isinstance(error.__cause__, OSError):
        return None
    with contextlib.suppress(CheckpointError), contextlib.closing(place.open_newest()) as opened:
        for name in opened.state.files:
            found = _other(opened, name)
            if found is not None and (name != CONFIG or not _typed(opened)):
                return CheckpointDamaged(f"{shown(opened.folder / name)} is damaged ({found}): {error}")
    return None


def edited(bundle: Bundle, kept: Iterable[KeptStep]) -> list[str]:
    """A sentence, in a list, when config.json says something else than was saved.

    Raises: CheckpointDamaged when one flipped bit is all that differs, which is no change that a person makes, and
    older steps are kept; CheckpointMismatch for an impossible value.
    """
    found = _other(bundle, CONFIG)
    if found is None or _as_written(bundle.config_values) == bundle.state.files[CONFIG]["crc32"]:
        return []
    at = _flipped(bundle)
    flipped = at is not None and not _is_edit(_text(bundle), *at)
    if flipped and any(kept):
        raise CheckpointDamaged(f"{bundle.path(CONFIG)} is damaged: a bit of it flipped ({found}).")
    _ = bundle.config  # raises where the fields cannot be
    how = "a bit of it flipped" if flipped else "it was edited"
    return [f"{bundle.path(CONFIG)}: not as it was saved: {how} ({found}). It is used as it is."]


def config_goes(place: ModelFolder) -> bool:
    """Whether the config.json at the top is damaged: one that a person edited stays when the folder goes back."""
    with contextlib.suppress(CheckpointError), contextlib.closing(place.open_newest()) as opened:
        return _other(opened, CONFIG) is not None and not _typed(opened)
    return False


def refuse_without_state(bundle: Bundle, kept: Iterable[KeptStep]) -> None:
    """Raise CheckpointDamaged for a step whose training state is gone: nothing says which step it is."""
    version, path = bundle.config_values.get("format_version", 1), bundle.path(STATE)
    if bundle.state:
        return
    if any(step.state for step in kept):
        raise CheckpointDamaged(f"{path}: missing, and kept steps have one.")
    if version >= WITH_STATE:
        raise CheckpointDamaged(
            f"{path}: missing, and {CONFIG} is of format version {version}, in which each step has one."
        )


def refuse_mixture(bundle: Bundle, place: ModelFolder) -> None:
    """Raise Mixed when a file of a bundle is of another save, as in a folder that was copied during one.

    It is what another step recorded; or the training state is that of a kept step, which has the recorded file; or it
    is whole and has the recorded size, but other tensors: what a person or another program writes has another size.
    """
    others = [step for step in (_top(place), *history(place.path)) if step.path != bundle.folder and step.state]
    for name, entry in bundle.state.files.items():
        if not name.endswith(".pt") or _other(bundle, name) is None:
            continue
        found, said = _record(bundle, name), None
        for step in others:
            same_step = step.state.commit_id == bundle.state.commit_id
            holds = step.state.files.get(name)
            if not same_step and holds is not None and found == (holds["size"], holds["crc32"]):
                said = f"is the file of step {step.step} ({_named(step, place)})"
            elif same_step and _holds(step, name, entry):
                said = f"is not the file of step {step.step}, which is in {_named(step, place)}"
        if said is None and found[0] == entry["size"] and "tensors" in entry:
            other = tensors_digest(verify_records(bundle.files[name], bundle.path(name))) != entry["tensors"]
            said = "is the file of another save" if other else None
        if said is not None:
            raise Mixed(
                f"{bundle.path(name)}: {said}, beside a {STATE} of step {bundle.step}: two steps are mixed, as in a "
                "copy made during a save."
            )


def _top(place: ModelFolder) -> KeptStep:
    state = top_state(place)
    return KeptStep(state.step or 0, place.path, state)


def _named(step: KeptStep, place: ModelFolder) -> str:
    return "the top" if step.path == place.path else step.path.name


def _holds(step: KeptStep, name: str, entry: dict[str, Any]) -> bool:
    """Whether a step has the very file that a training state recorded."""
    with contextlib.suppress(FileNotFoundError), DISK.open(step.path / name) as file:
        size = os.fstat(file.fileno()).st_size
        return size == entry["size"] and f"{crc32_file(file.fileno(), size):08x}" == entry["crc32"]
    return False


def _record(opened: OpenStep | Bundle, name: str) -> tuple[int, str]:
    """The size and the CRC32 of an open file."""
    fd = opened.files[name].fileno()
    size = os.fstat(fd).st_size
    return size, f"{crc32_file(fd, size):08x}"


def _other(opened: OpenStep | Bundle, name: str) -> str | None:
    """What shows that a file is not the one that was saved; None where it is, or nothing was recorded."""
    entry = opened.state.files.get(name)
    if entry is None or name not in opened.files:
        return None
    size = os.fstat(opened.files[name].fileno()).st_size
    if size != entry["size"]:  # and is not read, however large it is
        return f"{size} bytes; recorded {entry['size']}"
    _, crc = _record(opened, name)
    return f"CRC32 {crc}, recorded {entry['crc32']}" if crc != entry["crc32"] else None


def _as_written(values: dict[str, Any]) -> str | None:
    """The CRC32 of a config.json with these values, as a save writes it; None where JSON cannot hold them."""
    with contextlib.suppress(InputError):
        return f"{zlib.crc32(dump_json(values)):08x}"
    return None


def _text(opened: OpenStep | Bundle) -> bytes:
    """The beginning of config.json; what is longer than any is cut, and so is no JSON."""
    file = opened.files[CONFIG]
    file.seek(0)
    return file.read(LARGEST)


def _typed(opened: OpenStep | Bundle) -> bool:
    """Whether a person may have typed a config.json that cannot be used: it is text to its end, and no bit flipped."""
    data = _text(opened)
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        return False
    whole = text.endswith("}") and all(c.isprintable() or c.isspace() for c in text)
    return whole and _flipped(opened) is None


def _flipped(opened: OpenStep | Bundle) -> tuple[int, int] | None:
    """The byte and bit by which config.json differs from the one that was saved; None for any other difference."""
    entry, data = opened.state.files[CONFIG], _text(opened)
    return flipped_bit(data, int(entry["crc32"], 16)) if len(data) == entry["size"] else None


def _is_edit(text: bytes, at: int, bit: int) -> bool:
    """Whether a flipped bit made a digit of a digit, in a field that people edit."""
    field = text[text.rfind(b"\n", 0, at) + 1 : at].partition(b":")[0].strip(b' "')
    return field.decode() in EDITABLE and bytes([text[at], text[at] ^ 1 << bit]).isdigit()
