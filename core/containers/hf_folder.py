"""Open a Hugging Face folder: weights in one file, or in shards listed by an index, with the config beside them.

The files are described in the documentation of transformers (Loading models, Sharded checkpoints).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CheckpointDamaged, CheckpointNotFound
from .container import Check, Container, is_plain, listing, member
from .joined import read_json
from .pickles.inert import as_name, as_text, names_text
from .safetensors import METADATA, open_safetensors
from .series import Series, choose_series, series_of
from .spec import TensorSpec
from .torch_shards import Piece, join_pieces, offsets_of, sharding_of
from .trainer_folder import add_run

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""File names of a model's weights; when several exist the first is used, as in transformers."""

INDEX = ".index.json"
"""Suffix of the name of an index."""

CONFIG = "config.json"

BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "preprocessor_config.json",
)
"""Other files of a model: not read, and copied unchanged with it."""

_USUAL = {METADATA: {"format": "pt"}}
"""The metadata of every safetensors file written by transformers."""

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", INDEX)


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder holds a model under one of the names of Hugging Face."""
    names = listing(folder)
    return not names.keys().isdisjoint(WEIGHTS) or bool(series_of(names))


def open_hf_folder(path: Path) -> Container:
    """Open a Hugging Face folder, or the index of one; only headers are read.

    Its content has the `config` of config.json, the `metadata` of the index, and, under the name of each file, whatever
    that file holds besides tensors.

    An index decides which files are the model; without one, and with several series of numbered files, only one of them
    may be complete. The shards of torch's HuggingFaceStorageWriter are joined.

    Raises: CheckpointNotFound when there are no weights, or when several series could be the model; CheckpointDamaged
        when a shard is missing or damaged, when the index lists a tensor that no shard has, or when it refers to a file
        outside the folder.
    """
    folder = path.parent if path.name.endswith(INDEX) else path
    names = listing(folder)
    main = path.name if folder != path else next((name for name in WEIGHTS if name in names), None)
    where = str(folder / main) if main else str(folder)
    files: dict[str, int] = {}
    content: dict[str, Any] = {}
    if CONFIG in names:
        content["config"] = read_json(folder, CONFIG, files)
    weight_map: dict[str, str] = {}
    if main and main.endswith(INDEX):
        index = read_json(folder, main, files)
        weight_map = _weight_map(index, where)
        content |= {"metadata": index["metadata"]} if "metadata" in index else {}
    series, caveats = _series(names, weight_map, main, where)
    parts = sorted(set(weight_map.values())) or ([main] if main else [])
    parts += [name for name in (*series.names, *series.missing) if name not in parts] if series else []
    if not parts:
        raise CheckpointNotFound(f"{path}: no Hugging Face weights here, expected one of {', '.join(WEIGHTS)}.")
    shards = _open_shards(folder, parts, where, names)
    tensors = _merge(shards, where, series)
    notes = [] if main else ["no index beside the shards: whether all tensors are present is unknown"]
    if weight_map:
        notes += _compare(weight_map, tensors, where) + _total_size(content.get("metadata"), tensors)
    for name, shard in shards.items():
        files[name] = shard.files[Path(name).name]
        others = _without_tensors(shard.content)
        if others and others != _USUAL and not sharding_of(shard):
            content[name] = others
    kinds = ["Hugging Face folder"] if "config" in content else []
    kinds += sorted({shard.kind for shard in shards.values()})
    whole = Container(
        kind=", ".join([*kinds, *([f"{len(shards)} files"] if len(shards) > 1 else [])]),
        path=folder,
        tensors=tensors,
        content=content,
        files=files,
        checks=[
            Check(f"{name}/{c.file}" if c.file in shard.unpacked else name, c.offset, c.size, c.crc32, c.names)
            for name, shard in shards.items()
            for c in shard.checks
        ],
        foreign=list(dict.fromkeys(call for shard in shards.values() for call in shard.foreign)),
        notes=notes,
        caveats=caveats,
        unpacked={f"{name}/{file}": one for name, shard in shards.items() for file, one in shard.unpacked.items()},
    )
    add_run(whole, names)
    whole.notes += _beside(names, files)
    return whole


def _series(
    names: dict[str, int | None], weight_map: dict[str, str], main: str | None, where: str
) -> tuple[Series | None, list[str]]:
    """The series of numbered files that is the model, and what its names leave open.

    An index names the files itself; only those of torch's shards, which have parts of one tensor, are completed.
    """
    if main:
        used = {main, *weight_map.values()}
        every = series_of(names)
        series = next((one for one in every if one.ranked and used & set(one.names)), None)
        others = [one.label for one in every if not used & set(one.names)]
        others += [name for name in WEIGHTS if name in names and name != main]
        said = f"{where} is taken; also here: {names_text(others)}" if others else ""
    else:
        series, said = choose_series(names, where)
    caveats = [said] if said else []
    if series is not None and series.ranked:
        caveats.append(
            f"{where}: {series.label} are torch's shards of ranks 1 to {max(series.ranks)}. No file records how many "
            "ranks there were: if there were more, copy their shards too"
        )
    return series, caveats


def _beside(names: dict[str, int | None], files: dict[str, int]) -> list[str]:
    """Note the other files of the folder; those that belong to the model are added to its files."""
    known = {name: size for name in BESIDE if (size := names.get(name)) is not None}
    files |= known
    surplus = [name for name in names if name.endswith(_WEIGHT_SUFFIXES) and name not in files]
    notes = [f"with {', '.join(known)}"] if known else []
    return notes + ([f"also here, not part of the model: {names_text(surplus)}"] if surplus else [])


def _weight_map(index: dict[str, Any], where: str) -> dict[str, str]:
    """The file of each tensor, by name."""
    found = index.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointDamaged(f"{where}: its weight_map is {as_text(found, 80)}, expected a file for each tensor.")
    for name, file in found.items():
        if not isinstance(file, str):
            raise CheckpointDamaged(f"{where}: places {as_name(name)} in {as_text(file, 80)}, expected a file's name.")
    return found


def _open_shards(folder: Path, names: list[str], where: str, there: Iterable[str]) -> dict[str, Container]:
    """Open the existing files that hold tensors."""
    listed = set(there)
    missing = [name for name in names if is_plain(name) and name not in listed]
    if missing:
        raise CheckpointDamaged(
            f"{where}: of its {len(names)} files, {len(missing)} not there: {names_text(missing)}. "
            "Download or copy them again; the others were not opened."
        )
    return {name: _open_shard(member(folder, name, where)) for name in names}


def _open_shard(path: Path) -> Container:
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    from .torch_files.container import open_torch_single

    return open_torch_single(path)


def _merge(shards: dict[str, Container], where: str, series: Series | None) -> dict[str, TensorSpec]:
    """The tensors of all files, each with its file; those of which several of torch's shards have a part are joined."""
    pieces: dict[str, list[Piece]] = {}
    for file, shard in shards.items():
        offsets = offsets_of(shard, f"{where}: {as_name(file)}")
        for name, spec in shard.tensors.items():
            spec.file = f"{file}/{spec.file}" if spec.file in shard.unpacked else file
            spec.storage = f"{file}/{spec.storage}"
            pieces.setdefault(name, []).append(Piece(spec, offsets.get(name)))
    return {name: join_pieces(name, found, where, series) for name, found in pieces.items()}


