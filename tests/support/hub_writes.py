"""The write side of tests/support/hub_server.py: what huggingface_hub 1.33 to 2.4 sends to publish a model.

Uploads leave no trace that a reader could see: LFS objects (one PUT, or parts from `multipart_from` bytes on) and Xet
files are content without a name until a commit, a single request that takes effect whole or not at all, points to them.

Xet: the write token names hf_xet's own content store in a folder (`local://`) as its address, so chunks are split,
deduplicated and stored by hf_xet itself, in `<root>/xet`. Its shards (the .mdb files) tell which sha256 is which file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from hub_server import Blob, HubServer, Repo

ID = r"(?P<id>[^/]+(?:/[^/]+)?)"
REVISION = r"(?P<revision>[^/]+)"
SHA256 = r"(?P<sha256>[0-9a-f]{64})"
# What the Hub takes for a repository's name and for its card.
NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_][A-Za-z0-9._-]{0,94}[A-Za-z0-9_]|[A-Za-z0-9_]")
LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other
""".split()
RELATIONS = {"adapter", "merge", "quantized", "finetune"}


class HubError(Exception):
    """An answer other than 200, in the words and headers of the Hub."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.more: dict[str, Any] = {}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


@dataclass
class User:
    """A user of the Hub; `role` is the token's: "write" or "read"."""

    name: str
    orgs: tuple[str, ...] = ()
    role: str = "write"

    def may_write(self, namespace: str) -> bool:
        return self.role == "write" and namespace in (self.name, *self.orgs)


