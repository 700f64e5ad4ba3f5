"""Family: the names, shapes and conventions of one program's tensors, as a table."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from ..errors import CheckpointMismatch

Shape = tuple[int, ...]

WRAPPERS = ("_orig_mod", "module", "model")
"""Prefixes that torch.compile, DistributedDataParallel and other wrappers add to a name, in any order."""

Sides = tuple[str, ...]
"""A shape in words, each side one of `n_embd`, `3 n_embd`, `head_size / 2`, `q_size + 2 kv_size`, `5 n_layer +` (that
many or more) or a plain number. The words are fields of a config; besides ours `q_size` and `kv_size` (heads or groups
times head size), `n_kv_head`, `head_size`, `n_ffn`, and `head_rows` where the head may have other rows than the token
table; any other word is a number that is only compared."""


@dataclass(eq=False, repr=False)
class Style:
    """A variant of a family: it has the same table, and is distinguished by its switches."""

    name: str
    program: str
    switches: Mapping[str, bool]
    model_type: str = ""  # what the config says, where another style has the same tensors
    norm: str = ""  # if it has another norm than the family


@dataclass(eq=False, repr=False)
class Family:
    """The names of one program's tensors; in a name `{i}` is a layer, `{j}` a head, `{n}` any number."""

    name: str
    program: str
    tensors: Mapping[str, Sides]
    signature: tuple[str, ...]  # one of these is in every file of the family
    embedding: str  # the token table
    head: str
    positions: str = ""  # the table of positions
    tables: tuple[str, ...] = ()  # other tables that are looked up by token
    switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # tensors that come together or not at all
    always: tuple[str, ...] = ()  # switches that are on in every model of the program
    buffers: Mapping[str, tuple[Sides | None, str]] = field(default_factory=dict)  # no parameters: shape, what it is
    without: Mapping[int, str] = field(default_factory=dict)  # a layer, and the beginning of the names that it lacks
    some: frozenset[str] = frozenset()  # tensors that only some layers have
    base: str = ""  # prefix of names, unless the body of the model was saved by itself
    styles: tuple[Style, ...] = ()  # the first whose switches agree
    rotary: bool = False
    norm: str = "LayerNorm"
    norm_without_bias: str = ""  # if the bias distinguishes two kinds of norm
    activation: str = "GELU"
    gated: str = ""  # the activation where the feed-forward part is gated
    head_size: int | None = None  # where the program fixes it
    pads: bool = False  # the token table may have more rows than the config says
    entries: frozenset[str] = frozenset()  # of the file, by which it is told from a family of the same names
    fields: Mapping[str, str] = field(default_factory=dict)  # sizes in its config, as only it calls them: our field
    claims: Mapping[str, str] = field(default_factory=dict)  # field of the config beside it: switch that it controls


def linear(name: str, rows: str, columns: str) -> dict[str, Sides]:
    """Name the weight and the bias of a linear layer, with their sides."""
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, width: str = "n_embd") -> dict[str, Sides]:
    """Name the weight and the bias of a norm, with their sides."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


@dataclass(eq=False, repr=False)
class Length:
    """One side of a shape: times * symbol / over (+ 2 more), or at least that."""

    times: int
    symbol: str  # "" for a plain number, which is `times`
    over: int = 1
    more: str = ""
    least: bool = False

    def value(self, known: Mapping[str, int]) -> int | None:
        """Compute the side; None if a symbol is unknown."""
        if not self.symbol:
            return self.times
        if self.symbol not in known or (self.more and self.more not in known):
            return None
        return self.times * known[self.symbol] // self.over + (2 * known[self.more] if self.more else 0)


@lru_cache(maxsize=256)
def parse(side: str) -> Length:
    """Parse one side of a shape in a table."""
    words = side.split()
    times = int(words.pop(0)) if words[0].isdigit() else 1
    if not words:
        return Length(times, "")
    match words[1:]:
        case []:
            return Length(times, words[0])
        case ["/", over]:
            return Length(times, words[0], over=int(over))
        case ["+", "2", more]:
            return Length(times, words[0], more=more)
        case ["+"]:
            return Length(times, words[0], least=True)
    raise ValueError(side)


HELD = (
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "_fpw_module",
    "_original_module",
    "_forward_module",
)
"""Under these names torch.compile, checkpoint_wrapper, FSDP and Fabric hold what they wrap, anywhere in a name."""


def plain_name(name: str, wrappers: Collection[str] = ()) -> str:
    """Remove from a name what torch.compile and the like add, and the `wrappers` at its beginning."""
    words = [word for word in name.split(".") if word not in HELD]
    wrapped = next((i for i, word in enumerate(words[:-1]) if word not in wrappers), len(words) - 1)
    return ".".join(words[max(wrapped, 0) :]) or name


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Map each name without what wrappers added to the name as it stands.

    Raises: CheckpointMismatch when two names become one.
    """
    found: dict[str, str] = {}
    for name in names:
        plain = plain_name(name, WRAPPERS)
        if plain in found:
            raise CheckpointMismatch(f"{found[plain]} and {name} are the same tensor without their prefixes")
        found[plain] = name
    return found
