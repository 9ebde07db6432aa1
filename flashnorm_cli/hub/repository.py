"""A repository on the Hub as it is: what it holds, and what of that is what somebody wants to put there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from flashnorm_cli.checkpoint.hub_errors import with_retry
from flashnorm_cli.checkpoint.json_files import parse_json

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Upload:
    """A file to publish: its path in the repository, where its bytes are, and their hashes.

    `oid` is the file's id in git, which the Hub tells for files that are not LFS files.
    """

    path: str
    content: Path | bytes
    size: int
    sha256: str
    oid: str

    @property
    def ids(self) -> tuple[str, str]:
        """What a listing may call these bytes."""
        return self.sha256, self.oid

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"name": self.path, "bytes": self.size, "sha256": self.sha256}


@dataclass(frozen=True)
class State:
    """What a repository holds at the revision that will be written: sha256 or git id of each file by path.

    `head` is the commit; without `branch`, it is that of main, where the new branch will start.
    """

    exists: bool = False
    branch: bool = False
    head: str | None = None
    private: bool = False
    gated: str | bool = False
    files: Mapping[str, str] = field(default_factory=dict)

    def lacks(self, uploads: tuple[Upload, ...]) -> tuple[Upload, ...]:
        """Those of the uploads that are not there with these very bytes."""
        return lacking(self.files, uploads)


@dataclass(frozen=True)
class Repository:
    """A model repository, whether it exists or not, at a branch; `api` asks with the user's token."""

    api: HfApi
    repo_id: str
    revision: str = "main"

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{self.repo_id}"

    def state(self) -> State:
        """What it holds now."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        try:
            info = with_retry(lambda: self.api.model_info(self.repo_id))
        except RepositoryNotFoundError:
            return State()
        branch = True
        if self.revision != "main":
            try:
                info = with_retry(lambda: self.api.model_info(self.repo_id, revision=self.revision))
            except RevisionNotFoundError:
                branch = False
        return State(True, branch, info.sha, bool(info.private), info.gated or False, self.listed(str(info.sha)))

    def listed(self, revision: str) -> dict[str, str]:
        """sha256 or git id of each file by path, at any revision."""
        from huggingface_hub import RepoFile

        def listed() -> dict[str, str]:
            tree = self.api.list_repo_tree(self.repo_id, revision=revision, recursive=True)
            return {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in tree if isinstance(f, RepoFile)}

        return with_retry(listed)

    def read(self, name: str, head: str | None) -> bytes:
        """A small file at a commit."""
        with TemporaryDirectory() as folder:  # not the cache: this is not the model of anybody yet
            path = with_retry(lambda: self.api.hf_hub_download(self.repo_id, name, revision=head, local_dir=folder))
            return Path(path).read_bytes()

    def read_json(self, name: str, state: State) -> Any:
        """A JSON file, {} where it cannot be read as one, None where it is not there."""
        if name not in state.files:
            return None
        try:
            return parse_json(self.read(name, state.head))
        except ValueError:
            return {}


def lacking(files: Mapping[str, str], uploads: tuple[Upload, ...]) -> tuple[Upload, ...]:
    """Uploads that a listing does not hold with these very bytes."""
    return tuple(upload for upload in uploads if files.get(upload.path) not in upload.ids)
