"""A Hugging Face Hub on loopback: its HTTP interface, as huggingface_hub 1.33 to 2.4 use it.

    with HubServer(tmp_path / "hub") as hub:
        hub.add_repo("user/name", folder, private=True, token="hf_secret")
        subprocess.run([...], env=hub.client_env(tmp_path / "home"))
        hub.log  # every request: method, path, range, status, bytes sent and received

Files live under `root` by their sha256 and commits are maps of paths to them; the routes that write are in
hub_writes.py, for which `hub.add_user("name", "hf_token")` makes somebody who may. Large files are served as the Hub
does: a redirect to a CDN, here the same port under the host name `localhost`, where no token may arrive. Xet is
announced for files that came by Xet, and those are served both ways.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml
from hub_writes import ID, REVISION, SHA256, HubError, User, WriteRoutes, XetFile, xet_download, xet_files

# What the Hub's default .gitattributes puts into LFS, as far as checkpoints go; larger files go there anyway.
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth", ".ckpt")
LFS_FROM = 10 << 20
CHUNK = 1 << 16
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Blob:
    """A file's content, stored as `<root>/blobs/<sha256>`. `oid` is its id in git; `xet` its hash if it came by Xet."""

    sha256: str
    oid: str
    size: int
    lfs: bool
    xet: str | None = None


@dataclass(frozen=True)
class Request:
    """One line of the log. `sent` and `received` count the bytes of the bodies; `host` is "hub" or "cdn"."""

    method: str
    path: str
    range: str | None
    status: int
    sent: int
    host: str
    token: str | None
    received: int = 0


@dataclass
class Fault:
    """What goes wrong with requests whose `METHOD path range` matches `pattern`, `times` times (None: always).

    `range` is the header's value, or "whole".

    With a `status`, that is the answer; with `after`, the connection breaks after so many bytes of the answer's body
    (0: what was asked for is done, but the answer is lost); with `received`, it is reset after so many bytes of the
    request's body. `delay` is how many seconds each `piece` of a body takes, in either direction. With `hold`, the
    request stops where it would break, `reached` is set, and it goes on (or breaks) when `release` is set.

    With `lie`, what would be answered is changed: it is called with the status, the headers and the body, and gives
    back all three. A header that it sets to None is not sent; a Content-Length of its own is.
    """

    pattern: str
    status: int | None = None
    after: int | None = None
    received: int | None = None
    delay: float = 0.0
    piece: int = 1 << 16
    lie: Callable[[int, dict[str, str | None], bytes], tuple[int, dict[str, str | None], bytes]] | None = None
    hold: bool = False
    times: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def stop(self, connection: socket.socket) -> None:
        """Wait here, where the test wants the client to be; a client that is gone meanwhile has asked for nothing."""
        self.reached.set()
        if self.hold:
            self.release.wait(60)
            gone = select.poll()
            gone.register(connection, select.POLLRDHUP)
            if gone.poll(0):
                raise ConnectionResetError("the client went away")


