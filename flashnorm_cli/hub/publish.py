"""Put contents into a repository: upload what it does not have, and commit once.

huggingface_hub's `upload_folder` commits in several steps when files are many or uploads are slow, and each step is
visible. Here shards are uploaded one after the other (`preupload_lfs_files`), which shows nothing, and a single
`create_commit` puts everything in place. Run again after an interruption, what the Hub has already is found by its
hashes and not sent a second time.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from flashnorm_cli.checkpoint.hub_errors import RETRY_STATUS, WAITS, first_line, status_of, wait_after, with_retry
from flashnorm_cli.checkpoint.model import LeftOut, Progress
from flashnorm_cli.checkpoint.progress import shard_of
from flashnorm_cli.display import Shown
from flashnorm_cli.errors import FlashNormError
from flashnorm_cli.hub.card import REPORT
from flashnorm_cli.hub.contents import ATTRIBUTES, README, Contents
from flashnorm_cli.hub.published import same_fold
from flashnorm_cli.hub.repository import Repository, State, Upload, lacking
from flashnorm_cli.hub.standing import SHOWN_FILES

MESSAGE = "Upload folded checkpoint"


@dataclass(frozen=True)
class Options:
    """How to publish, as in huggingface_hub; `overwrite` replaces what the repository holds, whatever it is."""

    private: bool | None = None
    create_pr: bool = False
    message: str = MESSAGE
    overwrite: bool = False


@dataclass(frozen=True)
class Published:
    """What became of it: the repository as it was written to, and the commit or pull request that holds the contents.

    `missing` are the uploads that the repository did not have, `deleted` the files that were removed. `commit` is None
    where nothing has been written.
    """

    repository: Repository
    state: State
    missing: tuple[Upload, ...]
    deleted: tuple[str, ...] = ()
    commit: str | None = None
    pull_request: str | None = None
    created: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class PushResult(Shown):
    """What was published, or would be (`dry_run`).

    `sent` are the files that the Hub did not have, `unchanged` those that it had, `deleted` those that were removed
    from the repository. `commit` is the one that holds them (None: `dry_run`); `pull_request` is its address. `gated`
    is the repository's gate ("auto", "manual" or False). `verdict` is "equivalent", "as planned, not run" or "not
    verified"; `verified` whether it is the first.
    """

    repo_id: str
    url: str
    revision: str
    commit: str | None
    pull_request: str | None
    dry_run: bool
    created: bool
    private: bool
    gated: str | bool
    verified: bool
    verdict: str
    base_model: str | None
    licence: str
    sent: tuple[Upload, ...]
    unchanged: tuple[Upload, ...]
    deleted: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    card: str
    notes: tuple[str, ...]

    def _facts(self) -> dict[str, Any]:
        fields = {"repo_id": self.repo_id, "url": self.url, "commit": self.commit, "verdict": self.verdict}
        return {**fields, "sent": len(self.sent), "unchanged": len(self.unchanged), "dry_run": self.dry_run}

    def published(self) -> dict[str, Any]:
        """As plain JSON values: the repository, what was committed to it, and what a reader of the page sees."""
        names = "repo_id url revision commit pull_request created private gated base_model licence".split()
        return {**{name: getattr(self, name) for name in names}, "deleted": list(self.deleted)}

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values: `published`, and every file."""
        return {
            "published": self.published(),
            "dry_run": self.dry_run,
            "verdict": self.verdict,
            "sent": [upload.to_json() for upload in self.sent],
            "unchanged": [upload.to_json() for upload in self.unchanged],
            "left_out": [asdict(each) for each in self.left_out],
            "card": self.card,
            "notes": list(self.notes),
        }


def push_result(contents: Contents, done: Published, private: bool | None, notes: tuple[str, ...]) -> PushResult:
    """The whole story, for people and programs."""
    state = done.state
    return PushResult(
        repo_id=done.repository.repo_id,
        url=done.pull_request or done.repository.url,
        revision=done.repository.revision,
        commit=done.commit,
        pull_request=done.pull_request,
        dry_run=done.commit is None,
        created=done.created or not state.exists,
        private=state.private if state.exists else bool(private),
        gated=state.gated if state.exists else False if private else contents.gate,
        verified=contents.standing.verified,
        verdict=contents.standing.verdict,
        base_model=contents.base.repo_id if contents.base else None,
        licence=contents.licence,
        sent=done.missing,
        unchanged=tuple(upload for upload in contents.uploads if upload not in done.missing),
        deleted=done.deleted,
        left_out=contents.left_out,
        card=contents.card,
        notes=(*notes, *contents.notes, *done.notes),
    )


