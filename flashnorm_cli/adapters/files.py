"""Adapters as peft writes them: config, weights, card."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from flashnorm_cli.adapters.kinds import FITTING_TYPES, check_adapter_config
from flashnorm_cli.checkpoint.carry import find_files
from flashnorm_cli.checkpoint.files import Seen
from flashnorm_cli.checkpoint.header import Header, read_header
from flashnorm_cli.checkpoint.hub import cached_listing, checked_files
from flashnorm_cli.checkpoint.hub_errors import hub_errors
from flashnorm_cli.checkpoint.model import ADAPTER_CONFIG, OTHER_WEIGHTS, RECORD, Checkpoint, LeftOut, Source, read_json
from flashnorm_cli.errors import CheckpointError, FlashNormError, UsageError, shown

CONFIG, WEIGHTS, CARD = ADAPTER_CONFIG, "adapter_model.safetensors", "README.md"


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter on this disk.

    `others` are files to carry over, in `seen` as they were found; `left_out` are weights besides the adapter's own.
    """

    source: Source
    folder: Path
    commit: str | None
    config: dict[str, Any]
    header: Header
    others: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    seen: dict[str, Seen]

    @cached_property
    def _tensors(self) -> Any:
        from safetensors import safe_open

        return safe_open(self.folder / WEIGHTS, framework="pt")

    def read(self, name: str) -> torch.Tensor:
        """A tensor in its own dtype and shape."""
        return self._tensors.get_tensor(name)


def open_adapter(source: Source) -> Adapter:
    """Find an adapter and check its files. A Hub repository is downloaded, without weights in other formats.

    Raises UsageError where the name is neither a folder nor a Hub id, CheckpointError where the files are no adapter.
    """
    folder = Path(source.name).expanduser()
    commit = None
    if not folder.is_dir():
        if folder.exists():
            raise UsageError(f"{source.name}: is a file; name the folder that holds {CONFIG}")
        if source.name.startswith((".", "/", "~")) or source.name.count("/") != 1:
            raise UsageError(f"{source.name}: no such folder")
        folder = _download(source)
        commit = folder.name
    if not (folder / CONFIG).is_file():
        inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        hint = f"; it holds adapters in {', '.join(inner)}: name one of them" if inner else ": is this a PEFT adapter?"
        raise CheckpointError(f"{source.name}: there is no {CONFIG}{hint}")
    found = find_files(folder, source.follow_links)
    config = read_json(folder / CONFIG)
    check_adapter_config(config, str(folder / CONFIG))
    if not (folder / WEIGHTS).is_file():
        old = folder / "adapter_model.bin"
        if old.is_file() or commit is not None:
            raise CheckpointError(
                f"{source.name}: holds no {WEIGHTS}; a .bin file may run code when it is loaded, so convert it "
                'yourself: python -c "import torch, safetensors.torch as s; s.save_file({k: v.contiguous().clone() '
                f"for k, v in torch.load('{old}', weights_only=True).items()}}, '{folder / WEIGHTS}', "
                "{'format': 'pt'})\""
            )
        raise CheckpointError(f"{source.name}: there is no {WEIGHTS}")
    inside: dict[str, int] = {}  # adapters in subfolders, of steps of the training, say: their folders and bytes
    folders = {name.removesuffix(f"/{CONFIG}") for name in found.files if name.endswith(f"/{CONFIG}")}
    others, left_out = [], []
    for name, seen in found.files.items():
        above = [str(parent) for parent in PurePosixPath(name).parents][-2::-1]
        adapter = next((parent for parent in above if parent in folders), None)
        if adapter is not None:
            inside[adapter] = inside.get(adapter, 0) + seen.size
        elif name in (CONFIG, WEIGHTS, RECORD):
            continue
        elif name.endswith(tuple(OTHER_WEIGHTS)):
            left_out.append(LeftOut(name, seen.size, "weights besides the adapter's, made for the unfolded base"))
        elif os.access(folder / name, os.R_OK):
            others.append(name)
        else:
            raise CheckpointError(f"{shown(folder / name)}: cannot be read, so it cannot be carried over")
    left_out += [LeftOut(f"{name}/", size, "an adapter of its own; fold it by itself") for name, size in inside.items()]
    left_out += [LeftOut(name, 0, "a link to a folder that it lies in") for name in found.loops]
    left_out.sort(key=lambda each: each.name)
    seen_others = {name: found.files[name] for name in others}
    header = read_header(folder / WEIGHTS)
    return Adapter(source, folder, commit, config, header, tuple(others), tuple(left_out), seen_others)


def _download(source: Source) -> Path:
    from huggingface_hub import snapshot_download

    unwanted = [f"*{suffix}" for suffix in OTHER_WEIGHTS if suffix != ".safetensors"]
    with hub_errors(source.name):
        folder = Path(
            snapshot_download(
                source.name,
                revision=source.revision,
                token=source.token,
                cache_dir=source.cache_dir,
                local_files_only=source.local_files_only,
                ignore_patterns=[*unwanted, "checkpoint-*/*"],
            )
        )
    _, listed = cached_listing(source, folder)
    here = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    checked_files(source, folder, here, listed)
    return folder


def refuse_folded_adapter(adapter: Adapter, base: Checkpoint) -> None:
    """An adapter of the folded base itself fits already, and folding twice would break it."""
    name = adapter.source.name
    if (adapter.folder / RECORD).exists():
        raise FlashNormError(f"{name}: is folded already ({RECORD} says so); fold the adapter that it was made from")
    made_for = adapter.config.get("base_model_name_or_path")
    if isinstance(made_for, str) and made_for and same_model(made_for, base):
        raise FlashNormError(
            f"{name}: its {CONFIG} says that it was made for {made_for}, which is the folded base itself: it fits as "
            "it is. If that is wrong, write its true base there"
        )


def same_model(name: str, checkpoint: Checkpoint) -> bool:
    return _same_place(name, checkpoint.source.name) or _same_place(name, str(checkpoint.folder))


def adapter_warnings(model: Any) -> list[str]:
    """What is wrong with the adapters of a loaded folded model: one sentence for each that was made for another base.

    `model` is a PeftModel, or a transformers model with adapters. An adapter fits if its config names the folded model
    as its base, because it was trained on it or folded for it, or if its kind reads no norm.
    """
    inner = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    base_name = str(getattr(inner, "name_or_path", "") or "")
    configs = getattr(model, "peft_config", None) or getattr(inner, "peft_config", None)
    found = []
    for name, config in configs.items() if isinstance(configs, dict) else ():
        made_for = getattr(config, "base_model_name_or_path", None)
        kind = getattr(config, "peft_type", "")
        kind = str(getattr(kind, "value", kind))
        if not made_for or not base_name or kind in FITTING_TYPES or _same_place(str(made_for), base_name):
            continue
        found.append(
            f"adapter {name!r} was made for {made_for}, and this model is {base_name}, a folded checkpoint: what it "
            f"learned reads norm weights that are gone from here. Unless the two are one model under two names, run "
            f'`fold_adapter("<the adapter>", base={base_name!r})`'
        )
    return found


def _same_place(one: str, other: str) -> bool:
    if one == other:
        return True
    first, second = Path(one).expanduser(), Path(other).expanduser()
    return first.is_dir() and second.is_dir() and first.resolve() == second.resolve()
