"""What `flashnorm verify` found, in lines for a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flashnorm_cli.cli.tables import aligned
from flashnorm_cli.cli.text import Coloured
from flashnorm_cli.plan.wording import size

if TYPE_CHECKING:
    from flashnorm_cli.proof.result import LevelResult, Verification

SHOWN_FINDINGS = 12
GOOD, BAD, OPEN = "green", "red", "yellow"
COLOURS = {"passed": GOOD, "failed": BAD, "skipped": OPEN}


def _headline(result: Verification) -> list[str]:
    """The verdict in a line, and what the reader has to know of it."""
    from flashnorm_cli.proof.result import EQUIVALENT, NOT_RUN

    if result.verdict == EQUIVALENT:
        verdict, colour, what = "Equivalent", GOOD, f"{result.folded} computes the same as {result.source}"
    elif result.verdict != NOT_RUN:
        verdict, colour = "NOT equivalent", BAD
        what = f"{result.folded} does not hold what the fold of {result.source} holds" if result.source else ""
        weights, failed = result.level("weights"), [level for level in result.levels if level.status == "failed"]
        if weights is not None and weights.status == "passed":
            names = ", ".join(level.level for level in failed)
            what = (
                f"{result.folded} holds what the fold of {result.source} holds, and does not compute the same ({names})"
            )
    elif any(level.status == "passed" for level in result.levels):
        verdict, colour = "As planned, not run", OPEN
        what = f"{result.folded} holds what the plan asks for, but no run of both models was compared"
    else:
        verdict, colour, what = "Not verified", OPEN, "no level could run"
    lines: list[str] = [Coloured(f"{verdict}: {what}" if what else verdict, verdict, colour)]
    if result.skipped:
        lines.append(f"Not run: {', '.join(level.level for level in result.skipped)} (why is said below)")
    return lines


def summary(result: Verification) -> list[str]:
    """The verdict, a paragraph per level, and what is wrong."""
    rows = [
        (*((level.level, level.status) if i == 0 else ("", "")), line)
        for level in result.levels
        for i, line in enumerate(_level_lines(level))
    ]
    lines = [*_headline(result), "", *(_with_status(line) for line in aligned(rows, least=[12, 7]))]
    findings = [(level.level, finding) for level in result.levels for finding in level.findings]
    if findings:
        lines += ["", "Wrong:"]
        for level_name, finding in findings[:SHOWN_FINDINGS]:
            off_by = _off_by(finding.error) if level_name == "weights" else ""  # the others say it in words
            lines.append(f"  {finding.what}: {finding.message}{off_by}")
        if len(findings) > SHOWN_FINDINGS:
            lines.append(f"  and {len(findings) - SHOWN_FINDINGS} more (--json and --report list them)")
    notes = [*(note for level in result.levels for note in level.notes), *result.notes]
    lines += ["", *(f"Note: {note}." for note in notes)] if notes else [""]
    if result.recorded:
        lines.append(f"Recorded in {result.recorded}")
    return lines


def _with_status(line: str) -> str:
    """A level's line with its status in colour."""
    status = re.match(r"\S+ +(passed|failed|skipped)\b", line)
    return Coloured(line, status[1], COLOURS[status[1]]) if status else line


def _off_by(error: float | None) -> str:
    return "" if error is None or not math.isfinite(error) else f" (off by {error:.2g} relative)"


