"""Tensors of a checkpoint, read from its shards."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch

from flashnorm_cli.checkpoint.hub import hub_reader
from flashnorm_cli.checkpoint.hub_errors import hub_errors
from flashnorm_cli.checkpoint.model import Checkpoint
from flashnorm_cli.errors import CheckpointError

# What can be scaled or filled, and the integers that show its bits.
TORCH_DTYPE = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}

_settings = threading.Lock()
# What each job that is at work in this process found: torch's number of threads, and its precision of float32 products.
_threads: list[int] = []
_precisions: list[tuple[str, ...]] = []
Setting = TypeVar("Setting")


@contextmanager
def _while_at_work(
    jobs: list[Setting], read: Callable[[], Setting], write: Callable[[Setting], object], value: Setting
) -> Iterator[None]:
    """A setting of the whole process. Several jobs may be under way at a time: the last one restores it."""
    with _settings:
        jobs.append(jobs[0] if jobs else read())
        write(value)
    try:
        yield
    finally:
        with _settings:
            before = jobs.pop()
            if not jobs:
                write(before)


def one_thread_each() -> AbstractContextManager[None]:
    """Keep torch from starting threads where ours are the parallelism."""
    return _while_at_work(_threads, torch.get_num_threads, torch.set_num_threads, 1)


def float32_products() -> AbstractContextManager[None]:
    """Products of float32 matrices in float32, and not in TF32 or bf16, whatever the process has chosen for models.

    By backend: torch's one setting for all raises where they differ.
    """
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]

    def write(values: tuple[str, ...]) -> None:
        for backend, value in zip(backends, values, strict=True):
            backend.fp32_precision = value

    def read() -> tuple[str, ...]:
        return tuple(backend.fp32_precision for backend in backends)

    return _while_at_work(_precisions, read, write, ("ieee", "ieee"))


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
            sizes = {shard: checkpoint.shards[shard].file_size}
            read = hub_reader(checkpoint.source.name, checkpoint.commit, checkpoint.source.token, sizes)
            raw = bytearray(read(shard, first, last))
    if len(raw) != last - first:
        raise CheckpointError(f"{path}: {tensor} ends early")
    return raw


def read_tensors(checkpoint: Checkpoint, names: Collection[str]) -> dict[str, bytearray]:
    """The bytes of some tensors, read as by `read_bytes`, several at a time."""

    def read(name: str) -> bytearray:
        return read_bytes(checkpoint, name, 0, checkpoint.tensors[name].nbytes)

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(read, names), strict=True))


def read_tensor(checkpoint: Checkpoint, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
    """A tensor's values in its own dtype, or those of its first dimension from rows[0] to rows[1]."""
    entry = checkpoint.tensors[name]
    dtype = TORCH_DTYPE[entry.dtype]
    start, end = rows or (0, entry.shape[0])
    row = math.prod(entry.shape[1:]) * dtype.itemsize
    raw = read_bytes(checkpoint, name, start * row, end * row)
    return torch.frombuffer(raw, dtype=dtype).view(end - start, *entry.shape[1:])
