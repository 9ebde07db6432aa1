"""Which variant of norm_linear runs for which shape, as measured: kept on disk, per GPU and version of the sources."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flashnorm_cli.cuda.linear import Problem
from flashnorm_cli.cuda.linear_variants import Variant, source

FORMAT = 1


class Choice(NamedTuple):
    """What runs: a variant, or the library where that is None. Times in us, where they were measured."""

    variant: Variant | None
    us: float | None = None
    library_us: float | None = None


_lock = threading.Lock()
_known: dict[str, dict[str, Choice]] = {}  # name of the GPU -> key -> choice


def folder() -> Path:
    """Where choices are kept: $FLASHNORM_CACHE, or the platform's place for caches."""
    if own := os.environ.get("FLASHNORM_CACHE"):
        return Path(own)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "flashnorm"


@cache
def sources_hash() -> str:
    """Changes with the kernels: choices of other versions are not taken over."""
    return hashlib.sha256((source("one_row") + source("few_rows")).encode()).hexdigest()[:12]


@cache
def gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def file_of(gpu: str) -> Path:
    return folder() / f"norm_linear-{re.sub('[^A-Za-z0-9]+', '-', gpu)}-{sources_hash()}.json"


def _key(problem: Problem, rows: int) -> str:
    return " ".join(map(str, (*map(int, problem), rows)))


def choice_of(problem: Problem, rows: int, index: int) -> Choice | None:
    """What was chosen for one of MEASURED_ROWS, or None if nothing was yet."""
    return _of_gpu(gpu_name(index)).get(_key(problem, rows))


def remember(problem: Problem, rows: int, index: int, choice: Choice, save: bool = True) -> None:
    """Keep a choice for this process, and with `save` for later ones."""
    gpu = gpu_name(index)
    _of_gpu(gpu)[_key(problem, rows)] = choice
    if save:
        save_choices(gpu)


def save_choices(gpu: str) -> Path | None:
    """Write what is known of a GPU, with what other processes have written. None where the folder cannot be written."""
    path = file_of(gpu)
    with _lock, suppress(OSError):  # without a cache the next process measures again
        merged = {**_read(path), **_known.get(gpu, {})}
        entries = {key: _packed(choice) for key, choice in sorted(merged.items())}
        text = json.dumps({"format": FORMAT, "gpu": gpu, "sources": sources_hash(), "choices": entries}, indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".norm_linear-")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text + "\n")
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)
        return path
    return None


def _of_gpu(gpu: str) -> dict[str, Choice]:
    if gpu not in _known:
        with _lock:
            if gpu not in _known:
                _known[gpu] = _read(file_of(gpu))
    return _known[gpu]


def _packed(choice: Choice) -> dict[str, Any]:
    variant = None if choice.variant is None else {k: v for k, v in vars(choice.variant).items() if v}
    return {"variant": variant, "us": choice.us, "library_us": choice.library_us}


def _read(path: Path) -> dict[str, Choice]:
    """The choices in a file; none from a file that is not there or not ours."""
    found: dict[str, Choice] = {}
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        data = json.loads(path.read_text())
        if data["format"] == FORMAT and data["sources"] == sources_hash():
            for key, entry in data["choices"].items():
                variant = None if entry["variant"] is None else Variant(**entry["variant"])
                found[key] = Choice(variant, entry["us"], entry["library_us"])
    return found
