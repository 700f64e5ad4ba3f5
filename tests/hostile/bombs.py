"""Files of a given size that ask for as much time and memory as such a file can."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable

import numpy as np

from tests.hostile.assemble import FOUR, name, number, numbers, safetensors, storage, torch_zip

REBUILD = name("torch._utils", "_rebuild_tensor_v2") + b"q\x01"
ARGUMENTS = b"(h\x00" + number(0) + b"))\x89Ntq\x02"
TENSORS = storage("0", 4).removesuffix(b"Q") + b"Qq\x000" + REBUILD + b"0" + ARGUMENTS + b"0"
CALLED = b"ca\nb\nq\x03"


EVERYTHING = (
    TENSORS + CALLED.replace(b"\x03", b"\x04") + b"0U\1aq\x050" + storage("0", 4).removesuffix(b"Q") + b"q\x060"
)
"""Before a pickle that has some of everything: a name, a text and a storage beside what a tensor needs."""


def filled(size: int, before: bytes, repeated: bytes, most: float, behind: bytes = b"t.") -> bytes:
    """A pickle of `size` bytes: as many repetitions as fit or are allowed, below them values that nothing takes."""
    room = size - len(before) - len(behind)
    body = repeated * min(int(most), room // len(repeated))
    return b"N" * (room - len(body)) + before + body + behind


def colliding(size: int) -> bytes:
    """Numbers as keys: a walk through most of Python's table, and others that are sent onto it."""
    table = 1 << ((size // 6 * 3 // 2).bit_length() - 1)
    walk = np.empty(table * 9 // 20, dtype=np.int64)
    place = 5
    for i in range(len(walk)):
        walk[i], place = place, (5 * place + 1) % table
    taken = np.zeros(table, dtype=bool)
    taken[walk] = True
    found = perturbed = np.arange(table, 20 * table, dtype=np.int64)
    place_of = found % table
    on_walk = taken[place_of]
    for _ in range(5):
        perturbed = perturbed >> 5
        place_of = (5 * place_of + perturbed + 1) % table
        on_walk &= taken[place_of]
    keys = [*walk.tolist(), *found[on_walk][: table // 5].tolist()]
    return b"}(" + b"".join(b"J" + struct.pack("<i", key) + b"N" for key in keys) + b"u."


def different(
    size: int, each: Callable[[int], bytes], length: int, before: bytes = b"}(", behind: bytes = b"u."
) -> bytes:
    return before + b"".join(each(i) for i in range(size // length)) + behind


def names_of(size: int) -> bytes:
    """A header of safetensors with as many tensors as it can have."""
    count = size // 56
    return safetensors(
        json.dumps(
            {f"{i:x}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)},
            separators=(",", ":"),
        ).encode()
    )


PRIME = (1 << 61) - 1

PICKLES: dict[str, Callable[[int], bytes]] = {
    "None": lambda n: filled(n, b"(", b"N", 1_000_000 + n / 5),
    "None, too many": lambda n: b"(" + b"N" * (2 * n) + b"t.",
    "numbers": lambda n: filled(n, b"(", b"M\x01\x02", n),
    "numbers in lines": lambda n: filled(n, b"(", b"I1\n", n),
    "texts": lambda n: filled(n, b"(", b"U\x02ab", n),
    "empty tuples in tuples": lambda n: filled(n, b"(", b")\x85", n / 15),
    "pairs": lambda n: filled(n, b"(", b"NN\x86", n / 15),
    "pairs, too many": lambda n: filled(n, b"(", b"NN\x86", n),
    "tuples in each other": lambda n: b")" + b"\x85" * n + b".",
    "values stored": lambda n: b"N" + b"\x94" * n + b".",
    "values stored by number": lambda n: different(n, lambda i: b"r" + struct.pack("<I", i), 5, b"N", b"."),
    "lists": lambda n: filled(n, b"(", b"]", n / 30),
    "dictionaries": lambda n: filled(n, b"(", b"}K\x00Ns", n / 30),
    "dictionaries, too many": lambda n: filled(n, b"(", b"}K\x00Ns", n),
    "calls": lambda n: filled(n, CALLED + b"0(", b"h\x03)R", n / 32),
    "calls, too many": lambda n: filled(n, CALLED + b"0(", b"h\x03)R", n),
    "ordered dictionaries": lambda n: filled(n, name("collections", "OrderedDict") + b"q\x030(", b"h\x03)R", n / 21),
    "names": lambda n: filled(n, b"(", b"ca\nb\n", n / 21),
    "different names": lambda n: different(n, lambda i: b"ca\n%x\n0" % i, 21, b"", b"N."),
    "storages": lambda n: filled(n, TENSORS + b"(", b"h\x00Q", n),
    "tensors": lambda n: filled(n, TENSORS + b"(", b"h\x01h\x02R", n / 52),
    "tensors, too many": lambda n: filled(n, TENSORS + b"(", b"h\x01h\x02R", n),
    "empty texts": lambda n: filled(n, b"(", b"\x8c\0", n / 4 + 900_000),
    "texts in lines": lambda n: filled(n, b"(", b"V\n", n / 4 + 900_000),
    "texts in quotes": lambda n: filled(n, b"(", b"S''\n", n),
    "escapes": lambda n: filled(n, b"(", b"S'\\n'\n", n),
    "long numbers": lambda n: filled(n, b"(", b"\x8a\0", n / 4 + 900_000),
    "floats in lines": lambda n: filled(n, b"(", b"F1\n", n),
    "references in lines": lambda n: filled(n, b"Np1\n(", b"g1\n", n / 4 + 900_000),
    "booleans": lambda n: filled(n, b"(", b"\x88", n / 4 + 900_000),
    "appended one by one": lambda n: filled(n, b"]", b"Na", n / 6 + 90_000, b"."),
    "set one by one": lambda n: filled(n, b"}", b"K\0Ns", n / 6 + 90_000, b"."),
    "steps without effect": lambda n: filled(n, b"N", b"0N", n, b"."),
    "doubled": lambda n: filled(n, b"N", b"2", n, b"."),
    "empty batches": lambda n: filled(n, b"]", b"(e", n, b"."),
    "protocols": lambda n: filled(n, b"", b"\x80\2", n, b"N."),
    "frames": lambda n: filled(n, b"", b"\x95" + bytes(8), n, b"N."),
    "marks": lambda n: filled(n, b"", b"(", n, b"N."),
    "sets": lambda n: filled(n, b"(", b"\x8f(K\0\x90", n / 26),
    "some of everything": lambda n: filled(
        n,
        EVERYTHING + b"(",
        b"(h\x01h\x02R]h\x04)R(h\x05I1\nV\nS''\nd)\x85h\x06Qh\x04)RK\0b\x8f(K\1\x90ca\nb\nt",
        n / 60,
    ),
    "states": lambda n: filled(n, CALLED + b")R}q\x04K\x00K\x00s", b"h\x04b", n, b"."),
    "keys of one hash": lambda n: different(n, lambda i: number(i * PRIME) + b"N", 12),
    "keys that are numbers": lambda n: different(n, lambda i: b"J" + struct.pack("<i", i) + b"N", 6),
    "keys that are tuples": lambda n: different(n, lambda i: numbers((i, 1)) + b"N", 42),
    "keys that collide": colliding,
    "a set that collides": lambda n: colliding(n).replace(b"}(", b"\x8f(", 1)[:-2] + b"\x90.",
}
"""Pickles by what they have much of, made of a size in bytes."""

PICKLES["different storages"] = lambda n: different(n, lambda i: storage(f"{i:x}", 0) + b"0", 60, b"", b"N.")


def bomb(which: str, size: int) -> bytes:
    """A whole torch file around a pickle."""
    return torch_zip(PICKLES[which](size), {"0": FOUR})
