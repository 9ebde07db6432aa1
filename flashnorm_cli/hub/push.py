"""Publish a folded checkpoint: check it, make its card, and put both into a repository in one commit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from flashnorm_cli.checkpoint.hub_errors import first_line, hub_errors, with_retry
from flashnorm_cli.checkpoint.hub_ids import repository_id
from flashnorm_cli.checkpoint.leftover import refuse_unfinished
from flashnorm_cli.checkpoint.model import RECORD, Checkpoint, Progress, Source
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.checkpoint.progress import with_notebook_bar
from flashnorm_cli.errors import FlashNormError, UsageError
from flashnorm_cli.hub.base import base_info, find_base
from flashnorm_cli.hub.contents import Fold, file_hashes, make_contents
from flashnorm_cli.hub.origin import UNKNOWN, origin_of
from flashnorm_cli.hub.progress import quiet_hub
from flashnorm_cli.hub.publish import MESSAGE, Options, Published, PushResult, deletions, publish, push_result
from flashnorm_cli.hub.published import Base
from flashnorm_cli.hub.repository import Repository, State
from flashnorm_cli.hub.standing import NOT_RUN, Standing, standing_of
from flashnorm_cli.record.read import FoldRecord

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

NO_TOKEN = (
    "there is no Hub token: log in with `hf auth login`, or pass `token` (make one that may write at "
    "https://huggingface.co/settings/tokens)"
)
NO_BASE = (
    'its source is a local folder, so the card names no base model; `base_model="<Hub id>"` names it if it is on the '
    "Hub, too"
)
NO_NAME = (
    "its source was downloaded from the Hub (commit {commit}), but none of its files names a repository that holds it, "
    'so the card names no base model; `base_model="<Hub id>"` names it'
)
NOT_ASKED = "not logged in, so the Hub was not asked: neither the repository nor the source is known"


@with_notebook_bar
def push_to_hub(
    folded: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    unverified: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    workers: int | None = None,
    on_progress: Progress | None = None,
) -> PushResult:
    """Publish a folded checkpoint on the Hub, with its model card, its record and the report of its verification.

    Args:
        folded: the folder that `fold` has written and `verify` has checked.
        repo_id: the repository, `user/name`; it is created if it does not exist.
        base_model: the source's id on the Hub, for a checkpoint that was folded from a local folder whose files do not
            name it. Its files there have to be the ones that were folded.
        private, revision, create_pr, commit_message, token: as in huggingface_hub's `upload_folder` and `create_repo`.
        unverified: publish without a valid verification whose verdict is "equivalent"; the card says so.
        overwrite: replace what the repository holds, whatever it is.
        dry_run: check everything and make the card, but change nothing on the Hub.
        workers: threads that hash files; by default 4.
        on_progress: called with (bytes done, bytes in all, what is going on).
    Returns:
        What the repository holds now, or would (`dry_run`).
    Raises:
        UsageError: the call contradicts itself or the file system.
        FlashNormError: the checkpoint is not fit to be published, or the Hub said no; the message says what to do.
    """
    report = on_progress or (lambda done, total, what: None)
    repo_id, base_model = repository_id(repo_id), repository_id(base_model) if base_model else None
    check_call(folded, repo_id, revision, create_pr, workers)
    report(0, 0, "Reading headers")
    checkpoint = _open_folded(Path(str(folded)).expanduser(), str(folded))
    written = FoldRecord.read(checkpoint.folder / RECORD)
    written.plan, written.source_sizes  # noqa: B018  (both raise here, before the long work)
    record = written.content
    hashes = file_hashes(checkpoint, workers or 4, report)
    standing = standing_of(record, hashes)
    if not standing.verified and not unverified:
        raise FlashNormError(_refusal(str(folded), standing))
    fold = Fold(checkpoint, record, str(folded), standing)
    options = Options(private, create_pr, commit_message or MESSAGE, overwrite)
    with quiet_hub(), hub_errors(repo_id, writing=True):
        from huggingface_hub import HfApi, get_token

        online = bool(token or get_token())
        if not online and not dry_run:
            raise FlashNormError(NO_TOKEN)
        api = HfApi(token=token)
        report(0, 0, "Asking the Hub")
        repository = Repository(api, full_name(api, repo_id) if online else repo_id, revision or "main")
        state = repository.state() if online else State()
        held = repository.read_json(RECORD, state)
        origin = origin_of(checkpoint.folder, record, checkpoint.config) if online else UNKNOWN
        base = find_base(api, fold.name, record, standing.has_proof, base_model if online else None, held, origin)
        info = base_info(api, base) if online else None
        if online:
            check_private(info, options)
        contents = make_contents(fold, repository.repo_id, base, info, hashes)
        notes = notes_on(base, info, origin.commit)
        notes = notes if online else (*notes[: base is None], NOT_ASKED)
        deleted = deletions(repository, state, held, contents, overwrite) if state.exists else ()
        if dry_run:
            done = Published(repository, state, state.lacks(contents.uploads), deleted)
        else:
            done = publish(repository, state, contents, deleted, options, report, folder=fold.name)
    return push_result(contents, done, private, notes)


def _refusal(folded: str, standing: Standing) -> str:
    if standing.verdict == NOT_RUN:
        return (
            f"{folded}: {standing.why}, so nothing shows yet that it computes what its source does. Run them: "
            f"`verify({folded!r})` (or publish it with `unverified=True`: the card says what was not run)"
        )
    return (
        f"{folded}: {standing.why}. Verify it first: `verify({folded!r})` (or publish it with "
        "`unverified=True`, which its card will say)"
    )


def full_name(api: HfApi, repo_id: str) -> str:
    """The repository's id with its user, who has to be known to the Hub."""
    user = with_retry(api.whoami)
    return repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"


