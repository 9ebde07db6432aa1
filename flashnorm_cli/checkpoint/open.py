"""A checkpoint as its files say it is: config, safetensors headers, and everything else that travels along.

Nothing here reads a weight. A local folder and a Hub repository look the same to the callers.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from flashnorm_cli.checkpoint.belongs import Closed, is_whole_model, sort_files
from flashnorm_cli.checkpoint.carry import find_files
from flashnorm_cli.checkpoint.config_values import check_config
from flashnorm_cli.checkpoint.files import open_file
from flashnorm_cli.checkpoint.header import Header, read_header
from flashnorm_cli.checkpoint.hub import (
    RemoteFile,
    cached_listing,
    checked_files,
    hub_headers,
    hub_reader,
    progress_bar,
)
from flashnorm_cli.checkpoint.hub_errors import hub_errors, is_bad_answer, with_retry
from flashnorm_cli.checkpoint.model import (
    CONFIG,
    INDEX,
    OTHER_WEIGHTS,
    RECORD,
    SINGLE,
    Checkpoint,
    LeftOut,
    Progress,
    Source,
    read_json,
)
from flashnorm_cli.errors import CheckpointError, FlashNormError, UsageError, shown


def open_checkpoint(source: Source, weights: bool = True, on_progress: Progress | None = None) -> Checkpoint:
    """Find a checkpoint and check that its files hold together.

    Args:
        source: a local folder or a Hub id.
        weights: whether the shards themselves have to be on this disk; without, a Hub repository costs its small
            files and one ranged request per shard.
        on_progress: called with (bytes done, bytes in all, what is going on) while shards are downloaded.
    Returns:
        What the files say, for `make_plan` and for looking at: no weight is in memory.
    Raises:
        UsageError: the name is neither a folder nor a Hub id.
        CheckpointError: the files do not hold together, or a link leads out of the folder.
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
    if not os.path.lexists(folder / CONFIG):
        read_json(folder / CONFIG)  # says so, before a large folder is looked through
    found = find_files(folder, source.follow_links)
    config = _read_config(folder)
    index_name, index, names = _weights(config, folder, str(folder), found.files)
    shards = {name: read_header(folder / name) for name in names}
    _check_index(index, index_name, shards, folder)
    check_config(config, (e for header in shards.values() for e in header.tensors.values()), str(folder / CONFIG))
    rest = {name: seen.size for name, seen in found.files.items() if name not in (*names, CONFIG, index_name)}

    def opened(name: str) -> BinaryIO:
        return open_file(folder / name)

    others, left_out = sort_files(shards, rest, opened, _is_folded(config, rest))
    for name in others:
        if not os.access(folder / name, os.R_OK):
            raise CheckpointError(f"{shown(folder / name)}: cannot be read, so it cannot be carried over")
    left_out += [LeftOut(name, 0, "a link to a folder that it lies in") for name in found.loops]
    left_out.sort(key=lambda each: each.name)
    seen = {name: found.files[name] for name in others}
    return Checkpoint(
        source, folder, commit, config, shards, index, tuple(others), tuple(left_out), index_name or INDEX, seen
    )


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG)
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        raise CheckpointError(f"{folder / CONFIG}: architectures is no list of class names")
    return config


def _is_folded(config: dict[str, Any], files: Collection[str]) -> bool:
    return RECORD in files or "flashnorm" in config or bool(config.get("flashnorm_folded"))


def _weights(
    config: dict[str, Any], folder: Path, where: str, files: Collection[str]
) -> tuple[str | None, dict[str, Any] | None, list[str]]:
    """The index's name and content, or None twice, and the shards of a checkpoint of these files, as transformers
    finds them; `where` names it in errors.
    """
    chosen = _chosen_weights(config, where, files)
    index_name = chosen if chosen and chosen.endswith(".json") else INDEX if chosen is None else None
    single = SINGLE if chosen is None else chosen
    if index_name in files:
        index = read_json(folder / str(index_name))
        names = index_shards(index, f"{where}/{index_name}")
        for name in names:
            if name not in files:
                if (folder / name).is_dir():
                    raise CheckpointError(f"{folder / name}: Is a directory")
                raise CheckpointError(f"{where}: {index_name} names {shown(name)}, which is not there")
        if chosen is None and SINGLE in files and SINGLE not in names:  # transformers loads the file, vLLM the shards
            raise CheckpointError(f"{where}: holds {SINGLE} beside {INDEX}; runtimes disagree which counts: remove one")
        return index_name, index, names
    if single in files:
        return None, None, [str(single)]
    raise CheckpointError(_no_weights(config, where, files))


