"""A checkpoint as its files say it is: config, safetensors headers, and everything else that travels along.

Nothing here reads a weight. A local folder and a Hub repository look the same to the callers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from flashnorm_cli.checkpoint.header import LENGTH_BYTES, Header, TensorEntry, header_size, parse_header, read_header
from flashnorm_cli.errors import CheckpointError, FlashNormError, UsageError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
RECORD = "flashnorm.json"
# Weights in other formats would be an unfolded copy beside the folded one: they are left out, and named.
OTHER_WEIGHTS = (
    ".bin .bin.index.json .pt .pth .ckpt .h5 .msgpack .gguf .onnx .onnx_data .ot .tflite .mlmodel .npz .safetensors"
).split()
# Enough for most headers, so that a Hub shard costs one request.
FIRST_BYTES = 1 << 18
# done bytes, all bytes, what is going on
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Source:
    """Where a checkpoint comes from, and how to reach it."""

    name: str
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: Path | None = None
    local_files_only: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers, index and files hold together.

    `folder` holds the small files (and the shards too, unless only the headers of a Hub repository were read).
    `shards` maps the shards' file names, in the index's order, to their headers. `others` are the relative paths
    of the files to carry over, `left_out` those of weights in other formats and of links to folders. `sha256` are the
    shards' hashes where the Hub was asked for them.
    """

    source: Source
    folder: Path
    commit: str | None
    config: dict[str, Any]
    shards: dict[str, Header]
    index: dict[str, Any] | None
    others: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    sha256: dict[str, str] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor's header entry, in file order."""
        return {name: entry for header in self.shards.values() for name, entry in header.tensors.items()}

    @cached_property
    def shard_of(self) -> dict[str, str]:
        """The file that holds each tensor."""
        return {name: shard for shard, header in self.shards.items() for name in header.tensors}

    @property
    def name(self) -> str:
        """The last part of the folder's or repository's name."""
        if self.commit is not None:
            return self.source.name.rsplit("/", 1)[-1]
        return Path(self.source.name).expanduser().resolve().name


def open_checkpoint(source: Source, weights: bool = True, on_progress: Progress | None = None) -> Checkpoint:
    """Find a checkpoint and check that its files hold together.

    Args:
        source: a local folder or a Hub id.
        weights: whether the shards themselves have to be on this disk; without, a Hub repository costs its small
            files and one ranged request per shard.
        on_progress: called with (bytes done, bytes in all, what is going on) while shards are downloaded.
    Raises:
        UsageError: the name is neither a folder nor a Hub id.
        CheckpointError: the files do not hold together.
        FlashNormError: the Hub said no.
    """
    path = Path(source.name).expanduser()
    if path.is_dir():
        return _open_folder(source, path, commit=None)
    if path.exists():
        raise UsageError(f"{source.name}: is a file; name the folder that holds config.json and the shards")
    if source.name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.name):
        raise UsageError(f"{source.name}: no such folder")
    return _open_hub(source, weights, on_progress)


# ---- local folders ---------------------------------------------------------------------------------------------------


def _open_folder(source: Source, folder: Path, commit: str | None) -> Checkpoint:
    config = _read_config(folder)
    index, names = _shard_names(folder, str(folder), {path.name for path in folder.iterdir()})
    shards = {name: read_header(folder / name) for name in names}
    _check_index(index, shards, folder)
    others: list[str] = []
    left_out: list[str] = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if (
            (path.is_dir() and not path.is_symlink())
            or {".git", ".cache"} & set(relative.parts)
            or relative.as_posix() in (*names, CONFIG, INDEX)
        ):
            continue
        if path.name.endswith(tuple(OTHER_WEIGHTS)) or path.is_dir():  # a link to a folder: it may lead anywhere
            left_out.append(relative.as_posix())
        elif path.is_file() and os.access(path, os.R_OK):
            others.append(relative.as_posix())
        else:
            raise CheckpointError(f"{path}: cannot be read, so it cannot be carried over")
    return Checkpoint(source, folder, commit, config, shards, index, tuple(others), tuple(left_out))


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG)
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        raise CheckpointError(f"{folder / CONFIG}: architectures is no list of class names")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError if it is missing, or not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: there is no {path.name}: is this a transformers checkpoint?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return value


