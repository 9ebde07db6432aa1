"""The report of `verify`: one HTML page that stands on its own, without scripts, fonts or pictures from elsewhere.

This module decides what is said and computes the geometry of the chart; `report.html.jinja` beside it is the page.
Figures come from levels that may have been cut short, or from a record on disk: every one of them may be missing.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup

from flashnorm_cli._version import __version__
from flashnorm_cli.plan.planner import Norm, Plan, grouped, pattern_of
from flashnorm_cli.proof.result import MAX_ALGEBRA_ERROR, MAX_NOISE_RATIO, Finding, LevelResult, Verification

TEMPLATE = Path(__file__).with_name("report.html.jinja")
SHOWN_FINDINGS = 50
DECISIVE_FINDINGS = 3  # of each failed level, below the verdict
WORST_NORMS = 10
CHART_SIZES = ((960, 460), (340, 400))  # for a desk or paper, and for a phone
NOTHING = "\u2013"
SPACE = "\u00a0"  # between a number and its unit: no line ends there
HEADS = {
    "folded": "the final norm is folded into the output head",
    "untied": "the final norm is folded into an output head of its own, no longer tied to the embedding",
    "kept": "the final norm keeps its weight",
    "none": "no norm feeds an output head",
}
LAYOUTS = {
    "identity": "identity: folded norms are there and scale by one",
    "dropped": "dropped: folded norms are left out",
    "mixed": "mixed: some folded norms scale by one, others are left out",
}
THRESHOLDS = {
    "max_algebra_error": "Logits without rounding: relative error, at most",
    "max_noise_ratio": "With rounding: times the noise floor, at most",
}
# What no page may hold: control characters, lone surrogates, and marks that reorder the text around them.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def write_report(result: Verification, path: Path) -> None:
    """Write the page; `path` is replaced in one step, or left as it was."""
    page = render(result).encode()
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        with partial.open("xb") as file:  # never through a link that somebody left there
            file.write(page)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def render(result: Verification) -> str:
    """The page as text. It depends on `result` alone: the same result gives the same page."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=ChainableUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for form in (error, percent, count, times, perplexity, decimal, signed, seconds, size, px, date, anchor, breakable):
        environment.filters[form.__name__] = form
    plan, limit = result.plan, noise_limit(result)
    norms = _norms(_figures(result, "layers"), limit)
    return environment.get_template(TEMPLATE.name).render(
        result=result,
        verdict=verdict(result),
        highlights=highlights(result),
        plan=plan,
        folded=folded_rows(plan) if plan else [],
        kept=kept_rows(plan) if plan else [],
        not_traced=grouped(plan.not_traced) if plan else [],
        unread=grouped(plan.unread) if plan else [],
        head=HEADS.get(plan.lm_head, plan.lm_head) if plan else "",
        layout=LAYOUTS.get(str(_figures(result, "weights").get("layout")), ""),
        levels=[(level, title_of(level), findings_of(level)) for level in result.levels],
        shown=SHOWN_FINDINGS,
        norms=norms,
        over=sum(norm.over for norm in norms),
        worst=sorted(norms, key=lambda norm: -_rank(norm.ratio))[:WORST_NORMS],
        charts=[chart for size in CHART_SIZES if (chart := draw(norms, limit, *size))],
        limit=limit,
        algebra_limit=algebra_limit(result),
        greedy=[_side_by_side(g) for g in _dicts(_figures(result, "logits").get("greedy"))],
        tasks=_dicts(_figures(result, "eval").get("tasks")),
        names=THRESHOLDS,
        environment={k: v for k, v in result.environment.items() if k not in ("command", "date")},
        version=__version__,
    )


# ---- what is said ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """`kind` is "good", "bad" or "open"; `decisive` holds title, level and first findings of each failed level."""

    kind: str
    headline: str
    sentence: str
    decisive: tuple[tuple[str, LevelResult, tuple[Finding, ...]], ...] = ()


