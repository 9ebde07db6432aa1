"""A checkpoint as its files say it is: config, safetensors headers, and everything else that travels along.

Nothing here reads a weight. A local folder and a Hub repository look the same to the callers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashnorm_cli.checkpoint.header import Header, read_header
from flashnorm_cli.checkpoint.hub import cached_listing, checked_files, hub_headers, progress_bar
from flashnorm_cli.checkpoint.hub_errors import hub_errors, is_bad_answer, with_retry
from flashnorm_cli.checkpoint.model import CONFIG, INDEX, OTHER_WEIGHTS, SINGLE, Checkpoint, Progress, Source, read_json
from flashnorm_cli.errors import CheckpointError, FlashNormError, UsageError


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


def _open_hub(source: Source, weights: bool, on_progress: Progress | None) -> Checkpoint:
    """Small files always come to the cache; shards only for `weights`, and only those that the index names."""
    from huggingface_hub import snapshot_download

    def download(revision: str | None, **more: Any) -> Path:
        def ask() -> str:
            return snapshot_download(
                source.name,
                revision=revision,
                token=source.token,
                cache_dir=source.cache_dir,
                local_files_only=source.local_files_only,
                **{"tqdm_class": progress_bar("", None), **more},
            )

        return Path(with_retry(ask, transient=is_bad_answer))

    with hub_errors(source.name):
        folder = download(source.revision, ignore_patterns=[f"*{suffix}" for suffix in OTHER_WEIGHTS])
        commit = folder.name
        sizes, listed = cached_listing(source, folder)
    if CONFIG not in sizes:
        raise CheckpointError(f"{source.name}: there is no {CONFIG}: is this a transformers checkpoint?")
    here = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    checked_files(source, folder, [n for n in here if not n.endswith(tuple(OTHER_WEIGHTS))], listed)
    index, names = _shard_names(folder, source.name, sizes)
    left_out = tuple(sorted(n for n in sizes if n.endswith(tuple(OTHER_WEIGHTS)) and n not in names))
    cached = all((folder / name).exists() for name in names)
    if not cached and source.local_files_only:
        raise FlashNormError(f"{source.name}: its weights are not in the Hub cache, and the network is off")
    if not cached and weights:
        with hub_errors(source.name):
            download(commit, allow_patterns=names, tqdm_class=progress_bar(f"Downloading {source.name}", on_progress))
    if cached or weights:
        sha256 = checked_files(source, folder, names, listed, on_progress) if weights else {}
        return replace(_open_folder(source, folder, commit), left_out=left_out, sha256=sha256)
    with hub_errors(source.name):
        shards = hub_headers(source, commit, {name: sizes[name] for name in names})
    _check_index(index, shards, source.name)
    others = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    others = [name for name in others if name not in (CONFIG, INDEX) and name not in left_out]
    return Checkpoint(source, folder, commit, read_json(folder / CONFIG), shards, index, tuple(others), left_out)
