"""`flashnorm fold`: write the folded checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashnorm_cli.cli import options
from flashnorm_cli.cli.output import Output, size
from flashnorm_cli.cli.plan import plan_lines, plan_summary
from flashnorm_cli.cli.verify import summary
from flashnorm_cli.errors import EXIT_NOT_EQUIVALENT, EXIT_OK

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
    layout: Annotated[
        options.Layout,
        typer.Option(
            help="Folded norms are written as ones (zeros for 1 + w), so that no tensor is missing; or left out, which "
            "neither stock vLLM nor llama.cpp loads."
        ),
    ] = "identity",
    final_norm: options.FinalNormOpt = "auto",
    revision: options.RevisionOpt = None,
    token: options.TokenOpt = None,
    cache_dir: options.CacheDirOpt = None,
    local_files_only: options.LocalFilesOnlyOpt = False,
    trust_remote_code: options.TrustRemoteCodeOpt = False,
    workers: options.WorkersOpt = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that holds a checkpoint.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Then check it, levels weights and logits; exit code 3 if it fails.")
    ] = False,
    json: options.JsonOpt = False,
    quiet: options.QuietOpt = False,
    debug: options.DebugOpt = False,
) -> None:
    """Fold norm weights into the linear layers that read them, and write the checkpoint.

    The model computes the same and needs no norm weights. Shards are streamed, memory stays flat. An interrupted
    fold goes on where it stopped when the same command is run again.
    """
    out = Output(json, quiet)
    with out.progress() as report:
        report(0, 0, "Starting")
        from flashnorm_cli.folding import fold as run

        result = run(
            model,
            output,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
            final_norm=final_norm,
            layout=layout,
            workers=workers,
            overwrite=overwrite,
            on_progress=report,
        )
        verification = None
        if verify:
            from flashnorm_cli.proof.verify import verify as check

            verification = check(
                result.output,
                model,
                levels=("weights", "logits"),
                source_revision=result.plan.commit,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                trust_remote_code=trust_remote_code,
                workers=workers,
                command=options.command_line(["verify", str(result.output), "--source", model]),
                on_progress=report,
            )
    plan = result.plan
    out.data(
        {
            "output": str(result.output),
            "layout": result.layout,
            "flashnorm_folded": plan.folded_flag,
            "folded": len(plan.folded),
            "kept": len(plan.kept),
            "readers": len(plan.readers),
            "lm_head": plan.lm_head,
            "bytes_written": result.bytes_written,
            "bytes_added": plan.bytes_added,
            "flushed_to_zero": result.flushed,
            "resumed_shards": list(result.resumed),
            "left_out": list(result.left_out),
            "notes": [*plan.notes, *([DROPPED] if layout == "dropped" else [])],
            "seconds": dict(zip(("plan", "write", "flush"), (round(s, 3) for s in result.seconds), strict=True)),
            **({"verification": verification.to_json()} if verification else {}),
        }
    )
    out.text(*(line for line in plan_lines(plan) if line.startswith("kept")), *plan_summary(plan))
    if result.resumed:
        out.text(f"Went on after an interruption: {len(result.resumed)} shards were finished already.")
    if result.flushed:
        flushed = sum(result.flushed.values())
        out.text(f"{flushed} products in {len(result.flushed)} tensors were too small for their dtype and became zero.")
    if result.left_out:
        out.text(f"Left out (weights in other formats, links to folders): {', '.join(result.left_out)}")
    if layout == "dropped":
        out.text(DROPPED)
    planning, writing, flushing = result.seconds
    out.text(
        f"Planned in {planning:.1f} s, wrote {size(result.bytes_written)} in {writing:.1f} s, on the disk after "
        f"{flushing:.1f} s more:",
        str(result.output),
    )
    if verification is not None:
        out.text("", *summary(verification))
        raise typer.Exit(EXIT_OK if verification.equivalent else EXIT_NOT_EQUIVALENT)