def _chosen_weights(config: dict[str, Any], where: str, files: Collection[str]) -> str | None:
    """The file of weights that config.json names, in the way of transformers 5; None if it leaves that open."""
    chosen = config.get("transformers_weights")
    if chosen is None:
        return None
    says = f"{where}: {CONFIG} says transformers_weights {shown(repr(chosen))[:100]}"
    if not isinstance(chosen, str) or not chosen.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(f"{says}, which is neither a safetensors file nor the index of some")
    name = os.path.normpath(chosen)
    if "/" in name or name.startswith("."):
        raise CheckpointError(f"{says}; only a file beside {CONFIG} can be folded: move the weights there")
    if name not in files:
        raise CheckpointError(f"{says}, which is not there")
    return name


def _no_weights(config: dict[str, Any], where: str, files: Collection[str]) -> str:
    """What to do about a folder without weights that could be folded."""
    here = sorted(name for name in files if "/" not in name)
    safetensors = [name for name in here if name.endswith(".safetensors")]
    if not safetensors and any(name.endswith(".bin") for name in here):
        convert = _conversion(config, where)
        return f"{where}: holds no safetensors, only .bin weights; convert it first: python -c {convert}"
    if not safetensors:
        below = sorted(name for name in files if name.endswith((f"/{SINGLE}", f"/{INDEX}")))
        hint = f"; {shown(PurePosixPath(below[0]).parent)} holds some: name that folder" if below else ""
        return f"{where}: there are no safetensors weights ({SINGLE} or {INDEX}){hint}"
    only = f"{where}: there is neither {SINGLE} nor {INDEX}, only {', '.join(map(shown, safetensors[:3]))}"
    variants = {
        found.group(1) for name in here if (found := re.match(r"model\.(?:safetensors\.index\.)?(\w+)\.", name))
    }
    variants -= {"safetensors"}
    if variants:
        variant = min(variants)
        return (
            f"{only}: a variant, which transformers loads only when asked to; make it the model: from_pretrained(..., "
            f"variant='{variant}').save_pretrained(...), then fold that"
        )
    if any(re.fullmatch(r".*-\d+-of-\d+\.safetensors", name) for name in safetensors):
        return f"{only}: the index is missing, which says what each of them holds"
    if any(name.startswith("consolidated") for name in safetensors):
        return f"{only}: the format of the model's own authors; convert it to transformers' first"
    return only


def _conversion(config: dict[str, Any], where: str) -> str:
    """Python for a shell that writes weights as safetensors, by the class that keeps all that they hold: config.json's.

    A class of the checkpoint's own code is loaded by the auto class that stands for it.
    """
    import transformers

    names = [name for name in config.get("architectures") or [] if isinstance(name, str) and name.isidentifier()]
    auto_map = config.get("auto_map")
    own = {
        str(code).rsplit(".", 1)[-1]: auto
        for auto, code in (auto_map.items() if isinstance(auto_map, dict) else ())
        if auto.startswith("AutoModel") and hasattr(transformers, auto)
    }
    auto = next((own[name] for name in names if name in own), None)
    known = (name for name in names if hasattr(transformers, name))
    trust = ", trust_remote_code=True" if auto else ""
    output = f"{where.rsplit('/', 1)[-1]}-safetensors"
    code = (
        f"from transformers import {auto or next(known, 'AutoModelForCausalLM')} as M; "
        f"M.from_pretrained({where!r}, dtype='auto'{trust}).save_pretrained({output!r})"
    )
    return f'"{code}"' if not set(code) & set('"$`\\!') else shlex.quote(code)


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


