"""vLLM's fusion of norms with FP8 quantization, on a GPU: does a folded `1 + w` model take it, and what does it gain?

    python docs/experiments/vllm_fusion.py OUT.json WORK [--models gemma3,qwen3_5,llama] [--batches 1,16,64]

Models of random weights with gains far from the identity are made and folded in WORK, and quantized by vLLM while it
loads them (per token, and in blocks of 128, activations as well). One process, one card; for each model and format
stand side by side and take turns

- `stock`: the source, as vLLM runs it, with the pass `fuse_norm_quant` on;
- `fold`: the folded checkpoint with the plugin, and the same pass: norms that a pass hands on have ones;
- `stock, no pass` and `weightless`: the same two with the pass off, where the folded norms have no weight.

`matched` is how many norms the pass has replaced in the graphs that were compiled, `fused` how often its kernels ran in
a step; times and distances are those of vllm_speed.py. With the Llama come two controls, each in a process of its own:
its folded norms handed to the pass with ones, as the plugin leaves them, and without a weight. Models are added to
OUT.json if it is there.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import vllm_speed
from vllm import LLM
from vllm.compilation.passes.fusion.rms_quant_fusion import RMSNormQuantFusionPass

FORMATS = ("fp8_per_tensor", "fp8_per_block")
DEVICE = "cuda"
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
    else:
        config = transformers.Qwen3_5TextConfig(**SHAPE, **more)
        config.architectures = ["Qwen3_5ForCausalLM"]
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


def know_qwen3_5() -> None:
    """Qwen3.5 without its image tower, which vLLM knows by itself since 0.27 or later."""
    from vllm import ModelRegistry
    from vllm.model_executor.models import config, qwen3_5
    from vllm.model_executor.models.interfaces import IsHybrid

    name = "Qwen3_5ForCausalLM"
    if name in ModelRegistry.get_supported_archs():
        return
    whole = qwen3_5.Qwen3_5ForConditionalGeneration
    methods = ("get_mamba_state_dtype_from_config", "get_mamba_state_shape_from_config", "get_mamba_state_copy_func")
    members = {method: getattr(whole, method).__func__ for method in methods}
    text = type(name, (qwen3_5.Qwen3_5ForCausalLM, IsHybrid), {k: classmethod(m) for k, m in members.items()})
    ModelRegistry.register_model(name, text)
    config.MODELS_CONFIG_MAP[name] = config.MODELS_CONFIG_MAP["Qwen3_5ForConditionalGeneration"]


def engine(model: Path, form: str, batches: list[int], fuse: bool) -> LLM:
    torch._dynamo.reset()
    more = {"gdn_prefill_backend": "triton"} if "qwen3_5" in model.name else {}  # vLLM's own would be FlashInfer's
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
        **more,
    )


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many norms the pass replaces in each graph that is compiled meanwhile."""
    matched: list[int] = []
    own = RMSNormQuantFusionPass.__call__

    def call(self: Any, graph: Any) -> None:
        own(self, graph)
        matched.append(self.matched_count)

    RMSNormQuantFusionPass.__call__ = call  # type: ignore[method-assign]
    try:
        yield matched
    finally:
        RMSNormQuantFusionPass.__call__ = own  # type: ignore[method-assign]


def compare(name: str, form: str, work: Path, batches: list[int], turns: int) -> dict[str, Any]:
    """The three ways of one model in one format."""
    from flashnorm_cli.runtimes.vllm.norms import norm_states, norms_with_ones

    if name == "qwen3_5":
        know_qwen3_5()
    source, folded = make(name, work)
    ways = {
        "stock": (source, True),
        "fold": (folded, True),
        "stock, no pass": (source, False),
        "weightless": (folded, False),
    }
    engines: dict[str, LLM] = {}
    found: dict[str, Any] = {"engines": {}, "batches": {}}
    for way, (model, fuse) in ways.items():
        start = time.perf_counter()
        with counted() as matched:
            llm = engines[way] = engine(model, form, batches, fuse)
        found["engines"][way] = {
            "seconds_to_start": round(time.perf_counter() - start, 1),
            "matched": sum(matched),
            "norms_without_weight": sum(llm.apply_model(norm_states)[0].values()),
            "norms_with_ones": len(llm.apply_model(norms_with_ones)[0]),
        }
        print(name, form, way, found["engines"][way], flush=True)
    vocabulary = engines["stock"].llm_engine.model_config.get_vocab_size()
    found["distance_from_float32"] = vllm_speed.distances(engines, str(source), vocabulary, cpu=False)
    print(found["distance_from_float32"], flush=True)
    for batch in batches:
        asked = vllm_speed.prompts(batch, vllm_speed.CONTEXT, vocabulary)
        row = found["batches"][str(batch)] = vllm_speed.measure(engines, asked, turns)
        steps = {way: median(times) for way, times in row["step_us"].items()}
        print(batch, {way: (round(us, 1), round(us / steps["stock"], 4)) for way, us in steps.items()}, end=" ")
        print({way: each["us"] for way, each in row["busy"].items()}, flush=True)
    for way, each in row["busy"].items():
        fused = {k: n for k, n in each["calls"].items() if k.startswith("void vllm::rms_norm") and "quant" in k}
        found["engines"][way]["fused"] = fused
    engines.clear()
    del llm
    gc.collect()
    torch.cuda.empty_cache()
    return found


def control(work: Path, weights: bool) -> None:
    """Folded norms, with their ones as the plugin leaves them or without, quantized linears, and the pass."""
    from flashnorm_cli.runtimes.vllm import plugin

    if not weights:
        plugin.why_weights_are_needed = lambda config: None
    llm = engine(make("llama", work)[1], FORMATS[0], [1], fuse=True)
    tokens = vllm_speed.generate(llm, vllm_speed.prompts(1, 8, 1000), 4)[0].token_ids
    print("it ran, and said", list(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--models", default="gemma3,qwen3_5,llama")
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--control", choices=("ones", "none"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.control:
        control(chosen.work, chosen.control == "ones")
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
        for form in FORMATS:
            try:
                data["models"][f"{name} {form}"] = compare(name, form, chosen.work, batches, chosen.turns)
            except Exception as error:  # of one model: the others are still worth their time
                data["models"][f"{name} {form}"] = {"error": f"{type(error).__name__}: {error}"[:600]}
                print(name, form, data["models"][f"{name} {form}"], flush=True)
            chosen.out.write_text(json.dumps(data, indent=1) + "\n")
    for weights in ("ones", "none") if "llama" in chosen.models else ():
        command = [sys.executable, __file__, str(chosen.out), str(chosen.work), "--control", weights]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "[rank0]" in line or "it ran" in line]
        data["models"][f"control, {weights}"] = {"exit": done.returncode, "said": lines[-6:]}
        print(weights, data["models"][f"control, {weights}"])
    chosen.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
