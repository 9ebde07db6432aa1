"""How long a fold takes and how much memory, against `cp -r` and against loading, multiplying and saving.

    python docs/benchmarks/fold_speed.py FOLDER --json result.json

FOLDER is on the disk to be measured and needs about 10 GB free. Two checkpoints are made there, with random
weights from a fixed seed: `llama` (1.1 billion bf16 parameters in 3 shards, the shape of Llama-3.2-1B) and
`big-tensor` (a Llama with one layer, whose head is a single tensor of 1 GiB). All ways are checked to give
the same tensors before anything is timed. They are then run in turn, so that a slow minute of the machine
hits all of them; each run is a process of its own, starts without dirty pages, and is timed without its
imports. The source is in the page cache. `fold` is `flashnorm_cli.folding.fold`: its seconds are those of writing,
which compare with `cp`; `plan_s` come before, and `flush_s`, until the disk has everything, after them (`cp+sync`).
Its memory is that of the whole fold, plan included. `other_cores` is what other processes took meanwhile: with
two cores, ratios mean something where it is near 0. With --patience, runs are put off and repeated until it is, for at
most that long per checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
SHARD_BYTES = 900 * 2**20
WAYS = ("cp", "cp+sync", "fold", "load-save")


def llama_config(name: str) -> Any:
    from transformers import LlamaConfig

    shape = {
        "llama": (2048, 8192, 16, 32000),
        "big-tensor": (4096, 1024, 1, 131072),
    }[name]
    return LlamaConfig(
        **dict(zip(("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"), shape, strict=True)),
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def make_checkpoint(folder: Path, name: str) -> None:
    """A checkpoint as transformers saves it, written tensor by tensor."""
    import torch
    from transformers import LlamaForCausalLM

    from flashnorm_cli.checkpoint.header import build_header

    config = llama_config(name)
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in LlamaForCausalLM(config).state_dict().items()}
    shards: list[list[str]] = [[]]
    size = 0
    for key, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += nbytes

    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for number, keys in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header = build_header([(key, "BF16", shapes[key]) for key in keys], {"format": "pt"})
        with (folder / file_name).open("wb") as file:
            file.write(header.raw)
            for key in keys:
                weight_map[key] = file_name
                if "norm" in key:
                    values = torch.rand(shapes[key], generator=generator) * 1.4 + 0.4
                else:
                    values = torch.randn(shapes[key], generator=generator) * 0.02
                file.write(memoryview(values.bfloat16().view(torch.uint8).numpy()).cast("B"))
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def llama_gains(source: Path) -> dict[str, Any]:
    """Tensor name of each reader -> its float32 gain, and of each folded norm -> None."""
    from safetensors import safe_open

    weight_map = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    gains: dict[str, Any] = {}
    for name, shard in weight_map.items():
        if not name.endswith("norm.weight"):
            continue
        with safe_open(source / shard, "pt") as file:
            gain = file.get_tensor(name).float()
        prefix, norm = name.removesuffix(".weight").rsplit(".", 1)
        gains[name] = None
        readers = ["lm_head"] if norm == "norm" else [f"{prefix}.{reader}" for reader in READERS[norm]]
        gains.update({f"{reader}.weight": gain for reader in readers})
    return gains


def copy_rest(source: Path, target: Path) -> None:
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, target / file.name)


def load_save(source: Path, target: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    gains = llama_gains(source)
    target.mkdir()
    for shard in sorted(source.glob("*.safetensors")):
        tensors = load_file(shard)
        for name in tensors.keys() & gains.keys():
            gain = gains[name]
            if gain is None:
                tensors[name] = torch.ones_like(tensors[name])
            else:
                tensors[name] = (tensors[name].float() * gain).to(tensors[name].dtype)
        save_file(tensors, target / shard.name, {"format": "pt"})
    copy_rest(source, target)


def memory_kib(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise KeyError(key)


def child(way: str, source: Path, target: Path, workers: int) -> None:
    """One run. Prints the seconds and the peak of resident memory above a process with the imports done."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import flashnorm_cli.folding.fold

    before = memory_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    start, cpu = time.perf_counter(), time.process_time()
    more = {}
    if way == "load-save":
        load_save(source, target)
        seconds = time.perf_counter() - start
    else:
        plan, seconds, flush = flashnorm_cli.folding.fold.fold(source, target, workers=workers).seconds
        more = {"plan_s": plan, "flush_s": flush}
    cpu_seconds = time.process_time() - cpu
    added_mib = (memory_kib("VmHWM") - before) / 1024
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "added_mib": added_mib, **more}))


def children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def machine_cpu() -> float:
    """CPU seconds that all processes of the machine have used."""
    user, nice, system, _idle, _wait, *rest = Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    return sum(map(int, (user, nice, system, *rest[:2]))) / os.sysconf("SC_CLK_TCK")