def verdict(result: Verification) -> Verdict:
    """The first thing on the page."""
    by_status: dict[str, list[LevelResult]] = {"passed": [], "failed": [], "skipped": []}
    for level in result.levels:
        by_status.setdefault(level.status, []).append(level)
    passed, failed, skipped = (by_status[status] for status in ("passed", "failed", "skipped"))
    left_out = f" Not run: {_names(skipped)}." if skipped else ""
    if failed:
        also = f" Passed: {_names(passed)}." if passed else ""
        sentence = f"The folded checkpoint is not equivalent to its source: {_names(failed)} failed."
        decisive = tuple((title_of(level), level, tuple(findings_of(level)[:DECISIVE_FINDINGS])) for level in failed)
        return Verdict("bad", "NOT equivalent", sentence + also + left_out, decisive)
    if not passed:
        return Verdict("open", "Not verified", "No level ran, so nothing is shown in either direction." + left_out)
    every = "the one level that was run" if len(passed) == 1 else f"all {len(passed)} levels that were run"
    sentence = f"The folded checkpoint is the same model as its source: it passed {every} ({_names(passed)})."
    return Verdict("good", "Equivalent", sentence + left_out)


def highlights(result: Verification) -> list[tuple[str, str, str]]:
    """The few figures that carry the verdict: (what, how much, beside what)."""
    weights, layers, logits = (_figures(result, name) for name in ("weights", "layers", "logits"))
    found = []
    tensors, differing = _number(weights.get("tensors")), _number(weights.get("differing"))
    if tensors is not None and differing is not None:
        found.append(("Tensors as planned", count(max(tensors - differing, 0)), f"of {count(tensors)}"))
    limit = noise_limit(result)
    worst = max((norm.ratio for norm in _norms(layers, limit)), key=_rank, default=None)
    if worst is not None:
        found.append(("Worst layer", times(worst), f"the rounding error of the source itself; limit {times(limit)}"))
    if _number(logits.get("algebra_error")) is not None:
        beside = f"relative error of the logits; limit {error(algebra_limit(result))}"
        found.append(("Algebra", error(logits["algebra_error"]), beside))
    top1 = {who: _number(logits[who].get("top1")) for who in ("source", "folded") if isinstance(logits.get(who), dict)}
    if top1.get("folded") is not None:
        floor = f"; the source in {logits.get('dtype') or 'its own dtype'}: {percent(top1.get('source'))}"
        found.append(("Same next token", percent(top1["folded"]), f"of {count(logits.get('tokens'))} positions{floor}"))
    return found


def noise_limit(result: Verification) -> float:
    """How many times the noise floor an error may be."""
    return _number(result.thresholds.get("max_noise_ratio")) or MAX_NOISE_RATIO


def algebra_limit(result: Verification) -> float:
    """How large the logits' error without rounding may be."""
    return _number(result.thresholds.get("max_algebra_error")) or MAX_ALGEBRA_ERROR


def title_of(level: LevelResult) -> str:
    """The level's name as a heading."""
    kind, _, engine = level.level.partition(":")
    engine = {"vllm": "vLLM", "gguf": "llama.cpp (GGUF)"}.get(engine, engine)
    title = {"eval": "Evaluation"}.get(kind, kind.capitalize())
    return f"{title}: {engine}" if engine else title


def findings_of(level: LevelResult) -> list[Finding]:
    """What is missing or malformed (no error known) comes first, then the largest error."""
    return sorted(level.findings, key=lambda f: -_rank(f.error, unknown=math.inf))


def folded_rows(plan: Plan) -> list[tuple[str, int, str]]:
    """(pattern of names, how many, what they were folded into) of the folded norms."""
    kinds: dict[str, list[Norm]] = {}
    for norm in plan.folded:
        kinds.setdefault(pattern_of(norm.tensor), []).append(norm)
    rows = []
    for name, norms in kinds.items():
        patterns = dict.fromkeys(pattern_of(r).removesuffix(".weight") for norm in norms for r in norm.readers)
        rows.append((name, len(norms), ", ".join(dict.fromkeys(p.rsplit(".", 1)[-1] for p in patterns))))
    return rows


def kept_rows(plan: Plan) -> list[tuple[str, int, str]]:
    """(pattern of names, how many, why) of the kept norms."""
    kinds: dict[tuple[str, str], int] = {}
    for norm in plan.kept:
        key = pattern_of(norm.tensor), re.sub(r"\.\d+\b", ".*", norm.reason or "")
        kinds[key] = kinds.get(key, 0) + 1
    return [(name, number, why) for (name, why), number in kinds.items()]


def _names(levels: Iterable[LevelResult]) -> str:
    titles = [title_of(level) for level in levels]
    *first, last = [title[:1].lower() + title[1:] for title in titles]
    return f"{', '.join(first)} and {last}" if first else last


def _figures(result: Verification, name: str) -> dict[str, Any]:
    level = result.level(name)
    return level.figures if level else {}


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list | tuple) else []


