"""The report of `verify`: one HTML page that stands on its own, without scripts, fonts or pictures from elsewhere.

This module decides what is said and computes the geometry of the chart; `report.html.jinja` beside it is the page, and
`report.css` its style. Figures come from levels that may have been cut short, or from a record on disk: every one of
them may be missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup

from flashnorm_cli._version import __version__
from flashnorm_cli.checkpoint.disk import write_bytes
from flashnorm_cli.checkpoint.names import grouped
from flashnorm_cli.plan import wording
from flashnorm_cli.proof.result import (
    EQUIVALENT,
    MAX_ALGEBRA_ERROR,
    MAX_NOISE_RATIO,
    Finding,
    LevelResult,
    Verification,
)
from flashnorm_cli.report.chart import CHART_SIZES, chart_norms, draw
from flashnorm_cli.report.formats import (
    anchor,
    as_number,
    breakable,
    count,
    date,
    decimal,
    dicts_in,
    error,
    figures_of,
    percent,
    perplexity,
    printable,
    prose,
    px,
    rank,
    seconds,
    signed,
    size,
    times,
)
from flashnorm_cli.report.plan_svg import plan_drawing
from flashnorm_cli.report.project import address

TEMPLATE = Path(__file__).with_name("report.html.jinja")
PICTURES = ((864, "wide"), (320, "narrow"))  # of the plan: as wide as a card of the page, and as one on a phone
SHOWN_FINDINGS = 50
DECISIVE_FINDINGS = 3  # of each failed level, below the verdict
WORST_NORMS = 10
LAYOUTS = {
    "identity": "identity: folded norms are there and scale by one",
    "dropped": "dropped: folded norms are left out",
    "mixed": "mixed: some folded norms scale by one, others are left out",
}
THRESHOLDS = {
    "max_algebra_error": "Logits without rounding: relative error, at most",
    "max_noise_ratio": "With rounding: times the noise floor, at most",
}


def write_report(result: Verification, path: Path) -> None:
    """Write the page; `path` is replaced in one step, or left as it was."""
    write_bytes(path, render(result).encode())


def render(result: Verification, source: str | None = None) -> str:
    """The page as text, the same for the same result. It links to the project: at `source`, or where it lives."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=ChainableUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    forms = (error, percent, count, times, perplexity, decimal, signed, seconds, size, px, date, anchor)
    environment.filters.update({form.__name__: form for form in (*forms, breakable, prose)})
    plan, limit = result.plan, noise_limit(result)
    norms = chart_norms(figures_of(result, "layers"), limit)
    return environment.get_template(TEMPLATE.name).render(
        result=result,
        verdict=verdict(result),
        highlights=highlights(result),
        plan=plan,
        pictures=[Markup(plan_drawing(plan, *how)) for how in PICTURES] if plan and plan.norms else [],
        folded=wording.kinds(plan.folded) if plan else [],
        kept=wording.kinds(plan.kept) if plan else [],
        not_traced=grouped(plan.not_traced) if plan else [],
        unread=grouped(plan.unread) if plan else [],
        head=wording.HEADS.get(plan.lm_head, plan.lm_head) if plan else "",
        layout=LAYOUTS.get(str(figures_of(result, "weights").get("layout")), ""),
        levels=[(level, title_of(level), findings_of(level)) for level in result.levels],
        shown=SHOWN_FINDINGS,
        norms=norms,
        over=sum(norm.over for norm in norms),
        worst=sorted(norms, key=lambda norm: -rank(norm.ratio))[:WORST_NORMS],
        charts=[chart for size in CHART_SIZES if (chart := draw(norms, limit, *size))],
        limit=limit,
        algebra_limit=algebra_limit(result),
        greedy=[_side_by_side(g) for g in dicts_in(figures_of(result, "logits").get("greedy"))],
        users=dicts_in(figures_of(result, "users").get("users")),
        tasks=dicts_in(figures_of(result, "eval").get("tasks")),
        names=THRESHOLDS,
        environment={k: v for k, v in result.environment.items() if k not in ("command", "date")},
        version=__version__,
        project=source or address(),
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
    if result.verdict != EQUIVALENT:
        sentence = (
            f"The files hold what the plan asks for, but no run of both models was compared (passed: {_names(passed)})."
        )
        if result.level("users") in skipped and result.level("logits") in passed:
            sentence = f"Not everything that this checkpoint is used for was compared (passed: {_names(passed)})."
        return Verdict("open", "As planned, not run", sentence + left_out)
    every = "the one level that was run" if len(passed) == 1 else f"all {len(passed)} levels that were run"
    sentence = f"The folded checkpoint is the same model as its source: it passed {every} ({_names(passed)})."
    return Verdict("good", "Equivalent", sentence + left_out)


@dataclass(frozen=True)
class Highlight:
    """A figure that carries the verdict: what it is, how much, beside what; and whether it is why a level failed."""

    what: str
    much: str
    beside: str
    failed: bool = False


def highlights(result: Verification) -> list[Highlight]:
    """The few figures that carry the verdict."""
    weights, layers, logits = (figures_of(result, name) for name in ("weights", "layers", "logits"))
    found = []
    tensors, differing = as_number(weights.get("tensors")), as_number(weights.get("differing"))
    if tensors is not None and differing is not None:
        as_planned = count(max(tensors - differing, 0))
        found.append(Highlight("Tensors as planned", as_planned, f"of {count(tensors)}", differing > 0))
    limit = noise_limit(result)
    worst = max((norm.ratio for norm in chart_norms(layers, limit)), key=rank, default=None)
    if worst is not None:
        beside = f"the rounding error of the source itself; limit {times(limit)}"
        found.append(Highlight("Worst layer", times(worst), beside, rank(worst) > limit))
    found += _of_logits(logits, limit, algebra_limit(result), _failed(result, "logits"))
    return found


def _of_logits(logits: Mapping[str, Any], limit: float, algebra: float, failed: bool) -> list[Highlight]:
    """Where the level failed, something that says so: what is over its limit, or the tokens that are others."""
    found = []
    exact, ratio = as_number(logits.get("algebra_error")), as_number(logits.get("ratio"))
    if exact is not None:
        beside = f"relative error of the logits; limit {error(algebra)}"
        found.append(Highlight("Algebra", error(exact), beside, rank(exact) > algebra))
    if failed and rank(ratio) > limit:
        beside = f"the rounding error of the source itself; limit {times(limit)}"
        found.append(Highlight("Rounding of the logits", times(ratio), beside, True))
    top1 = {
        who: as_number(logits[who].get("top1")) for who in ("source", "folded") if isinstance(logits.get(who), Mapping)
    }
    if top1.get("folded") is not None:
        floor = f"; the source in {logits.get('dtype') or 'its own dtype'}: {percent(top1.get('source'))}"
        beside = f"of {count(logits.get('tokens'))} positions{floor}"
        unexplained = failed and not any(highlight.failed for highlight in found)
        found.append(Highlight("Same next token", percent(top1["folded"]), beside, unexplained))
    return found


def _failed(result: Verification, name: str) -> bool:
    level = result.level(name)
    return level is not None and level.status == "failed"


def noise_limit(result: Verification) -> float:
    """How many times the noise floor an error may be."""
    return as_number(result.thresholds.get("max_noise_ratio")) or MAX_NOISE_RATIO


def algebra_limit(result: Verification) -> float:
    """How large the logits' error without rounding may be."""
    return as_number(result.thresholds.get("max_algebra_error")) or MAX_ALGEBRA_ERROR


def title_of(level: LevelResult) -> str:
    """The level's name as a heading."""
    kind, _, engine = level.level.partition(":")
    engine = {"vllm": "vLLM", "gguf": "llama.cpp (GGUF)"}.get(engine, engine)
    title = {"eval": "Evaluation"}.get(kind, kind.capitalize())
    return f"{title}: {engine}" if engine else title


def findings_of(level: LevelResult) -> list[Finding]:
    """What is missing or malformed (no error known) comes first, then the largest error."""
    return sorted(level.findings, key=lambda f: -rank(f.error, unknown=math.inf))


def _names(levels: Iterable[LevelResult]) -> str:
    titles = [title_of(level) for level in levels]
    *first, last = [title[:1].lower() + title[1:] for title in titles]
    return f"{', '.join(first)} and {last}" if first else last


def _side_by_side(continuation: dict[str, Any]) -> dict[str, Any]:
    """A greedy continuation, its two texts split where they part."""
    source, folded = (str(continuation.get(key, "")) for key in ("source", "folded"))
    parts = (i for i, (a, b) in enumerate(zip(source, folded, strict=False)) if a != b)
    length = next(parts, min(len(source), len(folded)))
    return {**continuation, "common": source[:length], "rest": (source[length:], folded[length:])}