def run(way: str, source: Path, target: Path, workers: int) -> dict[str, float]:
    """One run, from a clean start, with what other processes took of the machine meanwhile."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    start, others = time.perf_counter(), machine_cpu() - children_cpu()
    result = timed(way, source, target, workers)
    others = machine_cpu() - children_cpu() - others
    return {**result, "other_cores": max(0.0, others / (time.perf_counter() - start))}


def quiet_run(way: str, source: Path, target: Path, workers: int, deadline: float) -> dict[str, float]:
    """A run with the machine to itself, or simply a run once the deadline (of time.monotonic) has passed."""
    while True:
        busy = machine_cpu()
        time.sleep(0.5)
        late = time.monotonic() > deadline
        if machine_cpu() - busy > 0.05 and not late:
            continue
        result = run(way, source, target, workers)
        if result["other_cores"] < 0.25 or late:
            return result


def timed(way: str, source: Path, target: Path, workers: int) -> dict[str, float]:
    if way in ("cp", "cp+sync"):
        start, cpu = time.perf_counter(), children_cpu()
        subprocess.run(["cp", "-r", source, target], check=True)
        if way == "cp+sync":
            subprocess.run(["sync", *target.iterdir()], check=True)
        return {"seconds": time.perf_counter() - start, "cpu_seconds": children_cpu() - cpu}
    command = [sys.executable, __file__, str(target), "--child", way, str(source), "--workers", str(workers)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(answer)
    return result


def same_tensors(one: Path, two: Path) -> bool:
    """save_file orders the data of a shard by itself, so tensors are compared, not files."""
    import torch
    from safetensors import safe_open

    for shard in sorted(one.glob("*.safetensors")):
        with safe_open(shard, "pt") as a, safe_open(two / shard.name, "pt") as b:
            if set(a.keys()) != set(b.keys()):
                return False
            if not all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in a.keys()):  # noqa: SIM118
                return False
    return True


def machine(folder: Path) -> dict[str, Any]:
    cpu = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
        ": ?",
    )
    filesystem = subprocess.run(["stat", "-f", "-c", "%T", folder], check=True, capture_output=True, text=True).stdout
    return {
        "cpu": cpu.split(":", 1)[1].strip(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "filesystem": filesystem.strip(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "safetensors")},
    }


def summed_up(runs: dict[str, list[dict[str, float]]], way: str, base: str, over: str) -> dict[str, float]:
    """The runs of one way in a few figures; `over` names its time in times of that of `base`."""
    seconds, yardstick = (statistics.median(r["seconds"] for r in runs[name]) for name in (way, base))
    return {
        "median_s": round(seconds, 3),
        over: round(seconds / yardstick, 3),
        "median_cpu_s": round(statistics.median(r["cpu_seconds"] for r in runs[way]), 3),
        "other_cores": round(statistics.median(r["other_cores"] for r in runs[way]), 2),
        "added_mib": round(max(r.get("added_mib", 0.0) for r in runs[way]), 1),
    }


def measure(folder: Path, name: str, rounds: int, workers: int, patience: float) -> dict[str, Any]:
    source, target = folder / name, folder / f"{name}-out"
    if not source.exists():
        make_checkpoint(source, name)
    reference = folder / f"{name}-reference"
    run("load-save", source, reference, workers)
    run("fold", source, target, workers)
    if not same_tensors(target, reference):
        raise SystemExit(f"{name}: the ways do not agree: nothing is timed")
    shutil.rmtree(reference)

    deadline = time.monotonic() + patience
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]:
            runs[way].append(quiet_run(way, source, target, workers, deadline))
    shutil.rmtree(target)
    summary = {}
    for way in WAYS:
        summary[way] = summed_up(runs, way, "cp", "over_cp")
        if way == "fold":
            for key in ("plan_s", "flush_s"):
                summary[way][key] = round(statistics.median(result[key] for result in runs[way]), 3)
            synced = [result["seconds"] + result["flush_s"] for result in runs[way]]
            base = [result["seconds"] for result in runs["cp+sync"]]
            summary[way]["with_flush_over_cp_sync"] = round(statistics.median(synced) / statistics.median(base), 3)
        print(f"{name:12} {way:12}", " ".join(f"{key} {value:<8}" for key, value in summary[way].items()))
    size = sum(file.stat().st_size for file in source.iterdir())
    return {"bytes": size, "summary": summary, "runs": runs}


def parser_of(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that all benchmarks in processes of their own have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for others to be idle")
    args = parser.parse_args()
    if args.child:
        child(args.child[0], Path(args.child[1]), args.folder, args.workers)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "command": f"python docs/benchmarks/fold_speed.py FOLDER --rounds {args.rounds} --workers {args.workers} "
        f"--patience {args.patience:g}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(args.folder),
        "workers": args.workers,
    }
    for name in ("llama", "big-tensor"):
        result[name] = measure(args.folder, name, args.rounds, args.workers, args.patience)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
