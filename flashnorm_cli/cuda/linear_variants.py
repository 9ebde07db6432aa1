"""The variants of the kernels of norm_linear, as data: which there are for a shape. Needs neither torch nor a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

Kernel = Literal["one_row", "few_rows"]
ACTIVATIONS = ("none", "silu", "gelu_tanh", "gelu")
MAX_ROWS = 16
# Numbers of rows that a choice is measured for; others take that of the next larger one.
MEASURED_ROWS = (1, 2, 4, 8, 16)
_VECTOR = 16  # bytes of an access
_SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
_SHARED_OF_OTHERS = 99 << 10


@dataclass(frozen=True)
class Variant:
    """One way to multiply; `kernels/norm_linear` says what the numbers mean.

    one_row takes `lines` and `groups`; few_rows takes `tiles`, `rows8` and `chunks`.
    """

    kernel: Kernel
    parts: int
    depth: int
    lines: int = 0
    groups: int = 0
    tiles: int = 0
    rows8: int = 0
    chunks: int = 0

    @property
    def threads(self) -> int:
        return 32 * self.parts * (self.groups or 1)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block: the slots of its threads, and where few_rows adds up afterwards."""
        fetched = self.lines or self.tiles * self.chunks * 2
        sums = self.parts * self.tiles * self.rows8 * 8 * 20 * 4
        return max(self.depth * fetched * _VECTOR * self.threads, sums)

    def blocks(self, n: int, activation: int) -> int:
        """The size of the grid for n outputs."""
        each = self.groups * self.lines or self.tiles * 16
        return -(-n // (each // 2 if activation else each))

    def options(self, dtype: int, k: int, norm: bool, activation: int, pdl: bool) -> tuple[str, ...]:
        """The -D options of NVRTC. `dtype` is 0 for bfloat16 and 1 for float16, `activation` a position."""
        values: dict[str, Any] = {
            "DTYPE": dtype,
            "K": k,
            "NORM": int(norm),
            "ACT": activation,
            "PARTS": self.parts,
            "DEPTH": self.depth,
            "PDL": int(pdl),
        }
        if self.kernel == "one_row":
            values |= {"LINES": self.lines, "GROUPS": self.groups}
        else:
            values |= {"TILES": self.tiles, "ROWS8": self.rows8, "CHUNKS": self.chunks}
        return tuple(f"-D{name}={value}" for name, value in values.items())


def shared_limit(arch: int) -> int:
    """Bytes of dynamic shared memory that a block may have on a compute capability (90 is sm_90)."""
    return _SHARED.get(arch, _SHARED.get(arch // 10 * 10, _SHARED_OF_OTHERS) if arch // 10 != 12 else _SHARED_OF_OTHERS)


@cache
def source(kernel: str, shared: bool = True) -> str:
    """The CUDA source of a kernel, with the shared part in front."""
    try:
        installed = find_spec("flashnorm_cli.kernels.norm_linear")
    except ModuleNotFoundError:
        installed = None
    if installed is not None and installed.origin is not None:
        folder = Path(installed.origin).parent
    else:  # a checkout that runs without having been installed
        folder = Path(__file__).parents[2] / "kernels" / "norm_linear"
    front = folder.joinpath("shared.cuh").read_text() if shared else ""
    return front + folder.joinpath(f"{kernel}.cu").read_text()


def bucket_of(rows: int) -> int:
    """The number of rows, of MEASURED_ROWS, whose choice `rows` rows take."""
    return next(each for each in MEASURED_ROWS if rows <= each)


def candidates(k: int, activation: int, rows: int, arch: int) -> list[Variant]:
    """The variants that are worth measuring for `rows` rows of k elements, likely ones first.

    Args:
        activation: a position in ACTIVATIONS; with one, W has two halves.
        arch: compute capability, which limits shared memory (90 is sm_90).
    """
    limit, found = shared_limit(arch), []
    for each in _one_row(k, bool(activation)) if rows == 1 else _few_rows(k, 1 if rows <= 8 else 2):
        if each.shared_bytes <= limit and each not in found:
            found.append(each)
    return found


# Of 40 and more per shape that were measured on an H100 (docs/kernels.md), those that were within 2 % of the best one
# for some shape of a 1B or 8B model; what is good most often comes first.
# (parts, depth, lines, groups)
_ONE_ROW = (
    (2, 4, 2, 4),
    (4, 2, 2, 2),
    (4, 4, 2, 2),
    (8, 4, 2, 1),
    (2, 4, 4, 4),
    (8, 2, 2, 1),
    (1, 4, 2, 8),
    (4, 8, 2, 2),
    (4, 4, 4, 2),
    (4, 8, 1, 2),
    (1, 8, 4, 8),
)
# (parts, depth, tiles, chunks)
_FEW_ROWS = (
    (16, 2, 1, 1),
    (16, 2, 2, 2),
    (8, 2, 4, 1),
    (16, 2, 4, 1),
    (16, 2, 1, 4),
    (16, 4, 2, 1),
    (8, 2, 1, 4),
    (8, 2, 1, 2),
    (16, 8, 1, 1),
    (16, 4, 1, 1),
    (8, 2, 2, 2),
    (16, 1, 2, 4),
)


def _one_row(k: int, paired: bool) -> Iterator[Variant]:
    for parts, depth, lines, groups in _ONE_ROW:
        turns = -(-(k // 8) // (32 * parts))
        if lines > 1 or not paired:
            yield Variant("one_row", parts, min(depth, turns), lines=lines, groups=groups)


def _few_rows(k: int, rows8: int) -> Iterator[Variant]:
    for parts, depth, tiles, chunks in _FEW_ROWS:
        stretches = (k + 31) // 32
        turns = -(-stretches // (parts * chunks))
        yield Variant("few_rows", parts, min(depth, turns), tiles=tiles, rows8=rows8, chunks=chunks)
