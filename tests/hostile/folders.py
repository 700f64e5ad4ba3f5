"""Folders whose indexes, links and metadata lead out of them, or say what cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.hostile.assemble import (
    METADATA,
    RUN,
    blocks,
    call,
    index,
    items,
    metadata,
    name,
    number,
    numbers,
    place,
    record,
    tensor,
    text,
    torch_zip,
)
from tests.hostile.case import SOUND_TENSORS, SOUND_ZIP, WEIGHTS, Case, folder_of


def hf_index(weight_map: Any, **files: bytes) -> dict[str, bytes | str]:
    """An index and the files beside it."""
    text_of = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    return {"model.safetensors.index.json": text_of, "a.safetensors": SOUND_TENSORS, **files}


OUT = "../outside.safetensors"


def beside(write: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """A folder with a sound checkpoint of somebody else beside it."""

    def both(folder: Path) -> Path:
        (folder / "own").mkdir()
        (folder / "outside.safetensors").write_bytes(SOUND_TENSORS)
        (folder / "outside.pt").write_bytes(SOUND_ZIP)
        (folder / "outside").mkdir()
        (folder / "rank").mkdir()
        (folder / "rank" / "model_optim_rng.pt").write_bytes(SOUND_ZIP)
        dcp({"w": blocks((2, 2), [((0, 0), (2, 2))])}, [(index("w", (0, 0)), place("a.distcp", 0, len(ITEM)))])(
            folder / "outside"
        )
        return write(folder / "own")

    return both


def dcp(
    tensors: dict[str, bytes],
    places: Sequence[tuple[bytes, bytes]],
    files: dict[str, bytes] | None = None,
    planner: bytes = b"}",
) -> Callable[[Path], Path]:
    """A DCP folder; by default its items are in one file, a.distcp."""
    return folder_of(
        {".metadata": metadata(tensors, places, planner), **({"a.distcp": ITEM} if files is None else files)}
    )


ITEM = torch_zip(tensor() + b".", WEIGHTS)
WHOLE = {"w": blocks((2, 2), [((0, 0), (2, 2))])}
AT = index("w", (0, 0))


def dcp_at(file_name: str, offset: int = 0, length: int = len(ITEM)) -> Callable[[Path], Path]:
    return dcp(WHOLE, [(AT, place(file_name, offset, length))])


def dcp_of(shape: Sequence[int], *boxes: tuple[Sequence[int], Sequence[int]]) -> Callable[[Path], Path]:
    """A tensor in these blocks, whose items are all the same one."""
    places = [(index("w", begin), place("a.distcp", i * len(ITEM), len(ITEM))) for i, (begin, _) in enumerate(boxes)]
    return dcp({"w": blocks(shape, boxes)}, places, {"a.distcp": ITEM * len(boxes)})


FOLDERS = {
    "an index that names a file out of the folder": Case(
        beside(folder_of(hf_index({"w": OUT}))), refused="expected one within its folder"
    ),
    "an index that names itself": Case(
        folder_of(hf_index({"w": "model.safetensors.index.json"})), refused="not a torch zip file|magic|text"
    ),
    "an index that names a folder": Case(
        folder_of(hf_index({"w": "sub"}) | {"sub/x": b""}), refused="a folder, expected a file"
    ),
    "an index that names an endless file": Case(folder_of(hf_index({"w": "x" * 5000})), refused="not there"),
    "an index of 20,000 files": Case(
        folder_of(hf_index({f"w{i}": f"{i}.safetensors" for i in range(20_000)})), refused="20000 not there"
    ),
    "an index nested 100,000 deep": Case(folder_of(hf_index("[" * 100_000)), refused="not valid JSON"),
    "a tensor in two files": Case(
        folder_of(hf_index({"w": "a.safetensors", "x": "b.safetensors"}) | {"b.safetensors": SOUND_TENSORS}),
        refused="w is in a.safetensors and in b.safetensors",
    ),
    "a file of 99,999 by its name": Case(
        folder_of({"model-00001-of-99999.safetensors": SOUND_TENSORS}), refused="99998 not there"
    ),
    "a link out of a Hugging Face folder": Case(
        beside(folder_of({"config.json": "{}"}, {"model.safetensors": OUT})), refused="a link that leads out"
    ),
    "a shard that is a link out of the folder": Case(
        beside(folder_of(hf_index({"w": "b.safetensors"}), {"b.safetensors": OUT})),
        refused='"b.safetensors" is a link that leads outside the folder, to ',
    ),
    "a link in a circle": Case(
        folder_of(hf_index({"w": "b.safetensors"}), {"b.safetensors": "b.safetensors"}), refused="cannot be opened"
    ),
    "a config that is a link out of the folder": Case(
        beside(folder_of({"model.safetensors": SOUND_TENSORS}, {"config.json": "../outside.pt"})),
        refused="a link that leads out",
    ),
    "the only checkpoint is a link out of the folder": Case(
        beside(folder_of({}, {"x.pt": "../outside.pt"})), refused="a link that leads out"
    ),
    "a part of a step that is a link out of the folder": Case(
        beside(folder_of({}, {"model_sharded": "../outside"})), refused="a link that leads out"
    ),
    "a rank file that is a link out of the folder": Case(
        beside(folder_of({}, {"model_rank00000.pt": "../outside.pt"})), refused="a link that leads out"
    ),
    "an iteration that is a link out of the folder": Case(
        beside(folder_of({}, {"iter_0000001": "../outside"})), refused="a link that leads out"
    ),
    "a rank's folder that is a link out of the folder": Case(
        beside(folder_of({}, {"mp_rank_00": "../rank"})), refused="a link that leads out"
    ),
    "a rank without its file": Case(
        folder_of({"mp_rank_00_001/x": b""}), refused=r"mp_rank_00_001: model_optim_rng\.pt is missing, found"
    ),
    "a file called by an escape sequence": Case(folder_of({"\x1b[2J.pt": SOUND_ZIP[:50]}), refused="names the file"),
    "ranks 0 and 99,999": Case(
        folder_of({"model_rank00000.pt": SOUND_ZIP, "model_rank99999.pt": SOUND_ZIP}), reported="2 of 100000 ranks"
    ),
}

DCP = {
    "a path out of the folder in .metadata": Case(beside(dcp_at("../outside/a.distcp")), refused="within its folder"),
    "an absolute path in .metadata": Case(dcp_at("/etc/passwd"), refused="expected one within its folder"),
    "a file that is not there": Case(dcp_at("b.distcp"), refused="1 of its 1 files are missing, with 1 items"),
    "an item beyond its file": Case(dcp_at("a.distcp", 10_000), refused="ends at byte"),
    "an item of 2**62 bytes": Case(dcp_at("a.distcp", 0, 1 << 62), refused="ends at byte 4611686018427387904"),
    "an item at 2**62": Case(dcp_at("a.distcp", 1 << 62), refused="ends at byte"),
    "an item at a negative offset": Case(dcp_at("a.distcp", -1), refused="all whole numbers of at least 0"),
    "an item of no bytes": Case(dcp_at("a.distcp", 0, 0), refused=r"w: empty \(0 bytes\)"),
    "an item that is cut": Case(dcp_at("a.distcp", 0, len(ITEM) - 1), refused="cut off|ends at"),
    "items that overlap": Case(
        dcp(
            {"v": blocks((2, 2), [((0, 0), (2, 2))]), **WHOLE},
            [(AT, place("a.distcp", 0, len(ITEM))), (index("v", (0, 0)), place("a.distcp", 0, len(ITEM)))],
        ),
        refused="the item before it ends at",
    ),
    "an item that belongs to nothing": Case(
        dcp(WHOLE, [(AT, place("a.distcp", 0, len(ITEM)))], {"a.distcp": ITEM + torch_zip(RUN + b".")}),
        reported="belong to no item",
    ),
    "a negative shape in .metadata": Case(dcp_of((-2, 2), ((0, 0), (2, 2))), refused="has the shape"),
    "a shape of 2**60 in .metadata": Case(dcp_of((1 << 60, 2), ((0, 0), (2, 2))), refused="has the shape|elements"),
    "blocks that overlap": Case(dcp_of((2, 2), ((0, 0), (2, 2)), ((0, 1), (2, 1))), refused="some occur twice"),
    "blocks that leave gaps": Case(dcp_of((4, 2), ((0, 0), (2, 2))), refused="some are missing"),
    "a block beyond the shape": Case(dcp_of((2, 2), ((1, 0), (2, 2))), refused="reaches beyond the shape"),
    "blocks of 2**62": Case(dcp_of((2, 2), ((0, 0), (1 << 62, 1 << 62))), refused="reaches beyond the shape"),
    "a block of another shape than its item": Case(dcp_of((4, 1), ((0, 0), (4, 1))), refused=r"is float32 \(2, 2\)"),
    "a block stored twice": Case(
        dcp(WHOLE, [(AT, place("a.distcp", 0, 9)), (AT, place("a", 0, 9))]), refused="stored twice"
    ),
    "a tensor that is stored nowhere": Case(dcp(WHOLE, []), refused="is nowhere in storage_data"),
    "storage that is no dictionary": Case(
        folder_of({".metadata": record(METADATA, "Metadata", state_dict_metadata=b"}", storage_data=RUN) + b"."}),
        refused="Another storage than files",
    ),
    "a path in the state dict 10,000 deep": Case(
        dcp(WHOLE, [(AT, place("a.distcp", 0, len(ITEM)))], planner=items(w=b"(" + text("k") * 10_000 + b"t")),
        reported="",
    ),
    "two items at one place in the state dict": Case(
        dcp(
            {"v": blocks((2, 2), [((0, 0), (2, 2))]), **WHOLE},
            [(AT, place("a.distcp", 0, len(ITEM))), (index("v", (0, 0)), place("a.distcp", len(ITEM), len(ITEM)))],
            {"a.distcp": ITEM * 2},
            items(v=text("k") + b"\x85", w=text("k") + b"\x85"),
        ),
        refused="where something else is",
    ),
    "a link out of a DCP folder": Case(
        beside(
            folder_of(
                {".metadata": metadata(WHOLE, [(AT, place("a.distcp", 0, len(ITEM)))])},
                {"a.distcp": "../outside/a.distcp"},
            )
        ),
        refused="a link that leads out",
    ),
    ".metadata that is a link out of the folder": Case(
        beside(folder_of({"a.distcp": ITEM}, {".metadata": "../outside/.metadata"})), refused="a link that leads out"
    ),
    "a second pickle behind .metadata": Case(
        folder_of(
            {".metadata": metadata(WHOLE, [(AT, place("a.distcp", 0, len(ITEM)))]) + RUN + b".", "a.distcp": ITEM}
        ),
        reported="behind",
    ),
}


def rank_file(placements: bytes, sizes: bytes, at: bytes, times: bytes = b"") -> Callable[[Path], Path]:
    """A rank's file with a DTensor of this mesh."""
    home = "torch.distributed.tensor"
    layout = record("torch.distributed._mesh_layout", "_MeshLayout", shape=sizes)
    mesh = record("torch.distributed.device_mesh", "DeviceMesh", _layout=layout, _coordinate_on_dim=at)
    spec = record(f"{home}._dtensor_spec", "DTensorSpec", mesh=mesh, placements=placements)
    kind = name(home, "DTensor")
    args = b"(" + kind + name("torch", "float32") + numbers((2, 2)) + b"t"
    state = items(_local_tensor=tensor(), _spec=spec)
    value = call(
        "torch._tensor", "_rebuild_from_type_v2", name("torch._utils", "_rebuild_wrapper_subclass"), kind, args, state
    )
    data = torch_zip(value + times + b".", WEIGHTS)
    return folder_of({"model_rank00000.pt": data})


