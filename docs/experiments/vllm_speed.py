"""vLLM's decode step on a GPU: the source in stock vLLM, the fold with the plugin, and with its norms inside linears.

    python docs/experiments/vllm_speed.py OUT.json SOURCE FOLDED [--batches 1,4,8,16,64] [--turns 15] [--served]
    python docs/experiments/vllm_speed.py OUT.json SOURCE FOLDED --gpus 2

One process, one card: the three engines stand side by side and take turns. Needs vLLM for GPUs and this package. For
each batch

- `step_us`: replays of the CUDA graph of one decode step, which vLLM captured, at 256 tokens of context: the model
  without its output head;
- `busy_us`: the time in which any kernel runs, per step of `generate`, head and sampling included, by torch.profiler;
- `tokens_per_s`: of `generate`, which waits for the host;

and how far log-probabilities are from the source in float32, computed by transformers, along the tokens that stock vLLM
chose: the stock's own distance is the noise floor.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": str(int("--served" in sys.argv)),  # else engines in this process
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # apply_model is sent a function
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DISABLE_COMPILE_CACHE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "HF_HUB_OFFLINE": "1",
}

import torch
from vllm import LLM, SamplingParams

WAYS = ("stock", "plugin", "deferred")
CONTEXT, NEW, TOP = 256, 128, 20
CLEAR = 0.25  # nats between the two likeliest tokens: ten times what bf16 does to a log-probability here


def engine(way: str, source: str, folded: str, batches: list[int], cpu: bool, gpus: int = 1) -> LLM:
    torch._dynamo.reset()  # vLLM's compiled code has no guards: an earlier model's must not be found
    more: dict[str, Any] = {
        "compilation_config": {"cudagraph_capture_sizes": batches},
        "kv_cache_memory_bytes": 4 << 30,
        "gpu_memory_utilization": 0.25,  # three engines; beside a size of the cache it is only asked for at the start
    }
    if cpu:
        more = {}
    if gpus > 1:  # a pass that hands norms' weights to another kernel would keep them there
        more["compilation_config"]["pass_config"] = {"fuse_allreduce_rms": False}
        more |= {"tensor_parallel_size": gpus, "disable_custom_all_reduce": True}
    if way == "deferred":
        more["additional_config"] = {"flashnorm": {"deferred": "anywhere" if cpu else True}}
    return LLM(
        model=source if way == "stock" else folded,
        dtype="float32" if cpu else "bfloat16",
        skip_tokenizer_init=True,
        max_model_len=128 if cpu else 1024,
        max_num_seqs=max(batches),
        max_logprobs=TOP,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **more,
    )


def prompts(count: int, length: int, vocabulary: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(count * 1000 + length)
    ids = torch.randint(10, vocabulary, (count, length), generator=generator)
    return [{"prompt_token_ids": row} for row in ids.tolist()]


def generate(llm: LLM, asked: list[dict[str, list[int]]], new: int, logprobs: int | None = None) -> list[Any]:
    sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False, logprobs=logprobs)
    return [out.outputs[0] for out in llm.generate(asked, sampling, use_tqdm=False)]


def decode_graph(llm: LLM, asked: list[dict[str, list[int]]]) -> torch.cuda.CUDAGraph:
    """The graph that the last steps of a decode replay."""
    replayed: list[Any] = []
    replay = torch.cuda.CUDAGraph.replay

    def noted(graph: Any) -> None:
        replayed.append(graph)
        replay(graph)

    torch.cuda.CUDAGraph.replay = noted  # type: ignore[method-assign]
    try:
        generate(llm, asked, 8)
    finally:
        torch.cuda.CUDAGraph.replay = replay  # type: ignore[method-assign]
    if not replayed or replayed[-1] is not replayed[-2]:
        raise SystemExit("a decode step is not one CUDA graph")
    return replayed[-1]


def replays(graph: torch.cuda.CUDAGraph, count: int = 40) -> float:
    """Microseconds of one."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    marks[0].record()
    for _ in range(count):
        graph.replay()
    marks[1].record()
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1]) * 1000 / count


def busy(llm: LLM, asked: list[dict[str, list[int]]], steps: int = 32) -> dict[str, Any]:
    """Kernels of `steps` decode steps: the union of their intervals, and which take the most."""
    from torch.profiler import ProfilerActivity, profile

    def profiled(new: int) -> tuple[float, Counter[str], Counter[str]]:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            generate(llm, asked, new)
        events = [e for e in seen.events() if e.device_type.name == "CUDA"]
        total, end, names = 0.0, 0.0, Counter[str]()
        calls = Counter(event.name[:90] for event in events)
        for event in sorted(events, key=lambda e: e.time_range.start):
            total += max(0.0, event.time_range.end - max(end, event.time_range.start))
            end = max(end, event.time_range.end)
            names[event.name[:90]] += event.time_range.end - event.time_range.start
        return total, names, calls

    (few, names, calls), (many, more, more_calls) = profiled(1), profiled(1 + steps)
    more.subtract(names)
    more_calls.subtract(calls)
    return {
        "us": round((many - few) / steps, 1),
        "kernels_us": {name: round(us / steps, 1) for name, us in more.most_common(14)},
        "calls": {name: round(more_calls[name] / steps, 2) for name, us in more.most_common(14)},
    }


