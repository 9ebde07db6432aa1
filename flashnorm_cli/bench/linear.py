"""Time norm_linear beside the norm and the library's matmul, on the shapes of models, on cold weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from flashnorm_cli.bench.timing import graph_times
from flashnorm_cli.cuda import driver, linear
from flashnorm_cli.cuda.linear import Problem
from flashnorm_cli.cuda.linear_variants import ACTIVATIONS, MEASURED_ROWS, source
from flashnorm_cli.norms.tuning import Calls, tune

SILU = ACTIVATIONS.index("silu")
# hidden, intermediate, rows of q, k and v together; Llama 3.2 1B and 3B, 3.1 8B, and one of eight GPUs' part of 70B.
MODELS = {
    "1b": (2048, 8192, 3072, 2048),
    "3b": (3072, 8192, 5120, 3072),
    "8b": (4096, 14336, 6144, 4096),
    "70b / 8": (8192, 3584, 1280, 1024),
}
_READS = (2, 4, 8, 16)  # accesses of a thread of the read kernel; the fastest counts


def problems_of(hidden: int, intermediate: int, qkv: int, attention: int, dtype: int = 0) -> dict[str, Problem]:
    """The four products of a layer: with the norm, with the norm and SiLU, and with the residual."""
    return {
        "norm, q k v": Problem(hidden, qkv, dtype, True, 0, False),
        "o, residual": Problem(attention, hidden, dtype, False, 0, True),
        "norm, gate up, SiLU": Problem(hidden, intermediate, dtype, True, SILU, False),
        "down, residual": Problem(intermediate, hidden, dtype, False, 0, True),
    }


def measure(problem: Problem, rows: int, index: int, trials: int = 15) -> dict[str, Any]:
    """Microseconds per call of each contender; medians over turns, and each turn.

    Contenders: flashnorm (what norm_linear does, its choice), norm + library + epilogue (three or more kernels), the
    library's matmul alone, and reads of the matrix.
    """
    choice = tune([problem], index, [rows])[problem, rows]
    calls = Calls(problem, rows, index)
    ours = calls.library if choice.variant is None else calls.kernel(choice.variant)
    if ours is None:
        raise RuntimeError("the chosen kernel does not compile")
    sets = len(calls.weights)
    contenders: dict[str, Callable[[int], object]] = {
        "flashnorm": ours,
        "norm + library": calls.library,
        "library, product alone": lambda i: F.linear(calls.x[0], calls.weights[i % sets]),
    }
    contenders |= {f"read {each}": _read(calls.weights, each, index) for each in _READS}
    times, failed = graph_times(contenders, sets, calls.launches, trials)
    middle = {name: median(each) for name, each in times.items()}
    read = min(value for name, value in middle.items() if name.startswith("read "))
    bytes_of = calls.weights[0].numel() * 2
    return {
        **problem._asdict(),
        "dtype": str(linear.DTYPES[problem.dtype]).removeprefix("torch."),
        "activation": ACTIVATIONS[problem.activation],
        "rows": rows,
        "megabytes": round(bytes_of / 1e6, 2),
        "variant": None if choice.variant is None else {k: v for k, v in vars(choice.variant).items() if v},
        "us": {name: round(value, 3) for name, value in middle.items()},
        "share_of_read": round(read / middle["flashnorm"], 4),
        "times_norm_and_library": round(middle["norm + library"] / middle["flashnorm"], 3),
        "terabytes_per_s": round(bytes_of / middle["flashnorm"] / 1e6, 3),
        "turns": {name: [round(value, 3) for value in each] for name, each in times.items()},
        "failed": failed,
    }


def _read(weights: Sequence[torch.Tensor], each: int, index: int) -> Callable[[int], None]:
    package = driver.cupy()
    kernel = package.RawKernel(source("read", shared=False), "read", (f"-DEACH={each}",))
    out = torch.zeros(1, dtype=torch.int32, device=f"cuda:{index}")
    count = weights[0].numel() * 2 // 16
    blocks = -(-count // (256 * each))

    def run(i: int) -> None:
        address = weights[i % len(weights)].data_ptr()
        with package.cuda.ExternalStream(driver.get_stream(index), index):
            kernel((blocks,), (256,), (address, count, out.data_ptr()))

    return run


def sweep(
    models: Sequence[str] = tuple(MODELS),
    rows: Sequence[int] = MEASURED_ROWS,
    trials: int = 15,
    on_result: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """`measure` over models and rows, on the current GPU."""
    index, found = torch.cuda.current_device(), []
    todo = [(m, part, p) for m in models for part, p in problems_of(*MODELS[m]).items()]
    tune([p for _, _, p in todo], index, rows)
    with torch.no_grad():
        for model, part, problem in todo:
            for count in rows:
                row = {"model": model, "part": part, **measure(problem, count, index, trials)}
                found.append(row)
                on_result(row)
    return found


def line_of(row: dict[str, Any]) -> str:
    """A row as one line of text."""
    us = row["us"]
    read = min(v for name, v in us.items() if name.startswith("read "))
    variant = "library" if row["variant"] is None else json.dumps(row["variant"])
    return (
        f"{row['model']:8} {row['part']:20} rows {row['rows']:2} {us['flashnorm']:8.2f} us, read {read:8.2f} "
        f"({100 * row['share_of_read']:5.1f} %), norm + library x{row['times_norm_and_library']:.2f}, "
        f"product alone {us.get('library, product alone', float('nan')):8.2f}  {variant}"
    )
