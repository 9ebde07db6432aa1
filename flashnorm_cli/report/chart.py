"""The chart of the report: geometry only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flashnorm_cli.checkpoint.names import by_layer
from flashnorm_cli.report.formats import NOTHING, as_number, dicts_in, rank

CHART_SIZES = ((960, 460), (340, 400))  # for a desk or paper, and for a phone


@dataclass(frozen=True)
class NormError:
    """What level "layers" measured at one folded norm; None is a figure that it did not give.

    `figures` is its row as it came. `over` says that the ratio is over the limit: with random activations (`source`,
    `folded`) or with outlier-heavy ones.
    """

    number: int
    name: str
    source: float | None
    folded: float | None
    ratio: float | None
    over: bool
    figures: dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """One of the chart's two plots: a log scale from `low` to `high` between `top` and `bottom`."""

    top: float
    bottom: float
    low: float
    high: float

    def y(self, value: float | None) -> float:
        """What a log scale cannot show lies on an edge: zero below, inf and nan above."""
        if value is None or value <= 0:
            return self.bottom
        place = (math.log(value) - math.log(self.low)) / math.log(self.high / self.low) if value < math.inf else 1.0
        return self.bottom - min(max(place, 0.0), 1.0) * (self.bottom - self.top)


@dataclass(frozen=True)
class Point:
    """A folded norm in the chart: `left` is where its slot begins, the two y are those of its error and its ratio."""

    left: float
    x: float
    error_y: float
    ratio_y: float
    norm: NormError


@dataclass(frozen=True)
class Chart:
    """The chart as coordinates of an SVG of `width` x `height`; both panels lie between `left` and `right`.

    Above, the errors: `floor` is the stepped outline of the source's own, `under` the area below it. Below, the ratio
    of the two with the limit, at `limit_y`. A norm takes `step` of the width.
    """

    width: int
    height: int
    left: float
    right: float
    errors: Panel
    ratios: Panel
    limit_y: float
    step: float
    radius: float
    x_ticks: tuple[tuple[float, int], ...]
    error_ticks: tuple[tuple[float, str], ...]
    ratio_ticks: tuple[tuple[float, str], ...]
    floor: str
    under: str
    points: tuple[Point, ...]
    worst: Point | None

    @property
    def worst_anchor(self) -> str:
        """How the worst point's label stands above it: centred, unless an edge is near."""
        x = self.worst.x if self.worst else 0.0
        return "start" if x < self.left + 50 else "end" if x > self.right - 50 else "middle"


def draw(norms: list[NormError], limit: float, width: int, height: int) -> Chart | None:
    """Lay out the chart, or None where no error is above zero, so that a log scale has nothing to show."""
    known = _drawable([*(norm.source for norm in norms), *(norm.folded for norm in norms)])
    if not known:
        return None
    left, right = 56.0, width - 6.0
    step = (right - left) / len(norms)
    ticks = _log_ticks(min(known) / 1.15, max(known) * 1.15)
    errors = Panel(30, height * 0.55, ticks[0], ticks[-1])
    known = [1.0, limit, *_drawable(norm.ratio for norm in norms)]
    top, bottom, low, high = height * 0.55 + 40, height - 46.0, min(known) / 1.1, max(known)
    room = 26  # above the highest point: that is where the label of the worst one stands
    ratios = Panel(top, bottom, low, low * (high / low) ** ((bottom - top) / (bottom - top - room)))

    steps = [(left + i * step, left + (i + 1) * step, errors.y(norm.source)) for i, norm in enumerate(norms)]
    outline = [f"{x:.1f},{y:.1f}" for start, end, y in steps for x in (start, end)]
    corners = [f"{x:.1f},{errors.bottom:.1f}" for x in (right, left)]
    points = tuple(
        Point(
            left + i * step, left + (i + 0.5) * step, errors.y(norm.folded), max(ratios.y(norm.ratio), top + room), norm
        )
        for i, norm in enumerate(norms)
        if norm.folded is not None
    )
    every = _round_step(56 / step)
    numbers = [*([1] if every > 2 else []), *range(every, len(norms) + 1, every)]
    labelled = [t for t in ticks if len(ticks) <= 7 or f"{t:e}".startswith("1.0")]
    labelled = labelled[:: math.ceil(len(labelled) / 7)]
    ratio_ticks = [limit]  # always there; one and its decades where there is room for a label
    decades = [t for t in _log_ticks(low, high) if f"{t:e}".startswith("1.0")]
    for tick in [1.0, *decades[:: math.ceil(len(decades) / 4)]]:
        if low <= tick <= high and all(abs(ratios.y(tick) - ratios.y(other)) > 15 for other in ratio_ticks):
            ratio_ticks.append(tick)
    return Chart(
        width=width,
        height=height,
        left=left,
        right=right,
        errors=errors,
        ratios=ratios,
        limit_y=ratios.y(limit),
        step=step,
        radius=min(4.5, max(1.2, step * 0.42)),
        x_ticks=tuple((left + (i - 0.5) * step, i) for i in numbers),
        error_ticks=tuple((errors.y(t), f"{t:.0e}") for t in labelled),
        ratio_ticks=tuple((ratios.y(t), f"{t:g}") for t in ratio_ticks),
        floor="M" + " L".join(outline),
        under="M" + " L".join(outline + corners) + " Z",
        points=points,
        worst=max(points, key=lambda point: rank(point.norm.ratio), default=None),
    )


def chart_norms(figures: Mapping[str, Any], limit: float) -> list[NormError]:
    found: list[NormError] = []
    for row in by_layer(dicts_in(figures.get("norms")), lambda row: str(row.get("norm", NOTHING))):
        source, folded, ratio = (as_number(row.get(key)) for key in ("error_source", "error_folded", "ratio"))
        if ratio is None and source and folded is not None:
            ratio = folded / source
        name = str(row.get("norm", NOTHING))
        found.append(NormError(len(found) + 1, name, source, folded, ratio, rank(ratio) > limit, row))
    return found


def _drawable(values: Iterable[float | None]) -> list[float]:
    """Those that set the scale; what is smaller or larger lies on an edge."""
    return [value for value in values if value is not None and 1e-30 < value < 1e30]


def _log_ticks(low: float, high: float) -> list[float]:
    """The numbers 1, 2, 5, 10, ... that lie from just below `low` to just above `high`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
    start = max(i for i, tick in enumerate(ticks) if tick <= low or i == 0)
    end = min(i for i, tick in enumerate(ticks) if tick >= high or i == len(ticks) - 1)
    return ticks[start : end + 1]


def _round_step(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... that is no smaller than `least`."""
    power = 10 ** max(0, math.floor(math.log10(max(least, 1))))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= least)