REPLICATE = record("torch.distributed.tensor.placement_types", "Replicate")
SHARD = record("torch.distributed.tensor.placement_types", "Shard", dim=b"K\x00")


def repeated(value: bytes, times: int) -> bytes:
    """A tuple of one value many times."""
    return b"(" + value + b"q\x05" + b"h\x05" * (times - 1) + b"t"


RANKS = {
    "a mesh of 2**62 ranks": Case(
        rank_file(REPLICATE + b"\x85", numbers((1 << 62,)), numbers((0,))), refused="of ranks"
    ),
    "a mesh of 20,000 dimensions": Case(
        rank_file(repeated(SHARD, 20_000), repeated(b"K\x01", 20_000), repeated(b"K\x00", 20_000)), refused="of a mesh"
    ),
    "a mesh of 2**62 times 20,000": Case(
        rank_file(repeated(SHARD, 20_000), repeated(number(1 << 62), 20_000), repeated(b"K\x00", 20_000)),
        refused="of a mesh",
    ),
    "a rank outside of its mesh": Case(rank_file(SHARD + b"\x85", numbers((2,)), numbers((2,))), refused="of ranks"),
    "a cut along a dimension that is not there": Case(
        rank_file(SHARD.replace(b"K\x00", b"K\x07") + b"\x85", numbers((2,)), numbers((0,))), refused="is cut along 7"
    ),
    "one DTensor 2**6 times": Case(
        rank_file(REPLICATE + b"\x85", numbers((1,)), numbers((0,)), b"q\x090" + b"(h\x09h\x09lq\x090" * 6 + b"h\x09"),
        reported="",
    ),
}
