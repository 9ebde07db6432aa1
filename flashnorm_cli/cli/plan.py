"""`flashnorm plan`: what a fold would do, from the config and the headers alone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flashnorm_cli.checkpoint.hub_ids import hub_id
from flashnorm_cli.cli import options
from flashnorm_cli.cli.output import Output, check_writable
from flashnorm_cli.cli.tables import aligned
from flashnorm_cli.errors import UsageError
from flashnorm_cli.plan import wording
from flashnorm_cli.plan.wording import size

if TYPE_CHECKING:
    from flashnorm_cli.checkpoint.model import Checkpoint, LeftOut, Source
    from flashnorm_cli.choices import FinalNorm
    from flashnorm_cli.plan.model import Plan
    from flashnorm_cli.plan.planner import TracedPlan


Tool = Literal["llm-compressor", "auto-round", "quark"]
# Of files in one line; --json and the record name all.
MOST_NAMES = 10
STDOUT = Path("-")


def plan(
    model: options.ModelArg,
    final_norm: options.FinalNormOpt = "auto",
    revision: options.RevisionOpt = None,
    token: options.TokenOpt = None,
    cache_dir: options.CacheDirOpt = None,
    local_files_only: options.LocalFilesOnlyOpt = False,
    trust_remote_code: options.TrustRemoteCodeOpt = False,
    follow_links: options.FollowLinksOpt = False,
    svg: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw the plan, as plan.svg say; - prints the picture alone."),
    ] = None,
    emit: Annotated[
        Tool | None,
        typer.Option(
            help="Write what this tool reads to fuse the norms and rotate the residual stream: JSON, see "
            "docs/plan_as_data.md."
        ),
    ] = None,
    emit_to: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="The file for --emit.", show_default="standard output"),
    ] = STDOUT,
    json: options.JsonOpt = False,
    quiet: options.QuietOpt = False,
    debug: options.DebugOpt = False,
) -> None:
    """Show which norms a fold would fold, which it keeps, and why. Reads headers, and few of the weights."""
    alone = _document_alone(svg, emit, emit_to, json)
    output, (model, revision) = Output(json, quiet), hub_id(model, revision)
    if alone:
        output.keep_stdout()
    with output.progress() as report:
        report(0, 0, "Reading headers")
        from flashnorm_cli.checkpoint.leftover import leftovers
        from flashnorm_cli.checkpoint.model import Source

        source = Source(model, revision, token, cache_dir, local_files_only, follow_links)
        checkpoint, traced = _traced(source, final_norm, trust_remote_code, lambda: report(0, 0, "Tracing the model"))
        result, stream = traced.plan, None
        if json:
            from flashnorm_cli.plan.rotation import stream_json

            stream = stream_json(checkpoint, traced)
        if emit is not None:
            from flashnorm_cli.plan.emit import emit as emitted

            settings = dumps(emitted(emit, checkpoint, traced), indent=2) + "\n"
    if svg is not None:
        from flashnorm_cli.report.plan_svg import plan_svg

        _hand_over(output, plan_svg(result), svg)
    if emit is not None:
        _hand_over(output, settings, emit_to)
    if alone:
        return
    left_out = [asdict(each) for each in checkpoint.left_out]
    output.data({**result.summary(), "left_out": left_out, "plan": result.to_json(), "stream": stream})
    output.text(f"{result.architecture} ({model}), {size(result.bytes_total)}", "")
    output.text(*norm_lines(result), "", *wording.sentences(result), *left_out_lines(checkpoint.left_out))
    if svg is not None:
        output.text(f"Picture: {svg}")
    output.remark(*leftovers(None, model))


def _traced(
    source: Source, final_norm: FinalNorm, trust_remote_code: bool, on_trace: Callable[[], None]
) -> tuple[Checkpoint, TracedPlan]:
    from flashnorm_cli.checkpoint.leftover import refuse_unfinished
    from flashnorm_cli.checkpoint.model import refuse_adapter
    from flashnorm_cli.checkpoint.open import open_checkpoint
    from flashnorm_cli.plan.grid import with_grid_note
    from flashnorm_cli.plan.planner import plan_checkpoint

    refuse_unfinished(Path(source.name))
    checkpoint = open_checkpoint(source, weights=False)
    refuse_adapter(checkpoint)
    on_trace()
    traced = plan_checkpoint(checkpoint, final_norm, trust_remote_code)
    return checkpoint, replace(traced, plan=with_grid_note(checkpoint, traced.plan))


def _document_alone(svg: Path | None, emit: Tool | None, emit_to: Path, json: bool) -> bool:
    """Whether standard output holds a document for another program instead of the plan.

    Raises UsageError where it would hold two, and before anything is read where a file cannot be written.
    """
    if emit is None and emit_to != STDOUT:
        raise UsageError("--output needs --emit")
    if emit is not None and json:
        raise UsageError("--emit and --json exclude each other")
    if svg == STDOUT and json:
        raise UsageError("--svg - and --json exclude each other: both print to standard output")
    if svg == STDOUT and emit is not None and emit_to == STDOUT:
        raise UsageError("--svg - and --emit exclude each other: both print to standard output; add --output FILE")
    for path in (svg, emit_to):
        if path is not None and path != STDOUT:
            check_writable(path)
    return svg == STDOUT or emit is not None


def _hand_over(output: Output, text: str, to: Path) -> None:
    """Print a document, or write it: the file is replaced in one step, or left as it was."""
    from flashnorm_cli.checkpoint.disk import write_text

    if to == STDOUT:
        output.verbatim(text)
    else:
        write_text(to, text)


def norm_lines(plan: Plan, kept_only: bool = False) -> list[str]:
    """One line for each kind of norm: what happens, its name with `*` for numbers, how many, and into what or why."""
    rows = [row for row in wording.rows(plan) if row[0] == "kept" or not kept_only]
    return aligned(rows, right=[2], least=[6, 0, 6])


def left_out_lines(left_out: Collection[LeftOut]) -> list[str]:
    """What does not travel along: files of one reason on one line, with their bytes."""
    from flashnorm_cli.errors import shown

    reasons: dict[str, list[LeftOut]] = {}
    for each in left_out:
        reasons.setdefault(each.reason, []).append(each)
    lines = []
    for reason, files in reasons.items():
        names = ", ".join(f"{shown(each.name)} ({size(each.bytes)})" for each in files[:MOST_NAMES])
        more = f" and {len(files) - MOST_NAMES} more ({size(sum(f.bytes for f in files))} in all)"
        lines.append(f"Left out, {reason}: {names}{more if len(files) > MOST_NAMES else ''}")
    return lines
