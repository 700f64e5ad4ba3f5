"""Whether a container has only a part of a model under the whole model's names, as one rank or one process saved it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import CheckpointNotFound
from .container import Container, listing
from .joined import read_json
from .pickles.inert import as_name, names_text
from .recognised import folder_kind
from .series import Series, series_of
from .spec import TensorSpec

_NUMBER = r"\d{1,5}(?:_\d{3}){0,2}"
_RANK = re.compile(
    rf"(?:(?:^|[._-])(?:(?:(?:mp|tp|pp|dp|zero_pp)_)?rank|tp|pp|mp)[_.-]?|^consolidated\.)({_NUMBER})(?!\d)"
)
"""Where the name of a file or folder has a rank: model_world_size_2_rank_0.pt, mp_rank_01, consolidated.00.pth."""

_FLAT = re.compile(r"(?:^|\.)(?:_?flat_param(?:_\d+)?|(?:fp32_flat|single_partition_of_fp32)_groups(?:\.\d+)?)(?=\.|$)")
"""Names under which FSDP and DeepSpeed store the values of many parameters end to end, a rank its part of them."""

_LORA = re.compile(r"(?:^|[._])lora_(?:[AaBb]|embedding_[AB]|magnitude_vector)(?:[._]|$)")
_ADAPTER = "adapter_config.json"
_DIGITS = re.compile(r"\d+")

_NORM = re.compile(r"(?:norm|ln|bn)[^.]*\.weight$|(?:norm|ln_|bn)[^.]*\.", re.IGNORECASE)
_FEW = 3  # weights: fewer vectors may be anything

_SCRIPT = "zero_to_fp32.py"


def part_of_model(container: Container) -> str:
    """Say why the tensors are only a part of a model, and what to do; "" when nothing shows that.

    A file that lies among the parts of one model is one of them.
    """
    single = container.path.is_file()
    folder = container.path.parent if single else container.path
    if said := _placeholders(container.tensors, folder) or _flat(container.tensors, folder):
        return said
    if said := _adapter(container.tensors, folder):
        return said
    if not single:
        return _alone(container)
    return _numbered(container.path) or _displaced(container) or _of_a_rank(container.path) or _one_of(container.path)


def _placeholders(tensors: Mapping[str, TensorSpec], folder: Path) -> str:
    """ZeRO-3 leaves an empty tensor in place of each parameter, whose values are spread over the ranks' files."""
    parameters = {name: spec for name, spec in tensors.items() if name.endswith((".weight", ".bias"))}
    empty = [name for name, spec in parameters.items() if spec.shape == (0,)]
    if len(empty) < 2 or 2 * len(empty) < len(parameters):
        return ""
    said = f"{len(empty)} of {len(parameters)} parameters have the shape (0,), such as {as_name(empty[0])}: "
    if flat := next((name for name in tensors if _FLAT.search(name)), None):
        return (
            f"{said}their values are in {as_name(flat)}, of which each rank of FSDP has a part. {_flat_remedy(folder)}"
        )
    at = next((place for place in (folder, folder.parent) if (place / _SCRIPT).is_file()), None)
    how = (
        f"`python {at / _SCRIPT} {at} OUT` joins them"
        if at
        else f"DeepSpeed writes {_SCRIPT} beside its global_step*/ folder: `python {_SCRIPT} FOLDER OUT` joins them"
    )
    return f"{said}placeholders of DeepSpeed's ZeRO-3, whose values are in the files of its ranks. {how}; convert OUT."


def _flat_remedy(folder: Path) -> str:
    """How to get whole tensors; dinov2 writes those of its teacher into a file of their own."""
    teachers = [p for p in folder.glob("eval/*/teacher_checkpoint.pth") if p.is_file()]
    if teachers:
        newest = max(teachers, key=lambda path: (len(path.parent.name), path.parent.name))
        return f"{newest} has the weights of the teacher whole, as dinov2 writes them: take that."
    return (
        "Load it on as many ranks with the program that wrote it, and save a full state dict "
        "(StateDictType.FULL_STATE_DICT, or get_model_state_dict of torch.distributed.checkpoint.state_dict with "
        "full_state_dict=True)."
    )


def _flat(tensors: Mapping[str, TensorSpec], folder: Path) -> str:
    """FSDP's local state dict, and DeepSpeed's optimizer states: many parameters end to end in one dimension."""
    name = next((name for name in tensors if _FLAT.search(name)), None)
    if name is None:
        return _vectors(tensors, folder)
    said = f"{as_name(name)} {tensors[name].shape} holds many parameters end to end, without their names and shapes: "
    if "_groups" in name:
        return f"{said}a rank's part of DeepSpeed's ZeRO. Run {_SCRIPT}, which lies beside its global_step*/ folder."
    return f"{said}a rank's part of FSDP. {_flat_remedy(folder)}"


def _vectors(tensors: Mapping[str, TensorSpec], folder: Path) -> str:
    """FSDP's local state dict of original parameters: a rank's part of each weight, in one dimension."""
    weights = {name: spec.shape for name, spec in tensors.items() if name.endswith(".weight")}
    if any(len(shape) != 1 for shape in weights.values()):
        return ""
    others = [name for name in weights if not _NORM.search(name)]
    if len(others) < _FEW:
        return ""
    return (
        f"none of its {len(weights)} weights has two dimensions ({as_name(others[0])} is {weights[others[0]]}): they "
        f"are a rank's part of FSDP, end to end. {_flat_remedy(folder)}"
    )


