"""`flashnorm plan`: what a fold would do, from the config and the headers alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from flashnorm_cli.checkpoint.hub_ids import hub_id
from flashnorm_cli.cli import options
from flashnorm_cli.cli.output import Output
from flashnorm_cli.cli.tables import aligned
from flashnorm_cli.plan import wording
from flashnorm_cli.plan.wording import size

if TYPE_CHECKING:
    from flashnorm_cli.checkpoint.model import LeftOut
    from flashnorm_cli.plan.model import Plan


# Of files in one line; --json and the record name all.
MOST_NAMES = 10


def plan(
    model: options.ModelArg,
    final_norm: options.FinalNormOpt = "auto",
    revision: options.RevisionOpt = None,
    token: options.TokenOpt = None,
    cache_dir: options.CacheDirOpt = None,
    local_files_only: options.LocalFilesOnlyOpt = False,
    trust_remote_code: options.TrustRemoteCodeOpt = False,
    follow_links: options.FollowLinksOpt = False,
    json: options.JsonOpt = False,
    quiet: options.QuietOpt = False,
    debug: options.DebugOpt = False,
) -> None:
    """Show which norms a fold would fold, which it keeps, and why. Reads headers, never weights."""
    output, (model, revision) = Output(json, quiet), hub_id(model, revision)
    with output.progress() as report:
        report(0, 0, "Reading headers")
        from flashnorm_cli.checkpoint.leftover import leftovers, refuse_unfinished
        from flashnorm_cli.checkpoint.model import Source, refuse_adapter
        from flashnorm_cli.checkpoint.open import open_checkpoint
        from flashnorm_cli.plan.planner import plan_checkpoint

        source = Source(model, revision, token, cache_dir, local_files_only, follow_links)
        refuse_unfinished(Path(model))
        checkpoint = open_checkpoint(source, weights=False)
        refuse_adapter(checkpoint)
        report(0, 0, "Tracing the model")
        traced = plan_checkpoint(checkpoint, final_norm, trust_remote_code)
        result, stream = traced.plan, None
        if json:
            from flashnorm_cli.plan.rotation import stream_json

            stream = stream_json(checkpoint, traced)
    left_out = [asdict(each) for each in checkpoint.left_out]
    output.data({**result.summary(), "left_out": left_out, "plan": result.to_json(), "stream": stream})
    output.text(f"{result.architecture} ({model}), {size(result.bytes_total)}", "")
    output.text(*norm_lines(result), "", *wording.sentences(result), *left_out_lines(checkpoint.left_out))
    output.remark(*leftovers(None, model))


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
