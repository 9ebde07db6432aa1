"""vLLM's fusion of norms with FP8 quantization, on a GPU: does a folded `1 + w` model take it, and what does it gain?

    python docs/experiments/vllm_fusion.py OUT.json WORK [--models gemma3,qwen3_next,llama] [--batches 1,16,64]

Models of random weights with gains far from the identity are made and folded in WORK, and quantized by vLLM while it
loads them (per token, and in blocks of 128, activations as well). One process, one card; for each model and format
stand side by side and take turns

- `stock`: the source, as vLLM runs it, with the pass `fuse_norm_quant` on;
- `fold`: the folded checkpoint with the plugin, and the same pass: norms that a pass hands on have ones;
- `weightless`: the folded checkpoint with the pass off: its norms have no weight.

`matched` is how many norms the pass has replaced (in the graphs of all compile ranges together), `fused` which of its
kernels ran; times and distances are those of vllm_speed.py. `--control` is a run of the folded Llama of which the pass
was given norms without a weight, as they would be without the plugin's care: in a process of its own, since it may not
survive. Models are added to OUT.json if it is there.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import vllm_speed
from vllm import LLM
from vllm.compilation.passes.vllm_inductor_pass import VllmPatternMatcherPass

FORMATS = ("fp8_per_tensor", "fp8_per_block")
PASS, DEVICE = "rmsnorm_quant_fusion_pass", "cuda"
SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32768}


def make(name: str, work: Path) -> tuple[Path, Path]:
    """A source of this architecture and its fold."""
    import transformers

    source, folded = work / name, work / f"{name}-folded"
    if folded.exists():
        return source, folded
    more: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    if name == "llama":
        more = {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
        config: Any = transformers.LlamaConfig(**SHAPE, **more)
    elif name == "gemma3":
        config = transformers.Gemma3TextConfig(**SHAPE, **more, query_pre_attn_scalar=256, sliding_window=512)
        config.architectures = ["Gemma3ForCausalLM"]
    else:  # dense, as Qwen3.5 is
        config = transformers.Qwen3NextConfig(**SHAPE, **more, mlp_only_layers=list(range(16)), num_experts=0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    one_plus = name != "llama"
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name and "linear_attn" not in parameter_name:
            parameter.data.uniform_(0.4 - one_plus, 1.8 - one_plus)
    model.save_pretrained(source)
    del model
    from flashnorm_cli import fold

    fold(source, folded)
    return source, folded


def engine(model: Path, form: str, batches: list[int], fuse: bool) -> LLM:
    torch._dynamo.reset()
    return LLM(
        model=str(model),
        quantization=form,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=max(batches),
        max_logprobs=vllm_speed.TOP,
        enable_prefix_caching=False,
        disable_log_stats=True,
        kv_cache_memory_bytes=4 << 30,
        gpu_memory_utilization=0.25,
        compilation_config={
            "cudagraph_capture_sizes": batches,
            "custom_ops": ["none", "+quant_fp8"],  # as FP8 in blocks has it by itself
            "pass_config": {"fuse_norm_quant": fuse},
        },
    )


def compare(name: str, form: str, work: Path, batches: list[int], turns: int) -> dict[str, Any]:
    """The three ways of one model in one format."""
    from flashnorm_cli.runtimes.vllm.norms import norm_states, norms_with_ones

    source, folded = make(name, work)
    ways = {"stock": (source, True), "fold": (folded, True), "weightless": (folded, False)}
    engines: dict[str, LLM] = {}
    found: dict[str, Any] = {"engines": {}, "batches": {}}
    for way, (model, fuse) in ways.items():
        before, start = VllmPatternMatcherPass.match_table.get(PASS, 0), time.perf_counter()
        llm = engines[way] = engine(model, form, batches, fuse)
        found["engines"][way] = {
            "seconds_to_start": round(time.perf_counter() - start, 1),
            "matched": VllmPatternMatcherPass.match_table.get(PASS, 0) - before,
            "norms_without_weight": sum(llm.apply_model(norm_states)[0].values()),
            "norms_with_ones": len(llm.apply_model(norms_with_ones)[0]),
        }
        print(name, form, way, found["engines"][way], flush=True)
    vocabulary = engines["stock"].llm_engine.model_config.get_vocab_size()
    found["distance_from_float32"] = vllm_speed.distances(engines, str(source), vocabulary, cpu=False)
    print(found["distance_from_float32"], flush=True)
    for batch in batches:
        asked = vllm_speed.prompts(batch, vllm_speed.CONTEXT, vocabulary)
        row = found["batches"][str(batch)] = measure(engines, asked, turns)
        steps = {way: median(times) for way, times in row["step_us"].items()}
        print(batch, {way: (round(us, 1), round(us / steps["stock"], 4)) for way, us in steps.items()}, end=" ")
        print({way: each["us"] for way, each in row["busy"].items()}, flush=True)
    for way, each in row["busy"].items():
        found["engines"][way]["fused"] = [k for k in each["kernels_us"] if "rms_norm" in k and "quant" in k]
    engines.clear()
    del llm
    gc.collect()
    torch.cuda.empty_cache()
    return found


def measure(engines: dict[str, LLM], asked: list[dict[str, list[int]]], turns: int) -> dict[str, Any]:
    graphs = {way: vllm_speed.decode_graph(llm, asked) for way, llm in engines.items()}
    row: dict[str, Any] = {"step_us": {way: [] for way in engines}}
    names = list(engines)
    for turn in range(turns):
        for way in names[turn % 3 :] + names[: turn % 3]:
            row["step_us"][way].append(round(vllm_speed.replays(graphs[way]), 2))
    row["busy"] = {way: vllm_speed.busy(llm, asked) for way, llm in engines.items()}
    row["tokens_per_s"] = vllm_speed.served(engines, asked, 3)
    return row


def control(work: Path) -> None:
    """Folded norms without a weight, quantized linears, and the pass."""
    from flashnorm_cli.runtimes.vllm import plugin

    plugin.why_weights_are_needed = lambda config: None
    llm = engine(make("llama", work)[1], FORMATS[0], [1], fuse=True)
    tokens = vllm_speed.generate(llm, vllm_speed.prompts(1, 8, 1000), 4)[0].token_ids
    print("it ran, and said", list(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--models", default="gemma3,qwen3_next,llama")
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--control", action="store_true")
    chosen = parser.parse_args()
    if chosen.control:
        control(chosen.work)
        return
    batches = [int(b) for b in chosen.batches.split(",")]
    data: dict[str, Any] = {
        "command": f"python docs/experiments/vllm_fusion.py OUT.json WORK --batches {chosen.batches}",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": {p: version(p) for p in ("torch", "transformers")} | {"vllm": __import__("vllm").__version__},
        "shape": SHAPE,
        "models": {},
    }
    if chosen.out.exists():  # what other calls on this card have found
        data["models"] = json.loads(chosen.out.read_text())["models"]
    for name in chosen.models.split(","):
        for form in FORMATS if name == "gemma3" else FORMATS[:1]:
            try:
                data["models"][f"{name} {form}"] = compare(name, form, chosen.work, batches, chosen.turns)
            except Exception as error:  # of one model: the others are still worth their time
                data["models"][f"{name} {form}"] = {"error": f"{type(error).__name__}: {error}"[:600]}
                print(name, form, data["models"][f"{name} {form}"], flush=True)
            chosen.out.write_text(json.dumps(data, indent=1) + "\n")
    if "llama" not in chosen.models:
        return
    command = [sys.executable, __file__, str(chosen.out), str(chosen.work), "--control"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "Error" in line or "it ran" in line]
    data["control"] = {"exit": done.returncode, "said": lines[-4:]}
    print(data["control"])
    chosen.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
