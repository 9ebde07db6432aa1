"""A checkpoint as its files say it is: config, safetensors headers, and everything else that travels along.

Nothing here reads a weight. A local folder and a Hub repository look the same to the callers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from flashnorm_cli.errors import CheckpointError, FlashNormError, UsageError
from flashnorm_cli.safetensors_file import (
    LENGTH_BYTES,
    Header,
    TensorEntry,
    header_size,
    parse_header,
    read_header,
)

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
    of the files to carry over, `left_out` those of weights in other formats.
    """

    source: Source
    folder: Path
    commit: str | None
    config: dict[str, Any]
    shards: dict[str, Header]
    index: dict[str, Any] | None
    others: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)

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


def open_checkpoint(source: Source, weights: bool = True) -> Checkpoint:
    """Find a checkpoint and check that its files hold together.

    Args:
        source: a local folder or a Hub id.
        weights: whether the shards themselves have to be on this disk; without, a Hub repository costs its small
            files and one ranged request per shard.
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
    return _open_hub(source, weights)


# ---- local folders ---------------------------------------------------------------------------------------------------


def _open_folder(source: Source, folder: Path, commit: str | None) -> Checkpoint:
    config = _read_config(folder)
    index, names = _shard_names(folder)
    shards = {name: read_header(folder / name) for name in names}
    _check_index(index, shards, folder)
    others: list[str] = []
    left_out: list[str] = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_dir() or {".git", ".cache"} & set(relative.parts) or relative.as_posix() in (*names, CONFIG, INDEX):
            continue
        if path.name.endswith(tuple(OTHER_WEIGHTS)):
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


def _shard_names(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX)
        names = index_shards(index, str(folder / INDEX))
        for name in names:
            if not (folder / name).exists():
                raise CheckpointError(f"{folder}: {INDEX} names {name}, which is not there")
        return index, names
    if (folder / SINGLE).exists():
        return None, [SINGLE]
    if any(folder.glob("pytorch_model*.bin")) or any(folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder}: holds no safetensors, only .bin weights; convert it first: python -c "
            f"\"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}', dtype='auto')"
            f".save_pretrained('{folder.name}-safetensors')\""
        )
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    if found:
        raise CheckpointError(f"{folder}: there is neither {SINGLE} nor {INDEX}, only {', '.join(found[:3])}")
    raise CheckpointError(f"{folder}: there are no safetensors weights ({SINGLE} or {INDEX})")


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
    except errors.EntryNotFoundError as error:
        raise FlashNormError(f"{name}: {str(error).splitlines()[0]}") from None
    except errors.HFValidationError as error:
        raise UsageError(f"{name}: no folder here, and not a Hub id: {error}") from None
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise FlashNormError(f"{name}: the Hub could not be reached: {lines[0] if lines else error!r}") from None
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise
        raise FlashNormError(f"{name}: the Hub could not be reached: {error}") from None


def _open_hub(source: Source, weights: bool) -> Checkpoint:
    from huggingface_hub import snapshot_download

    ignore = [f"*{suffix}" for suffix in OTHER_WEIGHTS if suffix != ".safetensors"]
    if not weights:
        ignore.append("*.safetensors")
    with hub_errors(source.name):
        folder = Path(
            snapshot_download(
                source.name,
                revision=source.revision,
                token=source.token,
                cache_dir=source.cache_dir,
                local_files_only=source.local_files_only,
                ignore_patterns=ignore,
            )
        )
    commit = folder.name
    if weights or source.local_files_only:
        return _open_folder(source, folder, commit)
    config = _read_config(folder)
    index = read_json(folder / INDEX) if (folder / INDEX).exists() else None
    names = index_shards(index, f"{source.name}/{INDEX}") if index else [SINGLE]
    with hub_errors(source.name):
        shards = _hub_headers(source, commit, names)
    _check_index(index, shards, source.name)
    others = tuple(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))
    return Checkpoint(source, folder, commit, config, shards, index, others)


def _hub_headers(source: Source, commit: str, names: list[str]) -> dict[str, Header]:
    from huggingface_hub import HfFileSystem

    hub = HfFileSystem(token=source.token)

    def header(name: str) -> Header:
        path = f"{source.name}@{commit}/{name}"
        size = int(hub.info(path)["size"])
        start = hub.cat_file(path, start=0, end=min(FIRST_BYTES, size), cache_type="none")
        need = header_size(start[:LENGTH_BYTES], size, f"{source.name}/{name}")
        if need > len(start):
            start += hub.cat_file(path, start=len(start), end=need, cache_type="none")
        return parse_header(start[:need], size, f"{source.name}/{name}")

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(header, names), strict=True))
