"""Hub to Hub and a cluster, measured: disk, memory, bytes, and shards a minute.

    python docs/benchmarks/scale.py FOLDER --json result.json

FOLDER is on the disk to be measured and needs about 20 GB free. A Llama checkpoint of 4.8 GB in 10 shards is made
there, with random weights from a fixed seed. Needs flashnorm-cli[cluster] and the repository's tests folder, whose Hub
on loopback is the Hub here: a process of its own with its own folder, so that its disk and memory do not count.

`hub` is one run of `flashnorm fold SOURCE --push-to TARGET`, by LFS and by Xet. Peak disk: the largest sum of blocks
that files below the client's folders had (its work folder, its cache, hf_xet's own folder), looked at every 20 ms. Peak
memory: the process's peak of resident memory above a process that has imported torch and transformers. Bytes: as the
server counts them.

`cluster` is the same checkpoint folded on this disk, by `fold` with one and with two threads, and by one, two and four
dask workers with a thread each; in turn, so that a slow minute hits all of them. What is compared are the seconds of
writing and flushing, without those of planning: workers flush each shard before they report it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent))
from fold_speed import machine, machine_cpu, memory_kib  # noqa: E402

SHARDS, TOKEN = 10, "hf_benchmark"
SOURCE, TARGET = "them/model", "me/model-FlashNorm"


def make_checkpoint(folder: Path, layers: int) -> None:
    """With 23 layers 2.4 billion bf16 parameters, 4.8 GB, as transformers saves them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from flashnorm_cli.checkpoint.header import build_header

    config = LlamaConfig(
        hidden_size=2560,
        intermediate_size=9216,
        num_hidden_layers=layers,
        vocab_size=32000,
        num_attention_heads=20,
        num_key_value_heads=20,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in LlamaForCausalLM(config).state_dict().items()}
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    shards: list[list[str]] = [[]]
    size = 0
    for key, shape in shapes.items():
        if size > total / SHARDS * len(shards):
            shards.append([])
        shards[-1].append(key)
        size += 2 * torch.Size(shape).numel()
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    # One block of random values, taken from another place for each tensor: making gigabytes of them takes minutes.
    block = (torch.randn(1 << 26, generator=generator) * 0.02).bfloat16()
    weight_map = {}
    for number, keys in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header = build_header([(key, "BF16", shapes[key]) for key in keys], {"format": "pt"})
        with (folder / file_name).open("wb") as file:
            file.write(header.raw)
            for key in keys:
                weight_map[key] = file_name
                n = torch.Size(shapes[key]).numel()
                if "norm" in key:
                    values = (torch.rand(n, generator=generator) * 1.4 + 0.4).bfloat16()
                else:
                    at = int(torch.randint(1 << 25, (), generator=generator))
                    values = torch.cat([block[at:], block[:at]]).repeat(-(-n // (1 << 26)))[:n]
                file.write(memoryview(values.view(torch.uint8).numpy()).cast("B"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")


# ---- from Hub to Hub -------------------------------------------------------------------------------------------------


def serve(root: Path, model: Path) -> None:
    """The Hub; what it is asked on stdin it answers on stdout: bytes sent and received of shards so far."""
    sys.path.insert(0, str(HERE.parents[2] / "tests"))
    from hub_server import Blob, HubServer

    with HubServer(root) as hub:
        hub.add_user("me", TOKEN)
        repo = hub.add_repo(SOURCE)
        files = {}
        for path in model.iterdir():
            if path.suffix == ".safetensors":  # by a link, not by a copy in memory
                sha256 = subprocess.run(["sha256sum", path], check=True, capture_output=True, text=True).stdout[:64]
                hub.blob_path(sha256).hardlink_to(path)
                files[path.name] = Blob(sha256, sha256[:40], path.stat().st_size, True)
            else:
                files[path.name] = hub.store(path.name, path.read_bytes())
        repo.commit(files)
        print(hub.url, flush=True)
        for _ in sys.stdin:
            whole = [request for request in hub.log if request.host == "cdn" and request.range is None]
            ranges = sum(request.sent for request in hub.log if request.host == "cdn" and request.range)
            down = sum(request.sent for request in whole if request.method == "GET")
            up = hub.received("PUT /lfs/")
            stored = sum(path.stat().st_size for path in (root / "xet").rglob("*") if path.is_file())
            print(json.dumps({"down": down, "ranges": ranges, "put": up, "xet_store": stored}), flush=True)
            hub.log.clear()
            hub.repos.pop(TARGET, None)
            for path in (root / "blobs").iterdir():
                if path.name not in {blob.sha256 for blob in files.values()}:
                    path.unlink()


def blocks(folders: list[Path]) -> int:
    """Bytes on the disk below folders; open files that have no name any more are few and short-lived here."""
    total = 0
    for folder in folders:
        for where, _, names in os.walk(folder):
            for name in names:
                try:
                    total += os.lstat(os.path.join(where, name)).st_blocks * 512  # noqa: PTH118
                except OSError:
                    continue
    return total


def child(way: str, *arguments: str) -> None:
    """One run in a process of its own; prints what it did and its peak of memory."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import flashnorm_cli.folding.fold
    import flashnorm_cli.hub.fold_to_hub

    before = memory_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    cpu = time.process_time()
    if way == "hub":
        streamed = flashnorm_cli.hub.fold_to_hub.fold_to_hub(SOURCE, TARGET, token=TOKEN)
        seconds = streamed.seconds
    else:
        source, target, dask = arguments
        workers = int(way.removeprefix("fold-")) if way.startswith("fold-") else None
        result = flashnorm_cli.folding.fold.fold(source, target, workers=workers, dask=dask or None)
        seconds = result.seconds
    added = (memory_kib("VmHWM") - before) / 1024
    cpu = time.process_time() - cpu
    found = {"seconds": [round(s, 3) for s in seconds], "cpu_s": round(cpu, 2), "added_mib": round(added, 1)}
    print(json.dumps(found))


def run_child(*arguments: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> dict[str, Any]:
    command = [sys.executable, str(HERE), "x", "--child", *map(str, arguments)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=env, cwd=cwd).stdout
    return dict(json.loads(answer))


def measure_hub(folder: Path, model: Path) -> dict[str, Any]:
    server = subprocess.Popen(
        [sys.executable, str(HERE), str(folder / "hub"), "--serve", str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert server.stdin and server.stdout  # noqa: S101
    url = server.stdout.readline().strip()
    found = {}
    sizes = [path.stat().st_size for path in model.glob("*.safetensors")]
    for way in ("lfs", "xet"):
        client = folder / f"client-{way}"
        (client / "cwd").mkdir(parents=True)
        keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        env = {**keep, "HF_ENDPOINT": url, "HF_HOME": str(client / "home"), "PYTHONPATH": str(HERE.parents[2])}
        env["HF_HUB_DISABLE_XET"] = "1" if way == "lfs" else "0"
        peak, stop = 0, threading.Event()

        def watch(client: Path = client, stop: threading.Event = stop) -> None:
            nonlocal peak
            while not stop.wait(0.02):
                peak = max(peak, blocks([client]))

        thread = threading.Thread(target=watch)
        thread.start()
        start, others = time.perf_counter(), machine_cpu()
        try:
            result = run_child("hub", env=env, cwd=client / "cwd")
        finally:
            stop.set()
            thread.join()
        result["machine_cores"] = round((machine_cpu() - others) / (time.perf_counter() - start), 2)
        server.stdin.write("?\n")
        served = json.loads(server.stdout.readline())
        result |= {
            "peak_disk": peak,
            "peak_disk_in_shards": round(peak / max(sizes), 2),
            "left_on_disk": blocks([client]),
            "downloaded_over_size": round(served["down"] / sum(sizes), 6),
            "range_bytes": served["ranges"],
            "put_over_size": round(served["put"] / sum(sizes), 6),
            "xet_store": served["xet_store"],
        }
        shutil.rmtree(client)
        found[way] = result
        print(way, result)
    server.stdin.close()
    server.wait()
    shutil.rmtree(folder / "hub")
    return {"bytes": sum(sizes), "shards": len(sizes), "largest_shard": max(sizes), **found}


# ---- a cluster -------------------------------------------------------------------------------------------------------


def scheduler(address_file: Path) -> None:
    import asyncio

    import distributed

    async def run() -> None:
        async with distributed.Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0") as it:
            address_file.write_text(it.address)
            await it.finished()

    asyncio.run(run())


def measure_cluster(folder: Path, model: Path, rounds: int, counts: list[int]) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {}
    ways = ["fold-1", "fold-2", *(f"dask-{n}" for n in counts)]
    for number in range(rounds):
        for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
            processes = []
            address = ""
            if way.startswith("dask"):
                file = folder / "address"
                file.unlink(missing_ok=True)
                processes.append(subprocess.Popen([sys.executable, str(HERE), str(file), "--scheduler"]))
                while not file.exists() or not file.read_text():
                    time.sleep(0.1)
                address = file.read_text()
                quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
                worker = "-m distributed.cli.dask_worker --nthreads 1 --no-nanny --no-dashboard --preload torch".split()
                for _ in range(int(way.removeprefix("dask-"))):
                    command = [sys.executable, *worker, "--local-directory", str(folder / "dask"), address]
                    processes.append(subprocess.Popen(command, **quiet))
                wait_for(address, int(way.removeprefix("dask-")))
            try:
                shutil.rmtree(folder / "out", ignore_errors=True)
                os.sync()
                start, others, workers = time.perf_counter(), machine_cpu(), [cpu_of(p.pid) for p in processes[1:]]
                result = run_child(way, model, folder / "out", address)
                result["worker_cpu_s"] = round(sum(cpu_of(p.pid) for p in processes[1:]) - sum(workers), 2)
                result["machine_cores"] = round((machine_cpu() - others) / (time.perf_counter() - start), 2)
            finally:
                for process in processes:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
            runs.setdefault(way, []).append(result)
            print(way, result, flush=True)
    for path in ("out", "dask"):
        shutil.rmtree(folder / path, ignore_errors=True)
    summary = {}
    base = statistics.median(result["seconds"][1] + result["seconds"][2] for result in runs["fold-1"])
    for way, results in runs.items():
        total = statistics.median(result["seconds"][1] + result["seconds"][2] for result in results)
        summary[way] = {"median_s": round(total, 3), "over_one_thread": round(total / base, 3)}
    return {"summary": summary, "runs": runs}


def cpu_of(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for(address: str, workers: int) -> None:
    import distributed

    with distributed.Client(address, set_as_default=False) as client:
        client.wait_for_workers(workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers", type=int, default=23, help="fewer make a smaller checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--only", choices=("hub", "cluster"))
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--scheduler", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    if args.serve:
        return serve(args.folder, args.serve)
    if args.scheduler:
        return scheduler(args.folder)
    args.folder.mkdir(parents=True, exist_ok=True)
    model = args.folder / "model"
    if not model.exists():
        make_checkpoint(model, args.layers)
    names = ("huggingface_hub", "hf_xet", "distributed")
    facts = {**machine(args.folder), **{name: version(name) for name in names}}
    result: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    result["machine"] = facts
    if args.only != "cluster":
        result["hub"] = {"layers": args.layers, "date": time.strftime("%Y-%m-%d"), **measure_hub(args.folder, model)}
    if args.only != "hub":
        cluster = measure_cluster(args.folder, model, args.rounds, args.workers)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        facts = {"layers": args.layers, "bytes": size, "date": time.strftime("%Y-%m-%d"), "rounds": args.rounds}
        result["cluster"] = {**facts, **cluster}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
