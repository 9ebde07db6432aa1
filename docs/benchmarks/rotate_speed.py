"""What `fold --rotate` and `verify` of its result take, in time and memory, beside `cp -r` and a plain fold.

    python docs/benchmarks/rotate_speed.py FOLDER --json result.json

FOLDER is on the disk to be measured and needs about 8 GB free. The checkpoint `llama` of fold_speed.py is made there
(1.1 billion bf16 parameters in 3 shards, hidden size 2048). All ways are run in turn, each in a process of its own and
without dirty pages, as fold_speed.py says; those of `random` once, as they take long. Seconds of a fold are those of
writing, which compare with `cp`; those of `verify` are of level weights, of the fold that is named, with all files in
the page cache. Memory is the peak of the whole command, plan included, above a process with the imports done. What is
verified is right: a wrong one stops the script.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fold_speed

WAYS = ("cp", "fold", "hadamard", "verify fold", "verify hadamard")
ONCE = ("random", "verify random")


def child(way: str, source: Path, target: Path, workers: int) -> None:
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from flashnorm_cli.folding.fold import fold
    from flashnorm_cli.proof.verify import verify

    before = fold_speed.memory_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    cpu = time.process_time()
    if way.startswith("verify"):
        result = verify(target, source, levels=["weights"], device="cpu", workers=workers, record=False)
        if result.levels[0].status != "passed":
            raise SystemExit(f"{way}: it did not pass: nothing is timed")
        plan, seconds = 0.0, result.levels[0].seconds
    else:
        rotate: Any = None if way == "fold" else way
        plan, seconds, _ = fold(source, target, workers=workers, rotate=rotate).seconds
    added = (fold_speed.memory_kib("VmHWM") - before) / 1024
    cpu = time.process_time() - cpu
    print(json.dumps({"seconds": seconds, "plan_s": plan, "cpu_seconds": cpu, "added_mib": added}))


def run(way: str, source: Path, workers: int) -> dict[str, float]:
    """One run, with what other processes took of the machine meanwhile."""
    target = source.with_name(f"{source.name}-{way.split()[-1]}")
    if not way.startswith("verify"):
        shutil.rmtree(target, ignore_errors=True)
    os.sync()
    start, others = time.perf_counter(), fold_speed.machine_cpu() - fold_speed.children_cpu()
    if way == "cp":
        result = fold_speed.timed(way, source, target, workers)
    else:
        command = [sys.executable, __file__, str(target), "--child", way, str(source), "--workers", str(workers)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    others = fold_speed.machine_cpu() - fold_speed.children_cpu() - others
    return {**result, "other_cores": max(0.0, others / (time.perf_counter() - start))}


def summary(runs: dict[str, list[dict[str, float]]], way: str) -> dict[str, float]:
    """Medians and the fastest run, in seconds and in times of `cp`."""

    def seconds(name: str) -> list[float]:
        return [each["seconds"] for each in runs[name]]

    return {
        "median_s": round(statistics.median(seconds(way)), 3),
        "median_over_cp": round(statistics.median(seconds(way)) / statistics.median(seconds("cp")), 2),
        "fastest_s": round(min(seconds(way)), 3),
        "fastest_over_cp": round(min(seconds(way)) / min(seconds("cp")), 2),
        "other_cores": round(statistics.median(each["other_cores"] for each in runs[way]), 2),
        "added_mib": round(max(each.get("added_mib", 0.0) for each in runs[way]), 1),
    }


def main() -> None:
    args = fold_speed.parser_of(__doc__, rounds=5).parse_args()
    if args.child:
        child(args.child[0], Path(args.child[1]), args.folder, args.workers)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    source = args.folder / "llama"
    if not source.exists():
        fold_speed.make_checkpoint(source, "llama")
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(args.rounds + 1):
        for way in WAYS:
            result = run(way, source, args.workers)
            if number:  # the first round fills the page cache
                runs[way].append(result)
    for way in ONCE:
        runs[way] = [run(way, source, args.workers)]
    result = {
        "command": f"python docs/benchmarks/rotate_speed.py FOLDER --rounds {args.rounds} --workers {args.workers}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": fold_speed.machine(args.folder),
        "bytes": sum(file.stat().st_size for file in source.iterdir()),
        "summary": {way: summary(runs, way) for way in runs},
        "runs": runs,
    }
    for way, figures in result["summary"].items():
        print(f"{way:16}", " ".join(f"{key} {value:<8}" for key, value in figures.items()))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
