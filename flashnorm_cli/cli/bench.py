"""`flashnorm bench`: the norms beside everybody else's, and a model with its norms on different code."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flashnorm_cli.checkpoint.output import write_text
from flashnorm_cli.cli import options
from flashnorm_cli.cli.output import Output, check_writable, written
from flashnorm_cli.cli.tables import markdown_table, text_table
from flashnorm_cli.errors import FlashNormError, UsageError

if TYPE_CHECKING:
    from flashnorm_cli.bench.kernels import Measurement

MODEL_TOKENS = (1, 16, 256, 4096)


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Local folder or Hub id of a model, or one of the shapes llama-3.2-1b and llama-3.1-8b with random "
            "weights: the norms of its sizes, decoding and prefill. Without it, the norms on standard shapes.",
            show_default=False,
        ),
    ] = None,
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Read the config and make random weights.")
    ] = False,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="What to time on.", show_default="cuda if there is one")
    ] = None,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option(help="Of the tensors.")] = "bfloat16",
    hidden: Annotated[
        list[int] | None,
        typer.Option(min=1, max=65536, help="Elements in a row; may be given again.", show_default="576 to 16384"),
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Rows of a norm; may be given again.", show_default="1 to 65536")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that the model decodes.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that the model decodes at once.")] = 1,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Turns of each contender.", show_default="11; models 20")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Time the model under torch.compile, too (minutes).")
    ] = True,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="First measure again which kernels norm_linear uses for the model's products, and keep that."
        ),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Picture of the norms' share of a copy over tokens (.svg, .png or .pdf).")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    save: Annotated[Path | None, typer.Option(help="File to write the results to, as JSON.")] = None,
    trust_remote_code: options.TrustRemoteCodeOpt = False,
    json: options.JsonOpt = False,
    quiet: options.QuietOpt = False,
    debug: options.DebugOpt = False,
) -> None:
    """Time the norms, each contender checked against float64 first, in turns, on the same buffers.

    Device times are replays of CUDA graphs, and hold no host time, which is a column of its own. The limit is a copy
    of the same bytes. Without a GPU, the norms that run on a CPU are timed, and the output says so.
    """
    out = Output(json, quiet)
    _check_options(plot, save, tune, model)
    command = options.command_line(["bench", *sys.argv[2:]])
    with out.progress() as report:
        report(0, 0, "Loading torch")
        import torch

        from flashnorm_cli.bench import kernels

        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: torch sees no CUDA device here")
        if device == "cpu" and plot is not None:
            raise UsageError("--plot shows shares of a copy on a GPU, and this is a CPU")
        of_model: list[dict[str, Any]] = []
        sizes = list(hidden or kernels.HIDDEN)
        if model is not None:
            from flashnorm_cli.bench import models

            report(0, 0, f"Loading {model}")
            loaded = models.load(model, config_only, device, getattr(torch, dtype), trust_remote_code)
            sizes = list(hidden or models.norm_sizes(loaded))
            if not sizes:
                raise FlashNormError(f"{model}: has no plain RMSNorm")
            of_model = _time_model(loaded, tune, compiled, trials or 20, new_tokens, batch, report)
            del loaded
        rows = list(tokens or (MODEL_TOKENS if model else kernels.TOKENS))
        results = _measure(device, sizes, rows, getattr(torch, dtype), trials or 11, report)
        data = kernels.record(command, results, device=device, model=model, models=of_model)
    problems: list[str] = []
    if save is not None:
        written(save, lambda: write_text(save, json_module.dumps(data, indent=1) + "\n"), problems)
    if plot is not None:
        from flashnorm_cli.bench.report import plot as draw

        written(plot, lambda: draw(results, plot), problems)
    out.data({"model": model, "benchmark": data})
    _show(out, results, of_model, device, markdown)
    if problems:
        raise FlashNormError("; ".join(problems))


def _check_options(plot: Path | None, save: Path | None, tune: bool, model: str | None) -> None:
    for path in (plot, save):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{path.absolute().parent}: no such folder")
        if path is not None:
            check_writable(path)
    if plot is not None:
        from flashnorm_cli.bench.report import PICTURES, require_matplotlib

        if plot.suffix.lower() not in PICTURES:
            raise UsageError(f"--plot {plot}: the name has to end in {', '.join(PICTURES)}")
        require_matplotlib()
    if tune and model is None:
        raise UsageError("--tune measures the products of a model: name one")


def _time_model(
    loaded: Any, tune: bool, compiled: bool, trials: int, new_tokens: int, batch: int, report: Any
) -> list[dict[str, Any]]:
    from flashnorm_cli.bench import models

    if tune:
        from flashnorm_cli.bench.ways import tune_model

        tune_model(loaded, report)
    modes = tuple(m for m in models.MODES if compiled or m != "decode, compiled")
    return models.bench(loaded, trials, new_tokens, batch, modes, on_progress=lambda what: report(0, 0, what))


def _measure(
    device: str, sizes: list[int], tokens: list[int], dtype: Any, trials: int, report: Any
) -> list[Measurement]:
    from flashnorm_cli.bench import kernels

    results: list[Measurement] = []
    shapes = [(h, t) for h in sizes for t in tokens]
    for i, (h, t) in enumerate(shapes):
        report(i, len(shapes), f"Norms of {h} elements, {t} rows")
        if device == "cpu":
            results += kernels.measure_cpu(h, t, dtype, trials)
        else:
            for operation in ("rms_norm", "fused_add_rms_norm"):
                results += kernels.measure(operation, h, t, dtype, trials, host=t == min(tokens))
    return results


def _show(out: Output, results: list[Measurement], of_model: list[dict[str, Any]], device: str, markdown: bool) -> None:
    from flashnorm_cli.bench import report

    table = markdown_table if markdown else text_table
    for operation in dict.fromkeys(r.operation for r in results):
        where = "on the GPU: device time" if device == "cuda" else "on this CPU, where flashnorm's norms are torch's"
        out.text(f"{operation} {where}; the others: how many times as long they take", "")
        out.text(*table(*report.rows_of(results, operation)), "")
    head, lines = report.host_rows(results)
    if lines and device == "cuda":
        out.text("Host time per call", *table(head, lines), "")
    if of_model:
        out.text(f"The model on the {'GPU' if device == 'cuda' else 'CPU'}", *table(*_model_rows(of_model)), "")
    for wrong in (r for r in results if r.error):
        out.text(f"{wrong.contender}, {wrong.hidden} x {wrong.tokens}: {wrong.error}")
    out.text(*report.words(results))


def _model_rows(of_model: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    head = ["mode", "norms", "tok/s", "10 % to 90 %", "over stock"]
    lines = []
    for row in of_model:
        if "error" in row:
            lines.append([row["mode"], row["way"], "-", "", row["error"]])
            continue
        low, high = row["spread"]
        gain = f"{row['gain_percent']:+.1f} %" if "gain_percent" in row else ""
        lines.append([row["mode"], row["way"], f"{row['tok_per_s']:.1f}", f"{low:.1f} to {high:.1f}", gain])
    return head, lines
