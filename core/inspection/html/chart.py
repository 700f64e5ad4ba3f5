"""Chart: lines over an axis, as an SVG that scales with the page and takes its colours from the style."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from .markup import escaped, number_text

WIDTH, LEFT, RIGHT = 1000, 74, 12
"""Units across a drawing; of these, those beside the plot."""


@dataclass
class Line:
    """One line of a chart; `style` names its class in the page's style, `dots` draws its points as well."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str
    dots: bool = False


@dataclass
class Mark:
    """A vertical line at some x, with what happened there."""

    x: float
    text: str


@dataclass
class Chart:
    """Lines in one plot; `title` is its text alternative."""

    lines: list[Line]
    title: str
    x_title: str
    y_title: str
    height: int = 300
    marks: list[Mark] = field(default_factory=list)
    log: bool = False  # a logarithmic y axis
    log_x: bool = False
    from_zero: bool = False
    ident: str = ""

    def svg(self) -> str:
        """The drawing; empty where there is no point to draw."""
        lines = [line for line in (self._drawable(line) for line in self.lines) if line.x]
        if not lines:
            return ""
        x = Axis.of([value for line in lines for value in (line.x[0], line.x[-1])], log=self.log_x, whole=True)
        ys = [value for line in lines for value in line.y]
        y = Axis.of([*ys, *([0.0] if self.from_zero else [])], log=self.log)
        bottom = self.height - 44
        parts = [
            f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" class="chart"'
            + (f' id="{self.ident}"' if self.ident else "")
            + f' data-x="{x.low:.9g} {x.high:.9g}" data-y="{y.low:.9g} {y.high:.9g} {int(self.log)} {bottom}">',
            f"<title>{escaped(self.title)}</title>",
            *self._grid(x, y, bottom),
            *self._marks(x, bottom),
        ]
        for line in lines:
            places = [(_across(x, a), _down(y, b, bottom)) for a, b in zip(line.x, line.y, strict=True)]
            single = line.dots or len(places) == 1
            parts.append(f'<path class="{line.style}" data-name="{escaped(line.name)}" d="{path(places)}"/>')
            if single:
                parts += [f'<circle class="{line.style}" cx="{a:g}" cy="{b:g}" r="3.5"/>' for a, b in places]
        return "".join(parts) + "</svg>"

    def legend(self) -> str:
        """The names of the lines beside a piece of each."""
        names = "".join(
            f'<li><svg class="key" viewBox="0 0 26 8" aria-hidden="true"><path class="{line.style}" d="M0 4H26"/></svg>'
            f"{escaped(line.name)}</li>"
            for line in self.lines
            if len(line.x)
        )
        return f'<ul class="legend">{names}</ul>' if names else ""

    def _drawable(self, line: Line) -> Line:
        """A line without the points that its axis cannot show."""
        kept = [i for i, value in enumerate(line.y) if math.isfinite(value) and (value > 0 or not self.log)]
        return Line(line.name, [line.x[i] for i in kept], [line.y[i] for i in kept], line.style, line.dots)

    def _grid(self, x: Axis, y: Axis, bottom: int) -> Iterator[str]:
        right = WIDTH - RIGHT
        for tick in y.ticks(max(3, bottom // 55)):
            place = _down(y, tick, bottom)
            yield f'<path class="grid" d="M{LEFT} {place:g}H{right}"/>'
            yield f'<text x="{LEFT - 8}" y="{place + 4:g}" class="end">{_tick(tick)}</text>'
        for tick in x.ticks(8):
            place = _across(x, tick)
            yield f'<path class="grid" d="M{place:g} {bottom}v5"/>'
            yield f'<text x="{place:g}" y="{bottom + 20}" class="mid">{_tick(tick)}</text>'
        yield f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>'
        yield f'<text x="{(LEFT + right) // 2}" y="{self.height - 4}" class="mid">{escaped(self.x_title)}</text>'
        middle = bottom // 2
        yield f'<text transform="translate(14 {middle}) rotate(-90)" class="mid">{escaped(self.y_title)}</text>'

    def _marks(self, x: Axis, bottom: int) -> Iterator[str]:
        for mark in self.marks:
            if x.low <= mark.x <= x.high:
                place = _across(x, mark.x)
                yield f'<path class="mark" d="M{place:g} 8V{bottom}"><title>{escaped(mark.text)}</title></path>'


@dataclass
class Axis:
    """The range of an axis."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @classmethod
    def of(cls, values: Iterable[float], *, log: bool = False, whole: bool = False) -> Axis:
        """The range of values: on a logarithmic axis of their logarithms; never empty."""
        # far from the largest float, so that differences of two of them are numbers
        found = [math.log10(value) if log else min(max(value, -1e300), 1e300) for value in values]
        low, high = min(found), max(found)
        if low == high:
            spread = abs(low) * 0.1 or 1.0
            return cls(low - spread * (not whole), high + spread, log, whole)
        room = 0.0 if whole else (high - low) * 0.04
        return cls(low - room * (low != 0), high + room, log, whole)

    def share(self, value: float) -> float:
        """The place of a value, 0 at the low end and 1 at the high one."""
        at = math.log10(value) if self.log else value
        return min(max((at - self.low) / (self.high - self.low), 0.0), 1.0)

    def ticks(self, most: int) -> list[float]:
        """Round numbers within the range."""
        if self.log:
            return self._log_ticks(most)
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / most))
        step *= next(factor for factor in (1, 2, 5, 10, 20) if (self.high - self.low) / (factor * step) <= most)
        if self.whole:
            step = max(step, 1.0)
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, first + most + 2) if self.low <= i * step <= self.high]

    def _log_ticks(self, most: int) -> list[float]:
        if self.high - self.low < 0.7 and abs(self.low) < 290:  # too narrow for powers of ten
            return Axis(10**self.low, 10**self.high).ticks(most)
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        factors = (1,) if len(powers) > most else (1, 3) if len(powers) > 2 else (1, 2, 5)
        every = max(1, len(powers) // most)
        found = [f * 10.0**p for p in powers[::every] for f in factors if -300 < p < 300]
        return [tick for tick in found if self.low <= math.log10(tick) <= self.high]


def _across(axis: Axis, value: float) -> float:
    return round(LEFT + (WIDTH - LEFT - RIGHT) * axis.share(value), 1)


def _down(axis: Axis, value: float, bottom: int) -> float:
    return round(bottom - (bottom - 10) * axis.share(value), 1)


def path(places: Iterable[tuple[float, float]]) -> str:
    """The data of a path through places, each relative to the one before it, which is shorter."""
    said, at = "", (0, 0)
    for a, b in places:
        place = round(10 * a), round(10 * b)
        across, down = (place[0] - at[0]) / 10, (place[1] - at[1]) / 10
        said += f"{'l' if said else 'M'}{across:g}{'' if down < 0 else ' '}{down:g}".replace("l0.", "l.")
        at = place
    return said


def _tick(value: float) -> str:
    if value == 0:
        return "0"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if 1e12 > abs(value) >= 10 * size or (1e12 > abs(value) >= size and size > 1e3):
            return f"{value / size:.4g}{unit}"
    return f"{value:.2g}" if abs(value) < 1e-3 or abs(value) >= 1e12 else number_text(value)