class WriteRoutes:
    """The part of the request handler that answers writes; `_Handler` in hub_server.py is the rest of it."""

    hub: HubServer
    token: str | None
    query: dict[str, str]
    form: bytes
    _json: Callable[..., None]
    _send: Callable[..., None]
    _commit: Callable[..., tuple[str, dict[str, Blob]]]
    _receive: Callable[[], Iterator[bytes]]

    def _write_routes(self) -> Iterator[tuple[str, str, Callable[..., None]]]:
        yield "GET", r"/api/whoami-v2", self._whoami
        yield "POST", r"/api/repos/create", self._create
        yield "POST", r"/api/validate-yaml", self._validate_yaml
        yield "PUT", rf"/api/models/{ID}/settings", self._settings
        yield "POST", rf"/api/models/{ID}/branch/(?P<branch>[^/]+)", self._branch
        yield "POST", rf"/api/models/{ID}/preupload/{REVISION}", self._preupload
        yield "POST", rf"/api/models/{ID}/commit/{REVISION}", self._commit_files
        yield "POST", rf"/api/models/{ID}/discussions", self._open_discussion
        yield "GET", rf"/api/models/{ID}/discussions/(?P<number>\d+)", self._discussion
        yield "GET", rf"/api/models/{ID}/xet-(?P<kind>read|write)-token/{REVISION}", self._xet_token
        yield "POST", rf"/{ID}\.git/info/lfs/objects/batch", self._lfs_batch
        yield "POST", rf"/{ID}\.git/info/lfs/objects/verify", self._lfs_verify
        yield "POST", rf"/lfs/complete/{SHA256}", self._lfs_complete

    # ---- who may what ------------------------------------------------------------------------------------------------

    def _user(self) -> User:
        if self.token is None:
            raise HubError(401, "Invalid username or password.")
        return self.hub.users.get(self.token, User("reader", role="read"))

    def _need_write(self, repo: Repo) -> None:
        """A pull request may be opened by every user; a branch is for those who own the repository."""
        user = self._user()
        if not user.may_write(repo.id.split("/")[0]) and "create_pr" not in self.query:
            if user.role == "read":
                raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
            raise HubError(403, f"You don't have the rights to write to {repo.id}")

    def _whoami(self) -> None:
        user = self._user()
        role = {"displayName": "test", "role": user.role}
        orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in user.orgs]
        self._json({"type": "user", "name": user.name, "orgs": orgs, "auth": {"accessToken": role}})

    # ---- repositories ------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        form = json.loads(self.form)
        user = self._user()
        namespace, name = form.get("organization") or user.name, form["name"]
        repo_id = f"{namespace}/{name}"
        if not user.may_write(namespace):
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        if not NAME.fullmatch(name) or name.endswith((".git", ".ipynb")):
            raise HubError(400, f"Invalid repo name: {name}")
        url = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        with self.hub.lock:
            if repo_id in self.hub.repos:
                error = HubError(409, "You already created this model repo")
                error.more = url
                raise error
            private = form.get("visibility") == "private" or bool(form.get("private"))
            repo = self.hub.add_repo(repo_id, private=private, token=self.token)
            repo.commit({".gitattributes": self.hub.store(".gitattributes", self.hub.gitattributes)})
        self._json(url)

    def _settings(self, repo: Repo) -> None:
        self._need_write(repo)
        form = json.loads(self.form)
        if "gated" in form:
            repo.gated = form["gated"]
        if "visibility" in form:
            repo.private = form["visibility"] == "private"
        self._json({})

    def _branch(self, repo: Repo, branch: str) -> None:
        self._need_write(repo)
        sha, _ = self._commit(repo, json.loads(self.form).get("startingPoint", "main"))
        if branch.startswith("refs/") or not re.fullmatch(r"[\w./-]+", branch):
            raise HubError(400, "Invalid reference for a branch")
        with self.hub.lock:
            if branch in repo.refs:
                raise HubError(409, f"Reference already exists: refs/heads/{branch}")
            repo.refs[branch] = sha
        self._json({})

    def _validate_yaml(self) -> None:
        """The checks of a card's metadata that matter here."""
        content = json.loads(self.form)["content"]
        errors, warnings = [], []
        match = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        try:
            data = (yaml.safe_load(match.group(1)) if match else None) or {}
        except yaml.YAMLError as error:
            data, errors = {}, [str(error)]
        if not data and not errors:
            warnings = ["empty or missing yaml metadata in repo card"]
        licenses = data.get("license", [])
        if any(name not in LICENSES for name in (licenses if isinstance(licenses, list) else [licenses])):
            errors.append('"license" must be one of [apache-2.0, mit, ...]')
        if data.get("base_model_relation", "finetune") not in RELATIONS:
            errors.append(f'"base_model_relation" must be one of {sorted(RELATIONS)}')
        if not isinstance(data.get("tags", []), list):
            errors.append('"tags" must be an array')
        answer = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
        self._json(answer, 400 if errors else 200)

    # ---- pull requests -----------------------------------------------------------------------------------------------

    def _open_discussion(self, repo: Repo) -> None:
        form = json.loads(self.form)
        self._user()
        with self.hub.lock:
            number = repo.open_pull_request(form["title"])
        self._json({"num": number, "url": f"{self.hub.url}/{repo.id}/discussions/{number}", "pullRequest": True})

    def _discussion(self, repo: Repo, number: str) -> None:
        title = repo.pull_requests.get(int(number))
        if title is None:
            raise HubError(404, "Discussion not found")
        self._json(
            {
                "num": int(number),
                "title": title,
                "author": {"name": "someone"},
                "createdAt": "2026-01-01T00:00:00.000Z",
                "status": "draft",
                "repo": {"name": repo.id, "type": "model"},
                "isPullRequest": True,
                "changes": {"base": "refs/heads/main"},
                "filesWithConflicts": [],
                "events": [],
                "diff": "",
            }
        )

    # ---- content -----------------------------------------------------------------------------------------------------

    def _preupload(self, repo: Repo, revision: str) -> None:
        self._need_write(repo)
        _, files = self._commit(repo, revision)
        form = json.loads(self.form)
        answer = []
        for file in form["files"]:
            path, old = file["path"], files.get(file["path"])
            mode = "lfs" if self.hub.is_lfs(path, file["size"]) else "regular"
            oid = None if old is None else old.sha256 if old.lfs else old.oid
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answer})

    def _lfs_batch(self, repo: Repo) -> None:
        self._user()  # the rights to the branch are checked by the commit: pull requests send their files here, too
        objects = []
        for asked in json.loads(self.form)["objects"]:
            sha256, size = asked["oid"], asked["size"]
            objects.append({"oid": sha256, "size": size})
            if self.hub.has_content(sha256):
                continue
            verify = {"href": f"{self.hub.url}/{repo.id}.git/info/lfs/objects/verify"}
            put = f"http://localhost:{self.hub.port}/lfs/{sha256}"
            upload: dict[str, Any] = {"href": put}
            if size > self.hub.multipart_from:
                count = -(-size // self.hub.multipart_from)
                parts = {f"{n:05}": f"{put}?part={n}" for n in range(1, count + 1)}
                upload = {
                    "href": f"{self.hub.url}/lfs/complete/{sha256}",
                    "header": {"chunk_size": str(self.hub.multipart_from), **parts},
                }
            objects[-1]["actions"] = {"upload": upload, "verify": verify}
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, sha256: str) -> None:
        """What S3 does: the whole object or one part of it; what does not arrive whole does not exist."""
        part = self.query.get("part")
        with tempfile.NamedTemporaryFile(dir=self.hub.root, prefix="put-", delete=False) as file:
            temporary = Path(file.name)
            try:
                for data in self._receive():
                    file.write(data)
                file.flush()
                data_sha256 = _sha256(temporary)
                if part is None and data_sha256 != sha256:
                    raise HubError(400, "BadDigest")
                temporary.rename(self.hub.root / f"part-{sha256}-{part}" if part else self.hub.blob_path(sha256))
            finally:
                temporary.unlink(missing_ok=True)
        self._send(200, b"", {"ETag": f'"{data_sha256[:32]}"'})

    def _lfs_complete(self, sha256: str) -> None:
        count = len(json.loads(self.form)["parts"])
        parts = [self.hub.root / f"part-{sha256}-{n}" for n in range(1, count + 1)]
        if not all(part.exists() for part in parts):
            raise HubError(400, "InvalidPart")
        whole = self.hub.root / f"whole-{sha256}"
        with whole.open("wb") as file:
            for part in parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, file)
        if _sha256(whole) != sha256:
            raise HubError(400, "BadDigest")
        whole.rename(self.hub.blob_path(sha256))
        for part in parts:
            part.unlink()
        self._json({"success": True})

    def _lfs_verify(self, repo: Repo) -> None:
        form = json.loads(self.form)
        if not self.hub.blob_path(form["oid"]).exists():
            raise HubError(404, "Object not found")
        if self.hub.blob_path(form["oid"]).stat().st_size != form["size"]:
            raise HubError(400, "Size does not match")
        self._json({})

    def _xet_token(self, repo: Repo, kind: str, revision: str) -> None:
        if kind == "write":
            self._need_write(repo)
        elif repo.gated and self.token not in repo.tokens:
            raise HubError(403, f"Access to model {repo.id} is restricted", "GatedRepo")
        expires = int(time.time()) + 3600
        headers = {
            "X-Xet-Cas-Url": self.hub.xet_url,
            "X-Xet-Access-Token": "xet_token",
            "X-Xet-Token-Expiration": str(expires),
        }
        self._json({"casUrl": self.hub.xet_url, "exp": expires, "accessToken": "xet_token"}, headers=headers)

    def _commit_files(self, repo: Repo, revision: str) -> None:
        """One commit from a list of operations, a JSON object a line."""
        self._need_write(repo)
        lines = [json.loads(line) for line in self.form.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            parent, files = self._commit(repo, revision)
            if header.get("parentCommit", parent) != parent:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(files)
            for line in lines:
                self._apply(line["key"], line["value"], files)
            answer: dict[str, Any] = {"success": True, "hookOutput": ""}
            if "create_pr" in self.query:
                number = repo.open_pull_request(header["summary"])
                answer["pullRequestUrl"] = f"{self.hub.url}/{repo.id}/discussions/{number}"
                revision = f"refs/pr/{number}"
            elif revision not in repo.refs:
                raise HubError(400, f"Cannot commit to {revision}: it is no branch")
            sha = repo.commit(files, revision, header["summary"])
        self._json({**answer, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo.id}/commit/{sha}"})

    def _apply(self, kind: str, value: dict[str, Any], files: dict[str, Blob]) -> None:
        path = value.get("path", "")
        if kind == "file":
            if value.get("encoding") != "base64":
                raise HubError(400, f"Unknown encoding of {path}")
            files[path] = self.hub.store(path, base64.b64decode(value["content"]))
        elif kind == "lfsFile":
            blob = self.hub.stored(value["oid"])
            if blob is None or blob.size != value.get("size", blob.size):
                why = "Your push was rejected because an LFS pointer pointed to a file that does not exist"
                raise HubError(400, f"{why}: {path}")
            files[path] = blob
        elif kind in ("deletedFile", "deletedFolder"):
            gone = [p for p in files if p == path or (kind == "deletedFolder" and p.startswith(path.rstrip("/") + "/"))]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        elif kind != "header":
            raise HubError(400, f"Unknown operation: {kind}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


# ---- Xet -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class XetFile:
    """A file in hf_xet's content store: its Xet hash and its size."""

    hash: str
    size: int


def xet_files(store: Path) -> dict[str, XetFile]:
    """Every whole file of a store, by its sha256; read from the shards' file sections.

    A shard's header has 48 bytes. Then come, per file, 48 bytes with its hash, flags and number of segments; 48 bytes
    per segment; where flag 31 is set, as many verification entries; where flag 30 is set, 48 bytes that begin with the
    sha256. The section ends at a hash of ones.
    """
    found = {}
    for path in store.glob("xet/xorbs/shards/*.mdb"):
        data, at = path.read_bytes(), 48
        while at + 48 <= len(data) and data[at : at + 32] != b"\xff" * 32:
            file_hash = _hex(data[at : at + 32])
            flags, count = (int.from_bytes(data[at + n : at + n + 4], "little") for n in (32, 36))
            segments = [data[at + 48 * n : at + 48 * (n + 1)] for n in range(1, count + 1)]
            size = sum(int.from_bytes(segment[36:40], "little") for segment in segments)
            at += 48 * (1 + count + (count if flags >> 31 & 1 else 0))
            if flags >> 30 & 1:
                found[_hex(data[at : at + 32])] = XetFile(file_hash, size)
                at += 48
    return found


def _hex(raw: bytes) -> str:
    """Xet prints a hash as four little-endian numbers."""
    return "".join(raw[n : n + 8][::-1].hex() for n in range(0, 32, 8))


def xet_download(url: str, file: XetFile, target: Path) -> None:
    """Put a file together from its chunks, as hf_xet does it for every client."""
    import hf_xet

    with hf_xet.XetSession().new_file_download_group(
        endpoint=url,
        token="xet_token",
        token_expiry_unix_secs=int(time.time()) + 3600,
        token_refresh_url=None,
        token_refresh_headers={},
        custom_headers={},
        progress_callback=None,
    ) as group:
        group.start_download_file(hf_xet.XetFileInfo(file.hash, file.size), str(target))
