"""`flashnorm fold`: write the folded checkpoint."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from flashnorm_cli.checkpoint.hub_ids import hub_id
from flashnorm_cli.cli import options
from flashnorm_cli.cli.output import Output
from flashnorm_cli.cli.plan import left_out_lines, norm_lines
from flashnorm_cli.cli.push_to_hub import done
from flashnorm_cli.cli.summary import summary
from flashnorm_cli.cli.verify import exit_code
from flashnorm_cli.errors import EXIT_NOT_RUN, EXIT_OK, UsageError
from flashnorm_cli.plan.wording import sentences, size

if TYPE_CHECKING:
    from flashnorm_cli.folding.fold import FoldResult
    from flashnorm_cli.hub.fold_to_hub import StreamResult
    from flashnorm_cli.proof.result import Verification

DROPPED = (
    "Layout dropped: transformers warns and fills the norms in. Stock vLLM does not load this. llama.cpp's converter "
    "takes it without a word, and then the GGUF does not load."
)


def fold(
    model: options.ModelArg,
    output: Annotated[
        Path | None,
        typer.Argument(help="The folder to write; by default ./<name>-FlashNorm.", show_default=False),
    ] = None,
    to: options.OutputOpt = None,
    layout: Annotated[
        options.Layout,
        typer.Option(
            help="Folded norms are written as ones (zeros for 1 + w), so that no tensor is missing; or left out, which "
            "neither stock vLLM nor llama.cpp loads."
        ),
    ] = "identity",
    final_norm: options.FinalNormOpt = "auto",
    rotate: Annotated[
        Literal["hadamard", "random"] | None,
        typer.Option(
            help="Then rotate the residual stream by an orthogonal matrix, which can make activations easier to "
            "quantize to integers: the same model in real arithmetic. Refused where it would not be exact.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="With --rotate: of the matrix.", show_default="0")] = None,
    for_: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="FORMAT",
            help="What the result will be quantized to (as q4_k_m or w8a8-int8): leave the model alone, fold, or fold "
            "and rotate, as was measured to be best (docs/quantization.md).",
            show_default=False,
        ),
    ] = None,
    leave_grid: Annotated[
        bool,
        typer.Option("--leave-grid", help="Fold also weights that lie on a quantizer's grid (trained for few bits)."),
    ] = False,
    revision: options.RevisionOpt = None,
    token: options.TokenOpt = None,
    cache_dir: options.CacheDirOpt = None,
    local_files_only: options.LocalFilesOnlyOpt = False,
    trust_remote_code: options.TrustRemoteCodeOpt = False,
    workers: options.WorkersOpt = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output, or a repository, that holds something already.")
    ] = False,
    dask: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Hand the shards to the workers of this dask scheduler (tcp://host:8786), which share source and "
            "output folder with this machine, or, with --push-to, reach the Hub.",
        ),
    ] = None,
    push_to: Annotated[
        str | None,
        typer.Option(
            metavar="REPO_ID",
            help="Write into this Hub repository instead of a folder: shards are downloaded, folded, uploaded and "
            "deleted one by one, and one commit at the end makes all of it visible.",
        ),
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--no-private", help="With --push-to: for a repository that is new.")
    ] = None,
    commit_message: Annotated[str | None, typer.Option(help="With --push-to: of the commit.")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="With --push-to: open a pull request instead of writing to main.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Then check it as `flashnorm verify` does, with its exit codes.")
    ] = False,
    follow_links: options.FollowLinksOpt = False,
    json: options.JsonOpt = False,
    quiet: options.QuietOpt = False,
    debug: options.DebugOpt = False,
) -> None:
    """Fold norm weights into the linear layers that read them, and write the checkpoint.

    The model computes the same and needs no norm weights. Shards are streamed, memory stays flat. An interrupted
    fold goes on where it stopped when the same command is run again.
    """
    out = Output(json, quiet)
    output, (model, revision) = options.one_output(output, to), hub_id(model, revision)
    if push_to is None and (private is not None or commit_message is not None or create_pr):
        raise UsageError("--private, --commit-message and --create-pr need --push-to")
    if seed is not None and rotate is None and for_ is None:
        raise UsageError("--seed needs --rotate")
    if push_to is not None and rotate is not None:
        raise UsageError("--push-to does not rotate: fold with --rotate into a folder, then flashnorm push-to-hub")
    if push_to is not None and (output is not None or local_files_only):
        raise UsageError("--push-to excludes an output folder and --local-files-only")
    hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
    how: dict[str, Any] = {"final_norm": final_norm, "layout": layout, "workers": workers, "overwrite": overwrite}
    how |= {"target": for_, "leave_grid": leave_grid}
    if push_to is not None:
        commit = {"private": private, "commit_message": commit_message, "create_pr": create_pr}
        _fold_to_hub(out, model, push_to, verify, revision=revision, dask=dask, **hub, **how, **commit)
    hub |= {"local_files_only": local_files_only, "follow_links": follow_links}
    with out.progress() as report:
        report(0, 0, "Starting")
        from flashnorm_cli.folding.fold import fold as run

        more: dict[str, Any] = {"rotate": rotate, "seed": seed or 0, "dask": dask, "on_progress": report}
        result = run(model, output, revision=revision, **hub, **how, **more)
        verification = None
        if verify:
            from flashnorm_cli.proof.verify import verify as check

            verification = check(
                result.output,
                model,
                source_revision=result.plan.commit,
                workers=workers,
                command=options.command_line(["verify", str(result.output), "--source", model]),
                on_progress=report,
                **hub,
            )
    _show(out, result, verification)
    if verification is not None:
        raise typer.Exit(exit_code(verification))


def _fold_to_hub(out: Output, model: str, push_to: str, verify: bool, **more: Any) -> NoReturn:
    with out.progress() as report:
        report(0, 0, "Starting")
        from flashnorm_cli.hub.fold_to_hub import fold_to_hub

        streamed = fold_to_hub(model, push_to, verify=verify, on_progress=report, **more)
    show_streamed(out, streamed)
    raise typer.Exit(EXIT_NOT_RUN if verify and not streamed.pushed.verified else EXIT_OK)


def fold_json(result: FoldResult | StreamResult, verification: Verification | None) -> dict[str, Any]:
    """The result of every fold, with the same fields; what does not belong to one is null."""
    absent = dict.fromkeys(("output", "published", "bytes_written", "bytes_downloaded", "bytes_uploaded"))
    found = {**absent, "verdict": "not verified", **result.to_json(), "verification": None}
    if verification is not None:
        found |= {"verdict": verification.verdict, "verification": verification.to_json()}
    dropped = [DROPPED] if result.layout == "dropped" else []
    return {**found, "notes": [*found["notes"], *dropped]}


def _show(out: Output, result: FoldResult, verification: Verification | None) -> None:
    out.data(fold_json(result, verification))
    if result.already_done:
        out.text(f"Already done: {result.output} holds this fold. Nothing was written.")
    else:
        _show_written(out, result)
    if verification is None:
        out.next(f"flashnorm verify {shlex.quote(str(result.output))}")
    else:
        out.text("", *summary(verification))


def _show_written(out: Output, result: FoldResult) -> None:
    out.text(*_outcome(result))
    planning, writing, flushing = result.seconds
    out.text(
        f"Planned in {planning:.1f} s, wrote {size(result.bytes_written)} in {writing:.1f} s, on the disk after "
        f"{flushing:.1f} s more:",
        str(result.output),
    )


def show_streamed(out: Output, result: StreamResult) -> None:
    """What a fold from Hub to Hub did."""
    out.data(fold_json(result, None))
    planning, moving, committing = result.seconds
    out.text(
        *_outcome(result),
        f"Planned in {planning:.1f} s; {size(result.downloaded)} came in and {size(result.uploaded)} went out in "
        f"{moving:.1f} s; published in {committing:.1f} s:",
        *done(result.pushed),
    )
    if not result.pushed.verified:
        out.next(f"flashnorm verify {result.pushed.repo_id} --publish")


def _outcome(result: FoldResult | StreamResult) -> list[str]:
    lines = [*norm_lines(result.plan, kept_only=True), *sentences(result.plan)]
    if result.resumed:
        lines.append(f"Went on after an interruption: {len(result.resumed)} shards were finished already.")
    if result.flushed:
        flushed = sum(result.flushed.values())
        lines.append(
            f"{flushed} products in {len(result.flushed)} tensors were too small for their dtype and became zero."
        )
    lines += left_out_lines(result.left_out)
    if result.layout == "dropped":
        lines.append(DROPPED)
    notes = [*result.notes, *([result.caution] if result.caution else [])]
    return lines + [f"Note: {note}." for note in notes]