def _level_lines(level: LevelResult) -> list[str]:
    if level.reason:
        return [level.reason]
    figures = level.figures
    if level.level == "weights" and figures:
        rotated = any("rotated tensors" in note for note in level.notes)  # float32 sums: not the bits of float64
        same = f"tensors hold {'what' if rotated else 'the very bits that'} source and plan ask for"
        lines = [f"{figures['identical']:,} of {figures['tensors']:,} {same} ({figures['changed']:,} of them changed)"]
        if figures["rounded_otherwise"]:
            lines.append(f"{figures['rounded_otherwise']:,} were rounded in another way, within two units")
        read = size(figures["bytes_read"])
        return [
            *lines,
            f"{figures['folded']} norms folded, {figures['kept']} kept; {read} read in {level.seconds:.1f} s",
        ]
    if level.level == "layers" and figures.get("norms"):
        readers = sum(row["readers"] for row in figures["norms"])
        where = re.sub(r"\.weight$", "", figures["worst_norm"])
        return [
            f"{len(figures['norms'])} norms and their {readers} readers, {figures['dtype']} against float64:",
            f"the largest error is {figures['worst_ratio']:.3g} times the noise floor ({where})",
        ]
    if level.level == "logits" and figures:
        return _logits_lines(figures)
    if level.level == "users" and figures:
        return [f"{row['user']}: {row['compared']}, off by {_or_more(row['error'])}" for row in figures["users"]]
    if level.level == "kernels" and figures:
        return [
            f"weightless norms of {', '.join(map(str, figures['sizes']))} elements on {figures['gpu']}, "
            f"{figures['dtype']} against float64:",
            f"the largest error is {figures['error']:.2g} eps (one rounding is 0.5)",
        ]
    if level.level.startswith("runtime:") and figures:
        difference, tolerance = (figures.get(key) or 0.0 for key in ("logprob_difference", "tolerance"))
        lines = [
            f"{figures.get('engine')} {figures.get('version')}: {figures.get('same_tokens')} of "
            f"{figures.get('tokens')} most likely tokens agree;",
            f"log-probabilities within {difference:.1e} ({tolerance:.1e} allowed)",
        ]
        if "norms" in figures:
            lines.append(f"{figures['norms_without_weight']} of {figures['norms']} norms ran without a weight")
        return lines
    if level.level == "eval" and figures:
        return [
            f"{row['task']} {row['metric']}: {row['source']:.4f} source, {row['folded']:.4f} folded, "
            f"difference {row['delta']:+.4f}"
            for row in figures.get("tasks", [])
        ]
    return ["nothing to compare" if not level.findings else ""]


def _or_more(error: float | None) -> str:
    return "more than can be said" if error is None else f"{error:.1e}"


def _logits_lines(figures: Mapping[str, Any]) -> list[str]:
    source, folded = figures["source"], figures["folded"]
    lines = []
    if figures["algebra_error"] is not None:
        lines.append(f"algebra   folded in {figures['reference']}, off by {figures['algebra_error']:.1e} (relative)")
    rounding = f"rounding  in {figures['dtype']}, off by {figures['rounding_error']:.2e}"
    if figures["ratio"] is not None:
        rounding += f": {figures['ratio']:.3g} times the noise floor of {figures['noise_floor']:.2e}"
    lines.append(rounding)
    lines.append(f"top-1     {folded['top1']:.2%} as in {figures['reference']} (the source: {source['top1']:.2%})")
    lines.append(f"KL        {folded['kl']:.1e} nats (the source: {source['kl']:.1e})")
    if folded["perplexity"] is not None:
        lines.append(
            f"perplexity {folded['perplexity']:.4f} (the source: {source['perplexity']:.4f}, "
            f"in {figures['reference']}: {figures['reference_perplexity']:.4f})"
        )
    if figures["greedy"]:
        same, tokens = (sum(row[key] for row in figures["greedy"]) for key in ("same", "tokens"))
        lines.append(f"greedy    {same} of {tokens} tokens before the texts part")
    judged = f"judged at {figures['judged']:,} positions of {figures['tokens']:,} tokens"
    where = f"{figures['device']}, layer by layer from disk" if figures["from_disk"] else figures["device"]
    lines.append(f"{judged}: {figures['text']}; {where}")
    if figures.get("norms_on_kernels"):
        lines.append(f"{figures['norms_on_kernels']} norms of the folded model ran on flashnorm's kernels")
    return lines