def _shard_names(folder: Path, where: str, files: Collection[str]) -> tuple[dict[str, Any] | None, list[str]]:
    """The index and the shards of a checkpoint of these files; `where` names it in errors."""
    if INDEX in files:
        index = read_json(folder / INDEX)
        names = index_shards(index, f"{where}/{INDEX}")
        for name in names:
            if name not in files:
                raise CheckpointError(f"{where}: {INDEX} names {name}, which is not there")
        if SINGLE in files and SINGLE not in names:  # transformers loads the single file, vLLM the shards
            raise CheckpointError(f"{where}: holds {SINGLE} beside {INDEX}; runtimes disagree which counts: remove one")
        return index, names
    if SINGLE in files:
        return None, [SINGLE]
    here = sorted(name for name in files if "/" not in name)
    if any(name.endswith(".bin") for name in here):
        raise CheckpointError(
            f"{where}: holds no safetensors, only .bin weights; convert it first: python -c "
            f"\"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{where}', dtype='auto')"
            f".save_pretrained('{where.rsplit('/', 1)[-1]}-safetensors')\""
        )
    found = [name for name in here if name.endswith(".safetensors")]
    if found:
        raise CheckpointError(f"{where}: there is neither {SINGLE} nor {INDEX}, only {', '.join(found[:3])}")
    raise CheckpointError(f"{where}: there are no safetensors weights ({SINGLE} or {INDEX})")


def index_shards(index: dict[str, Any], where: str) -> list[str]:
    """The shards that an index names, in its order. Raises CheckpointError for an index that is none."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise CheckpointError(f"{where}: {tensor} is said to be in {name!r}, which is no safetensors file")
        if "/" in name or "\\" in name or name.startswith("."):
            raise CheckpointError(f"{where}: {tensor} is said to be in {name!r}, outside the checkpoint's folder")
    return list(dict.fromkeys(sorted(weight_map.values())))


def _check_index(index: dict[str, Any] | None, shards: dict[str, Header], where: Path | str) -> None:
    seen: dict[str, str] = {}
    for shard, header in shards.items():
        for tensor in header.tensors:
            if tensor in seen:
                raise CheckpointError(f"{where}: {tensor} is both in {seen[tensor]} and in {shard}")
            seen[tensor] = shard
    if not seen:
        raise CheckpointError(f"{where}: the shards hold no tensors")
    for tensor, shard in index["weight_map"].items() if index else ():
        if seen.get(tensor) != shard:
            there = f"is in {seen[tensor]}" if tensor in seen else "is in no shard"
            raise CheckpointError(f"{where}: {INDEX} says that {tensor} is in {shard}, but it {there}")


# ---- the Hub ---------------------------------------------------------------------------------------------------------


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise FlashNormError(f"{name}: is gated; accept its terms on the Hub and pass --token") from None
    except errors.RevisionNotFoundError:
        raise FlashNormError(f"{name}: has no such revision") from None
    except errors.RepositoryNotFoundError:
        raise FlashNormError(
            f"{name}: neither a local folder nor a repository on the Hub (a private one needs --token)"
        ) from None
    except errors.HFValidationError as error:
        raise UsageError(f"{name}: no folder here, and not a Hub id: {error}") from None
    except errors.LocalEntryNotFoundError as error:
        # Not in the cache: either the network was not to be used, or it failed and the cache was the way out.
        if error.__cause__ is None or isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            raise FlashNormError(f"{name}: is not in the Hub cache as a whole, and the network is off") from None
        raise FlashNormError(f"{name}: {_why(error.__cause__)}") from None
    except errors.RemoteEntryNotFoundError as error:
        raise FlashNormError(f"{name}: {str(error).splitlines()[-1]}") from None
    except OSError as error:  # of the Hub, of the network, or of the disk that the cache is on
        raise FlashNormError(f"{name}: {_why(error)}") from None
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise
        raise FlashNormError(f"{name}: {_why(error)}") from None


def _why(error: BaseException) -> str:
    """What went wrong between here and the Hub, in one line."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return "the Hub does not accept the token"
        said = (error.server_message or error.response.reason_phrase).splitlines()[0]
        return f"the Hub answered {status}: {said}" + ("; try again later" if status == 429 or status >= 500 else "")
    if isinstance(error, OSError) and error.filename:
        return f"the Hub cache: {error.strerror}: {error.filename}"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"no such folder here, and the Hub could not be reached: {lines[0] if lines else type(error).__name__}"


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


