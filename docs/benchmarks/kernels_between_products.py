"""Time variants of the norms between matrix products, as in decoding: with and without programmatic dependent launch.

    python docs/benchmarks/kernels_between_products.py OUTPUT.json

Norm follows norm in kernels.py. In a model a norm stands between matrix products whose weights come from memory; what
it adds to them is measured here, as the time of a graph of both less that of a graph of the products alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from kernels_tune import BFLOAT16, EPS, candidates, short

from flashnorm_cli.bench import kernels
from flashnorm_cli.bench.timing import graph_times
from flashnorm_cli.cuda import driver, variants

HIDDEN, ROWS = (2048, 4096, 8192), (1, 4, 16, 64)


def measure(operation: variants.Operation, hidden: int, rows: int) -> dict[str, Any]:
    """Microseconds that each variant, and torch, add to a product of `rows` x hidden with hidden x hidden."""
    fused, shape = operation == "fused_add_rms_norm", (hidden,)
    count = max(4, min(40, 600_000_000 // (hidden * hidden * 2)))
    products = [torch.randn(hidden, hidden, device="cuda").bfloat16() / hidden**0.5 for _ in range(count)]
    x, y = (torch.randn(rows, hidden, device="cuda").bfloat16() for _ in range(2))
    residual = torch.randn_like(x)
    now = variants.choose(operation, hidden, 2, 16, rows, driver.device(0))
    choices = {now, *candidates(operation, hidden, rows)}
    choices |= {replace(choice, pdl=False) for choice in choices}
    with ThreadPoolExecutor(16) as pool:
        compiled = pool.map(lambda c: driver.plan_of(operation, c, BFLOAT16, 0, hidden, rows, 0), choices)
        plans = dict(zip(choices, compiled, strict=True))

    def chain(norm: Callable[[torch.Tensor, torch.Tensor], object]) -> Callable[[int], object]:
        def call(i: int) -> None:
            a, b = (x, y) if fused and i % 2 else (y, x)
            torch.mm(a, products[i % count], out=b)
            norm(b, a)  # in place, or into what the product has read; the next product reads the result

        return call

    def ours(plan: driver.Plan) -> Callable[[int], object]:
        if fused:
            return chain(lambda b, a: driver.launch_plan(plan, 0, b.data_ptr(), residual.data_ptr(), 0, EPS))
        return chain(lambda b, a: driver.launch_plan(plan, 0, b.data_ptr(), a.data_ptr(), 0, EPS))

    contenders = {short_name(c): ours(plan) for c, plan in plans.items() if plan is not None}
    contenders["products"] = chain(lambda b, a: None)
    contenders["torch"] = chain(lambda b, a: F.rms_norm(b + residual if fused else b, shape, None, EPS))
    times, failed = graph_times(contenders, 2 * count, 2 * count if count > 10 else 8 * count, 15)
    middle = {name: median(t) for name, t in times.items()}
    added = {name: round(us - middle["products"], 3) for name, us in middle.items() if name != "products"}
    order = sorted(added, key=lambda name: added[name])
    row = {"operation": operation, "hidden": hidden, "rows": rows, "products_us": round(middle["products"], 3)}
    return {**row, "now": short_name(now), "added_us": {name: added[name] for name in order}, "failed": failed}


def short_name(choice: variants.Launch) -> str:
    """Threads x rows / split, then p for POLICY and d for PDL."""
    return short(choice, {}).partition("=")[0]


def main() -> None:
    output, rows = Path(sys.argv[1]), []
    for operation in variants.OPERATIONS:
        for hidden in HIDDEN:
            for count in ROWS:
                rows.append(measure(operation, hidden, count))
                added, now = rows[-1]["added_us"], rows[-1]["now"]
                best = ", ".join(f"{name} {us}" for name, us in list(added.items())[:4])
                print(
                    f"{operation} {hidden} x {count}: now {now} {added[now]}, torch {added['torch']}; {best}",
                    flush=True,
                )
    record = kernels.record(f"python docs/benchmarks/{Path(__file__).name} {output.name}", [], rows=rows)
    output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