def deletions(
    repository: Repository,
    state: State,
    held: Any,
    contents: Contents,
    overwrite: bool,
    will_be_proven: bool = False,
) -> tuple[str, ...]:
    """What has to go from the repository. It may be empty, or hold this fold; `overwrite` replaces anything else.

    `held` is the repository's flashnorm.json; `will_be_proven` says that a verification is still to come. Raises
    FlashNormError where something would be lost unasked.
    """
    theirs = set(state.files) - {ATTRIBUTES}
    if not theirs or not state.lacks(contents.uploads):
        return ()
    where = repository.repo_id
    where += "" if state.branch else " at main, where the new branch would start,"
    if not same_fold(contents.record, held):
        if not overwrite:
            shown = ", ".join(sorted(theirs)[:SHOWN_FILES]) + (", ..." if len(theirs) > SHOWN_FILES else "")
            what = "another fold" if held is not None else "something else"
            raise FlashNormError(f"{where} holds {what} ({shown}); `overwrite=True` replaces it")
        return tuple(sorted(theirs - {upload.path for upload in contents.uploads}))
    deleted: tuple[str, ...] = ()
    if not (contents.standing.has_proof or will_be_proven) and isinstance(held.get("verify"), dict):
        if not overwrite:
            raise FlashNormError(
                f"{where} holds this fold with its verification; `overwrite=True` replaces it by an unverified one"
            )
        deleted = tuple(theirs & {REPORT})
    readme = state.files.get(README)
    card = next(upload for upload in contents.uploads if upload.path == README)
    if readme not in (None, *card.ids) and not overwrite:
        now = hashlib.sha256(repository.read(README, state.head)).hexdigest()
        if now != held.get("card_sha256"):
            raise FlashNormError(
                f"{where}: README.md was edited on the Hub since it was pushed; "
                "`overwrite=True` replaces it with a new card"
            )
    return deleted


def publish(
    repository: Repository,
    state: State,
    contents: Contents,
    deleted: tuple[str, ...],
    options: Options,
    report: Progress,
    stored: Mapping[str, Any] | None = None,
    folder: str = "",
) -> Published:
    """Upload and commit; `stored` are operations for contents that the Hub has already, though no commit names them.

    `state` is the repository as it was found, and the commit is made on that. `folder` names the checkpoint in
    messages. Raises FlashNormError where somebody else commits meanwhile, or the Hub does not take the card.
    """
    missing = state.lacks(contents.uploads)
    if not missing and not deleted:
        note = "the repository holds these very files already; nothing was committed"
        return Published(repository, state, (), commit=state.head, notes=(note,))
    if options.create_pr and state.exists and (found := _open_pull_request(repository, contents)):
        note = "a pull request with these very files is open already"
        return Published(repository, state, missing, deleted, *found, notes=(note,))
    report(0, 0, "Checking the card")
    check_card(repository, contents.card, folder)
    opened = create(repository, options.private, contents.gate) if not state.exists else None
    at = opened or Published(repository, state, ())
    notes = at.notes
    if state.exists and contents.gate and not state.gated:
        notes += ("the source is gated, and this repository is not: see its settings on the Hub",)
    if not at.state.branch and at.state.exists:
        branch = repository.revision
        with_retry(lambda: at.repository.api.create_branch(at.repository.repo_id, branch=branch, exist_ok=True))
    plan = _Commit(at.repository, at.state, contents, missing, deleted, options)
    commit, pull_request = _commit(plan, _send(plan, report, stored or {}), report)
    return Published(at.repository, at.state, missing, deleted, commit, pull_request, opened is not None, notes)


def check_card(repository: Repository, card: str, folder: str) -> None:
    """Before gigabytes are uploaded: the Hub takes the card."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    def ask() -> Any:
        # Not ModelCard.validate: in huggingface_hub 1.33 it asks huggingface.co whatever HF_ENDPOINT says.
        answer = get_session().post(
            f"{repository.api.endpoint}/api/validate-yaml",
            json={"content": card, "repoType": "model"},
            headers=build_hf_headers(token=repository.api.token),
        )
        if answer.status_code != 400:
            hf_raise_for_status(answer)
        return answer

    answer = with_retry(ask)
    if answer.status_code == 400:
        try:
            content = answer.json()
        except ValueError:
            content = {}
        errors = content.get("errors") if isinstance(content, dict) else None
        words = [str(e.get("message")) for e in errors if isinstance(e, dict)] if isinstance(errors, list) else []
        raise FlashNormError(
            f"the Hub does not take the card's metadata: {first_line('; '.join(words) or answer.text)}; mend them in "
            f"{folder}/{README}"
        )


def create(repository: Repository, private: bool | None, gate: str | bool) -> Published:
    """Make the repository, with the source's gate unless it is private; nothing is in it yet."""
    api = repository.api
    made = with_retry(lambda: api.create_repo(repository.repo_id, private=private, exist_ok=True))
    new = replace(repository, repo_id=made.repo_id)
    state = new.state()
    if gate and not state.private:
        wanted: Any = gate
        with_retry(lambda: api.update_repo_settings(new.repo_id, gated=wanted))
        return Published(new, replace(state, gated=gate), (), created=True)
    notes = ("the source is gated: gate this repository, too, before you make it public",) if gate else ()
    return Published(new, state, (), created=True, notes=notes)


