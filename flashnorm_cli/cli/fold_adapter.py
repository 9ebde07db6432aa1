"""`flashnorm fold-adapter`: make an adapter of the source fit the folded base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashnorm_cli.cli import options
from flashnorm_cli.cli.output import Output
from flashnorm_cli.cli.plan import left_out_lines
from flashnorm_cli.plan.wording import size

if TYPE_CHECKING:
    from flashnorm_cli.adapters.fold import AdapterResult


def fold_adapter(
    adapter: Annotated[str, typer.Argument(help="A PEFT adapter: a folder or a Hub id.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Argument(help="The folder to write; by default ./<name>-FlashNorm.", show_default=False),
    ] = None,
    to: options.OutputOpt = None,
    base: Annotated[
        str, typer.Option(help="The folded checkpoint that it is to run on: a folder or a Hub id.", show_default=False)
    ] = ...,  # type: ignore[assignment]
    source: Annotated[
        str | None,
        typer.Option(help="What the base was folded from: a folder or a Hub id.", show_default="what its record names"),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the adapter on the Hub.")] = None,
    base_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the base.")] = None,
    source_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the source.")] = None,
    token: options.TokenOpt = None,
    cache_dir: options.CacheDirOpt = None,
    local_files_only: options.LocalFilesOnlyOpt = False,
    trust_remote_code: options.TrustRemoteCodeOpt = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that holds an adapter.")] = False,
    follow_links: options.FollowLinksOpt = False,
    json: options.JsonOpt = False,
    quiet: options.QuietOpt = False,
    debug: options.DebugOpt = False,
) -> None:
    """Fold a PEFT adapter that was trained on the source of a folded checkpoint, so that it fits the folded one.

    Its matrices read the same norm weights as the layers that they adapt, so on a folded base the original is silently
    wrong. Only headers, norms and a few rows of base and source are read; the result is checked on random activations.
    """
    out = Output(json, quiet)
    with out.progress() as report:
        report(0, 0, "Starting")
        from flashnorm_cli.adapters.fold import fold_adapter as run

        result = run(
            adapter,
            base,
            options.one_output(output, to),
            source=source,
            revision=revision,
            base_revision=base_revision,
            source_revision=source_revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            follow_links=follow_links,
            on_progress=report,
        )
    out.data(result.to_json())
    out.text(*summary(result))


def summary(result: AdapterResult) -> list[str]:
    """What was done, and what the check found."""
    changed = result.changed
    kinds = [
        f"{changed['gain']} take the gain of the norm that they read",
        *([f"{changed['ratio']} norms of its own are divided by the folded gain"] if changed["ratio"] else []),
        *([f"{changed['magnitude']} magnitudes follow their rows' lengths"] if changed["magnitude"] else []),
    ]
    lines = [f"{result.peft_type}, {result.tensors} tensors: {'; '.join(kinds)}."]
    if not any(changed.values()):
        lines = [f"{result.peft_type}, {result.tensors} tensors: nothing in it reads a folded norm; it fits as it was."]
    if result.added:
        lines.append(f"Added: {', '.join(result.added)}")
    check = result.check
    lines.append(
        f"Checked: the base holds {result.source} times its gains in the rows read, one layer of each of {check.norms} "
        "norms."
    )
    if check.update is not None:
        whole = "" if check.layer is None else f", with the layer's own weights {check.layer:.2g}"
        lines.append(
            f"Checked: {check.modules} modules on random activations in float64; the update is off by "
            f"{check.update:.2g} eps at most{whole} (one rounding is 0.3)."
        )
    if result.flushed:
        flushed = sum(result.flushed.values())
        lines.append(f"{flushed} products in {len(result.flushed)} tensors were too small for their dtype, now zero.")
    lines += left_out_lines(result.left_out)
    lines += [f"Note: {note}." for note in result.notes]
    return [*lines, f"Wrote {size(result.bytes_written)}:", str(result.output)]
