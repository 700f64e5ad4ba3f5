"""Pickles read without running them: plain values stay plain, everything else becomes an inert record.

Nothing is imported and nothing is called. A class or function is a `Global`, its call a `Call`: text and data.
Work and memory are bounded by the length of the pickle.
The opcodes are those of CPython's Lib/pickletools.py.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from ...errors import CheckpointDamaged
from .allowance import DENSITY, KEYS, Allowance
from .collisions import FEW, SLICE, Table, fill, predictable
from .inert import Call, Global, Malformed, New, as_key, as_text, check_structure
from .opcodes import old_text, opcode_table, unescape, utf8
from .reductions import PLAIN, Reductions

LONGEST_INT = 1024
"""Bytes or characters of one whole number: 128-bit random states need 17, and Python prints up to 4300 digits."""

LONGEST_NAME = 1000
"""Characters of the full name of a class or function."""


_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|.)", re.DOTALL)

_ABSENT = object()
_KEPT = {str, bytes, float, bool, type(None), Global}
_LONG_KEY = 1 << 60

_uint32 = struct.Struct("<I").unpack_from
_int32 = struct.Struct("<i").unpack_from


class PickleCutOff(CheckpointDamaged):
    """A pickle needs more bytes than there are."""


class ParsedPickle(NamedTuple):
    """One pickle as read."""

    value: Any
    end: int  # the position behind its last byte
    unused: list[Any]  # calls and attributes that are not in the value: made for their effect, or dropped


def read_pickle(data: bytes, where: str) -> Any:
    """Read one pickle into plain values and inert records.

    Raises: CheckpointDamaged for everything that is not a complete, sound pickle.
    """
    return parse_pickle(data, where).value


def parse_pickle(
    data: bytes,
    where: str,
    start: int = 0,
    *,
    persistent: Callable[[Any], Any] | None = None,
    resolve: Callable[[Global], Any] | None = None,
    reductions: Reductions | None = None,
    density: float = DENSITY,
) -> ParsedPickle:
    """Read the pickle that begins at byte `start`, and report where it ends.

    `persistent` gives the value of a persistent id, `resolve` what to put for a name; `reductions` adds to PLAIN, and
    one that returns NotImplemented leaves its call an inert record. `density` is what it may make for each byte, as
    `Allowance` weighs it.

    Raises: PickleCutOff when it does not end within `data`, CheckpointDamaged for anything else that is not sound.
    """
    reader = _Reader(
        data, where, start, persistent, resolve or (lambda name: name), {**PLAIN, **(reductions or {})}, density
    )
    value = reader.run()
    held = check_structure(value, where, reader.position - start)
    return ParsedPickle(value, reader.position, [lost for lost in reader.unheld if id(lost) not in held])


class _Ends(Malformed):
    """The data end before the pickle does."""


class _Reader:
    """The stack machine of the pickle format."""

    def __init__(
        self,
        data: bytes,
        where: str,
        start: int,
        persistent: Callable[[Any], Any] | None,
        resolve: Callable[[Global], Any],
        reductions: Reductions,
        density: float,
    ) -> None:
        self.data, self.where = data, where
        self.persistent, self.resolve, self.reductions = persistent, resolve, reductions
        self.start = self.begin = self.position = start
        self.stack: list[Any] = []
        self.push = self.stack.append
        self.marks: list[int] = []
        self.puts = 0
        self.memo: dict[int, Any] = {}
        self.unheld: list[Any] = []  # calls and other values that may not be in the result
        allowance = Allowance(len(data) - start, len(data), density)
        self.count, self.most_puts = allowance.count, allowance.most["stored values"]
        self.tables: dict[int, Table] = {}  # of large dictionaries and sets, by identity
        self.globals: dict[tuple[str, str], Any] = {}
        self.copied = 0  # elements that reductions took: shared arguments add up

    def run(self) -> Any:
        """Read one pickle; `position` is behind it then."""
        try:
            return self.execute()
        except _Ends as fault:
            raise PickleCutOff(f"{self.begun()}: {fault}.") from None
        except Malformed as fault:
            problem = str(fault)
        except IndexError:
            problem = "it takes more from its stack than it put there"
        except KeyError:
            problem = "it refers to a value that it never stored"
        except (ValueError, OverflowError):
            problem = "a malformed number or text"
        raise CheckpointDamaged(f"{self.begun()}: {problem}.")

    def begun(self) -> str:
        return f"{self.where}: damaged pickle at byte {self.begin} of {len(self.data)}"

    def execute(self) -> Any:
        """The loop over the opcodes; what stands in it is nearly all of them, and needs no call."""
        data, table, end = self.data, _OPCODES, len(self.data)
        stack, memo, marks = self.stack, self.memo, self.marks
        push, most_puts = stack.append, self.most_puts
        position = self.position
        try:
            while True:
                begin = position
                if begin >= end:
                    raise _Ends("it ends without STOP")
                code = data[begin]
                position = begin + 1
                if code > 0x5F:
                    if code == 0x68 and position < end:  # BINGET
                        push(memo[data[position]])
                        position += 1
                        continue
                    if code == 0x71 and position < end:  # BINPUT
                        memo[data[position]] = stack[-1]
                        position += 1
                    elif code == 0x94:  # MEMOIZE
                        memo[len(memo)] = stack[-1]
                    elif code == 0x72 and begin + 4 < end:  # LONG_BINPUT
                        memo[_uint32(data, position)[0]] = stack[-1]
                        position += 4
                    elif code == 0x6A and begin + 4 < end:  # LONG_BINGET
                        push(memo[_uint32(data, position)[0]])
                        position += 4
                        continue
                    elif code == 0x8C and position < end and (behind := position + 1 + data[position]) <= end:
                        push(utf8(data[position + 1 : behind]))  # SHORT_BINUNICODE
                        position = behind
                        continue
                    else:
                        self.position = position
                        table[code](self)
                        position = self.position
                        continue
                    self.puts += 1
                    if self.puts > most_puts:
                        self.count("stored values", self.puts)
                elif code == 0x4B and position < end:  # BININT1
                    push(data[position])
                    position += 1
                elif code == 0x4E:  # NONE
                    push(None)
                elif code == 0x28:  # MARK
                    marks.append(len(stack))
                elif code == 0x58 and begin + 4 < end and (behind := begin + 5 + _uint32(data, position)[0]) <= end:
                    push(utf8(data[begin + 5 : behind]))  # BINUNICODE
                    position = behind
                elif code == 0x4D and begin + 2 < end:  # BININT2
                    push(data[position] | data[position + 1] << 8)
                    position += 2
                elif code == 0x4A and begin + 4 < end:  # BININT
                    push(_int32(data, position)[0])
                    position += 4
                elif code == 0x2E:  # STOP
                    return stack.pop()
                else:
                    self.position = position
                    table[code](self)
                    position = self.position
        finally:
            self.begin, self.position = begin, position

    # reading

    def take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if count < 0 or self.position > len(self.data):
            raise _Ends(f"{count} bytes are asked for, {len(self.data) - start} are left")
        return self.data[start : self.position]

    def byte(self) -> int:
        position = self.position
        if position >= len(self.data):
            raise _Ends("1 byte is asked for, 0 are left")
        self.position = position + 1
        return self.data[position]

    def number(self, size: int) -> int:
        start = self.position
        self.position = end = start + size
        if end > len(self.data):
            raise _Ends(f"{size} bytes are asked for, {len(self.data) - start} are left")
        return int.from_bytes(self.data[start:end], "little")

    def line(self) -> bytes:
        start = self.position
        end = self.data.find(b"\n", start)
        if end < 0:
            raise _Ends("a line without end")
        self.position = end + 1
        return self.data[start:end]

    def text_line(self) -> str:
        return self.line().decode("utf-8")

    def short_line(self) -> bytes:
        line = self.line()
        if len(line) > LONGEST_INT:
            raise Malformed(f"a number of {len(line)} characters, {LONGEST_INT} are allowed")
        return line

    # the stack

    def pop_many(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise IndexError
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        return values

    def pop_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        self.count("values in them", len(values))
        return values

    def batch(self) -> list[Any]:
        values = self.pop_mark()
        if not values:
            self.count("steps that make nothing")
        return values

    def top(self, *kinds: type) -> Any:
        value = self.stack[-1]
        if not isinstance(value, kinds) or (isinstance(value, Call) and not value.changes):
            raise Malformed(f"items for a {type(value).__name__}")
        return value

    # operations that are more than one line

    def call(self, callable: Any, args: Any, kind: type[Call] = Call) -> None:
        if not isinstance(callable, (Global, Call)):
            raise Malformed(f"a call of a {type(callable).__name__}")
        if not isinstance(args, tuple):
            raise Malformed(f"arguments in a {type(args).__name__}")
        self.count("calls")
        value: Any = NotImplemented
        reduce = self.reductions.get(callable.path) if isinstance(callable, Global) else None
        if reduce and not (args and kind is New):
            copied = sum([len(arg) for arg in args if isinstance(arg, (str, bytes, list, tuple, dict))])
            self.copied += copied
            if self.copied > 16 * (self.position - self.start) + 4096:
                raise Malformed("its calls copy more than the file holds")
            try:
                value = reduce(*args)
            except TypeError as error:  # another number of arguments than this callable takes
                raise Malformed(f"{as_text(callable)} with {len(args)} arguments") from error
        if value is NotImplemented:
            value = kind(callable, args)
            self.count("records of calls")
            self.unheld.append(value)
        self.push(value)

    def collection(self, made: Any) -> None:
        self.count("lists, dictionaries and sets")
        self.stack.append(made)

    def single(self) -> None:
        self.count("tuples")
        self.stack[-1] = (self.stack[-1],)

    def pair(self) -> None:
        self.count("tuples")
        last = self.stack.pop()
        self.stack[-1] = (self.stack[-1], last)

    def triple(self) -> None:
        self.count("tuples")
        self.push(self.pop_many(3))

    def make_tuple(self) -> None:
        self.count("tuples")
        start = self.marks.pop()
        self.count("values in them", len(self.stack) - start)
        self.stack[start:] = [tuple(self.stack[start:])]

    def reduce(self) -> None:
        args = self.stack.pop()
        self.call(self.stack.pop(), args)

    def build(self) -> None:
        self.count("states")
        state, target = self.stack.pop(), self.stack[-1]
        if state and isinstance(state, (dict, tuple)):
            self.unheld.append(state)  # a function among the attributes can be called, and replaced after that
        if isinstance(target, Call) and target.changes:
            target.state = state
        elif not isinstance(target, dict):  # attributes of a dictionary are dropped: torch's `_metadata`
            raise Malformed(f"a state for a {type(target).__name__}")

    def append(self, values: list[Any]) -> None:
        target = self.top(list, Call)
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        if len(values) % 2:
            raise Malformed("a key without value")
        target, keys, items = self.top(dict, Call), values[::2], values[1::2]
        if isinstance(target, Call):
            target.extend(zip(keys, items, strict=True))
            return
        if not target and {*map(type, keys)} == {str}:  # the attributes of a record: nothing to make of the keys
            target.update(zip(keys, items, strict=True))
            if len(target) == len(keys):
                return
            target.clear()
        keys = self.keys(keys)
        table = self.table(target, keys)
        for start in range(0, len(keys), SLICE):
            new = []
            for key, value in zip(keys[start : start + SLICE], items[start : start + SLICE], strict=True):
                replaced = target.get(key, _ABSENT)
                if replaced is _ABSENT:
                    new.append(key)
                elif isinstance(replaced, Global):
                    self.unheld.append(replaced)
                target[key] = value
            if table is not None:
                table.add(new)

    def table(self, target: dict[Any, Any] | set[Any], keys: list[Any]) -> Table | None:
        """What watches a dictionary or set that gets more keys; None while it has few, or only texts."""
        found = self.tables.get(id(target))
        if found is None and len(target) + len(keys) >= FEW and predictable(keys):
            found = self.tables[id(target)] = Table(target)
        return found

    def add_items(self) -> None:
        values = self.batch()
        target = self.top(set, Call)
        if isinstance(target, Call):
            target.extend(values)
            return
        keys = self.keys(values)
        if len(keys) + len(target) < FEW:
            target.update(keys)
            return
        table = self.table(target, keys)
        for start in range(0, len(keys), SLICE):
            new = {key for key in keys[start : start + SLICE] if key not in target}
            target |= new
            if table is not None:
                table.add(new)

    def keys(self, values: list[Any]) -> list[Any]:
        """Values as keys of a dictionary or set."""
        kinds = {*map(type, values)}
        if kinds <= _KEPT or (kinds == {int} and min(values) > -_LONG_KEY and max(values) < _LONG_KEY):
            return values
        found = list(map(as_key, values))
        self.count(KEYS, sum(key is not value for key, value in zip(found, values, strict=True)))
        return found

    def frozen(self) -> None:
        made: set[Any] = set()
        fill(made, self.keys(self.pop_mark()))
        self.collection(frozenset(made))

    def dictionary(self) -> None:
        values = self.pop_mark()
        self.collection({})
        self.set_items(values)

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]
        self.puts += 1
        if self.puts > self.most_puts:
            self.count("stored values", self.puts)

    def drop(self) -> None:
        self.count("steps that make nothing")
        self.stack.pop()

    def drop_marked(self) -> None:
        self.count("steps that make nothing")
        self.pop_mark()

    def double(self) -> None:
        self.count("steps that make nothing")
        self.push(self.stack[-1])

    def append_one(self) -> None:
        self.count("items appended one by one")
        self.append([self.stack.pop()])

    def set_one(self) -> None:
        self.count("items set one by one")
        self.set_items(list(self.pop_many(2)))

    def unknown(self) -> None:
        raise Malformed(f"unknown opcode 0x{self.data[self.position - 1]:02x}")

    def integer_line(self) -> int | bool:
        line = self.short_line()
        return {b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line)

    def long(self, size: int) -> int:
        if not 0 <= size <= LONGEST_INT:
            raise Malformed(f"a number of {size} bytes, {LONGEST_INT} are allowed")
        return int.from_bytes(self.take(size), "little", signed=True)

    def short_long(self) -> None:
        self.count("long numbers")
        size = self.byte()
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def text_in_line(self) -> None:
        self.count("texts in lines")
        self.push(self.line().decode("raw_unicode_escape"))

    def quoted(self) -> Any:
        self.count("texts in lines")
        line = self.line().strip()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
            raise Malformed("a text without quotes")
        return old_text(_ESCAPE.sub(unescape, line[1:-1]) if b"\\" in line else line[1:-1])

    def proto(self) -> None:
        self.count("steps that make nothing")
        if (version := self.byte()) > 5:
            raise Malformed(f"protocol {version}, the highest one is 5")

    def named(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > LONGEST_NAME:
            raise Malformed("a global whose name is not a short text")
        self.count("names")
        found = self.globals.get((module, name))
        if found is None:
            found = self.globals[module, name] = self.resolve(Global(module, name))
        return found

    def persist(self, identity: Any) -> None:
        if self.persistent is None:
            raise Malformed("a persistent id, which only files of torch have")
        self.count("references to storages")
        self.push(self.persistent(identity))

    def obj(self) -> None:
        values = self.pop_mark()
        self.call(values[0], tuple(values[1:]))

    def new(self) -> None:
        args = self.stack.pop()
        self.call(self.stack.pop(), args, New)

    def new_with_keywords(self) -> None:
        callable, args, keywords = self.pop_many(3)
        self.call(callable, args if keywords == {} else (*args, keywords) if isinstance(args, tuple) else args, New)


_TABLE = opcode_table(_Reader)
_OPCODES = [_TABLE.get(code, _Reader.unknown) for code in range(256)]