@dataclass
class Repo:
    """A model repository. `refs` are branches, tags and `refs/pr/N`, by name; `tokens` may read it where it is closed.

    `history` has (ref, commit, message) of each commit, in order; `pull_requests` their titles by number.
    """

    id: str
    private: bool = False
    gated: bool | str = False
    tokens: set[str] = field(default_factory=set)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    history: list[tuple[str, str, str]] = field(default_factory=list)
    pull_requests: dict[int, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Blob], ref: str = "main", message: str = "") -> str:
        """Put a branch or tag on a new commit of these files; returns the commit's id."""
        parent = self.refs.get(ref, "")
        state = json.dumps([self.id, parent, {path: blob.sha256 for path, blob in sorted(files.items())}])
        sha = hashlib.sha1(state.encode(), usedforsecurity=False).hexdigest()
        self.commits[sha] = dict(sorted(files.items()))
        self.refs[ref] = sha
        self.history.append((ref, sha, message))
        return sha

    def open_pull_request(self, title: str) -> int:
        """A new pull request; `refs/pr/N` begins at the main branch."""
        number = len(self.pull_requests) + 1
        self.pull_requests[number] = title
        self.refs[f"refs/pr/{number}"] = self.refs["main"]
        return number

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit id means."""
        return revision if revision in self.commits else self.refs.get(revision)


class HubServer:
    """The server; a context manager.

    Args:
        page_size: how many entries a page of a file listing holds.
        multipart_from: LFS files of more bytes are uploaded in parts of this size.
    """

    gitattributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()

    def __init__(self, root: Path, page_size: int = 1000, multipart_from: int = 5 << 30) -> None:
        self.root, self.page_size, self.multipart_from = Path(root), page_size, multipart_from
        self.repos: dict[str, Repo] = {}
        self.moved: dict[str, str] = {}
        self.tokens: set[str] = set()  # a token that is not in here gets a 401 everywhere, as on the Hub
        self.users: dict[str, User] = {}  # by token; who is not in here may only read
        self.lock = threading.RLock()
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

    def add_user(self, name: str, token: str, *, orgs: tuple[str, ...] = (), role: str = "write") -> None:
        """Somebody with a token; with the role "write" it may write to what the user and the organizations have."""
        self.tokens.add(token)
        self.users[token] = User(name, orgs, role)

    def store_folder(self, folder: Path) -> dict[str, Blob]:
        """Copy a folder's files in; returns what `Repo.commit` takes."""
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {path.relative_to(folder).as_posix(): self.store(path.name, path.read_bytes()) for path in paths}

    def store(self, name: str, data: bytes) -> Blob:
        """Keep the content of a file called `name`."""
        sha256 = hashlib.sha256(data).hexdigest()
        self.blob_path(sha256).write_bytes(data)
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        return Blob(sha256, oid, len(data), self.is_lfs(name, len(data)))

    @staticmethod
    def is_lfs(name: str, size: int) -> bool:
        return name.endswith(LFS_SUFFIXES) or size >= LFS_FROM

    @property
    def xet_url(self) -> str:
        """The address of the content store that hf_xet writes to."""
        return f"local://{(self.root / 'xet').resolve()}"

    def xet_file(self, sha256: str) -> XetFile | None:
        """A file that was uploaded by Xet and finished."""
        return xet_files(self.root / "xet").get(sha256)

    def has_content(self, sha256: str) -> bool:
        return self.blob_path(sha256).exists() or self.xet_file(sha256) is not None

    def stored(self, sha256: str) -> Blob | None:
        """The large file of this sha256, if it was uploaded. Its id in git is that of the pointer to it."""
        xet = self.xet_file(sha256)
        if not self.has_content(sha256):
            return None
        size = xet.size if xet else self.blob_path(sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        oid = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer, usedforsecurity=False).hexdigest()
        return Blob(sha256, oid, size, True, xet.hash if xet else None)

    def content(self, sha256: str) -> Path:
        """A file with the content of this sha256; a Xet file is put together when it is first asked for."""
        path = self.blob_path(sha256)
        with self.lock:
            if not path.exists() and (xet := self.xet_file(sha256)):
                xet_download(self.xet_url, xet, path.with_name(f"{sha256}.xet"))
                path.with_name(f"{sha256}.xet").rename(path)
        return path

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a reader of a repository sees: every file's name and bytes."""
        repo = self.repos[repo_id]
        commit = repo.commits[repo.resolve(revision) or ""]
        return {name: self.content(blob.sha256).read_bytes() for name, blob in commit.items()}

    def received(self, pattern: str) -> int:
        """Bytes of request bodies that came with `METHOD path` like `pattern`."""
        return sum(r.received for r in self.log if re.search(pattern, f"{r.method} {r.path}"))

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


