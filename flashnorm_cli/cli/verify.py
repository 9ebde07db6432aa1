"""`flashnorm verify`: is this the same model?"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashnorm_cli.checkpoint.hub_ids import hub_id
from flashnorm_cli.choices import Dtype
from flashnorm_cli.cli import options
from flashnorm_cli.cli.output import Output, check_writable, written
from flashnorm_cli.cli.summary import summary
from flashnorm_cli.errors import EXIT_NOT_EQUIVALENT, EXIT_NOT_RUN, EXIT_OK, FlashNormError, UsageError

if TYPE_CHECKING:
    from flashnorm_cli.hub.publish import PushResult
    from flashnorm_cli.proof.result import Verification

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
        typer.Option(
            "--eval",
            metavar="TASKS",
            help="Also run these tasks of lm-evaluation-harness (a,b,c) on both, or the task in a YAML file.",
        ),
    ] = None,
    eval_limit: Annotated[int | None, typer.Option(min=1, help="Items of each task.", show_default="all")] = None,
    text: Annotated[Path | None, typer.Option(help="A text file: its first 4,096 tokens are the prompts.")] = None,
    token_ids: Annotated[Path | None, typer.Option(help="A JSON file with lists of token ids, as prompts.")] = None,
    device: Annotated[
        str | None, typer.Option(help="For layers and logits: cpu, cuda, cuda:1.", show_default="cuda if there is one")
    ] = None,
    dtype: Annotated[
        Dtype | None,
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
    _check_publishing(publish, create_pr, no_record or adopt)
    if report is not None:
        check_writable(report)
    folded, revision = hub_id(folded, revision)
    asked: dict[str, Any] = {
        "source": source,
        "levels": level or [],
        "runtimes": runtime or [],
        "tasks": [task for task in (eval or "").split(",") if task],
        "limit": eval_limit,
        "text": text,
        "token_ids": token_ids,
        "device": device,
        "dtype": dtype,
        "max_algebra": max_algebra,
        "max_ratio": max_ratio,
        "insist": bool(level),
        "adopt": adopt,
        "record": not no_record,
        "source_revision": source_revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "trust_remote_code": trust_remote_code,
        "workers": workers,
        "follow_links": follow_links,
        "command": options.command_line(sys.argv[1:]),
    }
    result, pushed = _run(out, folded, revision, asked, publish, create_pr)
    problems: list[str] = []
    reported = report is not None and _report(result, report, problems)
    published = pushed.published() if pushed else None
    out.data({**result.to_json(), "report": str(report) if reported else None, "published": published})
    _show(out, folded, result)
    if publish:
        out.text(f"Published: {pushed.url}" if pushed else "Not published: the page stays as it is.")
    if reported:
        out.text(f"Report: {report}")
    if problems:
        raise FlashNormError("; ".join(problems))
    raise typer.Exit(exit_code(result))


def _check_publishing(publish: bool, create_pr: bool, unrecorded: bool) -> None:
    if create_pr and not publish:
        raise UsageError("--create-pr needs --publish")
    if publish and unrecorded:
        raise UsageError("--publish excludes --no-record and --adopt")


def _run(
    out: Output, folded: str, revision: str | None, asked: dict[str, Any], publish: bool, create_pr: bool
) -> tuple[Verification, PushResult | None]:
    """The verification, and what was published of it where that is asked for."""
    with out.progress() as progress:
        progress(0, 0, "Starting")
        from flashnorm_cli.checkpoint.leftover import refuse_unfinished
        from flashnorm_cli.proof.verify import verify as run

        refuse_unfinished(Path(folded))
        check: Callable[..., Verification] = partial(run, **asked, on_progress=progress)
        if not publish:
            return check(folded, revision=revision), None
        from flashnorm_cli.checkpoint.model import Source
        from flashnorm_cli.hub.verified import verify_on_hub

        where = Source(folded, revision, asked["token"], asked["cache_dir"], asked["local_files_only"])
        return verify_on_hub(where, check, create_pr=create_pr, on_progress=progress)


def _show(out: Output, folded: str, result: Verification) -> None:
    from flashnorm_cli.checkpoint.leftover import leftovers

    out.text(*summary(result))
    out.remark(*leftovers(Path(folded), result.source or folded))


def exit_code(result: Verification) -> int:
    """What a verification makes the command line return."""
    from flashnorm_cli.proof.result import EQUIVALENT, NOT_RUN

    return {EQUIVALENT: EXIT_OK, NOT_RUN: EXIT_NOT_RUN}.get(result.verdict, EXIT_NOT_EQUIVALENT)


def _report(result: Verification, path: Path, problems: list[str]) -> bool:
    from flashnorm_cli.report.page import write_report

    return written(path, lambda: write_report(result, path), problems)
