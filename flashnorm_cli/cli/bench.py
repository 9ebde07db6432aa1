"""`flashnorm bench`: the norms beside everybody else's, and a model with its norms on different code."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flashnorm_cli.cli import options
from flashnorm_cli.cli.output import Output, check_writable, written
from flashnorm_cli.cli.tables import markdown_table, text_table
from flashnorm_cli.errors import FlashNormError, UsageError

if TYPE_CHECKING:
    from flashnorm_cli.bench.kernels import Measurement
    from flashnorm_cli.checkpoint.model import Progress

MODEL_TOKENS = (1, 16, 256, 4096)
OF_ITS_ORIGIN = ("command", "date", "python", "norms", "versions", "method")
PATIENCE = 200.0  # seconds that a CPU may take for all of its turns, so that all is over in five minutes


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
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the model decodes.", show_default="256; 16 on a CPU")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that the model decodes at once.")] = 1,
    trials: Annotated[
        int | None,
        typer.Option(min=1, help="Turns of each contender.", show_default="11; models 20; on a CPU as time allows"),
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
    quick: Annotated[
        bool, typer.Option("--quick", help="A look within a minute or two: few shapes, 3 turns, nothing compiled.")
    ] = False,
    saved: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Measure nothing: show the results in a file of --save or --json."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Picture of the norms' share of a copy over tokens (.svg, .png or .pdf).")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    save: Annotated[Path | None, typer.Option(help="File to write the results to, as JSON, as they come.")] = None,
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
    given = {
        "a model": model, "--config-only": config_only, "--device": device, "--new-tokens": new_tokens, "--tune": tune,
        "--trials": trials, "--quick": quick, "--save": save, "--hidden": hidden, "--tokens": tokens,
    }  # fmt: skip
    _check_options(plot, save, tune, model, [name for name, value in given.items() if value] if saved else [])
    run = _Run(out, model, save, plot, markdown, options.command_line(["bench", *sys.argv[2:]]))
    if saved is not None:
        run.read(saved)
        run.finish()
        return
    asked = _Asked(
        device, dtype, hidden or (), tokens or (), new_tokens, batch, trials, compiled and not quick, tune, quick
    )
    try:
        with out.progress() as report:
            report(0, 0, "Loading torch")
            run.start(asked)
            if model is not None:
                asked = _time_model(run, model, config_only, trust_remote_code, asked, report)
            _time_norms(run, asked, report)
    except BaseException:  # Ctrl-C, a GPU without memory: what was measured is not lost
        if run.results or run.of_model:
            run.finish()
        raise
    run.finish()


def _check_options(plot: Path | None, save: Path | None, tune: bool, model: str | None, beside: Sequence[str]) -> None:
    if beside:
        raise UsageError(f"--from measures nothing, so it excludes {', '.join(beside)}")
    for path in (plot, save):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{path.absolute().parent}: no such folder")
        if path is not None:
            check_writable(path)
    if plot is not None:
        from flashnorm_cli.bench.picture import KINDS, require_matplotlib

        if plot.suffix.lower() not in KINDS:
            raise UsageError(f"--plot {plot}: the name has to end in {', '.join(KINDS)}")
        require_matplotlib()
    if tune and model is None:
        raise UsageError("--tune measures the products of a model: name one")


@dataclass(frozen=True)
class _Asked:
    """What is timed; None and () stand for what depends on the device."""

    device: str | None
    dtype: str
    hidden: Sequence[int]
    tokens: Sequence[int]
    new_tokens: int | None
    batch: int
    trials: int | None
    compiled: bool
    tune: bool
    quick: bool

    def turns(self, usual: int) -> int:
        return self.trials or (3 if self.quick else usual)


@dataclass
class _Run:
    """What is known so far: shown as it comes, saved as it comes, and once more in tables at the end."""

    out: Output
    model: str | None
    save: Path | None
    plot: Path | None
    markdown: bool
    command: str
    device: str = "cpu"
    results: list[Measurement] = field(default_factory=list)
    of_model: list[dict[str, Any]] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)  # of results that were read from a file

    def start(self, asked: _Asked) -> None:
        """Find the device. Raises UsageError where it is not there, or cannot do what is asked."""
        import torch

        self.device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: torch sees no CUDA device here")
        if self.device == "cpu" and self.plot is not None:
            raise UsageError("--plot shows shares of a copy on a GPU, and this is a CPU")

    def read(self, path: Path) -> None:
        from flashnorm_cli.bench.saved import read_results

        self.origin, self.results, self.of_model = read_results(path)
        model = self.origin.get("model")
        self.model = model if isinstance(model, str) else None
        self.device = "cpu" if self.origin.get("device") == "cpu" else "cuda"

    def data(self) -> dict[str, Any]:
        from flashnorm_cli.bench.kernels import record

        found = record(self.command, self.results, device=self.device, model=self.model, models=self.of_model)
        if self.origin:
            found |= {key: self.origin[key] for key in OF_ITS_ORIGIN if key in self.origin}
        return found

    def norms(self, measured: list[Measurement]) -> None:
        """One operation on one shape is done."""
        from flashnorm_cli.bench.report import line_of

        self.results += measured
        self.out.meanwhile(line_of(measured))
        self._store()

    def row(self, row: dict[str, Any]) -> None:
        """One mode of the model in one way is done."""
        self.of_model.append(row)
        cells = _model_rows([row])[1][0]
        self.out.meanwhile(f"{cells[0]}, {cells[1]}: {cells[2]} tok/s {cells[4]}".rstrip())
        self._store()

    def _store(self) -> None:
        if self.save is not None:
            from flashnorm_cli.checkpoint.disk import write_text

            write_text(self.save, json_module.dumps(self.data(), indent=1) + "\n")

    def finish(self) -> None:
        """Raises FlashNormError where a file could not be written; all else is shown all the same."""
        problems: list[str] = []
        if self.save is not None:
            written(self.save, self._store, problems)
        if self.plot is not None:
            from flashnorm_cli.bench.picture import plot
            from flashnorm_cli.bench.saved import gpu_of

            where = self.plot
            written(where, lambda: plot(self.results, where, gpu_of(self.data())), problems)
        self.out.data({"model": self.model, "benchmark": self.data()})
        self._show()
        if problems:
            raise FlashNormError("; ".join(problems))

    def _show(self) -> None:
        from flashnorm_cli.bench import report

        out, table = self.out, self._table
        for operation in dict.fromkeys(r.operation for r in self.results):
            where = "device time on the GPU" if self.device == "cuda" else f"on a CPU, {report.ON_A_CPU}"
            base = report.base_of(self.results, operation)
            out.text(f"{operation}, {where}. Time of {base}; the others: how many times as long they take", "")
            out.text(*table(*report.rows_of(self.results, operation)), "")
        head, lines = report.host_rows(self.results)
        if lines and self.device == "cuda":
            out.text("Host time per call", *table(head, lines), "")
        if self.of_model:
            out.text(f"The model on the {'GPU' if self.device == 'cuda' else 'CPU'}")
            out.text(*table(*_model_rows(self.of_model)), "")
        for wrong in (r for r in self.results if r.error):
            out.text(f"{wrong.contender}, {wrong.hidden} x {wrong.tokens}: {wrong.error}")
        out.text(*report.words(self.results))

    def _table(self, head: list[str], lines: list[list[str]]) -> list[str]:
        return markdown_table(head, lines) if self.markdown else text_table(head, lines, self.out.width(100))


def _time_model(
    run: _Run, name: str, config_only: bool, trust_remote_code: bool, asked: _Asked, report: Progress
) -> _Asked:
    """Time a model; returns what is to be timed of norms, which is those of its sizes."""
    import dataclasses

    import torch

    from flashnorm_cli.bench import models

    report(0, 0, f"Loading {name}")
    loaded = models.load(name, config_only, run.device, getattr(torch, asked.dtype), trust_remote_code)
    sizes = asked.hidden or models.norm_sizes(loaded)
    if not sizes:
        raise FlashNormError(f"{name}: has no plain RMSNorm")
    if asked.tune:
        from flashnorm_cli.bench.ways import tune_model

        tune_model(loaded, report)
    on_cpu, short = run.device == "cpu", run.device == "cpu" or asked.quick
    models.bench(
        loaded,
        asked.turns(5 if on_cpu else 20),
        asked.new_tokens or (16 if short else 256),
        asked.batch,
        tuple(m for m in models.MODES if asked.compiled or m != "decode, compiled"),
        on_progress=report,
        on_row=run.row,
        seconds=PATIENCE / 4 if on_cpu and asked.trials is None else None,
    )
    return dataclasses.replace(asked, hidden=sizes, tokens=asked.tokens or MODEL_TOKENS)


def _time_norms(run: _Run, asked: _Asked, report: Progress) -> None:
    import torch

    from flashnorm_cli.bench import kernels
    from flashnorm_cli.checkpoint.progress import Steps

    on_cpu, dtype = run.device == "cpu", getattr(torch, asked.dtype)
    usual: tuple[Sequence[int], Sequence[int]] = kernels.HIDDEN, kernels.TOKENS
    if on_cpu:
        usual = kernels.CPU_HIDDEN, kernels.CPU_TOKENS
    if asked.quick:
        usual = kernels.QUICK_HIDDEN, kernels.QUICK_TOKENS
    shapes = [(h, t) for h in asked.hidden or usual[0] for t in asked.tokens or usual[1]]
    seconds = PATIENCE / 2 / len(shapes) if asked.trials is None else None
    for i, (h, t) in enumerate(shapes):
        report(i, len(shapes), Steps(f"Timing norms of {h} elements, {t} rows"))
        if on_cpu:
            run.norms(kernels.measure_cpu(h, t, dtype, asked.turns(11), seconds))
        else:
            for operation in ("rms_norm", "fused_add_rms_norm"):
                host = t == min(tokens for _, tokens in shapes)
                run.norms(kernels.measure(operation, h, t, dtype, asked.turns(11), host=host))


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
