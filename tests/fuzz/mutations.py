"""Changes to a file, blind and by its structure; each is a function of the bytes and a random generator alone."""

from __future__ import annotations

import io
import json
import pickletools
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from core.bundle.training_state import unseal
from core.errors import CheckpointError

Mutation = Callable[[bytes, random.Random, list[bytes]], bytes]
"""From a file's bytes, and a pool of other files to take from."""

NUMBERS = [0, 1, 2, 7, 8, 64, 127, 128, 255, 256, 1000, 65535, 65536, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
NUMBERS += [1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, -1, -2, -(1 << 31), -(1 << 63)]

WORDS = ["", ".", "..", "/", "/etc/passwd", "../x", "a/../b", "\0", "\n", "\x1b[2J", "\ud800", "é" * 300, "x" * 5000]
WORDS += ["model", "w", "data/0", "data.pkl", "torch.FloatStorage", "storage", "__metadata__", ".metadata"]
WORDS += ["F32", "cpu"]

SNIPPETS = [
    b"cposix\nsystem\n", b"cbuiltins\neval\n", b"X\x01\0\0\0x", b"K\x01", b")", b"}", b"]", b"(", b"t", b"R", b"0",
    b"\x81", b"\x92", b"b", b"s", b"u", b"a", b"e", b"Q", b"o", b"2", b"1", b"N", b"\x88", b"\x94", b"h\x00", b"h\x01",
    b"\x85", b"\x86", b"\x87", b"\x8f", b"\x90", b"\x91", b"d", b"l", b".", b"\x82\x01", b"\x97", b"q\x00", b"\x93",
    b"G\x7f\xf8\0\0\0\0\0\0", b"I-1\n", b"L99999999999999999999L\n", b"F1e999\n", b"S'x'\n", b"Vx\n", b"p0\n", b"g0\n",
    b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n",
    b"J\xff\xff\xff\xff", b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x8a\x09\0\0\0\0\0\0\0\0\x01", b"ctorch\nSize\n",
    b"cx.y\nConfig\n", b"P0\n",
]  # fmt: skip
"""Opcodes of pickles to put anywhere."""


def flip(data: bytes, rng: random.Random, pool: list[bytes]) -> bytes:
    """One to eight bits."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        out[_spot(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(out)


def replace(data: bytes, rng: random.Random, pool: list[bytes]) -> bytes:
    """A number in the place of some bytes."""
    out, at = bytearray(data), _spot(data, rng)
    size = rng.choice([1, 2, 4, 8])
    out[at : at + size] = (rng.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, rng.choice(["little", "big"]))
    return bytes(out)


def cut(data: bytes, rng: random.Random, pool: list[bytes]) -> bytes:
    """Only the beginning."""
    return data[: _spot(data, rng)]


def insert(data: bytes, rng: random.Random, pool: list[bytes]) -> bytes:
    """Some bytes more."""
    at = _spot(data, rng)
    return data[:at] + rng.choice([rng.randbytes(rng.randrange(1, 40)), rng.choice(SNIPPETS), bytes(9)]) + data[at:]


def remove(data: bytes, rng: random.Random, pool: list[bytes]) -> bytes:
    """Some bytes less."""
    at = _spot(data, rng)
    return data[:at] + data[at + rng.choice([1, 2, 8, 64, 1000]) :]


def double(data: bytes, rng: random.Random, pool: list[bytes]) -> bytes:
    """A part once more, somewhere."""
    start, at = _spot(data, rng), _spot(data, rng)
    return data[:at] + data[start : start + rng.choice([1, 4, 46, 100, 1000])] * rng.choice([1, 2, 50]) + data[at:]


def splice(data: bytes, rng: random.Random, pool: list[bytes]) -> bytes:
    """The beginning of this file, the end of another."""
    other = rng.choice(pool)
    return rng.choice([data[: _spot(data, rng)] + other[_spot(other, rng) :], data + other, other + data])


BLIND: list[Mutation] = [flip, replace, cut, insert, remove, double, splice]


def _spot(data: bytes, rng: random.Random) -> int:
    """A position, more often where structure is: at the beginning and the end."""
    size = max(len(data), 1)
    return rng.choice([rng.randrange(size), rng.randrange(min(size, 400)), size - 1 - rng.randrange(min(size, 700))])


# zips


_DIRECTORY = {4: 2, 6: 2, 8: 2, 10: 2, 16: 4, 20: 4, 24: 4, 28: 2, 30: 2, 32: 2, 34: 2, 42: 4}
_LOCAL = {4: 2, 6: 2, 8: 2, 14: 4, 18: 4, 22: 4, 26: 2, 28: 2}
_END = {4: 2, 6: 2, 8: 2, 10: 2, 12: 4, 16: 4, 20: 2}
_END64 = {4: 8, 16: 4, 20: 4, 24: 8, 32: 8, 40: 8, 48: 8}
_LOCATOR = {4: 4, 8: 8, 16: 4}
_FIELDS = {b"PK\1\2": _DIRECTORY, b"PK\3\4": _LOCAL, b"PK\5\6": _END, b"PK\6\6": _END64, b"PK\6\7": _LOCATOR}


def zip_field(data: bytes, rng: random.Random, pool: list[bytes]) -> bytes:
    """Another number in one to three fields of headers."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        signature = rng.choice(list(_FIELDS))
        at = [i for i in range(len(data)) if data.startswith(signature, i)] if data.count(signature) < 200 else []
        if at:
            start = rng.choice(at)
            offset, size = rng.choice(list(_FIELDS[signature].items()))
            old = int.from_bytes(out[start + offset : start + offset + size], "little")
            new = rng.choice([rng.choice(NUMBERS), old + 1, old - 1, old * 2, rng.randrange(len(data) + 1)])
            out[start + offset : start + offset + size] = (new % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(out)


def zip_record(data: bytes, rng: random.Random, pool: list[bytes]) -> bytes:
    """One record changed by its own structure, the zip sound around it; or a record renamed, doubled or left out."""
    records = _records(data)
    if not records:
        return zip_field(data, rng, pool)
    at = rng.choice(
        [i for i, (name, _) in enumerate(records) if name.endswith("data.pkl")] * 4 + [*range(len(records))]
    )
    name, body = records[at]
    records = list(records)
    how = rng.randrange(12)
    if how == 0:
        records[at] = (rng.choice([name + "x", rng.choice(WORDS), rng.choice(records)[0]]), body)
    elif how == 1:
        records.insert(rng.randrange(len(records) + 1), (rng.choice([name, "x/evil.pkl", "x/../y"]), body))
    elif how == 2:
        del records[at]
    elif how == 3:
        rng.shuffle(records)
    else:
        records[at] = (name, mutate(body, rng, pool))
    return _zipped(records, compress=rng.random() < 0.03)


@lru_cache(maxsize=64)
def _records(data: bytes) -> tuple[tuple[str, bytes], ...]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return tuple((info.filename, archive.read(info)) for info in archive.infolist())
    except Exception:  # of a damaged zip Python's module raises whatever its parts do
        return ()


def _zipped(records: list[tuple[str, bytes]], compress: bool) -> bytes:
    """Without Python's zipfile, which refuses names twice, long names and is slow."""
    out, entries = bytearray(), []
    for name, body in records:
        raw, crc = name.encode("utf-8", "surrogatepass")[:65535], zlib.crc32(body)
        method, packed = 8 if compress else 0, zlib.compress(body)[2:-4] if compress else body
        fields = (method, 0, crc, len(packed), len(body), len(raw))
        entries.append(struct.pack("<4sHHHHIIIIHHHHHII", b"PK\1\2", 0, 0, 0, *fields, 0, 0, 0, 0, 0, len(out)) + raw)
        out += struct.pack("<4sHHHIIIIHH", b"PK\3\4", 0, 0, *fields, 0) + raw + packed
    start, directory = len(out), b"".join(entries)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, len(entries), len(entries), len(directory), start, 0)
    return bytes(out) + directory + end


# pickles


@lru_cache(maxsize=256)
def _operations(data: bytes) -> tuple[bytes, ...]:
    """The opcodes of all pickles at the beginning of these bytes, and the rest as one."""
    cuts: list[int] = []
    start = 0
    try:
        while start < len(data):
            found = [
                position for _, _, position in pickletools.genops(io.BytesIO(data[start:])) if position is not None
            ]
            ends = start + _length(data[start:], found)
            cuts += [start + position for position in found]
            start = ends
    except (ValueError, IndexError, KeyError, struct.error, UnicodeError, EOFError):
        cuts.append(start)
    cuts = sorted({*cuts, len(data)})
    return tuple(data[a:b] for a, b in zip([0, *cuts], cuts, strict=False) if a != b)


def _length(data: bytes, found: list[int]) -> int:
    return found[-1] + 1  # STOP has one byte


def pickle_operations(data: bytes, rng: random.Random, pool: list[bytes]) -> bytes:
    """Opcodes left out, doubled, moved, replaced, or given another argument."""
    parts = list(_operations(data))
    for _ in range(rng.choice([1, 1, 2, 4])):
        if not parts:
            return data
        at = rng.randrange(len(parts))
        how = rng.randrange(9)
        if how == 0:
            del parts[at]
        elif how == 1:
            parts.insert(at, rng.choice(parts))
        elif how == 2:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif how == 3:
            parts[at] = rng.choice(SNIPPETS)
        elif how == 4:
            parts[at:at] = [rng.choice(SNIPPETS) for _ in range(rng.randrange(1, 6))]
        elif how == 5:
            start = rng.randrange(len(parts))
            parts[at:at] = parts[start : start + rng.randrange(1, 30)] * rng.choice([1, 1, 20])
        else:
            parts[at] = _other_argument(parts[at], rng)
    return b"".join(parts)


def _other_argument(part: bytes, rng: random.Random) -> bytes:
    """An opcode with another number or text."""
    code = part[:1]
    if code in b"KMJ\x8aIL":
        value = rng.choice([*NUMBERS, -5, rng.randrange(100)])
        size = value.bit_length() // 8 + 1
        return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
    if code in b"X\x8c\x8dVUTS":
        data = rng.choice(WORDS).encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(data)) + data
    if code in b"hjqrgp":
        return code + part[1:-1] + bytes([rng.randrange(48, 58) if code in b"gp" else rng.randrange(40)])
    if code == b"c":
        return rng.choice([snippet for snippet in SNIPPETS if snippet[:1] == b"c"])
    return rng.choice(SNIPPETS)


