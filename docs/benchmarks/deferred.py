"""Models with the readers of their norms merged into them, beside stock, this project's norms, and Inductor.

    python docs/benchmarks/deferred.py llama-3.2-1b docs/benchmarks/deferred_1b.json [turns of graphs]

Needs a GPU. Also how far the logits of each way are from float32's, for stock and deferred.
"""

import json
import sys
import time
from pathlib import Path

import torch

from flashnorm_cli.bench import models
from flashnorm_cli.bench.kernels import record
from flashnorm_cli.bench.ways import TUNED_INDUCTOR, swapped
from flashnorm_cli.runtimes.transformers.deferred import states_of

RUNS = (
    ("decode, compiled", ("stock", "flashnorm deferred")),
    ("decode, CUDA graph", ("stock", "flashnorm", "flashnorm fused", "flashnorm deferred")),
    ("decode", ("stock", "flashnorm", "flashnorm deferred")),
    ("prefill", ("stock", "flashnorm", "flashnorm deferred")),
    ("decode, compiled ", (TUNED_INDUCTOR,)),  # by itself: its compilation takes minutes for an 8B
)


def logits_error(model: torch.nn.Module) -> dict[str, float]:
    """Relative error of a decode step's logits against the same model in float32, by way."""
    ids = torch.arange(3, 259, device="cuda").view(1, -1)
    found = {}
    with torch.no_grad():
        for way in ("stock", "flashnorm deferred"):
            with swapped(model, way):
                cache = model(ids[:, :-1], use_cache=True).past_key_values
                found[way] = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits.float()
        wide = model.float()  # an 8B takes 32 GB
        cache = wide(ids[:, :-1], use_cache=True).past_key_values
        want = wide(ids[:, -1:], past_key_values=cache, use_cache=True).logits
    return {way: ((got - want).norm() / want.norm()).item() for way, got in found.items()}


if __name__ == "__main__":
    name, path, turns = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 7
    wanted = sys.argv[4].split(";") if len(sys.argv) > 4 else [mode for mode, _ in RUNS]
    model = models.load(name, True, "cuda", torch.bfloat16, False)
    start = time.perf_counter()
    with swapped(model, "flashnorm deferred"):
        states = states_of(model)
    first = time.perf_counter() - start
    start = time.perf_counter()
    with swapped(model, "flashnorm deferred"):
        pass
    data = record(f"python docs/benchmarks/deferred.py {name}", [], device="cuda", model=name, models=[])
    data |= {
        "seconds_to_choose_kernels": round(first, 2),
        "seconds_again": round(time.perf_counter() - start, 2),
        "merged": sum(why is None for why in states.values()),
        "kept": {where: why for where, why in states.items() if why},
    }
    print(
        json.dumps({k: data[k] for k in ("seconds_to_choose_kernels", "seconds_again", "merged", "kept")}), flush=True
    )
    for mode, ways in RUNS:
        if mode not in wanted:
            continue
        trials = turns if mode != "decode" else max(3, turns // 2)
        for row in models.bench(model, trials=trials, modes=(mode.strip(),), ways=ways):
            data["models"].append(row)
            print(
                row["mode"],
                "|",
                row["way"],
                "|",
                row.get("tok_per_s"),
                row.get("gain_percent"),
                row.get("error"),
                flush=True,
            )
        path.write_text(json.dumps(data, indent=1) + "\n")
    data["logits_error"] = logits_error(model)
    print(data["logits_error"])
    path.write_text(json.dumps(data, indent=1) + "\n")
