"""`flashnorm push-to-hub`: publish a folded checkpoint with its proof."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashnorm_cli.cli import options
from flashnorm_cli.cli.output import Output
from flashnorm_cli.cli.tables import aligned
from flashnorm_cli.plan.wording import size

if TYPE_CHECKING:
    from flashnorm_cli.hub.publish import PushResult


def push_to_hub(
    folded: Annotated[Path, typer.Argument(help="The folder that `flashnorm fold` has written.", show_default=False)],
    repo_id: Annotated[
        str, typer.Argument(help="The repository on the Hub, user/name; created if needed.", show_default=False)
    ],
    base_model: Annotated[
        str | None,
        typer.Option(help="The source's id on the Hub, if it was folded from a local copy.", show_default=False),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option("--private/--no-private", help="Create a private repository; ignored where it exists already."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The branch to commit to; created if needed.")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of committing to main.")
    ] = False,
    commit_message: Annotated[
        str | None, typer.Option(help="The first line of the commit.", show_default=False)
    ] = None,
    token: options.TokenOpt = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, list the files and show the card; change nothing.")
    ] = False,
    unverified: Annotated[
        bool,
        typer.Option(
            "--unverified", help="Publish although no valid verification says `equivalent`; the card will say so."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace whatever the repository holds. Its history keeps it.")
    ] = False,
    json: options.JsonOpt = False,
    quiet: options.QuietOpt = False,
    debug: options.DebugOpt = False,
) -> None:
    """Publish a folded checkpoint on the Hugging Face Hub, with its proof.

    The checkpoint has to have passed `flashnorm verify`, and be the same since. Its model card is made from the
    source's: licence, gating, language and tags are kept; what was folded, how it was verified and how to load it are
    added. One commit at the end makes everything visible; run again after an interruption, it goes on where it stopped.
    """
    out = Output(json, quiet)
    with out.progress() as report:
        report(0, 0, "Starting")
        from flashnorm_cli.checkpoint.leftover import leftovers
        from flashnorm_cli.hub.push import push_to_hub as run

        result = run(
            folded,
            repo_id,
            base_model=base_model,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            token=token,
            unverified=unverified,
            overwrite=overwrite,
            dry_run=dry_run,
            on_progress=report,
        )
    out.data({"folded": str(folded), **result.to_json()})
    out.text(*(_plan_of(result) if result.dry_run else done(result)))
    if result.dry_run:
        out.text(result.card.rstrip(), verbatim=True)
    out.remark(*leftovers(folded, str(base_model or folded)))


def _plan_of(result: PushResult) -> list[str]:
    """For --dry-run: files, what becomes of the repository, the card."""
    rows = [(size(upload.size), upload.path) for upload in result.sent]
    rows += [("deleted", path) for path in result.deleted]
    lines = [f"Would upload to {result.url}{_branch(result)}:", "", *aligned(rows, right=[0], least=[9])]
    if result.unchanged:
        lines.append(f"{len(result.unchanged)} more files are there already")
    return [*lines, "", *_page(result), "", "The card:", ""]


def done(result: PushResult) -> list[str]:
    if result.sent or result.deleted:
        total = sum(upload.size for upload in result.sent)
        lines = [f"Published {len(result.sent)} files, {size(total)}, in one commit{_branch(result)}."]
    else:
        lines = []
    return [*lines, *_page(result), "", result.url]


def _branch(result: PushResult) -> str:
    if result.pull_request:
        return " of a pull request"
    return "" if result.revision == "main" else f" on branch {result.revision}"


def _page(result: PushResult) -> list[str]:
    """What somebody sees who opens the page."""
    if result.private:
        who = "only you and your organization"
    elif result.gated:
        who = f"everyone who accepts the terms (gated: {result.gated})"
    else:
        who = "everyone"
    proof = {
        "equivalent": "a verification that passed, with its report",
        "as planned, not run": "files as planned, models NOT RUN, in the card's first lines",
    }.get(result.verdict, "NOT VERIFIED, in the card's first lines")
    lines = [
        "What a reader of the page sees:",
        f"  files      {who}",
        f"  licence    {result.licence}",
        f"  base model {result.base_model or 'none'}",
        f"  proof      {proof}",
    ]
    if result.left_out:
        lines += [f"  not there  {each.name} ({each.reason})" for each in result.left_out]
    return [*lines, *(f"Note: {note}." for note in result.notes)]