# JSON


def json_values(data: bytes, rng: random.Random, pool: list[bytes]) -> bytes:
    """A value or key of a JSON text changed; one with a checksum of its own gets the right one."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return flip(data, rng, pool)
    for _ in range(rng.choice([1, 1, 2, 4])):
        values = _changed(values, rng, 0)
    if rng.random() < 0.05:
        values = {"x": values}
    deep = rng.choice([100, 500, 900, 5000]) if rng.random() < 0.03 else 0
    try:
        unseal(data, "x")
        if "integrity" in values:
            data = sealed(values)
            return data.replace(b"{", b'{"deep": ' + b"[" * deep + b"]" * deep + b",", 1) if deep else data
    except (CheckpointError, AttributeError, KeyError, TypeError, ValueError, RecursionError):
        pass
    text = json.dumps(values).encode("utf-8", "surrogatepass")
    return text.replace(b"{", b'{"deep": ' + b"[" * deep + b"]" * deep + b",", 1) if deep else text


def sealed(state: dict[str, Any]) -> bytes:
    """A training state with its checksum, which anybody can compute, whatever is in it."""
    unsealed = {**state, "integrity": {**state["integrity"], "self": None}}
    crc = zlib.crc32(json.dumps(unsealed, sort_keys=True, separators=(",", ":")).encode())
    return json.dumps({**state, "integrity": {**state["integrity"], "self": f"{crc:08x}"}}).encode()


def _changed(value: Any, rng: random.Random, depth: int) -> Any:
    """A copy of a JSON value with one change in it."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, how = rng.choice(keys), rng.randrange(9)
        value = dict(value) if isinstance(value, dict) else list(value)
        if how == 0:
            del value[key]
        elif how == 1 and isinstance(value, dict):
            value[rng.choice(WORDS)] = value.pop(key)
        elif how == 2 and isinstance(value, list):
            value[key:key] = [value[key]] * rng.choice([1, 2, 70])
        else:
            value[key] = _changed(value[key], rng, depth + 1)
        return value
    return rng.choice(
        [*NUMBERS, *WORDS, None, True, 0.5, 1e300, float("nan"), [], {}, [[]], ["x"], {"x": 1}, [1, 2, 3]]
    )


def safetensors_header(data: bytes, rng: random.Random, pool: list[bytes]) -> bytes:
    """The header changed by its structure, its length true."""
    length = int.from_bytes(data[:8], "little")
    header = json_values(data[8 : 8 + length], rng, pool)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _by_structure(data: bytes, rng: random.Random, pool: list[bytes]) -> bytes:
    if data[:2] == b"PK":
        return rng.choice([zip_field, zip_record, zip_record, zip_record])(data, rng, pool)
    if data[:1] == b"\x80" or data[-1:] == b".":
        return pickle_operations(data, rng, pool)
    if data[:1] == b"{":
        return json_values(data, rng, pool)
    if data[8:9] == b"{":
        return safetensors_header(data, rng, pool)
    return rng.choice(BLIND)(data, rng, pool)


def mutate(data: bytes, rng: random.Random, pool: list[bytes]) -> bytes:
    """A changed copy of a file; three in four are changed by their structure."""
    if not data:
        return rng.choice(pool)
    for _ in range(rng.choice([1, 1, 1, 2])):
        data = (_by_structure if rng.random() < 0.75 else rng.choice(BLIND))(data or b"\0", rng, pool)
    return data
