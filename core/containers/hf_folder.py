"""Open a Hugging Face folder: weights in one file, or in shards listed by an index, with the config beside them.

The files are described in the documentation of transformers (Loading models, Sharded checkpoints).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..console.words import listed_names
from ..errors import CheckpointDamaged, CheckpointNotFound
from .container import Container, is_plain, listing, member
from .joined import join, read_json
from .pickles.inert import as_name, as_text
from .safetensors import METADATA, open_safetensors
from .spec import TensorSpec

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

_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})\.(safetensors|bin)", re.DOTALL)

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

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder holds a model under one of the names of Hugging Face."""
    names = listing(folder)
    return not names.keys().isdisjoint(WEIGHTS) or bool(_numbered(names))


def open_hf_folder(path: Path) -> Container:
    """Open a Hugging Face folder, or the index of one; only headers are read.

    Its content has the `config` of config.json, the `metadata` of the index, and, under the name of each file, whatever
    that file holds besides tensors.

    Raises: CheckpointNotFound when there are no weights; CheckpointDamaged when a shard is missing or damaged, when the
        index lists a tensor that no shard has, or when it refers to a file outside the folder.
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
    parts = sorted(set(weight_map.values())) or ([main] if main else _numbered(names))
    if not parts:
        raise CheckpointNotFound(f"{path}: no Hugging Face weights here, expected one of {', '.join(WEIGHTS)}.")
    _check_shards(parts, where, names)
    whole = Container("", folder, {}, content, files)
    kinds = ["Hugging Face folder"] if "config" in content else []
    shard_kinds = set()
    for name in parts:
        shard = _open_shard(member(folder, name, where))
        join(whole, shard)
        shard_kinds.add(shard.kind)
        others = _without_tensors(shard.content)
        if others and others != _USUAL:
            content[name] = others
    if not main:
        whole.notes.append("no index beside the shards: whether all tensors are present is unknown")
    if weight_map:
        whole.notes += _compare(weight_map, whole.tensors, where) + _total_size(content.get("metadata"), whole.tensors)
    whole.notes += _beside(names, whole.files)
    whole.kind = ", ".join([*kinds, *sorted(shard_kinds), *([f"{len(parts)} files"] if len(parts) > 1 else [])])
    return whole


def _numbered(names: Iterable[str]) -> list[str]:
    """The names of all shards of a model, as counted by the names themselves."""
    found = sorted((match for name in names if (match := _SHARD.fullmatch(name))), key=lambda m: (m[3], m[1]))
    if not found:
        return []
    stem, total, suffix = found[-1].groups()
    return [f"{stem}-{i:05}-of-{total}.{suffix}" for i in range(1, int(total) + 1)]


def _beside(names: dict[str, int | None], files: dict[str, int]) -> list[str]:
    """Note the other files of the folder; those that belong to the model are added to its files."""
    known = {name: size for name in BESIDE if (size := names.get(name)) is not None}
    files |= known
    surplus = [name for name in names if name.endswith(_WEIGHT_SUFFIXES) and name not in files]
    notes = [f"with {', '.join(known)}"] if known else []
    return notes + ([f"also here, not part of the model: {_some(surplus)}"] if surplus else [])


def _weight_map(index: dict[str, Any], where: str) -> dict[str, str]:
    """The file of each tensor, by name."""
    found = index.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointDamaged(f"{where}: its weight_map is {as_text(found, 80)}, expected a file for each tensor.")
    for name, file in found.items():
        if not isinstance(file, str):
            raise CheckpointDamaged(f"{where}: places {as_name(name)} in {as_text(file, 80)}, expected a file's name.")
    return found


def _check_shards(names: list[str], where: str, there: Iterable[str]) -> None:
    """Refuse a model some of whose files are not there."""
    listed = set(there)
    missing = [name for name in names if is_plain(name) and name not in listed]
    if missing:
        raise CheckpointDamaged(
            f"{where}: of its {len(names)} files, {len(missing)} not there: {_some(missing)}. "
            "Download or copy them again; the others were not opened."
        )


def _open_shard(path: Path) -> Container:
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    from .torch_files.container import open_torch_single

    return open_torch_single(path)


def _compare(weight_map: dict[str, str], tensors: dict[str, TensorSpec], where: str) -> list[str]:
    """Refuse an index that lists tensors the files do not hold; tensors that it does not list are only noted."""
    lost = [name for name in weight_map if name not in tensors]
    if lost:
        raise CheckpointDamaged(
            f"{where}: lists {len(weight_map)} tensors, its files hold {len(weight_map) - len(lost)} of them: "
            f"{as_name(lost[0])} is not in {as_name(weight_map[lost[0]])}."
        )
    for name, file in weight_map.items():
        if tensors[name].file != file:
            raise CheckpointDamaged(f"{where}: places {as_name(name)} in {file}, it is in {tensors[name].file}.")
    extra = [name for name in tensors if name not in weight_map]
    if not extra:
        return []
    return [f"not in the index, and yet in the files: {_some([f'{n} ({tensors[n].file})' for n in extra])}"]


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


def _some(names: list[str]) -> str:
    return listed_names(names, 3, show=as_name)
