"""Checkpoints on the Hub: headers and tensors by ranged requests, files into the cache, and neither believed blindly.

A proxy or a CDN may answer a ranged request with the whole file, another range or another file, and a byte may flip
on the way. So a range counts only with the status, Content-Range, length and commit that belong to it, and a file only
with the hash that the repository's listing has for it.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashnorm_cli.checkpoint.header import LENGTH_BYTES, Header, header_size, parse_header
from flashnorm_cli.checkpoint.hub_client import BadAnswer
from flashnorm_cli.checkpoint.hub_errors import hub_errors, with_retry
from flashnorm_cli.checkpoint.model import Progress, Source
from flashnorm_cli.errors import CheckpointError, FlashNormError

# Enough for most headers, so that a Hub shard costs one request.
FIRST_BYTES = 1 << 18
BLOCK = 1 << 20
IN_GIT = 64 << 20  # the Hub takes nothing larger into git itself; its limit is 10 MB
RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
SHA256, SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


def progress_bar(what: str, report: Progress | None) -> type[Any]:
    """A progress bar class for huggingface_hub that hands bytes on to `report` and draws nothing."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"  # the other ones count files
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if report and self.counts_bytes:
                report(int(self.n), int(self.total or 0), what)

    return Bar


# ---- ranges ----------------------------------------------------------------------------------------------------------


def hub_reader(
    repo_id: str, commit: str, token: str | bool | None, sizes: Mapping[str, int], endpoint: str | None = None
) -> Callable[[str, int, int], bytes]:
    """A function that reads the bytes [start, end) of a file in a Hub repository.

    `sizes` are the whole files' in bytes, as the repository lists them. The function raises BadAnswer where an answer
    is not that range of that file, after it has asked again.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

    # Not HfFileSystem: it lists the repository again in each thread, and knows no ids without a user ("gpt2").
    # Compressed, the bytes of a range would not be those of the file.
    headers = {**build_hf_headers(token=token), "Accept-Encoding": "identity"}

    def read(name: str, start: int, end: int) -> bytes:
        url = hf_hub_url(repo_id, name, revision=commit, endpoint=endpoint)

        def ask() -> bytes:
            wanted = {**headers, "Range": f"bytes={start}-{end - 1}"}
            with get_session().stream("GET", url, headers=wanted) as answer:
                hf_raise_for_status(answer)
                _check_range(answer, name, start, end, sizes[name], commit)
                return _body(answer, name, end - start)

        return with_retry(ask)

    return read


def _check_range(answer: Any, name: str, start: int, end: int, size: int, commit: str) -> None:
    """Raise BadAnswer unless the head of an answer says that its body is the range that was asked for."""
    for step in (*answer.history, answer):
        if step.headers.get("X-Repo-Commit", commit) != commit:
            raise BadAnswer(f"answered with {name} of another commit, {step.headers['X-Repo-Commit']}")
        if step.headers.get("X-Linked-Size", str(size)) != str(size):
            raise BadAnswer(f"says that {name} has {step.headers['X-Linked-Size']} bytes, and its listing {size}")
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise BadAnswer(
            f"answered with {name} compressed ({answer.headers['Content-Encoding']}), where bytes were asked"
        )
    whole = start == 0 and end == size
    if answer.status_code == 200 and whole:
        found: tuple[int, int, int] | None = (0, size, size)
    elif answer.status_code == 206:
        match = RANGE.fullmatch(answer.headers.get("Content-Range", "").strip())
        found = (int(match[1]), int(match[2]) + 1, size if match[3] == "*" else int(match[3])) if match else None
    else:
        raise BadAnswer(
            f"answered {answer.status_code} to a request for a part of {name}: it, or a proxy on the way, sends whole "
            "files only"
        )
    if found != (start, end, size):
        told = answer.headers.get("Content-Range") or "nothing"
        raise BadAnswer(f"answered with another part of {name}: {told} instead of bytes {start}-{end - 1}/{size}")


def _body(answer: Any, name: str, length: int) -> bytes:
    """Exactly `length` bytes; of a longer answer, no more than it takes to see that it is one."""
    data = bytearray()
    for part in answer.iter_raw():
        data += part
        if len(data) > length:
            raise BadAnswer(f"sent more than the {length} bytes of {name} that were asked for")
    if len(data) < length:
        raise BadAnswer(f"sent {len(data)} of the {length} bytes of {name} that were asked for")
    return bytes(data)


class RemoteFile(io.RawIOBase):
    """A file on the Hub for a parser that reads its beginning or its end: in blocks, and a few at most."""

    BLOCK, MOST = 1 << 18, 64

    def __init__(self, read: Callable[[str, int, int], bytes], name: str, size: int) -> None:
        self._read, self._path, self._size = read, name, size
        self._position = 0
        self._blocks: dict[int, bytes] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = max(0, offset + (0, self._position, self._size)[whence])
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, n: int = -1) -> bytes:
        """Up to `n` bytes. Raises ValueError beyond the most blocks: such a file tells nothing cheaply."""
        end = self._size if n < 0 else min(self._position + n, self._size)
        data = b""
        while self._position < end:
            number, start = divmod(self._position, self.BLOCK)
            if number not in self._blocks:
                if len(self._blocks) == self.MOST:
                    raise ValueError(f"{self._path}: takes more than {self.MOST} requests to look into")
                first = number * self.BLOCK
                self._blocks[number] = self._read(self._path, first, min(first + self.BLOCK, self._size))
            piece = self._blocks[number][start : start + end - self._position]
            if not piece:
                break
            data += piece
            self._position += len(piece)
        return data


def hub_headers(source: Source, commit: str, sizes: dict[str, int]) -> dict[str, Header]:
    """The shards' headers, by ranged requests: one for each shard, or two where its header is long."""
    read = hub_reader(source.name, commit, source.token, sizes)

    def header(name: str) -> Header:
        where, size = f"{source.name}/{name}", sizes[name]
        start = read(name, 0, min(FIRST_BYTES, size)) if size else b""
        need = header_size(start[:LENGTH_BYTES], size, where)
        if need > len(start):
            start += read(name, len(start), need)
        return parse_header(start[:need], size, where)

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(sizes, pool.map(header, sizes), strict=True))


