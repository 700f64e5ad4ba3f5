"""What each opcode of a pickle does to the stack machine that reads it (core/containers/pickles/reader.py)."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

Operation = Callable[[Any], Any]
"""An operation on the machine."""


def opcode_table(machine: Any) -> dict[int, Operation]:
    """Give each opcode its operation; those of more than one line are methods of the class of the machine."""
    return {
        ord(code): operation
        for code, operation in {
            "\x80": machine.proto,
            "\x95": lambda r: r.take(8),  # FRAME
            "(": lambda r: r.marks.append(len(r.stack)),
            "0": machine.drop,
            "1": machine.drop_marked,
            "2": machine.double,
            # plain values
            "N": lambda r: r.push(None),
            "\x88": lambda r: r.push(True),
            "\x89": lambda r: r.push(False),
            "I": lambda r: r.push(r.integer_line()),
            "L": lambda r: r.push(int(r.short_line().rstrip(b"L"))),
            "F": lambda r: r.push(float(r.short_line())),
            "J": lambda r: r.push(int.from_bytes(r.take(4), "little", signed=True)),
            "K": lambda r: r.push(r.byte()),
            "M": lambda r: r.push(r.number(2)),
            "\x8a": machine.short_long,
            "\x8b": lambda r: r.push(r.long(r.number(4))),
            "G": lambda r: r.push(struct.unpack(">d", r.take(8))[0]),
            "V": machine.text_in_line,
            "X": lambda r: r.push(utf8(r.take(r.number(4)))),
            "\x8c": lambda r: r.push(utf8(r.take(r.byte()))),
            "\x8d": lambda r: r.push(utf8(r.take(r.number(8)))),
            "S": lambda r: r.push(r.quoted()),
            "T": lambda r: r.push(old_text(r.take(r.number(4)))),
            "U": lambda r: r.push(old_text(r.take(r.byte()))),
            "B": lambda r: r.push(r.take(r.number(4))),
            "C": lambda r: r.push(r.take(r.byte())),
            "\x8e": lambda r: r.push(r.take(r.number(8))),
            "\x96": lambda r: r.push(r.take(r.number(8))),  # BYTEARRAY8
            # collections
            ")": lambda r: r.push(()),
            "t": machine.make_tuple,
            "\x85": machine.single,
            "\x86": machine.pair,
            "\x87": machine.triple,
            "]": lambda r: r.collection([]),
            "l": lambda r: r.collection(r.pop_mark()),
            "a": machine.append_one,
            "e": lambda r: r.append(r.batch()),
            "}": lambda r: r.collection({}),
            "d": machine.dictionary,
            "s": machine.set_one,
            "u": lambda r: r.set_items(r.batch()),
            "\x8f": lambda r: r.collection(set()),
            "\x90": machine.add_items,
            "\x91": machine.frozen,
            # memo
            "p": lambda r: r.put(int(r.short_line())),
            "q": lambda r: r.put(r.byte()),
            "r": lambda r: r.put(r.number(4)),
            "\x94": lambda r: r.put(len(r.memo)),
            "g": lambda r: r.push(r.memo[int(r.short_line())]),
            "h": lambda r: r.push(r.memo[r.byte()]),
            "j": lambda r: r.push(r.memo[r.number(4)]),
            # names and calls
            "c": lambda r: r.push(r.named(r.text_line(), r.text_line())),
            "\x93": lambda r: r.push(r.named(*r.pop_many(2))),
            "i": lambda r: r.call(r.named(r.text_line(), r.text_line()), tuple(r.pop_mark())),
            "o": machine.obj,
            "R": machine.reduce,
            "\x81": machine.new,
            "\x92": machine.new_with_keywords,
            "b": machine.build,
            "P": lambda r: r.persist(r.text_line()),
            "Q": lambda r: r.persist(r.stack.pop()),
        }.items()
    }


def unescape(match: re.Match[bytes]) -> bytes:
    """Return the bytes that an escape in a quoted text stands for."""
    escape = match[1]
    if len(escape) == 3:
        return bytes([int(escape[1:], 16)])
    return {b"n": b"\n", b"t": b"\t", b"r": b"\r"}.get(escape, escape)


def old_text(raw: bytes) -> str | bytes:
    """Read a `str` of Python 2: text where it can be text, else bytes."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw


def utf8(raw: bytes) -> str:
    """Read a text, which may have halves of characters."""
    return raw.decode("utf-8", "surrogatepass")