def check_private(info: ModelInfo | None, options: Options) -> None:
    """Raise FlashNormError where a private source would be published without a word about it."""
    if info is not None and info.private and options.private is None and not options.create_pr:
        raise FlashNormError(f"the source {info.id} is private; say `private=True`, or `private=False` to publish it")


def notes_on(base: Base | None, info: ModelInfo | None, downloaded: str | None = None) -> tuple[str, ...]:
    """What the user has to know of the source, as far as the Hub was asked about it.

    `downloaded` is the commit that a local source came from, where its folder notes one.
    """
    if base is None:
        return (NO_BASE if downloaded is None else NO_NAME.format(commit=downloaded[:12]),)
    return () if info else (f"the source {base.repo_id} is not on the Hub any more, or not for this token",)


# ---- before the Hub is asked -----------------------------------------------------------------------------------------


def check_call(folded: str | Path, repo_id: str, revision: str | None, create_pr: bool, workers: int | None) -> None:
    """Raise UsageError where the call contradicts itself, or names what no repository can be called."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if not Path(str(folded)).expanduser().exists() and Path(repo_id).expanduser().is_dir():
        raise UsageError(f"{repo_id}: is a folder; the folder comes first, then the repository: user/name")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        why = first_line(" ".join(str(error).split()).split(". Use `repo_type`")[0])
        raise UsageError(f"{repo_id}: the Hub does not take this name; it looks like user/name ({why})") from None
    if create_pr and revision not in (None, "main"):
        raise UsageError("`create_pr` and `revision` exclude each other: a pull request is made against main")
    if workers is not None and workers < 1:
        raise UsageError(f"`workers` has to be at least 1, not {workers}")


def _open_folded(folder: Path, name: str) -> Checkpoint:
    """A finished fold, as its files say it is."""
    absolute = folder.absolute()
    inside = next((path for path in (absolute, *absolute.parents) if re.fullmatch(r"\..+\.partial", path.name)), None)
    if inside is not None:
        wanted = inside.name.removeprefix(".").removesuffix(".partial")
        raise FlashNormError(
            f"{wanted}: its fold is not finished; run the same `flashnorm fold` again, and it goes on where it stopped"
        )
    refuse_unfinished(folder)
    if folder.is_file():
        raise UsageError(f"{name}: is a file; name the folder that `flashnorm fold` has written")
    if not folder.is_dir():
        raise UsageError(f"{name}: no such folder; name one that `flashnorm fold` has written")
    checkpoint = open_checkpoint(Source(str(folder)))
    if not (folder / RECORD).exists():
        raise FlashNormError(
            f"{name}: has no {RECORD}: it is not a fold by flashnorm. Fold the model first: `fold({name!r})`; a fold "
            f'by another tool gets a record with: `verify({name!r}, source="<its source>", adopt=True)`'
        )
    return checkpoint
