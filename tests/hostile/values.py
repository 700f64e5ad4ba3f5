"""Impossible tensors, structures without end, and headers of safetensors that contradict themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.assemble import (
    FOUR,
    RUN,
    SYSTEM,
    call,
    entry,
    items,
    name,
    number,
    safetensors,
    storage,
    tensor,
    text,
    torch_stream,
    torch_zip,
)
from tests.hostile.case import WEIGHTS, Case, file


def of_tensor(**fields: Any) -> Callable[[Path], Path]:
    return file(torch_zip(items(w=tensor(**fields)) + b".", WEIGHTS))


def nested(depth: int, around: bytes = b"\x85", inside: bytes = b"N") -> bytes:
    return inside + around * depth + b"."


def doubled(times: int, leaf: bytes = b"N") -> bytes:
    """A list of twice the list before it, and so on: 2**times leaves."""
    return leaf + b"q\x000" + b"(h\x00h\x00lq\x000" * times + b"h\x00."


def clashing(seed: int) -> bytes:
    """A pair of numbers whose hash as a tuple is the same for every seed, and a value.

    Tuples of numbers hash alike in every process (xxHash without a key), so the second number can be solved for.
    """
    first, second, last = 11400714785074694791, 14029467366897019727, 2870177450012600261
    a = 1000 * seed
    while True:  # one in sixteen is short enough
        lane = (last + a * second) % WORD
        b = (0xBEEF - (lane << 31 | lane >> 33) % WORD * first) * _INVERSE % WORD
        if b < 1 << 60:
            return number(a) + number(b) + b"\x86N"
        a += 1


WORD = 1 << 64
_INVERSE = pow(14029467366897019727, -1, WORD)


ORDERED = name("collections", "OrderedDict")
STATE = ORDERED + b")R"

TENSORS = {
    "a tensor beyond its storage": Case(
        of_tensor(shape=(2, 3), strides=(3, 1)), refused="byte 24 of data/0, which has 16"
    ),
    "an offset beyond the storage": Case(of_tensor(offset=1), refused="ends at byte 20 of data/0, which has 16"),
    "an offset of 2**62": Case(of_tensor(offset=1 << 62), refused="ends at byte"),
    "a negative offset": Case(of_tensor(offset=-1), refused="all whole numbers of at least 0"),
    "a negative shape": Case(of_tensor(shape=(-2, 2)), refused="all whole numbers of at least 0"),
    "a shape of 2**63": Case(of_tensor(shape=(1 << 63, 1), strides=(0, 0)), refused="all whole numbers of at least 0"),
    "a shape whose product is 2**64": Case(of_tensor(shape=(1 << 32, 1 << 32), strides=(0, 0)), refused="ends at byte"),
    "an empty tensor beyond it": Case(of_tensor(shape=(0,), strides=(1,), offset=5), refused="ends at byte 20"),
    "an empty shape of 2**62": Case(of_tensor(shape=(0, 1 << 62), strides=(1 << 62, 1)), reported=""),
    "negative strides": Case(of_tensor(strides=(-2, 1)), refused="all whole numbers of at least 0"),
    "strides beyond the storage": Case(of_tensor(strides=(1 << 40, 1)), refused="ends at byte"),
    "strides of 2**63 - 1": Case(of_tensor(strides=((1 << 63) - 1,) * 2), refused="ends at byte"),
    "fewer strides than sizes": Case(of_tensor(strides=(1,)), refused="as many strides as sizes"),
    "65 dimensions": Case(of_tensor(shape=(1,) * 65, strides=(1,) * 65), refused="ends at|expected as many strides"),
    "10,000 dimensions": Case(of_tensor(shape=(1,) * 10_000, strides=(1,) * 10_000), refused="expected as many"),
    "a storage larger than its record": Case(of_tensor(numel=41), refused="data/0 has 16 bytes, data.pkl says 164"),
    "a storage of negative size": Case(of_tensor(numel=-4), refused="malformed reference"),
    "a storage of 2**70 elements": Case(of_tensor(numel=1 << 70), refused="malformed reference"),
    "a storage that is not there": Case(of_tensor(key="1"), refused="data/1 is missing"),
    "a storage whose name leads out": Case(of_tensor(key="../data.pkl"), refused="is missing"),
    "a storage with an endless name": Case(of_tensor(key="k" * 100_000), refused="is missing"),
    "one storage of two sizes": Case(
        file(torch_zip(items(a=tensor(), b=tensor(numel=2, shape=(2,), strides=(1,))) + b".", WEIGHTS)),
        refused="both 16 and 8 bytes",
    ),
    "a tensor whose storage is a call": Case(
        file(torch_zip(call("torch._utils", "_rebuild_tensor_v2", RUN, *[b"N"] * 5) + b".")), reported="posix.system"
    ),
    "a tensor whose location is a call": Case(
        file(torch_zip(items(w=tensor().replace(text("cpu"), RUN)) + b".", WEIGHTS)), reported="posix.system"
    ),
    "a tensor with a hook that is a call": Case(of_tensor(hooks=RUN), reported="posix.system"),
    "a parameter around a call": Case(
        file(torch_zip(call("torch._utils", "_rebuild_parameter", RUN, b"\x88", STATE) + b".")), reported="posix.system"
    ),
    "a parameter with a state that is a call": Case(
        file(
            torch_zip(
                call("torch._utils", "_rebuild_parameter_with_state", tensor(), b"\x88", STATE, RUN) + b".", WEIGHTS
            )
        ),
        reported="posix.system",
    ),
    "a tensor of a class that is a function": Case(
        file(
            torch_zip(
                call(
                    *("torch._tensor", "_rebuild_from_type_v2"),
                    *(SYSTEM, name("torch", "Tensor"), text("x") + b"\x85", b"}"),
                )
                + b"."
            )
        ),
        reported="_rebuild_from_type_v2(posix.system",
    ),
    "a storage that runs and is dropped": Case(
        file(torch_zip(storage("0", 4) + items(append=SYSTEM) + b"b" + text("touch executed") + b"a0N.", WEIGHTS)),
        refused="a state for a Storage",
    ),
    "a storage of an unknown class": Case(
        file(torch_zip(storage("0", 4, "EvilStorage") + b".", WEIGHTS)), reported="torch.EvilStorage"
    ),
    "a reference of six parts": Case(
        file(torch_zip(b"(" + text("storage") + b"NNNNNtQ.")), refused="expected one to a storage"
    ),
}

LISTS = {
    "nested 190 deep": Case(file(torch_zip(nested(190))), reported=""),
    "nested 1,000 deep": Case(file(torch_zip(nested(1000))), refused="nested deeper than 200 levels"),
    "nested 100,000 deep": Case(file(torch_zip(nested(100_000))), refused="nested deeper than 200 levels"),
    "1,000 calls in calls": Case(
        file(torch_zip(name("a", "f") + b"q\x000" + nested(1000, b"q\x010h\x00h\x01\x85R"))),
        refused="nested deeper than 200 levels",
    ),
    "100,000 marks": Case(file(torch_zip(b"(" * 100_000 + b"N.")), reported=""),
    "1,000,000 lists on the stack": Case(
        file(torch_zip(b"]" * 1_000_000 + b".")), refused="lists, dictionaries and sets"
    ),
    "1,000,000 sets in a list": Case(
        file(torch_zip(b"(" + b"\x8f" * 1_000_000 + b"l.")), refused="lists, dictionaries and sets"
    ),
    "90,000 lists in a list": Case(file(torch_zip(b"(" + b"]" * 90_000 + b"l.")), reported=""),
    "12,000 keys of one hash": Case(
        file(torch_zip(b"}(" + b"".join(map(clashing, range(12_000))) + b"u.")), reported=""
    ),
    "2**60 values": Case(file(torch_zip(doubled(60))), refused="unfolds to over"),
    "2**15 values in 200 bytes": Case(file(torch_zip(doubled(15))), reported=""),
    "2**14 tensors with names of 900 wide characters": Case(
        file(torch_zip(b"}" + text("\U0001f600" * 900) + doubled(14, tensor())[:-1] + b"s.", WEIGHTS)),
        refused="their names have over 1000000 characters too many",
    ),
    "2**60 tensors": Case(file(torch_zip(doubled(60, tensor()), WEIGHTS)), refused="unfolds to over"),
    "200,000 values behind a key of 200,000 characters": Case(
        file(torch_zip(b"}" + text("k" * 200_000) + b"(" + b"N" * 200_000 + b"ls.")), reported=""
    ),
    "a list in itself": Case(file(torch_zip(b"]q\x00h\x00a.")), reported="contains itself"),
    "a dictionary in itself": Case(file(torch_zip(b"}q\x00K\x01h\x00s.")), reported="contains itself"),
    "a call in its own state": Case(file(torch_zip(b"cx\nC\n)Rq\x00h\x00b.")), reported="contains itself"),
    "a tuple as a key, 2**60 parts": Case(
        file(torch_zip(b"Nq\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"0}h\x00Ns.")), refused="unfolds to over"
    ),
    "a text of 2**63 bytes": Case(file(torch_zip(b"\x8d" + b"\xff" * 8 + b".")), refused="bytes are asked for"),
    "bytes of 4 GB": Case(file(torch_zip(b"B\xff\xff\xff\xff.")), refused="bytes are asked for"),
    "a number of 2 GB": Case(file(torch_zip(b"\x8b\xff\xff\xff\x7f.")), refused="1024 are allowed"),
    "a number of 10,000 digits": Case(file(torch_zip(b"L" + b"9" * 10_000 + b"L\n.")), refused="1024 are allowed"),
    "memo 2**31": Case(file(torch_zip(b"Nr\xff\xff\xff\x7fj\xff\xff\xff\x7f0.")), reported=""),
    "a name of 100,000 characters": Case(file(torch_zip(name("a" * 100_000, "f") + b".")), refused="not a short text"),
    "a tensor with an endless name": Case(
        file(torch_zip(b"}" + text("k" * 5000) + tensor() + b"s.", WEIGHTS)), refused="endless name"
    ),
    "a tensor named by an escape sequence": Case(
        file(torch_zip(b"}" + text("\x1b[2J\n\r") + tensor() + b"s.", WEIGHTS)), reported=""
    ),
    "a tensor named by half a character": Case(
        file(torch_zip(b"}" + text("\ud800") + tensor() + b"s.", WEIGHTS)), reported=""
    ),
    "two tensors of one name": Case(
        file(torch_zip(b"}(" + text("a.b") + tensor() + text("a") + items(b=tensor()) + b"u.", WEIGHTS)),
        refused="two tensors are called",
    ),
    "a stream with an endless pickle": Case(file(torch_stream(b"(" * 5000, b"")), refused="does not end"),
    "a stream whose storages share a key": Case(
        file(torch_stream(b"N.", b"](" + text("0") * 2 + b"e.")), refused="names one of them twice"
    ),
    "a stream with bytes behind": Case(file(torch_stream(b"N.", tail=RUN + b".")), refused="belong to nothing"),
}


def tensors_file(header: Any, data: bytes = FOUR, length: int | None = None) -> Callable[[Path], Path]:
    return file(safetensors(header, data, length), "x.safetensors")


def of_entry(*args: Any) -> Callable[[Path], Path]:
    return tensors_file({"w": entry(*args)})


SAFETENSORS = {
    "a header of 2**63 bytes": Case(tensors_file({}, length=1 << 63), refused="claims 9223372036854775808 bytes"),
    "a header nested 100,000 deep": Case(tensors_file(b'{"a":' + b"[" * 100_000), refused="not valid JSON"),
    "a header nested 900 deep": Case(
        tensors_file(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"), refused="deeper than 200"
    ),
    "a number of 5,000 digits in the header": Case(
        tensors_file(b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}'),
        refused="not valid JSON",
    ),
    "sizes that are texts": Case(of_entry(["2", "2"], 0, 16), refused="whole numbers of at least 0"),
    "sizes that are fractions": Case(of_entry([2.0, 2.0], 0, 16), refused="whole numbers of at least 0"),
    "10,000 sizes": Case(of_entry([1] * 10_000, 0, 16), refused="at most 64"),
    "offsets beyond the file": Case(of_entry([2, 2], 1 << 40, (1 << 40) + 16), refused="ends at byte"),
    "a pickle in the metadata": Case(
        tensors_file({"__metadata__": {"x": RUN.decode("latin1")}, "w": entry([2, 2], 0, 16)}), reported=""
    ),
    "an endless name in safetensors": Case(
        tensors_file({"w" * 100_000: entry([2, 2], 0, 16)}), refused="is not a valid name"
    ),
    "an escape sequence as a name": Case(tensors_file({"\x1b[2J\n": entry([2, 2], 0, 16)}), reported=""),
    "10,000 empty tensors": Case(
        tensors_file({f"w{i}": entry([0], 0, 0) for i in range(10_000)} | {"w": entry([4], 0, 16)}), reported=""
    ),
}
