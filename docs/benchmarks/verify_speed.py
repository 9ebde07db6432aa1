"""How long `flashnorm verify` takes and how much memory, against reading both folders.

    python docs/benchmarks/verify_speed.py FOLDER --json result.json

FOLDER is on the disk to be measured and needs about 15 GB free. A bf16 Llama of 3.6 billion parameters (7.2 GB in
8 shards, the shape of Llama-3.2-3B with a head of its own) is made there and folded. Then it is read (every byte of
both folders, by as many threads as verify has) and verified in turn, each run in a process of its own: first with
nothing in the page cache (`cold`), then with as much as there is room for (`warm`). Seconds are those of the level,
without imports and plan; memory is the peak of the whole process above one with the imports done.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fold_speed

WAYS = ("read", "weights", "layers")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def drop_cache(*folders: Path) -> None:
    os.sync()
    for folder in folders:
        for path in shards(folder):
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def read(path: Path) -> int:
    buffer, size = bytearray(2**20), 0
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            size += n
    return size


def child(way: str, source: Path, folded: Path, workers: int) -> None:
    import transformers  # noqa: F401

    from flashnorm_cli.proof.verify import verify

    before = fold_speed.memory_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    cpu = time.process_time()
    if way == "read":
        start = time.perf_counter()
        with ThreadPoolExecutor(workers) as pool:
            sum(pool.map(read, [*shards(source), *shards(folded)]))
        seconds = time.perf_counter() - start
    else:
        # No record: hashing for it is a part of level weights, and would be added to level layers.
        result = verify(folded, source, levels=[way], device="cpu", workers=workers, record=False)
        if result.levels[0].status != "passed":
            raise SystemExit(f"level {way} did not pass: nothing is timed")
        seconds = result.levels[0].seconds
    answer = {
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu,
        "added_mib": (fold_speed.memory_kib("VmHWM") - before) / 1024,
    }
    print(json.dumps(answer))


def run(way: str, source: Path, folded: Path, workers: int, cold: bool) -> dict[str, float]:
    if cold:
        drop_cache(source, folded)
    others = fold_speed.machine_cpu() - fold_speed.children_cpu()
    start = time.perf_counter()
    command = [sys.executable, __file__, str(folded), "--child", way, str(source), "--workers", str(workers)]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    others = fold_speed.machine_cpu() - fold_speed.children_cpu() - others
    return {**result, "other_cores": max(0.0, others / (time.perf_counter() - start))}


def make(folder: Path) -> tuple[Path, Path]:
    from transformers import LlamaConfig

    from flashnorm_cli.folding.fold import fold

    def config(_name: str) -> Any:
        return LlamaConfig(
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            vocab_size=128256,
            num_attention_heads=24,
            num_key_value_heads=8,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
        )

    source, folded = folder / "llama-3b", folder / "llama-3b-folded"
    if not source.exists():
        fold_speed.llama_config = config
        fold_speed.make_checkpoint(source, "llama-3b")
    if not folded.exists():
        fold(source, folded)
    return source, folded


def main() -> None:
    args = fold_speed.parser_of(__doc__, rounds=3).parse_args()
    if args.child:
        child(args.child[0], Path(args.child[1]), args.folder, args.workers)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    source, folded = make(args.folder)
    result: dict[str, Any] = {
        "command": f"python docs/benchmarks/verify_speed.py FOLDER --rounds {args.rounds} --workers {args.workers}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": fold_speed.machine(args.folder),
        "bytes_of_both": sum(path.stat().st_size for path in [*shards(source), *shards(folded)]),
    }
    for state in ("cold", "warm"):
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for number in range(args.rounds):
            for way in WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]:
                runs[way].append(run(way, source, folded, args.workers, state == "cold"))
        summary = {}
        for way in WAYS:
            summary[way] = fold_speed.summed_up(runs, way, "read", "over_reading")
            print(f"{state} {way:10}", " ".join(f"{key} {value:<8}" for key, value in summary[way].items()))
        result[state] = {"summary": summary, "runs": runs}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
