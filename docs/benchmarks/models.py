"""Decode and prefill of two Llama shapes with their norms on different code, into one JSON file.

    python docs/benchmarks/models.py OUTPUT.json [llama-3.2-1b | llama-3.1-8b]

What is timed, and how, is `flashnorm bench <model>`'s.
About eight minutes on an H200, most of it decoding token by token.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from flashnorm_cli.bench import kernels, models

RUNS = (
    ("llama-3.2-1b", "decode, CUDA graph", 20, models.WAYS),
    ("llama-3.2-1b", "decode", 20, ("stock", "notebook swap", "flashnorm", "flashnorm fused")),
    ("llama-3.2-1b", "prefill", 5, models.WAYS),
    ("llama-3.2-1b", "decode, compiled", 20, ("stock", "flashnorm")),
    ("llama-3.1-8b", "decode, CUDA graph", 10, models.WAYS),
    ("llama-3.1-8b", "prefill", 5, models.WAYS),
    ("llama-3.1-8b", "decode", 3, ("stock", "flashnorm", "flashnorm fused")),
)


def main() -> None:
    output, rows = Path(sys.argv[1]), []
    name, model = "", None
    runs = [run for run in RUNS if not sys.argv[2:] or run[0] in sys.argv[2:]]
    for wanted, mode, turns, ways in runs:
        if wanted != name:
            model = None  # free its memory first
            name, model = wanted, models.load(wanted, True, "cuda", torch.bfloat16, False)
        for row in models.bench(model, turns, 256, modes=(mode,), ways=ways):
            rows.append({"model": name, **row})
            print({k: v for k, v in rows[-1].items() if k != "trials"}, flush=True)
        record = kernels.record(
            " ".join(["python docs/benchmarks/models.py", output.name, *sys.argv[2:]]), [], models=rows
        )
        output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
