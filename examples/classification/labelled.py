"""Labelled texts: rows of text columns and a class, read from CSV, TSV or JSON lines, alone or in splits."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.console.files import open_regular
from core.data.randomness import draws, mix
from core.errors import InputError

FORMATS = (".csv", ".tsv", ".jsonl")
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
"""The names that files of a folder may have, without their extensions."""

USUAL_TEXTS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("text",), ("sentence",))
"""Default text columns: the first of these that a file has."""

_LONGEST_NUMBER = 100
"""Characters of a class that is sorted as a number; more are a text."""

HELD_OUT = 0.1
"""Fraction of the training rows used for validation where no file is."""


@dataclass(frozen=True)
class LabelledTexts:
    """Rows of a file: the texts of each, and the name of its class."""

    path: Path
    columns: tuple[str, ...]
    texts: list[tuple[str, ...]]
    labels: list[str]
    lines: list[int]  # where in the file each row begins

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, numbers: Sequence[int]) -> LabelledTexts:
        """The rows with these numbers, in this order."""
        texts, labels = [self.texts[i] for i in numbers], [self.labels[i] for i in numbers]
        return LabelledTexts(self.path, self.columns, texts, labels, [self.lines[i] for i in numbers])

    def classes(self) -> list[str]:
        """The names of all classes: sorted as numbers if all are numbers, else as text."""
        names = set(self.labels)
        if all(name.removeprefix("-").isdecimal() and len(name) < _LONGEST_NUMBER for name in names):
            return sorted(names, key=lambda name: (int(name), name))
        return sorted(names)

    def class_numbers(self, classes: Sequence[str]) -> np.ndarray:
        """The index of each row's class in a list of classes, int64 [N].

        Raises: InputError naming the first row whose class is not in the list.
        """
        places = {name: i for i, name in enumerate(classes)}
        for label, line in zip(self.labels, self.lines, strict=True):
            if label not in places:
                raise InputError(
                    f"{self.path}, line {line}: class {label!r}, expected one of the training rows: "
                    f"{', '.join(classes)}. Remove the row, or add rows of its class to the training rows."
                )
        return np.array([places[label] for label in self.labels], dtype=np.int64)


def read_splits(
    path: Path, text_columns: Sequence[str] | None = None, label_column: str = "label", seed: int = 0
) -> dict[str, LabelledTexts]:
    """Read a file, or a folder with a train, a validation and a test file: rows by "train", "validation" and "test".

    Without a validation file, a tenth of the training rows is used, drawn by seed; a test file may be missing.

    Raises: InputError when there is nothing to read, or a file is not as expected.
    """
    if not path.exists():
        raise InputError(
            f"{path}: no such file or folder; looked for {path.absolute()}. --dataset takes a "
            f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]} file, or a folder with a train file."
        )
    if path.is_dir():
        files = {split: found for split, names in SPLITS.items() if (found := _find(path, names))}
        if "train" not in files:
            raise InputError(
                f"{path}: found no train.csv, train.tsv or train.jsonl. Give the training rows one of these names."
            )
    else:
        files = {"train": path}
    splits = {split: read_labelled(file, text_columns, label_column) for split, file in files.items()}
    if "validation" not in splits:
        rows = splits["train"]
        order = np.argsort(draws(mix(seed, 0x68656C64), 0, 0, len(rows)), kind="stable")
        held = max(1, round(HELD_OUT * len(rows)))
        if held == len(rows):
            raise InputError(f"{rows.path}: found {len(rows)} row, expected at least 2: one to train, one to validate.")
        splits["validation"] = rows.take(np.sort(order[:held]).tolist())
        splits["train"] = rows.take(np.sort(order[held:]).tolist())
    return splits


def read_labelled(path: Path, text_columns: Sequence[str] | None = None, label_column: str = "label") -> LabelledTexts:
    """Read the rows of a .csv, .tsv or .jsonl file; without names, its text columns are the default ones.

    A TSV has no quotes, as in XNLI and GLUE: a quotation mark is text.

    Raises: InputError with the place, for another format, a missing column, or a value that is not a text.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: expected a file that ends in {', '.join(FORMATS)}, or a folder of such files.")
    try:
        with open_regular(path) as file:
            content = file.read().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}. --dataset takes a file, or a folder with a train file.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from error
    read = _json_lines if path.suffix.lower() == ".jsonl" else _table
    columns: tuple[str, ...] = tuple(text_columns or ())
    texts, labels, lines = [], [], []
    for line, row in read(path, content):
        columns = columns or _usual(path, row)
        if missing := [name for name in (*columns, label_column) if name not in row]:
            raise InputError(
                f"{path}, line {line}: no column {', '.join(missing)}; there are {', '.join(row)}. "
                "Name others with --text_columns and --label_column."
            )
        texts.append(tuple(_text(path, line, name, row[name]) for name in columns))
        labels.append(_label(path, line, label_column, row[label_column]))
        lines.append(line)
    if not texts:
        raise InputError(f"{path}: found no rows, expected some with a text and its class.")
    return LabelledTexts(path, columns, texts, labels, lines)


def _find(folder: Path, names: Sequence[str]) -> Path | None:
    found = [folder / f"{name}{ending}" for name in names for ending in FORMATS]
    found = [path for path in found if path.is_file()]
    if len(found) > 1:
        raise InputError(f"{folder}: {' and '.join(p.name for p in found)}, expected one of them. Move the other away.")
    return found[0] if found else None


def _table(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a CSV or TSV with names in its first line, each with the line at which it begins."""
    csv.field_size_limit(2**31 - 1)  # a field may be a whole document
    if path.suffix.lower() == ".tsv":
        reader = csv.reader(io.StringIO(content, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise InputError(f"{path}: two columns have the same name among {', '.join(header)}. Rename one.")
        line = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                raise InputError(
                    f"{path}, line {line}: found {len(row)} fields, expected {len(header)} as in line 1. Correct it."
                )
            if row:
                yield line, dict(zip(header, row, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not valid CSV ({error}). Correct the file.") from error


def _json_lines(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(content.split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {line}: not valid JSON ({error}). Correct the line.") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {line}: a JSON {type(row).__name__}, expected an object of columns.")
        yield line, row


def _usual(path: Path, row: dict[str, Any]) -> tuple[str, ...]:
    for columns in USUAL_TEXTS:
        if all(name in row for name in columns):
            return columns
    raise InputError(
        f"{path}: columns {', '.join(row)}, none of which is a default text column. Name them with --text_columns."
    )


def _text(path: Path, line: int, column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{path}, line {line}: {column} is {str(value)[:40]}, expected a text. Correct the row.")
    return value


def _label(path: Path, line: int, column: str, value: Any) -> str:
    """The name of a class: a text, or a number as in a CSV."""
    if not isinstance(value, (str, int)) or isinstance(value, bool) or not str(value).strip():
        raise InputError(
            f"{path}, line {line}: {column} is {str(value)[:40]!r}, expected the name or number of a class. "
            "Correct the row."
        )
    return str(value).strip()