def _open_hub(source: Source, weights: bool, on_progress: Progress | None) -> Checkpoint:
    """Small files always come to the cache; shards only for `weights`, and only those that the index names."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    def download(revision: str | None, **more: Any) -> Path:
        return Path(
            snapshot_download(
                source.name,
                revision=revision,
                token=source.token,
                cache_dir=source.cache_dir,
                local_files_only=source.local_files_only,
                **{"tqdm_class": progress_bar("", None), **more},
            )
        )

    with hub_errors(source.name):
        folder = download(source.revision, ignore_patterns=[f"*{suffix}" for suffix in OTHER_WEIGHTS])
        commit = folder.name
        try:
            tree = get_cached_repo_tree(source.name, revision=commit, cache_dir=source.cache_dir)
            sizes = {file.path: file.size for file in tree}
        except CachedRepoTreeNotFoundError:  # a cache that an older huggingface_hub has filled
            paths = (path for path in folder.rglob("*") if path.is_file())
            sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    if CONFIG not in sizes:
        raise CheckpointError(f"{source.name}: there is no {CONFIG}: is this a transformers checkpoint?")
    index, names = _shard_names(folder, source.name, sizes)
    left_out = tuple(sorted(n for n in sizes if n.endswith(tuple(OTHER_WEIGHTS)) and n not in names))
    cached = all((folder / name).exists() for name in names)
    if not cached and source.local_files_only:
        raise FlashNormError(f"{source.name}: its weights are not in the Hub cache, and the network is off")
    if not cached and weights:
        with hub_errors(source.name):
            download(commit, allow_patterns=names, tqdm_class=progress_bar(f"Downloading {source.name}", on_progress))
    if cached or weights:
        return replace(_open_folder(source, folder, commit), left_out=left_out)
    with hub_errors(source.name):
        shards = _hub_headers(source, commit, {name: sizes[name] for name in names})
    _check_index(index, shards, source.name)
    others = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    others = [name for name in others if name not in (CONFIG, INDEX) and name not in left_out]
    return Checkpoint(source, folder, commit, read_json(folder / CONFIG), shards, index, tuple(others), left_out)


def hub_reader(
    repo_id: str, commit: str, token: str | bool | None, endpoint: str | None = None
) -> Callable[[str, int, int], bytes]:
    """A function that reads the bytes [start, end) of a file in a Hub repository."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
        http_backoff,
    )

    # Not HfFileSystem: it lists the repository again in each thread, and knows no ids without a user ("gpt2").
    headers = build_hf_headers(token=token)

    def read(name: str, start: int, end: int) -> bytes:
        url = hf_hub_url(repo_id, name, revision=commit, endpoint=endpoint)
        wanted = {**headers, "Range": f"bytes={start}-{end - 1}"}
        answer = http_backoff("GET", url, headers=wanted, timeout=HF_HUB_DOWNLOAD_TIMEOUT, max_retries=3)
        hf_raise_for_status(answer)
        return answer.content[: end - start]

    return read


def read_bytes(checkpoint: Checkpoint, tensor: str, start: int, end: int) -> bytearray:
    """Bytes `start` to `end` of a tensor: from the disk where its shard is there, else by a ranged request.

    Raises CheckpointError where fewer arrive, FlashNormError where the Hub says no.
    """
    shard = checkpoint.shard_of[tensor]
    entry, offset = checkpoint.tensors[tensor], checkpoint.shards[shard].data_start
    first, last = offset + entry.start + start, offset + entry.start + end
    path = checkpoint.folder / shard
    if last <= first:
        return bytearray()
    if path.exists() or checkpoint.commit is None:
        try:
            with path.open("rb") as file:
                file.seek(first)
                raw = bytearray(file.read(last - first))
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error
    else:
        with hub_errors(checkpoint.source.name):
            raw = bytearray(
                hub_reader(checkpoint.source.name, checkpoint.commit, checkpoint.source.token)(shard, first, last)
            )
    if len(raw) != last - first:
        raise CheckpointError(f"{path}: {tensor} ends early")
    return raw


def read_tensors(checkpoint: Checkpoint, names: Collection[str]) -> dict[str, bytearray]:
    """The bytes of some tensors, read as by `read_bytes`, several at a time."""

    def read(name: str) -> bytearray:
        return read_bytes(checkpoint, name, 0, checkpoint.tensors[name].nbytes)

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(read, names), strict=True))


def _hub_headers(source: Source, commit: str, sizes: dict[str, int]) -> dict[str, Header]:
    """The shards' headers, by ranged requests: one for each shard, or two where its header is long."""
    read = hub_reader(source.name, commit, source.token)

    def header(name: str) -> Header:
        where, size = f"{source.name}/{name}", sizes[name]
        start = read(name, 0, min(FIRST_BYTES, size)) if size else b""
        need = header_size(start[:LENGTH_BYTES], size, where)
        if need > len(start):
            start += read(name, len(start), need)
        return parse_header(start[:need], size, where)

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(sizes, pool.map(header, sizes), strict=True))
