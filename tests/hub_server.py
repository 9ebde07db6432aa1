"""A Hugging Face Hub on loopback: the read side of its HTTP interface, as huggingface_hub 1.33 to 2.4 use it.

    with HubServer(tmp_path / "hub") as hub:
        hub.add_repo("user/name", folder, private=True, token="hf_secret")
        subprocess.run([...], env=hub.client_env(tmp_path / "home"))
        hub.log  # every request: method, path, range, status, bytes sent

Files live under `root` by their sha256 and commits are maps of paths to them, so that a write side needs only
routes that store blobs and call `Repo.commit`. Large files are served as the Hub does: a redirect to a CDN, here the
same port under the host name `localhost`, where no token may arrive. Xet is never announced.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

# What the Hub's default .gitattributes puts into LFS, as far as checkpoints go; larger files go there anyway.
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth", ".ckpt")
LFS_FROM = 10 << 20
CHUNK = 1 << 16
DATE = "2026-01-01T00:00:00.000Z"

ID = r"(?P<id>[^/]+(?:/[^/]+)?)"
REVISION = r"(?P<revision>[^/]+)"


@dataclass(frozen=True)
class Blob:
    """A file's content, stored as `<root>/blobs/<sha256>`. `oid` is its id in git."""

    sha256: str
    oid: str
    size: int
    lfs: bool


@dataclass(frozen=True)
class Request:
    """One line of the log. `sent` counts the bytes of the body that went out; `host` is "hub" or "cdn"."""

    method: str
    path: str
    range: str | None
    status: int
    sent: int
    host: str
    token: str | None


@dataclass
class Fault:
    """What goes wrong with requests whose `METHOD path range` matches `pattern`, `times` times (None: always).

    `range` is the header's value, or "whole".

    With a `status`, that is the answer; with `after`, the connection breaks after so many bytes of the body.
    """

    pattern: str
    status: int | None = None
    after: int | None = None
    times: int | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Repo:
    """A model repository. `refs` are branches and tags, by name; `tokens` may read it where it is closed."""

    id: str
    private: bool = False
    gated: bool = False
    tokens: set[str] = field(default_factory=set)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Blob], ref: str = "main") -> str:
        """Put a branch or tag on a new commit of these files; returns the commit's id."""
        parent = self.refs.get(ref, "")
        state = json.dumps([self.id, parent, {path: blob.sha256 for path, blob in sorted(files.items())}])
        sha = hashlib.sha1(state.encode(), usedforsecurity=False).hexdigest()
        self.commits[sha] = dict(sorted(files.items()))
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit id means."""
        return revision if revision in self.commits else self.refs.get(revision)


class HubServer:
    """The server; a context manager. `page_size` is how many entries a page of a file listing holds."""

    def __init__(self, root: Path, page_size: int = 1000) -> None:
        self.root, self.page_size = Path(root), page_size
        self.repos: dict[str, Repo] = {}
        self.moved: dict[str, str] = {}
        self.tokens: set[str] = set()  # a token that is not in here gets a 401 everywhere, as on the Hub
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        (self.root / "blobs").mkdir(parents=True, exist_ok=True)
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> HubServer:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Shut down: from now on connections are refused."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add_repo(
        self,
        repo_id: str,
        folder: Path | None = None,
        *,
        private: bool = False,
        gated: bool = False,
        token: str | None = None,
        revisions: dict[str, Path] | None = None,
    ) -> Repo:
        """Publish a repository: `folder` becomes its main branch, `revisions` further branches or tags.

        Args:
            private: without `token` the repository does not exist.
            gated: anyone sees that it exists and what files it has; only `token` gets their content.
        """
        repo = self.repos[repo_id] = Repo(repo_id, private, gated)
        if token is not None:
            self.tokens.add(token)
            repo.tokens.add(token)
        for name, path in {**({"main": folder} if folder else {}), **(revisions or {})}.items():
            repo.commit(self.store_folder(path), name)
        return repo

    def store_folder(self, folder: Path) -> dict[str, Blob]:
        """Copy a folder's files in; returns what `Repo.commit` takes."""
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {path.relative_to(folder).as_posix(): self.store(path.name, path.read_bytes()) for path in paths}

    def store(self, name: str, data: bytes) -> Blob:
        """Keep the content of a file called `name`."""
        sha256 = hashlib.sha256(data).hexdigest()
        self.blob_path(sha256).write_bytes(data)
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        return Blob(sha256, oid, len(data), name.endswith(LFS_SUFFIXES) or len(data) >= LFS_FROM)

    def blob_path(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256

    def fail(self, pattern: str, **what: Any) -> Fault:
        """Let matching requests fail from now on; see `Fault`."""
        self.faults.append(Fault(pattern, **what))
        return self.faults[-1]

    def take_fault(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times != 0 and re.search(fault.pattern, request):
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None

    def client_env(self, home: Path, **more: str) -> dict[str, str]:
        """This process's environment, without its proxies and its Hub settings, pointed at this server."""
        keep = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) and not name.lower().endswith("_proxy")
        }
        return {**keep, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **more}