class _Handler(WriteRoutes, BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; Nagle would hold the second one back

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        self.range = self.headers.get("Range")
        self.status, self.sent, self.received = 0, 0, 0
        self.fault = self.hub.take_fault(f"{self.command} {self.path} {self.range or 'whole'}")
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.on_cdn = (self.headers.get("Host") or "").startswith("localhost")
        self.unread = int(self.headers.get("Content-Length") or 0)
        try:
            if self.fault and self.fault.hold and self.fault.after is None and self.fault.received is None:
                self.fault.stop(self.connection)
            if self.command != "PUT" or not self.on_cdn or (self.fault and self.fault.status):
                self.form = b"".join(self._receive()) or b"{}"
            if self.fault and self.fault.status:
                words = HTTPStatus(self.fault.status).phrase
                raise HubError(self.fault.status, words, **self.fault.headers)
            self._route(url.path)
        except HubError as error:
            self.close_connection = self.unread > 0
            self._json({"error": error.message, **error.more}, error.status, error.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            host = "cdn" if self.on_cdn else "hub"
            line = Request(self.command, self.path, self.range, self.status, self.sent, host, self.token, self.received)
            self.hub.log.append(line)

    do_HEAD = do_POST = do_PUT = do_GET

    def _receive(self) -> Iterator[bytes]:
        """The request's body, in pieces; as slow and as short as the fault wants it."""
        cut = self.fault.received if self.fault else None
        while self.unread and (cut is None or self.received < cut):
            data = self.rfile.read(min(CHUNK, self.unread, CHUNK if cut is None else cut - self.received))
            if not data:
                raise ConnectionResetError("the client went away")
            self.unread -= len(data)
            self.received += len(data)
            time.sleep(self.fault.delay if self.fault else 0)
            yield data
        if cut is not None and self.received >= cut:
            self.fault.stop(self.connection)
            # With no time to linger, closing sends a reset instead of a polite end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise ConnectionResetError("as the fault wants it")

    def log_message(self, format: str, *args: object) -> None:
        pass

    # ---- routes ------------------------------------------------------------------------------------------------------

    def _route(self, path: str) -> None:
        if self.on_cdn:
            return self._cdn(path)
        if self.token is not None and self.token not in self.hub.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        for method, pattern, answer in self._routes():
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                parts = {name: unquote(value or "") for name, value in match.groupdict().items()}
                if "id" not in parts:
                    return answer(**parts)
                if parts["id"] in self.hub.moved:
                    new = f"{path}?{urlsplit(self.path).query}".replace(parts["id"], self.hub.moved[parts["id"]], 1)
                    raise HubError(307, "Temporary Redirect", Location=new.rstrip("?"))
                return answer(self._repo(parts.pop("id")), **parts)
        raise HubError(404, "Not found")

    def _routes(self) -> Iterator[tuple[str, str, Callable[..., None]]]:
        yield "GET", rf"/api/models/{ID}/refs", self._refs
        yield "GET", rf"/api/models/{ID}/tree/{REVISION}(?:/(?P<folder>.+))?", self._tree
        yield "POST", rf"/api/models/{ID}/paths-info/{REVISION}", self._paths_info
        yield "GET", rf"/api/models/{ID}/revision/{REVISION}", self._info
        yield "GET", rf"/api/models/{ID}", self._info
        yield "GET HEAD", rf"/{ID}/resolve/{REVISION}/(?P<file>.+)", self._resolve
        yield from self._write_routes()

    def _repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self._may_read(repo)):
            # The Hub does not tell strangers which repositories exist.
            if self.token is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def _may_read(self, repo: Repo) -> bool:
        user = self.hub.users.get(self.token or "")
        return self.token in repo.tokens or (user is not None and repo.id.split("/")[0] in (user.name, *user.orgs))

    def _commit(self, repo: Repo, revision: str) -> tuple[str, dict[str, Blob]]:
        sha = repo.resolve(revision)
        if sha is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo.commits[sha]

    def _info(self, repo: Repo, revision: str = "main") -> None:
        sha, files = self._commit(repo, revision)
        blobs = "blobs" in self.query
        siblings = [{"rfilename": path, **(_entry(path, blob) if blobs else {})} for path, blob in files.items()]
        card = _card_data(self.hub.content(files["README.md"].sha256)) if "README.md" in files else {}
        info = {"_id": sha[:24], "id": repo.id, "modelId": repo.id, "sha": sha, "siblings": siblings}
        info |= {"tags": card.get("tags", []), **({"cardData": card} if card else {})}
        gated = "manual" if repo.gated is True else repo.gated
        more = {"private": repo.private, "gated": gated, "disabled": False, "downloads": 0, "likes": 0}
        self._json({**info, **more, "lastModified": DATE, "createdAt": DATE})

    def _refs(self, repo: Repo) -> None:
        refs = [
            {"name": n, "ref": n if n.startswith("refs/") else f"refs/heads/{n}", "targetCommit": sha}
            for n, sha in repo.refs.items()
        ]
        pulls = [ref for ref in refs if ref["name"].startswith("refs/pr/")]
        answer = {"branches": [ref for ref in refs if ref not in pulls], "tags": [], "converts": []}
        self._json({**answer, **({"pullRequests": pulls} if "include_prs" in self.query else {})})

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
            raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
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
        if repo.gated and not self._may_read(repo):
            why = f"Access to model {repo.id} is restricted"
            if self.token is None:
                raise HubError(401, f"{why}. You must be authenticated to access it. Please log in.", "GatedRepo")
            raise HubError(403, f"{why} and you are not in the authorized list.", "GatedRepo")
        if file not in files:
            raise HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        blob = files[file]
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes", "ETag": f'"{blob.oid}"'}
        if not blob.lfs:
            return self._content(blob, headers)
        headers |= {"X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.sha256}"'}
        if blob.xet:
            route = f"{self.hub.url}/api/models/{repo.id}/xet-read-token/{sha}"
            headers |= {"X-Xet-Hash": blob.xet, "Link": f'<{route}>; rel="xet-auth"', "X-Xet-Refresh-Route": route}
        location = f"http://localhost:{self.hub.port}/blobs/{blob.sha256}?filename={quote(file)}"
        self._send(302, b"", {**headers, "Location": location})

    def _cdn(self, path: str) -> None:
        match = re.fullmatch(rf"/(blobs|lfs)/{SHA256}", path)
        if self.token is not None:  # as S3 answers a signed address that comes with a token
            raise HubError(400, "Only one auth mechanism allowed")
        if match and match.group(1) == "lfs" and self.command == "PUT":
            return self._lfs_put(match["sha256"])
        if not match or not self.hub.content(match["sha256"]).exists():
            raise HubError(404, "Not found")
        sha256 = match["sha256"]
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
                raise HubError(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{blob.size}"})
            status = 206
            headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{blob.size}"}
        with self.hub.content(blob.sha256).open("rb") as file:
            file.seek(start)
            self._send(status, file.read(end - start), {"Content-Type": "application/octet-stream", **headers})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if self.fault and self.fault.lie:
            status, headers, body = self.fault.lie(status, {**headers}, body)
        self.status = status
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), "X-Request-Id": "Root=1-00000000-local", **headers}
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if int(headers["Content-Length"] or 0) != len(body):
            self.close_connection = True
        if self.command == "HEAD":
            return
        cut = self.fault.after if self.fault else None
        piece = self.fault.piece if self.fault else CHUNK
        for at in range(0, len(body[:cut]), piece):
            self.sent += self.wfile.write(body[:cut][at : at + piece])
            time.sleep(self.fault.delay if self.fault else 0)
        if cut is not None:
            self.fault.stop(self.connection)
            self.close_connection = True


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    """A file in a listing."""
    entry = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "sha256": blob.sha256, "size": blob.size, "pointerSize": 134}
    if blob.xet:
        entry["xetHash"] = blob.xet
    return entry


def _card_data(readme: Path) -> dict[str, Any]:
    """The metadata at the top of a model card."""
    match = re.match(r"---\n(.*?)\n---", readme.read_text(), re.DOTALL)
    return (yaml.safe_load(match.group(1)) if match else None) or {}
