"""Several containers in one folder, presented as one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointDamaged
from .blocks import read_whole
from .container import Container, member, reading
from .pickles.inert import as_text

_LARGEST_JSON = 100_000_000  # bytes; an index of 100,000 tensors has 10 million


def join(whole: Container, part: Container, name: str = "") -> None:
    """Add the content of a part, which lies in the whole's folder; its tensors are prefixed with `name`, if given.

    Its content is stored under `name`; without one it is left to the caller. The part's specs are modified in place.

    Raises: CheckpointDamaged when two tensors would have the same name.
    """
    single = part.path.is_file()
    folder = part.path.parent if single else part.path
    before = "" if folder == whole.path else f"{folder.relative_to(whole.path).as_posix()}/"
    for spec in part.tensors.values():
        spec.name = f"{name}.{spec.name}" if name else spec.name
        if spec.name in whole.tensors:
            first = whole.tensors[spec.name].blocks[0].file
            raise CheckpointDamaged(f"{whole.path}: two tensors are called {as_text(spec.name, 80)}, one in {first}.")
        if not spec.chunks:
            spec.file = before + (inside(part, spec.file) if single else spec.file)
        spec.chunks = tuple(replace(chunk, file=before + chunk.file) for chunk in spec.chunks)
        spec.storage = "/".join(filter(None, (before + part.path.name if single else name, spec.storage)))
        whole.tensors[spec.name] = spec
    if name:
        put(whole, name, part.content)
    whole.files |= {before + file: size for file, size in part.files.items()}
    for check in part.checks:
        names = tuple(f"{name}.{held}" for held in check.names) if name else check.names
        file = inside(part, check.file) if single else check.file
        whole.checks.append(replace(check, file=before + file, names=names))
    for packed, unpacked in part.unpacked.items():
        whole.unpacked[before + (inside(part, packed) if single else packed)] = unpacked
    whole.foreign += [call for call in part.foreign if call not in whole.foreign]
    whole.notes += [f"{before}{note}" if before else note for note in part.notes]


def inside(part: Container, file: str) -> str:
    """Name a file of a container of one file, or what it holds packed, within the folder of that file."""
    return f"{part.path.name}/{file}" if file in part.unpacked else part.path.name


def put(whole: Container, name: str, content: Any) -> None:
    """Add an entry to the content of the whole.

    Raises: CheckpointDamaged when the name is taken.
    """
    if name in whole.content:
        raise CheckpointDamaged(f"{whole.path}: two parts of it are called {as_text(name, 80)}.")
    whole.content[name] = content


def read_json(folder: Path, name: str, files: dict[str, int]) -> dict[str, Any]:
    """Read a JSON object in a folder, and add its size to `files`.

    Raises: CheckpointNotFound, CheckpointDamaged when it is not a JSON object, or not in the folder.
    """
    from .json_files import parse_json  # most folders that are joined have no JSON

    path = member(folder, name, str(folder))
    with reading(path) as file:
        data = read_whole(file, _LARGEST_JSON, str(path))
    values = parse_json(data, str(path))
    files[name] = len(data)
    return values
