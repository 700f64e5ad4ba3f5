"""Pickles read without running them: plain values stay plain, everything else becomes an inert record.

Nothing is imported and nothing is called. A class or function is a `Global`, its call a `Call`: text and data.
Work and memory are bounded by the length of the pickle.
The opcodes are those of CPython's Lib/pickletools.py.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from ...errors import CheckpointDamaged
from .inert import FEW, SLACK, SLICE, Call, Global, Malformed, New, Watch, as_key, as_text, check_structure, fill
from .opcodes import old_text, opcode_table, unescape
from .reductions import PLAIN, Reductions

LONGEST_INT = 1024
"""Bytes or characters of one whole number: 128-bit random states need 17, and Python prints up to 4300 digits."""

LONGEST_NAME = 1000
"""Characters of the full name of a class or function."""


_KEYS = "keys that are no texts or short numbers"

_MOST = {
    "lists, dictionaries and sets": (SLACK, 25),  # 60 to 220 bytes of memory each
    "calls": (40_000, 20),
    "records of calls": (20_000, 30),
    "references to storages": (20_000, 20),
    _KEYS: (SLACK, 40),
    "names": (20_000, 20),
    "tuples": (SLACK, 14),
    "values in them": (10 * SLACK, 4),
    "stored values": (SLACK, 3),
}
"""What a pickle may make of each kind: so many in any case, and one more for so many of its bytes."""

_uint32 = struct.Struct("<I").unpack_from


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
) -> ParsedPickle:
    """Read the pickle that begins at byte `start`, and report where it ends.

    `persistent` gives the value of a persistent id, `resolve` what to put for a name; `reductions` adds to PLAIN, and
    one that returns NotImplemented leaves its call an inert record.

    Raises: PickleCutOff when it does not end within `data`, CheckpointDamaged for anything else that is not sound.
    """
    reader = _Reader(data, where, start, persistent, resolve or (lambda name: name), {**PLAIN, **(reductions or {})})
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
    ) -> None:
        self.data, self.where = data, where
        self.persistent, self.resolve, self.reductions = persistent, resolve, reductions
        self.start = self.position = start
        self.stack: list[Any] = []
        self.push = self.stack.append
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.unheld: list[Any] = []  # calls and other values that may not be in the result
        self.most = {what: free + (len(data) - start) // share for what, (free, share) in _MOST.items()}
        self.made = dict.fromkeys(_MOST, 0)
        self.watch = Watch()
        self.globals: dict[tuple[str, str], Any] = {}
        self.copied = 0  # elements that reductions took: shared arguments add up

    def run(self) -> Any:
        data, table, end = self.data, _OPCODES, len(self.data)
        stack, memo, marks = self.stack, self.memo, self.marks
        most, ones, most_ones = self.most["stored values"], 0, self.most["tuples"]
        begin = position = self.position
        try:
            while True:
                begin = position
                if begin >= end:
                    raise _Ends("it ends without STOP")
                code = data[begin]
                position = begin + 1
                if code == 0x94:  # MEMOIZE; this and the next six are two thirds of all, and need no call
                    memo[len(memo)] = stack[-1]
                    if len(memo) > most:
                        self.count("stored values", len(memo))
                elif code == 0x68 and position < end:  # BINGET
                    stack.append(memo[data[position]])
                    position += 1
                elif code == 0x6A and begin + 4 < end:  # LONG_BINGET
                    stack.append(memo[_uint32(data, position)[0]])
                    position += 4
                elif code == 0x29:  # EMPTY_TUPLE
                    stack.append(())
                elif code == 0x85:  # TUPLE1
                    stack[-1] = (stack[-1],)
                    ones += 1
                    if ones > most_ones:
                        self.count("tuples", ones)
                elif code == 0x4E:  # NONE
                    stack.append(None)
                elif code == 0x28:  # MARK
                    marks.append(len(stack))
                elif code == 0x2E:  # STOP
                    self.position = position
                    return stack.pop()
                else:
                    operation = table.get(code)
                    if operation is None:
                        raise Malformed(f"unknown opcode 0x{code:02x}")
                    self.position = position
                    operation(self)
                    position = self.position
        except _Ends as fault:
            raise PickleCutOff(f"{self.where}: damaged pickle at byte {begin} of {end}: {fault}.") from None
        except Malformed as fault:
            problem = str(fault)
        except IndexError:
            problem = "it takes more from its stack than it put there"
        except KeyError:
            problem = "it refers to a value that it never stored"
        except (ValueError, OverflowError):
            problem = "a malformed number or text"
        raise CheckpointDamaged(f"{self.where}: damaged pickle at byte {begin} of {end}: {problem}.")

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

    def pop(self) -> Any:
        return self.stack.pop()

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
                begin = time.process_time() if copied > FEW else 0.0
                value = reduce(*args)
                if copied > FEW:
                    self.watch.add(copied, time.process_time() - begin, copied)
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

    def count(self, what: str, more: int = 1) -> None:
        self.made[what] += more
        if self.made[what] > self.most[what]:
            raise Malformed(f"over {self.most[what]} {what}, too many for {len(self.data)} bytes")

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
        state, target = self.pop(), self.stack[-1]
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
        if len(target) + len(keys) < FEW:
            self.put_pairs(target, keys, items)
            return
        for start in range(0, len(keys), SLICE):
            begin, tuples = time.process_time(), self.made[_KEYS]
            self.put_pairs(target, keys[start : start + SLICE], items[start : start + SLICE])
            seconds = time.process_time() - begin
            self.watch.add(min(SLICE, len(keys) - start), seconds, self.made[_KEYS] - tuples)

    def put_pairs(self, target: dict[Any, Any], keys: list[Any], items: list[Any]) -> None:
        for key, value in zip(keys, items, strict=True):
            key = self.key(key)
            if isinstance(replaced := target.get(key), Global):
                self.unheld.append(replaced)
            target[key] = value

    def add_items(self) -> None:
        values = self.pop_mark()
        target = self.top(set, Call)
        if isinstance(target, Call):
            target.extend(values)
        else:
            fill(target, list(map(self.key, values)), self.watch)

    def key(self, value: Any) -> Any:
        """A value as a key of a dictionary."""
        key = as_key(value)
        if key is not value:
            self.count(_KEYS)
        return key

    def frozen(self) -> None:
        made: set[Any] = set()
        fill(made, list(map(self.key, self.pop_mark())), self.watch)
        self.collection(frozenset(made))

    def dictionary(self) -> None:
        values = self.pop_mark()
        self.collection({})
        self.set_items(values)

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]
        if len(self.memo) > self.most["stored values"]:
            self.count("stored values", len(self.memo))

    def integer_line(self) -> int | bool:
        line = self.short_line()
        return {b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line)

    def long(self, size: int) -> int:
        if not 0 <= size <= LONGEST_INT:
            raise Malformed(f"a number of {size} bytes, {LONGEST_INT} are allowed")
        return int.from_bytes(self.take(size), "little", signed=True)

    def quoted(self) -> Any:
        line = self.line().strip()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
            raise Malformed("a text without quotes")
        return old_text(re.sub(rb"\\(x[0-9a-fA-F]{2}|.)", unescape, line[1:-1], flags=re.DOTALL))

    def proto(self) -> None:
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


_OPCODES = opcode_table(_Reader)
