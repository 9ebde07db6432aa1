"""`flashnorm demo`: the main job on the model that comes with the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashnorm_cli.cli import options
from flashnorm_cli.cli.fold import fold_json
from flashnorm_cli.cli.output import Output
from flashnorm_cli.cli.tables import aligned
from flashnorm_cli.errors import EXIT_NOT_EQUIVALENT, EXIT_OK
from flashnorm_cli.plan.wording import size

if TYPE_CHECKING:
    from flashnorm_cli.demo import DemoResult


def demo(
    output: Annotated[
        Path | None,
        typer.Argument(help="Keep the folded model in this folder.", show_default="a temporary folder"),
    ] = None,
    to: options.OutputOpt = None,
    json: options.JsonOpt = False,
    quiet: options.QuietOpt = False,
    debug: options.DebugOpt = False,
) -> None:
    """Fold the small trained Llama that comes with flashnorm, offline, and compare it with its source."""
    out = Output(json, quiet)
    output = options.one_output(output, to)
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as scratch, out.progress() as report:
        report(0, 0, "Folding and comparing the demo model")
        from flashnorm_cli.demo import run_demo

        result = run_demo(output or Path(scratch) / "demo-FlashNorm")
    out.data(
        {
            **fold_json(result.fold, result.verification),
            "text_source": result.text_source,
            "text_folded": result.text_folded,
            "output": str(output) if output else None,
        }
    )
    out.text(*_lines(result, output))
    raise typer.Exit(EXIT_OK if result.verification.equivalent else EXIT_NOT_EQUIVALENT)


def _lines(result: DemoResult, output: Path | None) -> list[str]:
    plan = result.fold.plan
    low, high = result.gains
    weights, logits = (level.figures for level in result.verification.levels if level.level != "layers")
    source, folded = logits["source"], logits["folded"]
    same = (
        "the same text"
        if result.text_source == result.text_folded
        else "different texts (a near tie went the other way)"
    )
    table = aligned(
        [
            ("On text it was not trained on:", "source", "folded"),
            ("perplexity per byte", f"{source['perplexity']:.4f}", f"{folded['perplexity']:.4f}"),
        ],
        right=[1, 2],
    )
    where = f"{output}" if output else "a temporary folder (give one to keep it: flashnorm demo ./demo-FlashNorm)"
    lines = [
        f"A byte-level Llama with {result.parameters / 1e6:.1f} M parameters, trained until its norm weights lay "
        f"between {low:.2f} and {high:.2f}.",
        "",
        f"Folded   {len(plan.folded)} norms into the {len(plan.readers)} linear layers that read them; every norm "
        "weight is now 1.",
        f"         {size(result.fold.bytes_written)} in {sum(result.fold.seconds):.1f} s, written to {where}",
        "",
        f"Checked  all {weights['tensors']} tensors hold the very bits that source and plan ask for.",
        *(f"         {line}" for line in table),
        f"         In float32 the logits agree to {logits['algebra_error']:.0e} (relative): the algebra is exact.",
        f"         Running the folded model in bfloat16 moves them by {logits['rounding_error']:.2e}; running the "
        f"source in bfloat16 moves them by {logits['noise_floor']:.2e}, the noise floor.",
        f"         The most likely next byte is that of float32 at {folded['top1']:.2%} of positions "
        f"(the source in bfloat16: {source['top1']:.2%}).",
        "",
        f"Wrote    {same}:",
        *(
            f"         {name}  {' '.join(text.split())}"
            for name, text in (("source", result.text_source), ("folded", result.text_folded))
        ),
        "",
        "Equivalent." if result.verification.equivalent else "NOT equivalent: please report this.",
        "",
        "Next, with a model of yours (a folder or a Hub id):",
        "  flashnorm plan <model>       what would be folded, what is kept, and why",
        "  flashnorm fold <model>       write ./<name>-FlashNorm, to be loaded as <model> is",
        "  flashnorm verify <folded>    prove that it is the same model; --report writes a page to show",
        "  flashnorm push-to-hub <folded> <you/name>    publish it with that proof",
    ]
    return lines