# ---- one commit ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Commit:
    """What is to be committed, and onto what."""

    repository: Repository
    state: State
    contents: Contents
    missing: tuple[Upload, ...]
    deleted: tuple[str, ...]
    options: Options = field(default_factory=Options)


def _send(plan: _Commit, report: Progress, stored: Mapping[str, Any]) -> list[Any]:
    """Upload the contents of large files, one after the other; small ones travel in the commit."""
    from huggingface_hub import CommitOperationAdd

    from flashnorm_cli.hub.progress import watched

    operations = {
        upload.path: stored.get(upload.path) or CommitOperationAdd(upload.path, _as_hub_content(upload.content))
        for upload in plan.missing
    }
    to_send = [upload for upload in plan.missing if upload.path not in stored]
    small = [upload for upload in to_send if upload.path not in plan.contents.shards]
    groups = [[upload] for upload in to_send if upload.path in plan.contents.shards] + ([small] if small else [])
    total, done = sum(upload.size for upload in to_send), 0
    for i, group in enumerate(groups):
        first = group[0]
        shown = "Uploading other files" if group is small else shard_of(i, len(to_send) - len(small), "Uploading")

        def so_far(n: int, start: int = done, shown: str = shown) -> None:
            report(start + n, total, shown)

        with watched(first.content if isinstance(first.content, Path) else None, first.size, so_far):
            plan.repository.api.preupload_lfs_files(
                plan.repository.repo_id,
                [operations[upload.path] for upload in group],
                revision=plan.repository.revision,
                create_pr=plan.options.create_pr,
                free_memory=False,
            )
        for upload in group:
            if operations[upload.path].upload_info.sha256.hex() != upload.sha256:
                raise FlashNormError(f"{upload.path}: changed while it was uploaded; nothing was published")
            done += upload.size
        report(done, total, shown)
    return list(operations.values())


def _as_hub_content(content: Path | bytes) -> str | bytes:
    """As huggingface_hub takes it."""
    return content if isinstance(content, bytes) else str(content)


def _commit(plan: _Commit, additions: list[Any], report: Progress) -> tuple[str, str | None]:
    """One commit, and its pull request; if its answer is lost, whether it took effect is seen from the repository."""
    from huggingface_hub import CommitOperationDelete

    repository = plan.repository
    operations = [*additions, *(CommitOperationDelete(path) for path in plan.deleted)]
    report(0, 0, "Committing")
    for wait in (*WAITS, None):
        try:
            commit = repository.api.create_commit(
                repository.repo_id,
                operations,
                commit_message=plan.options.message,
                revision=repository.revision,
                create_pr=plan.options.create_pr,
                parent_commit=None if plan.options.create_pr else plan.state.head,
            )
            break
        except Exception as error:  # the Hub's or the network's; after a lost answer the repository is asked
            status = status_of(error)
            if status is not None and status not in (*RETRY_STATUS, 412):
                raise
            if (found := _took_effect(plan)) is not None:
                return found
            if status == 412:
                raise FlashNormError(
                    f"{repository.repo_id}: somebody else committed to it meanwhile; nothing was published. Look at "
                    "it, and run the same command again"
                ) from None
            if wait is None:
                raise
            time.sleep(wait_after(error, wait))
    if lacking(repository.listed(commit.oid), plan.contents.uploads):
        raise FlashNormError(
            f"{repository.repo_id}: the Hub does not show what was committed; look at {commit.commit_url}"
        )
    return commit.oid, commit.pr_url


def _took_effect(plan: _Commit) -> tuple[str, str | None] | None:
    """The head of the branch or of our pull request, if it holds what was to be committed."""
    try:
        if plan.options.create_pr:
            return _open_pull_request(plan.repository, plan.contents)
        now = plan.repository.state()
    except Exception as error:  # the Hub cannot be asked, which is why its answer was lost
        if status_of(error) is None and not isinstance(error, OSError):
            raise
        return None
    there = now.branch and not set(plan.deleted) & set(now.files) and not now.lacks(plan.contents.uploads)
    return (now.head, None) if there and now.head else None


def _open_pull_request(repository: Repository, contents: Contents) -> tuple[str, str | None] | None:
    """(commit, address) of an open pull request that proposes these very files: a second one would help nobody."""
    api, repo_id = repository.api, repository.repo_id
    refs = with_retry(lambda: api.list_repo_refs(repo_id, include_pull_requests=True))
    newest = sorted(refs.pull_requests or [], key=lambda ref: int(ref.ref.rsplit("/", 1)[-1]), reverse=True)
    for ref in newest[:5]:
        if lacking(repository.listed(ref.ref), contents.uploads):
            continue
        details = api.get_discussion_details(repo_id, int(ref.ref.rsplit("/", 1)[-1]))
        if details.status in ("open", "draft"):
            return ref.target_commit, details.url
    return None