def _compare(weight_map: dict[str, str], tensors: dict[str, TensorSpec], where: str) -> list[str]:
    """Refuse an index that lists tensors the files do not hold; tensors that it does not list are only noted."""
    lost = [name for name in weight_map if name not in tensors]
    if lost:
        raise CheckpointDamaged(
            f"{where}: lists {len(weight_map)} tensors, its files hold {len(weight_map) - len(lost)} of them: "
            f"{as_name(lost[0])} is not in {as_name(weight_map[lost[0]])}."
        )
    for name, file in weight_map.items():
        holders = [block.file for block in tensors[name].chunks] or [tensors[name].file]
        if file not in holders:
            raise CheckpointDamaged(f"{where}: places {as_name(name)} in {file}, it is in {holders[0]}.")
    extra = [name for name in tensors if name not in weight_map]
    if not extra:
        return []
    return [
        f"not in the index, and yet in the files: {names_text([f'{n} ({tensors[n].blocks[0].file})' for n in extra])}"
    ]


def _total_size(metadata: Any, tensors: dict[str, TensorSpec]) -> list[str]:
    """Note when the index's total size is not that of the tensors, with tied ones counted once or each time."""
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    each = sum(spec.nbytes for spec in tensors.values())
    once = sum(nbytes for _, _, nbytes in {(spec.storage, spec.offset, spec.nbytes) for spec in tensors.values()})
    if said is None or said in (each, once):
        return []
    return [f"the index gives a total_size of {as_text(said, 40)} bytes, the tensors have {each}"]


def _without_tensors(content: Any) -> Any:
    """The content of a file; of a plain state dict, only the entries that are not tensors."""
    if not isinstance(content, dict):
        return content
    return {name: value for name, value in content.items() if not isinstance(value, TensorSpec)}
