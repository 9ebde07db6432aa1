"""Time variants of the kernels against one another, to choose the numbers in flashnorm_cli/norms/launch.py.

    python docs/benchmarks/kernels_tune.py OUTPUT.json [rms_norm] [fused_add_rms_norm] [weighted]

One H200 took about two minutes. Prints the best variants per shape beside the one that `choose` takes now.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from flashnorm_cli.bench.timing import graph_times
from flashnorm_cli.cuda import driver, variants
from flashnorm_cli.cuda.variants import Launch, Operation

BFLOAT16 = 0
EPS = 1e-5


def caller(plan: driver.Plan, buffers: list[tuple[Any, ...]], gain: torch.Tensor | None) -> Callable[[int], object]:
    at = 0 if gain is None else gain.data_ptr()
    return lambda i: driver.launch_plan(plan, 0, buffers[i][0].data_ptr(), buffers[i][1].data_ptr(), at, EPS)


def candidates(operation: Operation, hidden: int, rows: int) -> list[Launch]:
    fused = operation != "rms_norm"
    accesses = hidden // 8
    traffic = hidden * rows * (8 if fused else 4)
    found = set()
    pers = (1, 2, 4) if rows > 264 else (1, 2, 4, 8)
    splits = (1, 2, 4, 8) if rows * accesses <= 132 * 256 and accesses >= 128 else (1,)
    for split in splits:
        for per in pers:
            wanted = -(-accesses // (per * (split if fused else 1)))
            if wanted > 1024 or (per * 4 * (2 if fused else 1) > 32 and wanted > 512):
                continue
            threads = variants._threads(accesses // split if fused else accesses, per)
            actual = -(-accesses // threads)
            if not fused and split > 1 and actual < split:
                continue
            for policy in (False, True) if traffic > 20e6 else (False,):
                for block in (128, 256) if threads <= 64 and rows > 264 else (1,):
                    n = max(1, block // threads) if split == 1 else 1
                    if rows <= 264 and threads < 32:
                        n = max(1, 32 // threads)
                    for pdl in (True, False) if rows <= 4096 else (True,):
                        found.add(Launch(16, threads, n, split, True, policy, pdl))
    return sorted(found, key=lambda c: (c.threads, c.rows, c.split, c.policy))


def main() -> None:
    output, kinds = sys.argv[1], sys.argv[2:] or ["rms_norm", "fused_add_rms_norm"]
    gain = 1 if "weighted" in kinds else 0
    operations: list[Operation] = [o for o in variants.OPERATIONS if o in kinds]
    device = driver.device(0)
    few = [(h, t) for h in (576, 2048, 4096, 8192, 16384) for t in (1, 16, 64, 256)]
    many = [(h, t) for h in (576, 2048, 3072, 4096, 5120, 8192, 16384) for t in (4096, 65536) if h * t <= 2**29]
    heads = [(64, 1 << 20), (128, 1 << 20), (256, 1 << 19), (128, 32), (128, 2048)]
    work = []
    for operation in operations:
        for hidden, rows in few + many + heads:
            choice = variants.choose(operation, hidden, 2, 16, rows, device, weighted=gain > 0)
            choices = {*candidates(operation, hidden, rows), choice, replace(choice, pdl=False)}
            work.append((operation, hidden, rows, choice, sorted(choices, key=str)))
    with ThreadPoolExecutor(16) as pool:
        jobs = [(o, c, BFLOAT16, gain, h, r, 0) for o, h, r, _, cs in work for c in cs]
        plans = dict(zip(jobs, pool.map(lambda j: driver.plan_of(*j), jobs), strict=True))
    arena = [torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    results = []
    for operation, hidden, rows, current, choices_now in work:
        n = hidden * rows
        weight = torch.rand(hidden, device="cuda").bfloat16() if gain else None
        big = n > 2_000_000
        sets = max(1, min((1 << 30) // n, 128 if big else 100))
        sets = min(sets, max(2, int(6e8 // (n * 4)) + 1)) if big else sets
        buffers = [tuple(a[i * n : (i + 1) * n].view(rows, hidden) for a in arena) for i in range(sets)]
        contenders = {
            str(c): caller(plans[operation, c, BFLOAT16, gain, hidden, rows, 0], buffers, weight) for c in choices_now
        }
        launches = max(4, sets * 2) if big else 200
        times, failed = graph_times(contenders, sets, launches, 7 if n > 1e8 else 11)
        middle = {name: median(t) for name, t in times.items()}
        best = sorted(choices_now, key=lambda c: middle.get(str(c), 1e9))
        results.append(
            {
                "operation": operation,
                "weighted": bool(gain),
                "hidden": hidden,
                "rows": rows,
                "failed": failed,
                "variants": [{**asdict(c), "us": round(middle.get(str(c), -1), 3)} for c in best],
            }
        )
        print(
            f"{operation[:5]} {hidden:6} {rows:8} now {short(current, middle)}",
            f"without PDL {short(replace(current, pdl=False), middle)} best",
            *(short(c, middle) for c in best[:4]),
            flush=True,
        )
    Path(output).write_text(json.dumps(results, indent=1) + "\n")


def short(choice: Launch, times: dict[str, float]) -> str:
    marks = ("p" if choice.policy else "") + ("d" if choice.pdl else "")
    return f"{choice.threads}x{choice.rows}/{choice.split}{marks}={times.get(str(choice), -1):.2f}"


if __name__ == "__main__":
    main()
