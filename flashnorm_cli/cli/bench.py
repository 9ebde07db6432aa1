"""`flashnorm bench`: the norms beside everybody else's, or a model with its norms on different code."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flashnorm_cli.cli import options
from flashnorm_cli.cli.output import Output
from flashnorm_cli.errors import FlashNormError

if TYPE_CHECKING:
    from flashnorm_cli.bench.kernels import Measurement


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            help="llama-3.2-1b, llama-3.1-8b or a local folder with a config: decode with random weights. Without it, "
            "the kernels on standard shapes.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option(help="Of the tensors.")] = "bfloat16",
    hidden: Annotated[
        list[int] | None, typer.Option(help="Hidden size; may be given again.", show_default="576 to 16384")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Rows, or tokens to decode; may be given again.", show_default="1 to 65536")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Turns.", show_default="11, models 20")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (SVG) of the norms, share of a copy.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write what --json prints to a file as well.")] = None,
    json: options.JsonOpt = False,
    quiet: options.QuietOpt = False,
    debug: options.DebugOpt = False,
) -> None:
    """Time the norms: every contender is checked before it is timed, in turns, on the same buffers.

    Device times come from CUDA graphs and hold no host time; that is a column of its own. Without a GPU, the norms
    that run on a CPU are timed there.
    """
    out = Output(json, quiet)
    command = options.command_line(["bench", *_without_program(sys.argv)])
    with out.progress() as report:
        report(0, 0, "Starting")
        import torch

        from flashnorm_cli.bench import kernels

        gpu = torch.cuda.is_available()
        if model is not None:
            if not gpu:
                raise FlashNormError("decoding is timed on a GPU, and torch sees none here")
            from flashnorm_cli.bench import models

            rows = models.bench(
                model,
                trials or 20,
                tokens[0] if tokens else 256,
                dtype=getattr(torch, dtype),
                on_progress=lambda what: report(0, 0, what),
            )
            data = kernels.record(command, [], models=rows)
        else:
            results = _measure(gpu, hidden, tokens, getattr(torch, dtype), trials or 11, report)
            data = kernels.record(command, results, device="GPU" if gpu else "CPU")
    if save is not None:
        save.write_text(json_module.dumps(data, indent=1) + "\n")
    out.data(data)
    if model is not None:
        _show_models(out, data["models"], markdown)
        return
    if plot is not None:
        from flashnorm_cli.bench.report import plot as picture

        plot.write_text(picture(results, "rms_norm"))
        plot.with_suffix(".fused.svg").write_text(picture(results, "fused_add_rms_norm"))
    _show(out, results, gpu, markdown)


def _measure(
    gpu: bool, hidden: list[int] | None, tokens: list[int] | None, dtype: Any, trials: int, report: Any
) -> list[Measurement]:
    from flashnorm_cli.bench import kernels

    results: list[Measurement] = []
    for h in hidden or (kernels.HIDDEN if gpu else (2048,)):
        for t in tokens or (kernels.TOKENS if gpu else (1, 256)):
            if not gpu:
                report(0, 0, f"CPU, hidden {h}, {t} tokens")
                results += kernels.measure_cpu(h, t, dtype, trials)
                continue
            for operation in ("rms_norm", "fused_add_rms_norm"):
                report(0, 0, f"{operation}, hidden {h}, {t} tokens")
                results += kernels.measure(operation, h, t, dtype, trials, host=t == 1)
    return results


def _show(out: Output, results: list[Measurement], gpu: bool, markdown: bool) -> None:
    from flashnorm_cli.bench import report

    table = report.markdown_table if markdown else report.text_table
    for operation in dict.fromkeys(r.operation for r in results):
        where = "GPU: device time; the others' columns say how many times as long they take" if gpu else "CPU"
        out.text(f"{operation} ({where})", *table(*report.rows_of(results, operation)), "")
    head, lines = report.host_rows(results)
    if lines:
        out.text("Host time per call", *table(head, lines), "")
    for wrong in (r for r in results if r.error):
        out.text(f"{wrong.contender}, {wrong.hidden} x {wrong.tokens}: {wrong.error}")
    out.text(*report.words(results))


def _show_models(out: Output, rows: list[dict[str, Any]], markdown: bool) -> None:
    from flashnorm_cli.bench import report

    head = ["mode", "norms", "tok/s", "over stock"]
    lines = [
        [r["mode"], r["way"], "", r["error"]]
        if "error" in r
        else [r["mode"], r["way"], f"{r['tok_per_s']:.1f}", f"{r['gain_over_stock_percent']:+.1f} %"]
        for r in rows
    ]
    out.text(*(report.markdown_table if markdown else report.text_table)(head, lines))


def _without_program(arguments: list[str]) -> list[str]:
    return arguments[2:] if arguments[1:2] == ["bench"] else arguments[1:]