class _HubError(Exception):
    """An answer other than 200, in the words and headers of the Hub."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; Nagle would hold the second one back

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        self.range = self.headers.get("Range")
        self.status, self.sent = 0, 0
        self.fault = self.hub.take_fault(f"{self.command} {self.path} {self.range or 'whole'}")
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.on_cdn = (self.headers.get("Host") or "").startswith("localhost")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.form = body if body else b"{}"
        try:
            if self.fault and self.fault.status:
                words = HTTPStatus(self.fault.status).phrase
                raise _HubError(self.fault.status, words, **self.fault.headers)
            self._route(url.path)
        except _HubError as error:
            self._json({"error": error.message}, error.status, error.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            host = "cdn" if self.on_cdn else "hub"
            line = Request(self.command, self.path, self.range, self.status, self.sent, host, self.token)
            self.hub.log.append(line)

    do_HEAD = do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass

    # ---- routes ------------------------------------------------------------------------------------------------------

    def _route(self, path: str) -> None:
        if self.on_cdn:
            return self._cdn(path)
        if self.token is not None and self.token not in self.hub.tokens:
            raise _HubError(401, "Invalid credentials in Authorization header")
        for method, pattern, answer in self._routes():
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                parts = {name: unquote(value or "") for name, value in match.groupdict().items()}
                if parts["id"] in self.hub.moved:
                    new = f"{path}?{urlsplit(self.path).query}".replace(parts["id"], self.hub.moved[parts["id"]], 1)
                    raise _HubError(307, "Temporary Redirect", Location=new.rstrip("?"))
                return answer(self._repo(parts.pop("id")), **parts)
        raise _HubError(404, "Not found")

    def _routes(self) -> Iterator[tuple[str, str, Callable[..., None]]]:
        yield "GET", rf"/api/models/{ID}/refs", self._refs
        yield "GET", rf"/api/models/{ID}/tree/{REVISION}(?:/(?P<folder>.+))?", self._tree
        yield "POST", rf"/api/models/{ID}/paths-info/{REVISION}", self._paths_info
        yield "GET", rf"/api/models/{ID}/revision/{REVISION}", self._info
        yield "GET", rf"/api/models/{ID}", self._info
        yield "GET HEAD", rf"/{ID}/resolve/{REVISION}/(?P<file>.+)", self._resolve

    def _repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.token not in repo.tokens):
            # The Hub does not tell strangers which repositories exist.
            if self.token is None:
                raise _HubError(401, "Invalid username or password.", "RepoNotFound")
            raise _HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def _commit(self, repo: Repo, revision: str) -> tuple[str, dict[str, Blob]]:
        sha = repo.resolve(revision)
        if sha is None:
            raise _HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo.commits[sha]

    def _info(self, repo: Repo, revision: str = "main") -> None:
        sha, files = self._commit(repo, revision)
        blobs = "blobs" in self.query
        siblings = [{"rfilename": path, **(_entry(path, blob) if blobs else {})} for path, blob in files.items()]
        info = {"_id": sha[:24], "id": repo.id, "modelId": repo.id, "sha": sha, "siblings": siblings, "tags": []}
        gated = "manual" if repo.gated else False
        more = {"private": repo.private, "gated": gated, "disabled": False, "downloads": 0, "likes": 0}
        self._json({**info, **more, "lastModified": DATE, "createdAt": DATE})

    def _refs(self, repo: Repo) -> None:
        refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in repo.refs.items()]
        self._json({"branches": refs, "tags": [], "converts": []})

    def _tree(self, repo: Repo, revision: str, folder: str = "") -> None:
        sha, files = self._commit(repo, revision)
        inside = folder.strip("/") + "/" if folder.strip("/") else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, blob in files.items():
            if not path.startswith(inside):
                continue
            steps = path[len(inside) :].split("/")
            for depth in range(1, len(steps)):
                parent = inside + "/".join(steps[:depth])
                oid = hashlib.sha1(parent.encode(), usedforsecurity=False).hexdigest()
                entries[parent] = {"type": "directory", "oid": oid, "size": 0, "path": parent}
            entries[path] = _entry(path, blob)
        if inside and not entries:
            raise _HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        recursive = self.query.get("recursive", "").lower() == "true"
        listed = [e for path, e in entries.items() if recursive or "/" not in path[len(inside) :]]
        if self.query.get("expand", "").lower() == "true":
            listed = [{**e, "lastCommit": {"id": sha, "title": "commit", "date": DATE}} for e in listed]
        start = int(self.query.get("cursor", 0))
        end = start + self.hub.page_size
        headers = {}
        if end < len(listed):
            query = "&".join(f"{k}={quote(v)}" for k, v in {**self.query, "cursor": str(end)}.items())
            headers["Link"] = f'<{self.hub.url}{urlsplit(self.path).path}?{query}>; rel="next"'
        self._json(listed[start:end], headers=headers)

    def _paths_info(self, repo: Repo, revision: str) -> None:
        _, files = self._commit(repo, revision)
        form = json.loads(self.form) if self.form.startswith(b"{") else parse_qs(self.form.decode())
        self._json([_entry(path, files[path]) for path in form.get("paths", []) if path in files])

    def _resolve(self, repo: Repo, revision: str, file: str) -> None:
        sha, files = self._commit(repo, revision)
        if repo.gated and self.token not in repo.tokens:
            why = f"Access to model {repo.id} is restricted"
            if self.token is None:
                raise _HubError(401, f"{why}. You must be authenticated to access it. Please log in.", "GatedRepo")
            raise _HubError(403, f"{why} and you are not in the authorized list.", "GatedRepo")
        if file not in files:
            raise _HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        blob = files[file]
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes", "ETag": f'"{blob.oid}"'}
        if not blob.lfs:
            return self._content(blob, headers)
        headers |= {"X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.sha256}"'}
        location = f"http://localhost:{self.hub.port}/blobs/{blob.sha256}?filename={quote(file)}"
        self._send(302, b"", {**headers, "Location": location})

    def _cdn(self, path: str) -> None:
        sha256 = path.removeprefix("/blobs/")
        if self.token is not None:  # as S3 answers a signed address that comes with a token
            raise _HubError(400, "Only one auth mechanism allowed")
        if not re.fullmatch(r"[0-9a-f]{64}", sha256) or not self.hub.blob_path(sha256).exists():
            raise _HubError(404, "Not found")
        blob = Blob(sha256, "", self.hub.blob_path(sha256).stat().st_size, True)
        self._content(blob, {"Accept-Ranges": "bytes", "ETag": f'"{sha256}"'})

    # ---- answers -----------------------------------------------------------------------------------------------------

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self._send(status, body, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})

    def _content(self, blob: Blob, headers: dict[str, str]) -> None:
        """The whole file or the range that was asked for."""
        start, end, status = 0, blob.size, 200
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.range or "")
        if match and any(match.groups()):
            first, last = match.groups()
            start = int(first) if first else max(blob.size - int(last), 0)
            end = min(int(last) + 1, blob.size) if first and last else blob.size
            if start >= end:
                raise _HubError(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{blob.size}"})
            status = 206
            headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{blob.size}"}
        with self.hub.blob_path(blob.sha256).open("rb") as file:
            file.seek(start)
            self._send(status, file.read(end - start), {"Content-Type": "application/octet-stream", **headers})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.status = status
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), "X-Request-Id": "Root=1-00000000-local", **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.fault.after if self.fault else None
        for at in range(0, len(body[:cut]), CHUNK):
            self.sent += self.wfile.write(body[:cut][at : at + CHUNK])
        if cut is not None:
            self.close_connection = True


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    """A file in a listing."""
    entry = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "sha256": blob.sha256, "size": blob.size, "pointerSize": 134}
    return entry