def distances(engines: dict[str, LLM], source: str, vocabulary: int, cpu: bool) -> dict[str, Any]:
    """Mean distance of log-probabilities from float32's, over the tokens that stock vLLM likes most."""
    from transformers import AutoModelForCausalLM

    asked = [p for n in (1, 3, 7, 12) for p in prompts(2, n, vocabulary)]
    outputs = {way: generate(llm, asked, 16, TOP) for way, llm in engines.items()}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if not cpu and torch.cuda.mem_get_info()[0] > 4.5 * model.num_parameters():
        model = model.to("cuda")
    found: dict[str, Any] = {way: [] for way in engines}
    agree = Counter[str]()
    with torch.no_grad():
        for at, prompt in enumerate(asked):
            tokens = list(outputs["stock"][at].token_ids)
            ids = torch.tensor([prompt["prompt_token_ids"] + tokens], device=model.device)
            want = model(ids).logits[0, -len(tokens) - 1 : -1].log_softmax(-1).cpu()
            margin = want.topk(2).values
            for way, outs in outputs.items():
                for step, (token, top) in enumerate(zip(outs[at].token_ids, outs[at].logprobs, strict=True)):
                    top_stock = outputs["stock"][at].logprobs[step]
                    found[way] += [abs(top[t].logprob - want[step, t].item()) for t in top_stock if t in top]
                    agree[f"{way} steps"] += 1
                    if margin[step, 0] - margin[step, 1] > CLEAR:
                        agree[f"{way} clear"] += 1
                        agree[f"{way} as float32"] += token == want[step].argmax().item()
                    if token != tokens[step]:
                        break
    return {"mean_nats": {way: round(sum(d) / len(d), 5) for way, d in found.items()}, "tokens": dict(agree)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("source")
    parser.add_argument("folded")
    parser.add_argument("--batches", default="1,4,8,16,64")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--served", action="store_true", help="tokens_per_s alone, each engine in a process of its own")
    parser.add_argument("--gpus", type=int, default=1, help="tensor parallelism: distances and tokens_per_s alone")
    parser.add_argument("--cpu", action="store_true", help="only whether it runs")
    chosen = parser.parse_args()
    from flashnorm_cli.runtimes.vllm.deferred import deferred_state
    from flashnorm_cli.runtimes.vllm.norms import norm_states

    batches = [int(b) for b in chosen.batches.split(",")]
    data: dict[str, Any] = {
        "command": f"python docs/experiments/vllm_speed.py, {chosen.source}, batches {chosen.batches}",
        "date": date.today().isoformat(),
        "device": platform.processor() if chosen.cpu else torch.cuda.get_device_name(),
        "versions": {p: version(p) for p in ("torch", "transformers")} | {"vllm": __import__("vllm").__version__},
        "engines": {},
        "batches": {},
    }
    engines: dict[str, LLM] = {}
    for way in WAYS:
        start = time.perf_counter()
        llm = engines[way] = engine(way, chosen.source, chosen.folded, batches, chosen.cpu, chosen.gpus)
        data["engines"][way] = {
            "seconds_to_start": round(time.perf_counter() - start, 1),
            "norms_without_weight": sum(llm.apply_model(norm_states)[0].values()),
            "deferred": llm.apply_model(deferred_state)[-1],
        }
        print(way, data["engines"][way], flush=True)
    vocabulary = engines["stock"].llm_engine.model_config.get_vocab_size()
    if not chosen.served:
        data["distance_from_float32"] = distances(engines, chosen.source, vocabulary, chosen.cpu)
        print(data["distance_from_float32"], flush=True)
    for batch in batches if not chosen.cpu else []:
        asked = prompts(batch, CONTEXT, vocabulary)
        if chosen.served or chosen.gpus > 1:
            speeds = data["batches"][str(batch)] = {"tokens_per_s": served(engines, asked, chosen.turns)}
            print(batch, {way: round(median(s), 1) for way, s in speeds["tokens_per_s"].items()}, flush=True)
            continue
        row = data["batches"][str(batch)] = measure(engines, asked, chosen.turns)
        steps = {way: median(times) for way, times in row["step_us"].items()}
        print(batch, {way: (round(us, 1), round(us / steps["stock"], 4)) for way, us in steps.items()}, end=" ")
        print({w: b["us"] for w, b in row["busy"].items()}, end=" ")
        print({w: round(median(t), 1) for w, t in row["tokens_per_s"].items()}, flush=True)
        chosen.out.write_text(json.dumps(data, indent=1) + "\n")
    chosen.out.write_text(json.dumps(data, indent=1) + "\n")


def measure(engines: dict[str, LLM], asked: list[dict[str, list[int]]], turns: int) -> dict[str, Any]:
    graphs = {way: decode_graph(llm, asked) for way, llm in engines.items()}
    row: dict[str, Any] = {"step_us": {way: [] for way in engines}}
    ways = list(engines)
    for turn in range(turns):
        for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
            row["step_us"][way].append(round(replays(graphs[way]), 2))
    row["busy"] = {way: busy(llm, asked) for way, llm in engines.items()}
    row["tokens_per_s"] = served(engines, asked, max(2, turns // 4))
    return row


def served(engines: dict[str, LLM], asked: list[dict[str, list[int]]], turns: int) -> dict[str, list[float]]:
    """Tokens per second of `generate`, prefill included, engines in turns."""
    speeds: dict[str, list[float]] = {way: [] for way in engines}
    for turn in range(turns + 1):
        for way, llm in engines.items():
            start = time.perf_counter()
            generate(llm, asked, NEW)
            if turn:
                speeds[way].append(round(len(asked) * NEW / (time.perf_counter() - start), 1))
    return speeds


if __name__ == "__main__":
    main()
