"""All shapes that docs/kernels.md speaks of, with every contender that is installed, into one JSON file.

    python docs/benchmarks/kernels.py OUTPUT.json [--flashinfer fi.so] [--hidden N ...] [--tokens N ...]

`--flashinfer` takes the library that kernels_flashinfer.cu makes. What is timed, and how, is `flashnorm bench`'s.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flashnorm_cli.bench import kernels, report
from flashnorm_cli.bench.contenders import EPS, Buffers
from flashnorm_cli.cli.tables import text_table
from flashnorm_cli.cuda import driver


def flashinfer(path: str) -> dict[str, list[Any]]:
    library = ctypes.CDLL(path)
    for name, pointers in (("fi_norm", 3), ("fi_fused", 3)):
        getattr(library, name).argtypes = [ctypes.c_void_p] * pointers + [
            ctypes.c_uint, ctypes.c_uint, ctypes.c_float, ctypes.c_void_p
        ]  # fmt: skip

    def call(function: Any, first: torch.Tensor, second: torch.Tensor, third: torch.Tensor) -> None:
        code = function(
            first.data_ptr(),
            second.data_ptr(),
            third.data_ptr(),
            first.size(0),
            first.size(-1),
            EPS,
            driver.get_stream(0),
        )
        if code:
            raise RuntimeError(f"CUDA error {code}")

    def norm(b: Buffers) -> Any:
        return lambda i: call(library.fi_norm, b.x[i], b.weight, b.other[i])

    def fused(b: Buffers) -> Any:
        return lambda i: call(library.fi_fused, b.x[i], b.other[i], b.weight)

    return {
        "rms_norm": [("FlashInfer, weight", True, norm)],
        "fused_add_rms_norm": [("FlashInfer fused, weight", True, fused)],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--flashinfer")
    parser.add_argument("--hidden", type=int, nargs="+", default=kernels.HIDDEN)
    parser.add_argument("--tokens", type=int, nargs="+", default=kernels.TOKENS)
    parser.add_argument("--trials", type=int, default=9)
    options = parser.parse_args()
    extra = flashinfer(options.flashinfer) if options.flashinfer else {}
    results = []
    start = time.perf_counter()
    for hidden in options.hidden:
        for tokens in options.tokens:
            for operation in ("rms_norm", "fused_add_rms_norm"):
                results += kernels.measure(
                    operation, hidden, tokens, trials=options.trials, host=tokens == 1, extra=extra.get(operation, ())
                )
            print(f"{hidden} x {tokens}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            command = f"python docs/benchmarks/kernels.py {options.output.name}"
            command += f" --flashinfer {Path(options.flashinfer).name}" if options.flashinfer else ""
            record = kernels.record(command, [])
            lines = ",\n".join(f"  {json.dumps(asdict(r))}" for r in results)  # a line each, so that diffs can be read
            options.output.write_text(f"{json.dumps(record, indent=1)[:-5]}[\n{lines}\n ]\n}}\n")
    for operation in ("rms_norm", "fused_add_rms_norm"):
        print(operation, *text_table(*report.rows_of(results, operation)), sep="\n")
    print(*text_table(*report.host_rows(results)), *report.words(results), sep="\n")
    print(*(f"{r.contender} {r.hidden}x{r.tokens}: {r.error}" for r in results if r.error), sep="\n")


if __name__ == "__main__":
    main()