def _check_index(
    index: dict[str, Any] | None, index_name: str | None, shards: dict[str, Header], where: Path | str
) -> None:
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
            raise CheckpointError(f"{where}: {index_name} says that {tensor} is in {shard}, but it {there}")


# ---- the Hub ---------------------------------------------------------------------------------------------------------


def _open_hub(source: Source, weights: bool, on_progress: Progress | None) -> Checkpoint:
    """Small files always come to the cache; shards, and other files of tensors that travel, only for `weights`."""
    from huggingface_hub import constants

    with hub_errors(source.name):
        folder = _download(source, source.revision, ignore_patterns=[f"*{suffix}" for suffix in OTHER_WEIGHTS])
        commit = folder.name
        sizes, listed = cached_listing(source, folder)
    if CONFIG not in sizes:
        raise CheckpointError(f"{source.name}: there is no {CONFIG}: is this a transformers checkpoint?")
    here = [name for name in find_files(folder).files if not name.endswith(tuple(OTHER_WEIGHTS))]
    checked_files(source, folder, here, listed)
    config = _read_config(folder)
    index_name, index, names = _weights(config, folder, source.name, sizes)
    offline = source.local_files_only or constants.HF_HUB_OFFLINE
    cached = all((folder / name).exists() for name in names)
    if not cached and source.local_files_only:
        raise FlashNormError(f"{source.name}: its weights are not in the Hub cache, and the network is off")
    bar = progress_bar(f"Downloading {source.name}", on_progress)
    if not cached and weights:
        with hub_errors(source.name):
            _download(source, commit, allow_patterns=names, tqdm_class=bar)
    if cached or weights:
        sha256 = checked_files(source, folder, names, listed, on_progress) if weights else {}
        shards = {name: read_header(folder / name) for name in names}
    else:
        sha256 = {}
        with hub_errors(source.name):
            shards = hub_headers(source, commit, {name: sizes[name] for name in names})
    _check_index(index, index_name, shards, source.name)
    check_config(config, (e for h in shards.values() for e in h.tensors.values()), f"{source.name}/{CONFIG}")

    def opened(name: str) -> Any:
        if (folder / name).exists():
            return open_file(folder / name)
        if offline or is_whole_model(name):  # on the Hub such a name is not looked behind
            raise Closed
        return RemoteFile(hub_reader(source.name, commit, source.token, sizes), name, sizes[name])

    rest = {name: size for name, size in sizes.items() if name not in (*names, CONFIG, index_name)}
    rest = {name: size for name, size in rest.items() if not {".git", ".cache"} & set(name.split("/"))}
    with hub_errors(source.name):
        others, left_out = sort_files(shards, rest, opened, _is_folded(config, rest))
    absent = [name for name in others if not (folder / name).exists()]
    if absent and offline:
        raise FlashNormError(f"{source.name}: {shown(absent[0])} is not in the Hub cache, and the network is off")
    found = Checkpoint(
        source,
        folder,
        commit,
        config,
        shards,
        index,
        tuple(others),
        tuple(left_out),
        index_name or INDEX,
        sha256=sha256,
    )
    return fetch_others(found, on_progress) if weights else _with_seen(found)


def fetch_others(checkpoint: Checkpoint, on_progress: Progress | None = None) -> Checkpoint:
    """The same checkpoint with every file on this disk that travels along; the shards stay where they are.

    Raises FlashNormError where the Hub says no.
    """
    absent = [name for name in checkpoint.others if not (checkpoint.folder / name).exists()]
    if absent:
        source = checkpoint.source
        bar = progress_bar(f"Downloading {source.name}", on_progress)
        with hub_errors(source.name):
            _download(source, checkpoint.commit, allow_patterns=[glob.escape(name) for name in absent], tqdm_class=bar)
        checked_files(source, checkpoint.folder, absent, cached_listing(source, checkpoint.folder)[1])
    return _with_seen(checkpoint)


def _with_seen(checkpoint: Checkpoint) -> Checkpoint:
    files = find_files(checkpoint.folder).files
    return replace(checkpoint, seen={name: files[name] for name in checkpoint.others if name in files})


def _download(source: Source, revision: str | None, **more: Any) -> Path:
    from huggingface_hub import snapshot_download

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
