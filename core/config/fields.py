"""What every kind of config shares: reading and writing a config.json, and checking its fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from ..errors import CheckpointMismatch

FORMAT_VERSION, NEWEST_VERSION = 2, 3
"""The bundle format this program writes, and that of models with a choice which is not neutral; without one it is 1."""

Rule = tuple[Callable[[Any], bool], str]
"""Whether a value is possible, and the end of a sentence that says what is: "expected true or false"."""


def whole_number(least: int) -> Rule:
    """Make the rule for a whole number."""
    return lambda value: is_whole(value, least), f"expected a whole number of at least {least}"


def one_of(*values: str) -> Rule:
    """Make the rule for one of some texts."""
    return lambda value: value in values, f"expected {', '.join(values)}"


def is_whole(value: Any, least: int) -> bool:
    """Whether a value is a whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def is_positive(value: Any) -> bool:
    """Whether a value is a finite number above 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


BOOLEAN: Rule = (lambda value: isinstance(value, bool), "expected true or false")
DEVICE: Rule = (lambda value: isinstance(value, str) and value != "", "expected auto, cpu, cuda or cuda:N")


@dataclass
class ConfigFields:
    """The fields of a config.json. Subclasses declare them, with a rule for each."""

    unknown: dict[str, Any] = field(default_factory=dict, kw_only=True)  # fields of other programs, kept as they are

    RULES: ClassVar[Mapping[str, Rule]] = {}
    """The rule of each field; a name that is not a field is looked up in `unknown`."""

    NEUTRAL: ClassVar[Mapping[str, Any]] = {}
    """Fields about which models had no choice before the field existed, and what all of them did; not written then."""

    OURS: ClassVar[tuple[str, ...]] = ("format_version",)
    """Names in a config.json that are neither fields nor unknown."""

    def __post_init__(self) -> None:
        self.settle()
        self.check("config")

    def check(self, where: str) -> None:
        """Raise unless every field has its type and a possible value.

        Raises: CheckpointMismatch naming each field, its value and what is allowed.
        """
        values = {name: getattr(self, name) if hasattr(self, name) else self.unknown.get(name) for name in self.RULES}
        faults = [
            f"{name} is {values[name]!r}, {expected}"
            for name, (is_possible, expected) in self.RULES.items()
            if not is_possible(values[name])
        ]
        if faults := faults or self.contradictions():
            raise CheckpointMismatch(f"{where}: {'; '.join(faults)}.")

    def contradictions(self) -> list[str]:
        """Describe fields that do not fit together, each of which is possible by itself."""
        return []

    def settle(self) -> None:
        """Give one spelling to values that have several; the fields are not checked yet."""

    @classmethod
    def names(cls) -> list[str]:
        """List the names of the fields."""
        return [f.name for f in fields(cls) if f.name != "unknown"]

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config.json") -> Self:
        """Read a config.json; fields this program does not know are kept in `unknown`.

        Raises: CheckpointMismatch when a field has a wrong type or an impossible value.
        """
        version = values.get("format_version")
        if isinstance(version, int) and version > NEWEST_VERSION:
            raise CheckpointMismatch(
                f"{where}: format_version {version}, this program reads up to {NEWEST_VERSION}. Update the program."
            )
        config, known = cls(), cls.names()
        for name in known:
            setattr(config, name, values.get(name, getattr(config, name)))
        config.unknown = {k: v for k, v in values.items() if k not in known and k not in cls.OURS}
        config.settle()
        config.check(where)
        return config

    def to_dict(self, model_class: str | None = None) -> dict[str, Any]:
        """The content of config.json, with the unknown fields of the file it came from; a GPT names no class."""
        named = {} if model_class is None else {"model_class": model_class}
        known = self.without_neutral({name: getattr(self, name) for name in self.names()})
        return {**named, **known, "format_version": self.format_version, **self.unknown}

    @property
    def format_version(self) -> int:
        """The lowest format whose programs compute this model, and not another one without a field they do not know."""
        chosen = self.without_neutral({name: getattr(self, name) for name in self.NEUTRAL})
        return NEWEST_VERSION if chosen else FORMAT_VERSION

    @property
    def neutral(self) -> Mapping[str, Any]:
        """The fields of `NEUTRAL` with the value that was implied before they existed, given the others."""
        return self.NEUTRAL

    def without_neutral(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out the fields of `NEUTRAL` that have their neutral value, or none."""
        neutral = self.neutral
        return {name: v for name, v in values.items() if name not in neutral or v not in (None, neutral[name])}
