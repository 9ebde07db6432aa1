"""Which variant of a kernel runs: everything that is chosen on the host, as data. Needs neither torch nor a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

Operation = Literal["rms_norm", "fused_add_rms_norm", "copy"]
OPERATIONS: tuple[Operation, ...] = ("rms_norm", "fused_add_rms_norm")
DTYPES = ("bfloat16", "float16", "float32")
GAINS = ("none", "w", "1 + w")
MAX_BLOCKS = 2**31 - 1


@dataclass(frozen=True)
class Device:
    """What a choice depends on: compute capability (90 is sm_90), multiprocessors, bytes of L2."""

    arch: int
    processors: int
    l2: int


@dataclass(frozen=True)
class Launch:
    """One variant of a kernel; `kernels/norms/row.cuh` says what the numbers mean."""

    width: int
    threads: int
    rows: int = 1
    split: int = 1
    keep: bool = True
    policy: bool = False
    pdl: bool = False
    dims: int = 1

    def options(self, dtype: int, gain: int, hidden: int) -> tuple[str, ...]:
        """The -D options of NVRTC. `dtype` and `gain` are positions in DTYPES and GAINS."""
        values = {
            "DTYPE": dtype,
            "GAIN": gain,
            "HIDDEN": hidden,
            "WIDTH": self.width,
            "THREADS": self.threads,
            "ROWS": self.rows,
            "SPLIT": self.split,
            "KEEP": int(self.keep),
            "POLICY": int(self.policy),
            "PDL": int(self.pdl),
            "DIMS": self.dims,
        }
        return tuple(f"-D{name}={value}" for name, value in values.items())

    def blocks(self, rows: int) -> int:
        """The size of the grid."""
        return -(-rows // self.rows) * self.split


@cache
def source(operation: Operation) -> str:
    """The CUDA source of an operation, with the shared part in front."""
    installed = find_spec("flashnorm_cli.kernels")
    if installed is not None and installed.origin is not None:
        folder = Path(installed.origin).parent
    else:  # a checkout that runs without having been installed
        folder = Path(__file__).parents[2] / "kernels" / "norms"
    return folder.joinpath("row.cuh").read_text() + folder.joinpath(f"{operation}.cu").read_text()


def width_of(*addresses: int) -> int:
    """Bytes per access, 16 at most, that divide all of these addresses, strides and lengths in bytes."""
    everything = 16
    for address in addresses:
        everything |= address
    return everything & -everything


def choose(
    operation: Operation,
    hidden: int,
    size: int,
    width: int,
    rows: int,
    device: Device,
    dims: int = 1,
    weighted: bool = False,
) -> Launch:
    """The variant for `rows` rows of `hidden` elements of `size` bytes, read `width` bytes at a time.

    The numbers come from measurements on an H200 (docs/kernels.md).
    """
    fused = operation == "fused_add_rms_norm"
    accesses = hidden * size // width
    traffic = hidden * size * rows * (4 if fused else 2)
    split, at_most = 1, 1024
    many = rows > 2 * device.processors
    if accesses <= 32:
        per = 1 if many else 2
    elif many:
        # Enough rows to fill the chip. Blocks of few warps let others run while they wait for their sum.
        if accesses <= 128:
            per = -(-accesses // (64 if fused else 32))
        elif fused:
            per = 1
        else:
            per, at_most = (4 if weighted and accesses > 512 else 2), 512
    elif accesses <= 128:
        per = 1 if fused else -(-accesses // 32)
    elif rows > device.processors:
        per, at_most = 1, 1024 if fused else 512
    elif fused:
        per = 1 if accesses >= 1024 and rows > device.processors // 4 else 2
        most = device.processors // (4 if accesses >= 2048 else 16)
        if device.arch >= 90 and accesses >= 1024 and rows <= most and width == 16:
            per, split = (2 if accesses >= 2048 else 1), 8
    elif rows * accesses <= 250 * device.processors and width == 16:
        # A short row is enough for one warp of each of four blocks, which needs no barrier.
        per, split = (8, 4) if accesses <= 256 else (2, 2) if accesses <= 512 and rows > 4 else (4, 4)
    else:
        per = 2 if accesses <= 256 else 4
    threads = min(_threads(-(-accesses // split) if fused else accesses, per), at_most)
    held = -(-accesses // (threads * (split if fused else 1)))
    words = max(width // 4, 1) * held * (2 if fused else 1)
    # What fits beside the addresses without spilling: 64 registers at 1024 threads, 128 at 512.
    keep = words <= ((32 if fused else 24) if threads > 512 else 64)
    if not keep:
        threads, split = 1024, 1
    block = 256 if many and (fused or accesses <= 32) else 128 if many or accesses <= 32 else threads
    return Launch(
        width=width,
        threads=threads,
        rows=1 if split > 1 else max(1, block // threads),
        split=split,
        keep=keep,
        policy=keep and width == 16 and device.arch >= 80 and traffic >= (device.l2 if fused else device.l2 // 2),
        pdl=device.arch >= 90,
        dims=dims,
    )


def _threads(accesses: int, per: int) -> int:
    """Threads for a row of `accesses`, about `per` for each thread."""
    wanted = -(-accesses // per)
    if wanted <= 32:
        return 1 << (wanted - 1).bit_length() if wanted > 1 else 1
    return min(-(-wanted // 32) * 32, 1024)