# ---- whole files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ContentId:
    """What a file's bytes are known by: their sha256, their id in git, and that of the LFS pointer to them.

    `oid` is empty for a file that is too large to be anything but an LFS file.
    """

    sha256: str
    oid: str
    pointer: str

    def is_one_of(self, known: Collection[str]) -> bool:
        return bool({self.sha256, self.oid, self.pointer} & {*known})


def content_id(path: Path, on_bytes: Callable[[int], None] = lambda n: None) -> ContentId:
    """Read a file for its hashes; `on_bytes` is told of each block."""
    sha256, size = hashlib.sha256(), path.stat().st_size
    oid = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False) if size <= IN_GIT else None
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            sha256.update(block)
            if oid:
                oid.update(block)
            on_bytes(len(block))
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256.hexdigest()}\nsize {size}\n".encode()
    of_pointer = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer, usedforsecurity=False)
    return ContentId(sha256.hexdigest(), oid.hexdigest() if oid else "", of_pointer.hexdigest())


def cached_listing(source: Source, folder: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Sizes and ids in git of a repository's files, as `snapshot_download` has listed them for a snapshot.

    Where a huggingface_hub that kept no listing has filled the cache, the sizes are those of the files that are there,
    and there are no ids.
    """
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = get_cached_repo_tree(source.name, revision=folder.name, cache_dir=source.cache_dir)
    except CachedRepoTreeNotFoundError:
        paths = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}, {}
    return {file.path: file.size for file in tree}, {file.path: file.blob_id for file in tree}


def checked_files(
    source: Source,
    folder: Path,
    names: Collection[str],
    listed: Mapping[str, str],
    report: Progress | None = None,
) -> dict[str, str]:
    """Make sure that files of a snapshot in the cache are those that the Hub lists; returns their sha256, by name.

    A file that is another one, because it changed on the way or since, is downloaded once more.

    Args:
        source: the repository, and how to reach it.
        folder: its snapshot in the cache; its name is the commit.
        names: the files, relative to `folder`.
        listed: the files' ids in git as the repository lists them (of an LFS file, that of its pointer). Of a file that
            is not in here, the name that the cache gives its content is believed: the Hub's ETag.
        report: called with (bytes done, bytes in all, what is going on).
    Raises:
        CheckpointError: it is still another one.
    """
    commit = folder.name
    total, done = sum((folder / name).stat().st_size for name in names), 0

    def on_bytes(n: int) -> None:
        nonlocal done
        done += n  # several threads: what is shown may lag behind by a block
        if report:
            report(min(done, total), total, f"Checking {source.name}")

    def check(name: str) -> str:
        path = folder / name
        found = content_id(path, on_bytes)
        if not _meant(source, commit, name, path, found, listed):
            if not source.local_files_only:
                with suppress(FlashNormError), hub_errors(source.name):  # what is wrong is said below in any case
                    with_retry(lambda: _download_again(source, commit, name))
                found = content_id(path)
            if not _meant(source, commit, name, path, found, listed):
                raise CheckpointError(
                    f"{source.name}: {name} is not the file that the Hub lists: its bytes changed on the way, or in "
                    f"the cache since; remove {path.resolve()} and run it again"
                )
        return found.sha256

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(check, names), strict=True))


def _download_again(source: Source, commit: str, name: str) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(
        source.name,
        name,
        revision=commit,
        token=source.token,
        cache_dir=source.cache_dir,
        force_download=True,
        tqdm_class=progress_bar("", None),
    )


def _meant(source: Source, commit: str, name: str, path: Path, found: ContentId, listed: Mapping[str, str]) -> bool:
    """Whether content is the one that is listed under a name."""
    if name in listed and found.is_one_of([listed[name]]):
        return True
    cached_as = path.resolve().name if path.is_symlink() else ""
    if name in listed and not SHA256.fullmatch(cached_as):  # no LFS file, so its id in git is its own
        return False
    if name in listed and not source.local_files_only:  # a pointer that is not written as git-lfs writes it
        return found.is_one_of(listed_ids(source, commit, [name]).get(name, (cached_as,)))
    if SHA256.fullmatch(cached_as) or SHA1.fullmatch(cached_as):
        return found.is_one_of([cached_as])
    return True  # a cache without links, filled by a huggingface_hub that kept no listing: nothing to compare with


def listed_ids(source: Source, commit: str, names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """What the Hub lists files as: the sha256 of those in LFS, the ids in git of others."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api, wanted, found = HfApi(token=source.token), list(names), dict[str, tuple[str, ...]]()
    for start in range(0, len(wanted), 500):  # the Hub answers for 1,000 at most
        batch = wanted[start : start + 500]

        def ask(batch: list[str] = batch) -> list[Any]:
            return api.get_paths_info(source.name, batch, revision=commit)

        with hub_errors(source.name):
            files = with_retry(ask)
        found.update({f.path: (f.lfs.sha256 if f.lfs else f.blob_id,) for f in files if isinstance(f, RepoFile)})
    return found