def _adapter(tensors: Mapping[str, TensorSpec], folder: Path) -> str:
    """The tensors of LoRA by themselves, as PEFT saves them, without those of the model that they change."""
    names = [name for name in tensors if _LORA.search(name)]
    if not names or 2 * len(names) < len(tensors):
        return ""
    config, base = folder / _ADAPTER, "BASE"
    if config.is_file():
        said = read_json(folder, _ADAPTER, {}).get("base_model_name_or_path")
        base = as_name(said) if isinstance(said, str) else base
    return (
        f"{len(names)} of {len(tensors)} tensors are those of LoRA, such as {as_name(names[0])}: an adapter of {base}, "
        f"not a model. PEFT merges them: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), "
        f"{str(folder)!r}).merge_and_unload().save_pretrained('OUT'); convert OUT."
    )


def _one_of(path: Path) -> str:
    """One of the parts of a model of a program that is known by the names of its files."""
    names = listing(path.parent)
    row = folder_kind(names)
    like = [name for name in names if _DIGITS.sub("0", name) == _DIGITS.sub("0", path.name)]
    if row is None or len(like) < 2 or not any(re.fullmatch(wanted, name) for wanted in row.names for name in like):
        return ""
    return f"one of {len(like)} files of {row.what}. {row.said(path.parent)}"


def _numbered(path: Path) -> str:
    """One of several numbered files, or of torch's shards."""
    one = next(iter(series_of([path.name])), None)
    if one is None or (one.total == 1 and not one.ranked):
        return ""
    beside = next((s for s in series_of(listing(path.parent)) if s.label == one.label), one)
    if len(beside.ranks) == 1:
        return _lone(beside)
    what = f"the shards of {len(beside.ranks)} ranks" if one.ranked else f"{one.total} files"
    said = f"one of {what} of one model ({as_name(one.label)})"
    if beside.missing:
        return f"{said}; not there: {names_text(beside.missing)}. Copy them beside it, and name the folder."
    return f"{said}, which lie beside it. Name the folder, {path.parent}."


def _displaced(container: Container) -> str:
    """One of torch's shards under another name: a tensor that does not begin at its first element."""
    if not isinstance(container.content, dict) or "__metadata__" not in container.content:
        return ""
    from .torch_shards import offsets_of  # what looks into a torch file does without the readers of safetensors

    offsets = offsets_of(container, str(container.path))
    name = next((name for name, begin in offsets.items() if any(begin)), None)
    if name is None:
        return ""
    return (
        f"{as_name(name)} begins at {offsets[name]} of the whole tensor: a rank's shard of torch's "
        "HuggingFaceStorageWriter. Name the folder with the shards of all ranks."
    )


def _alone(container: Container) -> str:
    """A folder with the shard of a single rank: torch's writer records nowhere how many there were."""
    ranked = [one for one in series_of(container.files) if one.ranked]
    return _lone(ranked[0]) if len(ranked) == 1 and len(ranked[0].ranks) == 1 else ""


def _lone(one: Series) -> str:
    rank = max(one.ranks)
    lost = [f"shard-{k:05}-{one.stem}-*.safetensors" for k in (*range(1, rank), rank + 1)]
    return (
        f"{as_name(one.names[0])} has rank {rank}'s part of each tensor, and no other rank's is here: "
        f"{names_text(lost)} and on are missing. Copy the shards of all ranks into one folder and name it; if one "
        "rank saved the whole model, rename the file to model.safetensors."
    )


def _of_a_rank(path: Path) -> str:
    """A file of one rank whose siblings, files or folders of the other ranks, are beside it."""
    for place in (path, path.parent):
        pattern = rank_pattern(place.name)
        if pattern is None:
            continue
        names = [name for name in listing(place.parent) if re.fullmatch(pattern, name)]
        if place is not path:  # a folder for each rank, with a file of the same name in each
            names = [f"{name}/{path.name}" for name in names if (place.parent / name / path.name).is_file()]
        others = [name for name in names if place.parent / name != path]
        if not any(_is_first(name) for name in names):
            continue  # ranks count from 0; other numbers are something else
        if others:
            return (
                f"the file of one rank; beside it are those of {len(others)} more ({names_text(others)}). "
                f"{_how_to_join(place, path)}; if each has the whole model, copy this one to a folder of its own."
            )
    return ""


def _how_to_join(place: Path, path: Path) -> str:
    from .rank_files import rank_files

    try:
        here = place is not path or any(place.name in files.values() for files in rank_files(place.parent).values())
    except CheckpointNotFound:
        return "Copy these to a folder of their own, and name it"
    row = folder_kind(listing(place.parent))
    if row is not None and not here:
        return row.said(place.parent).removesuffix(".")
    return f"Name the folder, {place.parent}" if here else "Join them with the program that wrote them"


def rank_pattern(name: str) -> str | None:
    """A regular expression for the names of the same file of other ranks; None for a name without a rank."""
    pattern, end = "", 0
    for match in _RANK.finditer(name):
        pattern += re.escape(name[end : match.start(1)]) + _NUMBER
        end = match.end(1)
    return pattern + re.escape(name[end:]) if end else None


def _is_first(name: str) -> bool:
    return all(set(match[1]) <= set("0_") for match in _RANK.finditer(name.partition("/")[0]))