def _side_by_side(continuation: dict[str, Any]) -> dict[str, Any]:
    """A greedy continuation, its two texts split where they part."""
    source, folded = (str(continuation.get(key, "")) for key in ("source", "folded"))
    parts = (i for i, (a, b) in enumerate(zip(source, folded, strict=False)) if a != b)
    length = next(parts, min(len(source), len(folded)))
    return {**continuation, "common": source[:length], "rest": (source[length:], folded[length:])}


# ---- the chart ------------------------------------------------------------------------------------------------------


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
        worst=max(points, key=lambda point: _rank(point.norm.ratio), default=None),
    )


def _norms(figures: dict[str, Any], limit: float) -> list[NormError]:
    found: list[NormError] = []
    for row in _dicts(figures.get("norms")):
        source, folded, ratio = (_number(row.get(key)) for key in ("error_source", "error_folded", "ratio"))
        if ratio is None and source and folded is not None:
            ratio = folded / source
        name = str(row.get("norm", NOTHING))
        found.append(NormError(len(found) + 1, name, source, folded, ratio, _rank(ratio) > limit, row))
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


# ---- numbers for people ---------------------------------------------------------------------------------------------


def _number(value: Any) -> float | None:
    """A number as a float; None for what is not one."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _rank(value: float | None, unknown: float = -math.inf) -> float:
    """For sorting: nan is as bad as inf."""
    number = _number(value)
    return unknown if number is None else math.inf if math.isnan(number) else number


def _shown(form: Callable[[float], str]) -> Callable[[Any], str]:
    """A filter of numbers: what is missing becomes a dash, inf and nan are named."""

    @functools.wraps(form)
    def filtered(value: Any) -> str:
        number = _number(value)
        if number is None:
            return NOTHING
        return form(number) if math.isfinite(number) else str(number)

    return filtered


@_shown
def error(value: float) -> str:
    """1.2e-07"""
    return f"{value:.1e}" if value else "0"


@_shown
def percent(share: float) -> str:
    """99.98 %; never 100 % for a little less, never 0 % for a little more."""
    if 0.9999 < share < 1:
        return f"> 99.99{SPACE}%"
    if 0 < share < 0.0001:
        return f"< 0.01{SPACE}%"
    return f"{share * 100:.{0 if share in (0, 1) else 2}f}{SPACE}%"


@_shown
def count(value: float) -> str:
    """1,234"""
    return f"{value:,.0f}"


@_shown
def times(ratio: float) -> str:
    """1.08 and a multiplication sign"""
    digits = f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}" if ratio < 1e6 else f"{ratio:.1e}"
    return f"{digits}{SPACE}\u00d7"


@_shown
def perplexity(value: float) -> str:
    """Enough digits to see a difference."""
    return f"{value:,.4f}" if value < 1000 else f"{value:,.1f}"


@_shown
def decimal(value: float) -> str:
    """Four significant digits, as they come."""
    return f"{value:.4g}"


@_shown
def signed(value: float) -> str:
    """A difference: +0.0012, or 0."""
    return f"{value:+.4g}" if value else "0"


@_shown
def px(value: float) -> str:
    """A coordinate in the chart."""
    return f"{value:.1f}"


@_shown
def seconds(value: float) -> str:
    """0.4 s, or 3 min 12 s"""
    return f"{value:.1f}{SPACE}s" if value < 60 else f"{value // 60:.0f}{SPACE}min {value % 60:.0f}{SPACE}s"


@_shown
def size(value: float) -> str:
    """1.2 GB, decimal as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.95:
            return f"{value:.{0 if unit == 'B' else 1}f}{SPACE}{unit}"
        value /= 1000
    return f"{value:,.1f}{SPACE}TB"


def date(value: Any) -> str:
    """`2026-01-31T12:30:05Z` as 2026-01-31 12:30 UTC; anything else as it is."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d)(:\d\d(\.\d+)?)?(Z|\+00:?00)", str(value))
    return f"{found[1]} {found[2]} UTC" if found else str(value)


def anchor(name: Any) -> str:
    """A level's name as the id of its section."""
    return "level-" + re.sub(r"[^A-Za-z0-9]+", "-", str(name))


def breakable(text: Any) -> Markup:
    """Text in which long names and paths may be broken after their dots, slashes and underscores."""
    parts = re.split(r"(?<=\S{12}[./_-])(?=[^\s./_-])", _printable(str(text)))
    return Markup("<wbr>").join(parts)


def _printable(value: Any) -> Any:
    """Text from outside without the characters that no page may hold; everything else as it is."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return UNPRINTABLE.sub("\ufffd", value)
    return value
