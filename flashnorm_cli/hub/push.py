"""Publish a folded checkpoint: check it, make its card, upload what the Hub does not have, and commit once.

huggingface_hub's `upload_folder` commits in several steps when files are many or uploads are slow, and each step is
visible. Here shards are uploaded one after the other (`preupload_lfs_files`), which shows nothing, and a single
`create_commit` puts everything in place. Run again after an interruption, what the Hub has already is found by its
hashes and not sent a second time.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import threading
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashnorm_cli.checkpoint.hub_errors import RETRY_STATUS, WAITS, hub_errors, status_of, wait_after, with_retry
from flashnorm_cli.checkpoint.model import CONFIG, INDEX, RECORD, Checkpoint, Progress, Source, read_json
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.checkpoint.places import local_paths, without_places
from flashnorm_cli.errors import FlashNormError, UsageError
from flashnorm_cli.hub.card import REPORT, CardFacts, build_card
from flashnorm_cli.hub.licence import check_licence, gate_of, terms
from flashnorm_cli.hub.progress import quiet_hub, watched
from flashnorm_cli.hub.published import Base, dump, published_record, same_fold
from flashnorm_cli.hub.repository import SHOWN_FILES, Upload, _Remote
from flashnorm_cli.hub.source_card import read_card
from flashnorm_cli.proof.files import CLAIMS, changed_files, is_paper
from flashnorm_cli.proof.result import Verification
from flashnorm_cli.report.page import render

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

README, ATTRIBUTES = "README.md", ".gitattributes"
LARGEST_JSON = 1 << 20  # bytes; larger ones are vocabularies
MESSAGE = "Upload folded checkpoint"
NO_TOKEN = (
    "there is no Hub token: log in with `hf auth login`, or pass --token (make one that may write at "
    "https://huggingface.co/settings/tokens)"
)


@dataclass(frozen=True)
class PushResult:
    """What was published, or would be (`dry_run`).

    `sent` are the files that the Hub did not have, `unchanged` those that it had, `deleted` those that were removed
    from the repository. `commit` is the one that holds them (None: `dry_run`); `pull_request` is its address. `gated`
    is the repository's gate ("auto", "manual" or False).
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
    base_model: str | None
    licence: str
    sent: tuple[Upload, ...]
    unchanged: tuple[Upload, ...]
    deleted: tuple[str, ...]
    left_out: tuple[str, ...]
    card: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        plain = {name: value for name, value in self.__dict__.items() if name not in ("sent", "unchanged")}
        files = {
            what: [{"path": upload.path, "size": upload.size, "sha256": upload.sha256} for upload in uploads]
            for what, uploads in (("sent", self.sent), ("unchanged", self.unchanged))
        }
        return {**plain, **files, **{name: list(plain[name]) for name in ("deleted", "left_out", "notes")}}


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
        base_model: the source's id on the Hub, for a checkpoint that was folded from a local folder. Its files there
            have to be the ones that were folded.
        private, revision, create_pr, commit_message, token: as in huggingface_hub's `upload_folder` and `create_repo`.
        unverified: publish without a passing, valid verification; the card says so.
        overwrite: replace what the repository holds, whatever it is.
        dry_run: check everything and make the card, but change nothing on the Hub.
        workers: threads that hash files; by default 4.
        on_progress: called with (bytes done, bytes in all, what is going on).
    Raises:
        UsageError: the call contradicts itself or the file system.
        FlashNormError: the checkpoint is not fit to be published, or the Hub said no; the message says what to do.
    """
    report = on_progress or (lambda done, total, what: None)
    check_call(folded, repo_id, revision, create_pr, workers)
    report(0, 0, "Reading headers")
    checkpoint = _open_folded(Path(str(folded)).expanduser(), str(folded))
    record = read_json(checkpoint.folder / RECORD)
    hashes = file_hashes(checkpoint, workers or 4, report)
    doubt = _why_unverified(record, hashes, str(folded))
    if doubt and not unverified:
        raise FlashNormError(
            f"{folded}: {doubt}. Verify it first: flashnorm verify {shlex.quote(str(folded))} (or publish it with "
            "--unverified, which its card will say)"
        )
    with quiet_hub(), hub_errors(repo_id, writing=True):
        from huggingface_hub import HfApi, get_token

        if not (token or get_token()) and not dry_run:
            raise FlashNormError(NO_TOKEN)
        api = HfApi(token=token)
        report(0, 0, "Asking the Hub")
        push = Push(api, checkpoint, record, str(folded), repo_id, report, notes=[])
        push.private, push.revision, push.create_pr = private, revision or "main", create_pr
        push.message, push.overwrite, push.doubt = commit_message or MESSAGE, overwrite, doubt
        push.prepare(base_model, hashes, online=bool(token or get_token()))
        return push.result(None) if dry_run else push.run()


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
        why = " ".join(str(error).split()).split(". Use `repo_type`")[0]
        raise UsageError(f"{repo_id}: the Hub does not take this name; it looks like user/name ({why})") from None
    if create_pr and revision not in (None, "main"):
        raise UsageError("--create-pr and --revision exclude each other: a pull request is made against main")
    if workers is not None and workers < 1:
        raise UsageError(f"workers has to be at least 1, not {workers}")


def _open_folded(folder: Path, name: str) -> Checkpoint:
    """A finished fold, as its files say it is."""
    absolute = folder.absolute()
    inside = next((path for path in (absolute, *absolute.parents) if re.fullmatch(r"\..+\.partial", path.name)), None)
    partial = absolute.with_name(f".{absolute.name}.partial")
    if inside is not None or partial.exists():
        wanted = name if inside is None else inside.name.removeprefix(".").removesuffix(".partial")
        raise FlashNormError(
            f"{wanted}: its fold is not finished; run the same `flashnorm fold` again, and it goes on where it stopped"
            + ("" if inside else f" (or remove {partial.name} beside it)")
        )
    if folder.is_file():
        raise UsageError(f"{name}: is a file; name the folder that `flashnorm fold` has written")
    if not folder.is_dir():
        raise UsageError(f"{name}: no such folder; name one that `flashnorm fold` has written")
    checkpoint = open_checkpoint(Source(str(folder)))
    if not (folder / RECORD).exists():
        raise FlashNormError(
            f"{name}: has no {RECORD}: it is no fold of flashnorm. Fold the model first: flashnorm fold {name}; a fold "
            f"by another tool gets a record with: flashnorm verify {name} --source <its source> --adopt"
        )
    return checkpoint


def file_hashes(checkpoint: Checkpoint, workers: int, report: Progress) -> dict[str, tuple[str, str]]:
    """(sha256, id in git) of every file of the checkpoint."""
    names = [CONFIG, *([INDEX] if checkpoint.index else []), *checkpoint.shards, *checkpoint.others]
    names = [name for name in names if name != RECORD]
    total, done, lock = sum((checkpoint.folder / name).stat().st_size for name in names), 0, threading.Lock()

    def digest(name: str) -> tuple[str, str]:
        nonlocal done
        path = checkpoint.folder / name
        sha256, oid = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        with path.open("rb", buffering=0) as file:
            while block := file.read(1 << 20):
                sha256.update(block)
                if name not in checkpoint.shards:  # those are LFS files, which are known by their sha256
                    oid.update(block)
                with lock:
                    done += len(block)
                    report(done, total, "Hashing")
        return sha256.hexdigest(), oid.hexdigest()

    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _why_unverified(record: dict[str, Any], hashes: dict[str, tuple[str, str]], name: str) -> str | None:
    """Why the record does not prove that this very folder is right; None if it does."""
    entry = record.get("verify")
    if not isinstance(entry, dict) or not isinstance(entry.get("levels"), dict):
        return "has not been verified"
    levels = {name: level.get("status") for name, level in entry["levels"].items() if isinstance(level, dict)}
    failed = [name for name, status in levels.items() if status == "failed"]
    if failed or entry.get("equivalent") is not True:
        return f"its verification failed (level {', '.join(failed) or 'unknown'})"
    if levels.get("weights") != "passed":
        return "its verification left out level weights, the one that compares every tensor"
    changed = changed_files(entry, {name: sha256 for name, (sha256, _) in hashes.items() if not is_paper(name)})
    if changed:
        more = f" and {len(changed) - SHOWN_FILES} more" if len(changed) > SHOWN_FILES else ""
        return f"its verification is void: {', '.join(changed[:SHOWN_FILES])}{more} changed since"
    return None


# ---- the Hub ---------------------------------------------------------------------------------------------------------


@dataclass
class Push:
    """One run of `push_to_hub`, after the folder was found fit."""

    api: HfApi
    checkpoint: Checkpoint
    record: dict[str, Any]
    folded: str
    repo_id: str
    report: Progress
    notes: list[str]
    private: bool | None = None
    revision: str = "main"
    create_pr: bool = False
    message: str = MESSAGE
    overwrite: bool = False
    doubt: str | None = None
    base: Base | None = None
    base_info: ModelInfo | None = None
    remote: _Remote = field(default_factory=_Remote)
    held: Any = None  # flashnorm.json of the repository
    uploads: list[Upload] = field(default_factory=list)
    deleted: tuple[str, ...] = ()
    card: str = ""
    gate: str | bool = False
    created: bool = False
    pull_request: str | None = None
    # Contents that the Hub has already, though no commit names them: operations by path.
    stored: dict[str, Any] = field(default_factory=dict)

    # ---- checks and contents, nothing is written yet ----

    def prepare(self, base_model: str | None, hashes: dict[str, tuple[str, str]], online: bool) -> None:
        if online:
            user = with_retry(self.api.whoami)
            if "/" not in self.repo_id:
                self.repo_id = f"{user['name']}/{self.repo_id}"
            self.remote = self._remote()
            self.held = self._remote_json(RECORD) if RECORD in self.remote.files else None
            self.base = self._base(base_model or self._base_held())
            self.base_info = self._base_info()
        else:
            self.base = self._base(None)
            self.notes.append("not logged in, so the Hub was not asked: neither the repository nor the source is known")
        self.contents(hashes)
        if self.remote.exists:
            self._refuse_something_else()

    def _base(self, wanted: str | None) -> Base | None:
        """The source on the Hub: the one that was folded, or verified against; or the one that the caller names."""
        entry = self.record.get("verify")
        verified = entry.get("source") if isinstance(entry, dict) and self.doubt is None else None
        said = [(self.record.get("source"), self.record.get("commit"))]
        said += [(verified.get("name"), verified.get("commit"))] if isinstance(verified, dict) else []
        known = next((Base(str(name), str(commit)) for name, commit in said if name and commit), None)
        if known is not None:
            if wanted not in (None, known.repo_id):
                raise UsageError(f"--base-model {wanted}: this checkpoint was made from {known.repo_id}")
            return known
        if wanted is not None:
            return self._same_on_hub(wanted)
        self.notes.append(
            "its source is a local folder, so the card names no base model; --base-model <Hub id> names it if it is on "
            "the Hub, too"
        )
        return None

    def _base_held(self) -> str | None:
        """The source that the repository names, if it holds this fold already."""
        held = self.held if same_fold(self.record, self.held) else {}
        return held["source"] if held.get("commit") else None

    def _same_on_hub(self, name: str) -> Base:
        """The Hub repository of a local source, if it holds the very files that were folded."""
        theirs = open_checkpoint(Source(name, token=self.api.token), weights=False)
        if theirs.commit is None:
            raise UsageError(f"--base-model {name}: is a folder; name a repository on the Hub")
        facts: dict[str, Any] = self.record.get("source_files") or {}
        with hub_errors(name):
            listed = self.api.get_paths_info(name, list(theirs.shards), revision=theirs.commit)
        on_hub: dict[str, Any] = {file.path: getattr(file, "lfs", None) for file in listed}
        for shard, header in theirs.shards.items():
            fact, lfs = facts.get(shard, {}), on_hub.get(shard)
            if fact.get("header_sha256") != hashlib.sha256(header.raw).hexdigest():
                raise FlashNormError(f"--base-model {name}: its {shard} is not the one that was folded")
            if "sha256" not in fact or lfs is None:
                raise FlashNormError(
                    f"--base-model {name}: whether its {shard} is the one that was folded cannot be told from hashes; "
                    f"flashnorm verify {self.folded} --source {name} compares them, and names it in the record"
                )
            if fact["sha256"] != lfs.sha256:
                raise FlashNormError(f"--base-model {name}: its {shard} is not the one that was folded")
        config = hashlib.sha256((theirs.folder / CONFIG).read_bytes()).hexdigest()
        if facts.get(CONFIG, {}).get("sha256") != config:
            raise FlashNormError(f"--base-model {name}: its {CONFIG} is not the one that was folded")
        return Base(name, theirs.commit)

    def _base_info(self) -> ModelInfo | None:
        """What the Hub says of the source: its gate, its licence."""
        if self.base is None:
            return None
        base = self.base
        try:
            info: ModelInfo = with_retry(lambda: self.api.model_info(base.repo_id, revision=base.commit))
        except Exception as error:
            if status_of(error) not in (401, 403, 404):
                raise
            self.notes.append(f"the source {base.repo_id} is not on the Hub any more, or not for this token")
            return None
        if info.private and self.private is None and not self.create_pr:
            raise FlashNormError(f"the source {base.repo_id} is private; say --private, or --no-private to publish it")
        return info

    def _remote(self) -> _Remote:
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        try:
            info = with_retry(lambda: self.api.model_info(self.repo_id))
        except RepositoryNotFoundError:
            return _Remote()
        branch, revision = True, self.revision
        if revision != "main":
            try:
                info = with_retry(lambda: self.api.model_info(self.repo_id, revision=revision))
            except RevisionNotFoundError:
                branch = False  # it will start at main
        gated = info.gated or False
        return _Remote(True, branch, info.sha, bool(info.private), gated, self._listed(str(info.sha)))

    def _listed(self, revision: str) -> dict[str, str]:
        from huggingface_hub import RepoFile

        def listed() -> dict[str, str]:
            tree = self.api.list_repo_tree(self.repo_id, revision=revision, recursive=True)
            return {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in tree if isinstance(f, RepoFile)}

        return with_retry(listed)

    def contents(self, hashes: dict[str, tuple[str, str]]) -> None:
        """What will be uploaded: the checkpoint's own files, and card, record and report as they are published."""
        folder = self.checkpoint.folder
        cleaned = self._cleaned(hashes)
        clean = {name: hashlib.sha256(data).hexdigest() for name, data in cleaned.items()}
        new = published_record(self.record, self.repo_id, self.base, self.doubt is None, clean)
        result = Verification.from_record(new, self.repo_id) if self.doubt is None else None
        text = (folder / README).read_bytes().decode("utf-8", "replace") if (folder / README).is_file() else None
        ours = read_card(text or "").data.to_dict()
        theirs = self._source_data()
        if text is None:
            ours = theirs
        check_licence(ours, theirs, {*self.checkpoint.others}, self.base_info, self.folded)
        self.gate = gate_of(ours, self.base_info)
        facts = CardFacts(
            repo_id=self.repo_id,
            record=new,
            config=self.checkpoint.config,
            base=self.base,
            verification=result,
            unverified=self.doubt,
            sizes=(
                sum(fact["size"] for name, fact in new["source_files"].items() if name.endswith(".safetensors")),
                sum(header.file_size for header in self.checkpoint.shards.values()),
            ),
            source_card=text,
            source_data=theirs,
        )
        self.card = build_card(facts)
        new["card_sha256"] = hashlib.sha256(self.card.encode()).hexdigest()
        made = {**cleaned, README: self.card.encode(), RECORD: dump(new)}
        if result is not None:
            made[REPORT] = render(result).encode()
        for name, (sha256, oid) in hashes.items():
            if name not in (*made, REPORT, ATTRIBUTES) and not name.startswith(CLAIMS):
                shard = self.checkpoint.shards.get(name)
                size = shard.file_size if shard else (folder / name).stat().st_size
                self.uploads.append(Upload(name, folder / name, size, sha256, oid))
        for name, data in made.items():
            oid = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
            self.uploads.append(Upload(name, data, len(data), hashlib.sha256(data).hexdigest(), oid))

    def _cleaned(self, names: Collection[str]) -> dict[str, bytes]:
        """JSON files that name a folder of this machine as the place where they came from, without it."""
        found = {}
        for name in names:
            path = self.checkpoint.folder / name
            if not name.endswith(".json") or name == INDEX or path.stat().st_size > LARGEST_JSON:
                continue
            data = path.read_bytes()
            text = data.decode("utf-8", "surrogateescape")
            if (short := without_places(text)) != text:
                found[name] = short.encode("utf-8", "surrogateescape")
        if found:
            self._note(f"{', '.join(found)}: named a folder of this machine, and is published without it")
        if elsewhere := local_paths(self.checkpoint.config):
            keys = ", ".join(dict.fromkeys(elsewhere))
            self._note(f"{CONFIG} names paths of a machine ({keys}), and is published with them")
        return found

    def _note(self, words: str) -> None:
        if words not in self.notes:  # contents are made twice from Hub to Hub
            self.notes.append(words)

    def _source_data(self) -> dict[str, Any]:
        """The metadata of the source's card where it is: on the Hub, or in its folder if that is still there."""
        if self.base_info is not None:
            data = self.base_info.card_data
            return data.to_dict() if data else {}
        path = Path(str(self.record.get("source"))).expanduser() / README
        if self.base is None and path.is_file():
            return read_card(path.read_text(encoding="utf-8", errors="replace")).data.to_dict()
        return {}

    def _missing(self, files: dict[str, str]) -> list[Upload]:
        """Uploads that a listing does not hold with these very bytes."""
        return [upload for upload in self.uploads if files.get(upload.path) not in (upload.sha256, upload.oid)]

    def _refuse_something_else(self) -> None:
        """A repository may be empty, or hold this fold; anything else is only replaced when the caller says so."""
        theirs = set(self.remote.files) - {ATTRIBUTES}
        if not theirs or not self._missing(self.remote.files):
            return
        where = self.repo_id if self.remote.branch else f"{self.repo_id} at main, where the new branch would start,"
        if not same_fold(self.record, self.held):
            if not self.overwrite:
                shown = ", ".join(sorted(theirs)[:SHOWN_FILES]) + (", ..." if len(theirs) > SHOWN_FILES else "")
                what = "another fold" if self.held is not None else "something else"
                raise FlashNormError(f"{where} holds {what} ({shown}); --overwrite replaces it")
            self.deleted = tuple(sorted(theirs - {upload.path for upload in self.uploads}))
            return
        if self.doubt and isinstance(self.held.get("verify"), dict):
            if not self.overwrite:
                raise FlashNormError(
                    f"{where} holds this fold with its verification; --overwrite replaces it by an unverified one"
                )
            self.deleted = tuple(theirs & {REPORT})
        readme = self.remote.files.get(README)
        card = next(upload for upload in self.uploads if upload.path == README)
        if readme in (None, card.sha256, card.oid) or self.overwrite:
            return
        if hashlib.sha256(self._remote_bytes(README)).hexdigest() != (self.held or {}).get("card_sha256"):
            raise FlashNormError(
                f"{where}: README.md was edited on the Hub since it was pushed; --overwrite replaces it with a new card"
            )

    def _remote_bytes(self, name: str) -> bytes:
        from tempfile import TemporaryDirectory

        with TemporaryDirectory() as folder:  # not the cache: this is nobody's model yet
            path = with_retry(
                lambda: self.api.hf_hub_download(self.repo_id, name, revision=self.remote.head, local_dir=folder)
            )
            return Path(path).read_bytes()

    def _remote_json(self, name: str) -> Any:
        try:
            return json.loads(self._remote_bytes(name))
        except ValueError:
            return {}

    # ---- writing ----

    def run(self) -> PushResult:
        missing = self._missing(self.remote.files) if self.remote.exists else self.uploads
        if not missing and not self.deleted:
            self.notes.append("the repository holds these very files already; nothing was committed")
            return self.result(self.remote.head)
        if self.create_pr and self.remote.exists and (found := self._open_pull_request()):
            return found
        self.report(0, 0, "Checking the card")
        self.validate_card()
        if not self.remote.exists:
            self.create()
        elif self.gate and not self.remote.gated:
            self.notes.append("the source is gated, and this repository is not: see its settings on the Hub")
        if not self.remote.branch and self.remote.exists:
            with_retry(lambda: self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True))
        additions = self._send(missing)
        return self.result(self._commit(missing, additions))

    def validate_card(self) -> None:
        """Before gigabytes are uploaded: the Hub takes the card."""
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        def ask() -> Any:
            # Not ModelCard.validate: in huggingface_hub 1.33 it asks huggingface.co whatever HF_ENDPOINT says.
            answer = get_session().post(
                f"{self.api.endpoint}/api/validate-yaml",
                json={"content": self.card, "repoType": "model"},
                headers=build_hf_headers(token=self.api.token),
            )
            if answer.status_code != 400:
                hf_raise_for_status(answer)
            return answer

        answer = with_retry(ask)
        if answer.status_code == 400:
            said = "; ".join(str(error.get("message")) for error in answer.json().get("errors", []))
            raise FlashNormError(
                f"the Hub does not take the card's metadata: {said}; mend them in {self.folded}/{README}"
            )

    def create(self) -> None:
        created = with_retry(lambda: self.api.create_repo(self.repo_id, private=self.private, exist_ok=True))
        self.repo_id, self.created = created.repo_id, True
        self.remote = self._remote()
        if self.gate and not self.remote.private:
            gate: Any = self.gate
            with_retry(lambda: self.api.update_repo_settings(self.repo_id, gated=gate))
            self.remote = replace(self.remote, gated=gate)
        elif self.gate:
            self.notes.append("the source is gated: gate this repository, too, before you make it public")

    def _send(self, missing: list[Upload]) -> list[Any]:
        """Upload the contents of large files, one after the other; small ones travel in the commit."""
        from huggingface_hub import CommitOperationAdd

        additions = [
            self.stored.get(upload.path) or CommitOperationAdd(upload.path, _given(upload.content))
            for upload in missing
        ]
        pairs = [pair for pair in zip(missing, additions, strict=True) if pair[0].path not in self.stored]
        large = [[pair] for pair in pairs if pair[0].path in self.checkpoint.shards]
        small = [pair for pair in pairs if pair[0].path not in self.checkpoint.shards]
        total, done = sum(upload.size for upload, _ in pairs), 0
        for group in (*large, small) if small else large:
            upload = group[0][0]
            shown = f"Uploading {upload.path}" if group is not small else "Uploading other files"

            def so_far(n: int, start: int = done, shown: str = shown) -> None:
                self.report(start + n, total, shown)

            with watched(upload.content if isinstance(upload.content, Path) else None, upload.size, so_far):
                self.api.preupload_lfs_files(
                    self.repo_id,
                    [addition for _, addition in group],
                    revision=self.revision,
                    create_pr=self.create_pr,
                    free_memory=False,
                )
            for upload, addition in group:
                if addition.upload_info.sha256.hex() != upload.sha256:
                    raise FlashNormError(f"{upload.path}: changed while it was uploaded; nothing was published")
                done += upload.size
            self.report(done, total, shown)
        return additions

    def _commit(self, missing: list[Upload], additions: list[Any]) -> str:
        """One commit; if its answer is lost, whether it took effect is seen from the repository."""
        from huggingface_hub import CommitOperationDelete

        operations = [*additions, *(CommitOperationDelete(path) for path in self.deleted)]
        self.report(0, 0, "Committing")
        for wait in (*WAITS, None):
            try:
                commit = self.api.create_commit(
                    self.repo_id,
                    operations,
                    commit_message=self.message,
                    revision=self.revision,
                    create_pr=self.create_pr,
                    parent_commit=None if self.create_pr else self.remote.head,
                )
                break
            except Exception as error:
                status = status_of(error)
                if status is not None and status not in (*RETRY_STATUS, 412):
                    raise
                if (head := self._took_effect()) is not None:
                    return head
                if status == 412:
                    raise FlashNormError(
                        f"{self.repo_id}: somebody else committed to it meanwhile; nothing was published. Look at "
                        "it, and run the same command again"
                    ) from None
                if wait is None:
                    raise
                time.sleep(wait_after(error, wait))
        self.pull_request = commit.pr_url
        if self._missing(self._listed(commit.oid)):
            raise FlashNormError(
                f"{self.repo_id}: the Hub does not show what was committed; look at {commit.commit_url}"
            )
        return commit.oid

    def _took_effect(self) -> str | None:
        """The head of the branch or of our pull request, if it holds what was to be committed."""
        try:
            if self.create_pr:
                found = self._open_pull_request()
                return found.commit if found else None
            now = self._remote()
        except Exception as error:
            if status_of(error) is None and not isinstance(error, OSError):
                raise
            return None
        gone = not set(self.deleted) & set(now.files)
        return now.head if now.branch and gone and not self._missing(now.files) else None

    def _open_pull_request(self) -> PushResult | None:
        """An open pull request that proposes these very files already: a second one would help nobody."""
        refs = with_retry(lambda: self.api.list_repo_refs(self.repo_id, include_pull_requests=True))
        newest = sorted(refs.pull_requests or [], key=lambda ref: int(ref.ref.rsplit("/", 1)[-1]), reverse=True)
        for ref in newest[:5]:
            if self._missing(self._listed(ref.ref)):
                continue
            number = int(ref.ref.rsplit("/", 1)[-1])
            if (details := self.api.get_discussion_details(self.repo_id, number)).status in ("open", "draft"):
                self.pull_request = details.url
                self.notes.append("a pull request with these very files is open already")
                return self.result(ref.target_commit)
        return None

    def result(self, commit: str | None) -> PushResult:
        missing = self._missing(self.remote.files)
        return PushResult(
            repo_id=self.repo_id,
            url=self.pull_request or f"{self.api.endpoint}/{self.repo_id}",
            revision=self.revision,
            commit=commit,
            pull_request=self.pull_request,
            dry_run=commit is None,
            created=self.created or not self.remote.exists,
            private=self.remote.private if self.remote.exists else bool(self.private),
            gated=self.remote.gated if self.remote.exists else False if self.private else self.gate,
            verified=self.doubt is None,
            base_model=self.base.repo_id if self.base else None,
            licence=terms(read_card(self.card).data.to_dict()),
            sent=tuple(missing),
            unchanged=tuple(upload for upload in self.uploads if upload not in missing),
            deleted=self.deleted,
            left_out=self.checkpoint.left_out,
            card=self.card,
            notes=tuple(self.notes),
        )


def _given(content: Path | bytes) -> str | bytes:
    """As huggingface_hub takes it."""
    return content if isinstance(content, bytes) else str(content)
