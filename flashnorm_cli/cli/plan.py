"""`flashnorm plan`: what a fold would do, from the config and the headers alone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from flashnorm_cli.cli import options
from flashnorm_cli.cli.output import Output, size

if TYPE_CHECKING:
    from rich.table import Table

    from flashnorm_cli.plan import Norm, Plan


def plan(
    model: options.ModelArg,
    final_norm: options.FinalNormOpt = "auto",
    revision: options.RevisionOpt = None,
    token: options.TokenOpt = None,
    cache_dir: options.CacheDirOpt = None,
    local_files_only: options.LocalFilesOnlyOpt = False,
    trust_remote_code: options.TrustRemoteCodeOpt = False,
    json: options.JsonOpt = False,
    quiet: options.QuietOpt = False,
    debug: options.DebugOpt = False,
) -> None:
    """Show which norms a fold would fold, which it keeps, and why. Reads headers, never weights."""
    output = Output(json, quiet)
    with output.progress() as report:
        report(0, 0, "Reading headers")
        from flashnorm_cli.checkpoint import Source, open_checkpoint
        from flashnorm_cli.plan import make_plan

        source = Source(model, revision, token, cache_dir, local_files_only)
        checkpoint = open_checkpoint(source, weights=False)
        report(0, 0, "Tracing the model")
        result = make_plan(checkpoint, final_norm, trust_remote_code)
    output.data(result.to_json())
    output.text(f"{result.architecture} ({model}), {size(result.bytes_total)}", "", plan_table(result))
    output.text("", *plan_summary(result))


def plan_table(plan: Plan) -> Table:
    """One row for each kind of norm: its name with `*` for numbers, how many, what reads it, what happens to it."""
    from rich.table import Table

    from flashnorm_cli.plan import pattern_of

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("norm", overflow="fold")
    table.add_column("count", justify="right")
    table.add_column("read by", overflow="fold")
    table.add_column("gain", overflow="fold")
    rows: dict[tuple[str, str], list[Norm]] = {}
    for norm in plan.norms:
        gain = ("1 + w" if norm.offset == 1 else f"w + {norm.offset:g}") if norm.offset else "w"
        reason = re.sub(r"\.\d+\b", ".*", norm.reason or "")
        verdict = f"{gain}, kept: {reason}" if reason else f"{gain}, folded"
        rows.setdefault((pattern_of(norm.tensor).removesuffix(".weight"), verdict), []).append(norm)
    for (pattern, verdict), norms in rows.items():
        readers = dict.fromkeys(pattern_of(r) for norm in norms for r in norm.readers)
        short = dict.fromkeys(r.removesuffix(".weight").rsplit(".", 1)[-1] for r in readers)
        table.add_row(pattern, str(len(norms)), ", ".join(short), verdict)
    return table


def plan_summary(plan: Plan) -> list[str]:
    """The sentences below the table."""
    from flashnorm_cli.plan import grouped

    head = {
        "folded": "the final norm is folded into the output head",
        "untied": "the final norm is folded into an output head of its own (tie_word_embeddings becomes false)",
        "kept": "the final norm keeps its weight",
        "none": "no norm feeds an output head",
    }[plan.lm_head]
    lines = [
        f"{len(plan.folded)} of {len(plan.norms)} norms are folded into {len(plan.readers)} tensors; {head}.",
        f"{size(plan.bytes_changed)} change, {size(plan.bytes_added)} are added; "
        f"flashnorm_folded: {str(plan.folded_flag).lower()}.",
    ]
    if plan.not_traced:
        names = ", ".join(p for p, _ in grouped(plan.not_traced))
        lines.append(f"Not reached by a text forward, left alone: {names}")
    if plan.unread:
        lines.append(f"On disk but not read by the model, left alone: {', '.join(p for p, _ in grouped(plan.unread))}")
    return lines + [f"Note: {note}." for note in plan.notes]
