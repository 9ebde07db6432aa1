"""What a caller may ask of `verify`, checked before any work."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import torch

from flashnorm_cli.checkpoint.model import Source
from flashnorm_cli.choices import Dtype, Level, Runtime
from flashnorm_cli.errors import UsageError
from flashnorm_cli.proof.result import LEVELS, MAX_ALGEBRA_ERROR, MAX_NOISE_RATIO
from flashnorm_cli.proof.tasks import named_tasks

RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class VerifyOptions:
    """What is run, on what, and what counts as equivalent: the arguments of `verify`.

    Raises UsageError for task files without a task, and for values that contradict themselves or this machine.
    """

    levels: tuple[Level, ...] = LEVELS
    runtimes: tuple[Runtime, ...] = ()
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    text: Path | None = None
    token_ids: Path | None = None
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    dtype: Dtype | None = None
    max_algebra: float = MAX_ALGEBRA_ERROR
    max_ratio: float = MAX_NOISE_RATIO
    insist: bool = False
    trust_remote_code: bool = False
    workers: int | None = None

    def __post_init__(self) -> None:
        for given, known, what in ((self.levels, LEVELS, "levels"), (self.runtimes, RUNTIMES, "runtimes")):
            for each in given:
                if each not in known:
                    raise UsageError(f"`{what}` is one of {', '.join(known)}, not {each!r}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"`dtype` is one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"`workers` has to be at least 1, not {self.workers}")
        if not 0 < self.max_algebra < math.inf or not 0 < self.max_ratio < math.inf:
            raise UsageError("`max_algebra` and `max_ratio` have to be greater than 0, and finite")
        if self.text is not None and self.token_ids is not None:
            raise UsageError("`text` and `token_ids` exclude each other")
        named_tasks(self.tasks)
        _check_device(self.device)


@dataclass(frozen=True)
class Access:
    """How both checkpoints are reached, as in huggingface_hub."""

    token: str | bool | None = None
    cache_dir: Path | None = None
    local_files_only: bool = False
    follow_links: bool = False

    def source(self, name: str, revision: str | None = None) -> Source:
        """A checkpoint by its folder or Hub id."""
        return Source(name, revision, self.token, self.cache_dir, self.local_files_only, self.follow_links)


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise UsageError(f"{device!r} is not a device; try cpu, cuda or cuda:1") from None
    if kind.type not in ("cpu", "cuda"):
        raise UsageError(f"{device!r}: only cpu and cuda are supported")
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"{device}: torch sees no CUDA device here")
    if kind.index is not None and kind.type == "cuda" and kind.index >= torch.cuda.device_count():
        raise UsageError(f"{device}: there are {torch.cuda.device_count()} CUDA devices")
