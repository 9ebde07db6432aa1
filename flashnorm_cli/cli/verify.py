"""`flashnorm verify`: is this the same model?"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flashnorm_cli.cli import options
from flashnorm_cli.cli.output import Output, check_writable, written
from flashnorm_cli.cli.tables import aligned
from flashnorm_cli.errors import EXIT_NOT_EQUIVALENT, EXIT_NOT_RUN, EXIT_OK, FlashNormError, UsageError
from flashnorm_cli.plan.wording import size

if TYPE_CHECKING:
    from flashnorm_cli.hub.publish import PushResult
    from flashnorm_cli.proof.result import LevelResult, Verification

SHOWN_FINDINGS = 12


def verify(
    folded: Annotated[str, typer.Argument(help="The folded checkpoint: a folder or a Hub id.", show_default=False)],
    source: Annotated[
        str | None,
        typer.Option(help="What it was made from: a folder or a Hub id.", show_default="what its record names"),
    ] = None,
    level: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LEVEL",
            help="weights, layers or logits: of these, run this one only; may be repeated.",
            show_default="all three",
        ),
    ] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ENGINE", help="Also run both in vllm, or in llama.cpp (gguf); may be repeated.", show_default=False
        ),
    ] = None,
    eval: Annotated[
        str | None,
        typer.Option("--eval", metavar="TASKS", help="Also run these tasks of lm-evaluation-harness (a,b,c) on both."),
    ] = None,
    eval_limit: Annotated[int | None, typer.Option(min=1, help="Items of each task.", show_default="all")] = None,
    text: Annotated[Path | None, typer.Option(help="A text file to take the prompts from.")] = None,
    token_ids: Annotated[Path | None, typer.Option(help="A JSON file with lists of token ids, as prompts.")] = None,
    device: Annotated[
        str | None, typer.Option(help="For layers and logits: cpu, cuda, cuda:1.", show_default="cuda if there is one")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="What the models run in.", show_default="the source's own"),
    ] = None,
    max_algebra: Annotated[float, typer.Option(help="Largest relative error of the logits, folded in float32.")] = 1e-5,
    max_ratio: Annotated[
        float, typer.Option(help="Largest ratio of the error to the noise floor: the source's own rounding error.")
    ] = 1.5,
    report: Annotated[Path | None, typer.Option(help="Write the result as a web page, report.html say.")] = None,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Give a checkpoint that another tool folded a record, if it passes.")
    ] = False,
    no_record: Annotated[bool, typer.Option("--no-record", help="Leave flashnorm.json alone.")] = False,
    publish: Annotated[
        bool, typer.Option("--publish", help="For a fold on the Hub: commit the result to its card and record.")
    ] = False,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="With --publish: open a pull request instead of committing to main.")
    ] = False,
    revision: options.RevisionOpt = None,
    source_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the source.")] = None,
    token: options.TokenOpt = None,
    cache_dir: options.CacheDirOpt = None,
    local_files_only: options.LocalFilesOnlyOpt = False,
    trust_remote_code: options.TrustRemoteCodeOpt = False,
    workers: options.WorkersOpt = None,
    follow_links: options.FollowLinksOpt = False,
    json: options.JsonOpt = False,
    quiet: options.QuietOpt = False,
    debug: options.DebugOpt = False,
) -> None:
    """Check that a folded checkpoint is the same model as its source.

    weights: every tensor, recomputed from the source, bit for bit. layers: each norm with its readers against float64.
    logits: both models on text, against the noise floor, which is what the source's own dtype does to it. --runtime
    and --eval come on top. A model that does not fit into memory is run layer by layer from disk.

    Exit codes: 0 equivalent: both models were run and compared. 4 as planned, not run: the files hold what the plan
    asks for, and no comparison of the models could be made. 3 not equivalent, 1 error, 2 wrong usage.
    """
    out = Output(json, quiet)
    if text is not None and token_ids is not None:
        raise UsageError("--text and --token-ids exclude each other")
    if eval_limit is not None and eval is None:
        raise UsageError("--eval-limit needs --eval")
    if create_pr and not publish:
        raise UsageError("--create-pr needs --publish")
    if publish and (no_record or adopt):
        raise UsageError("--publish excludes --no-record and --adopt")
    if report is not None:
        check_writable(report)
    pushed: PushResult | None = None
    with out.progress() as progress:
        progress(0, 0, "Starting")
        from flashnorm_cli.checkpoint.leftover import leftovers, refuse_unfinished
        from flashnorm_cli.proof.verify import verify as run

        refuse_unfinished(Path(folded))
        check = partial(
            run,
            source=source,
            levels=level or (),
            runtimes=runtime or (),
            tasks=[task for task in (eval or "").split(",") if task],
            limit=eval_limit,
            text=text,
            token_ids=token_ids,
            device=device,
            dtype=dtype,
            max_algebra=max_algebra,
            max_ratio=max_ratio,
            insist=bool(level),
            adopt=adopt,
            record=not no_record,
            source_revision=source_revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
            workers=workers,
            follow_links=follow_links,
            command=options.command_line(sys.argv[1:]),
            on_progress=progress,
        )
        if publish:
            from flashnorm_cli.checkpoint.model import Source
            from flashnorm_cli.hub.verified import verify_on_hub

            where = Source(folded, revision, token, cache_dir, local_files_only)
            result, pushed = verify_on_hub(where, check, create_pr=create_pr, on_progress=progress)
        else:
            result = check(folded, revision=revision)
    problems: list[str] = []
    reported = report is not None and _report(result, report, problems)
    published = pushed.published() if pushed else None
    out.data({**result.to_json(), "report": str(report) if reported else None, "published": published})
    out.text(*summary(result))
    out.remark(*leftovers(Path(folded), result.source or folded))
    if publish:
        out.text(f"Published: {pushed.url}" if pushed else "Not published: the page stays as it is.")
    if reported:
        out.text(f"Report: {report}")
    if problems:
        raise FlashNormError("; ".join(problems))
    raise typer.Exit(exit_code(result))


def exit_code(result: Verification) -> int:
    """What a verification makes the command line return."""
    from flashnorm_cli.proof.result import EQUIVALENT, NOT_RUN

    return {EQUIVALENT: EXIT_OK, NOT_RUN: EXIT_NOT_RUN}.get(result.verdict, EXIT_NOT_EQUIVALENT)


def _report(result: Verification, path: Path, problems: list[str]) -> bool:
    from flashnorm_cli.report.page import write_report

    return written(path, lambda: write_report(result, path), problems)


def _headline(result: Verification) -> list[str]:
    """The verdict in a line, and what the reader has to know of it."""
    from flashnorm_cli.proof.result import EQUIVALENT, NOT_RUN

    if result.verdict == EQUIVALENT:
        lines = [f"Equivalent: {result.folded} computes the same as {result.source}"]
    elif result.verdict != NOT_RUN:
        what = f"{result.folded} does not hold what the fold of {result.source} holds"
        lines = [f"NOT equivalent: {what}" if result.source else "NOT equivalent"]
        weights, failed = result.level("weights"), [level for level in result.levels if level.status == "failed"]
        if weights is not None and weights.status == "passed":
            names = ", ".join(level.level for level in failed)
            lines = [
                f"NOT equivalent: {result.folded} holds what the fold of {result.source} holds, and does not compute "
                f"the same ({names})"
            ]
    elif any(level.status == "passed" for level in result.levels):
        lines = [
            f"As planned, not run: {result.folded} holds what the plan asks for, but no run of both models was compared"
        ]
    else:
        lines = ["Not verified: no level could run"]
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
    lines = [*_headline(result), "", *aligned(rows, least=[12, 7])]
    findings = [(level.level, finding) for level in result.levels for finding in level.findings]
    if findings:
        lines += ["", "Wrong:"]
        for level_name, finding in findings[:SHOWN_FINDINGS]:
            by = _by(finding.error) if level_name == "weights" else ""  # the others say it in words
            lines.append(f"  {finding.what}: {finding.message}{by}")
        if len(findings) > SHOWN_FINDINGS:
            lines.append(f"  and {len(findings) - SHOWN_FINDINGS} more (--json and --report list them)")
    notes = [*(note for level in result.levels for note in level.notes), *result.notes]
    lines += ["", *(f"Note: {note}." for note in notes)] if notes else [""]
    if result.recorded:
        lines.append(f"Recorded in {result.recorded}")
    return lines


def _by(error: float | None) -> str:
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
