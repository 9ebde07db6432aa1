"""Run folded checkpoints in vLLM, with the plugin and without, and write what was seen as JSON.

    python docs/experiments/vllm_engine.py docs/vllm.json               # half an hour on two cores
    python docs/experiments/vllm_engine.py docs/vllm.json --only llama  # only the checks named so

Needs vLLM (its CPU build will do) and this package, installed in the same environment. No test run collects this. Each
engine runs in a process of its own. Exit code 1 if a check fails.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from importlib.metadata import packages_distributions, version
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any

TOLERANCE = 1e-4  # of log-probabilities in float32, in nats
VOCABULARY, PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 128, 6, 24, 16
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "KMP_BLOCKTIME": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # apply_model sends a function
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


# ---- engines, in their processes -------------------------------------------------------------------------------------


def serve() -> None:
    """Answer jobs, one JSON line each, until there are no more."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints belongs to the log
    for line in sys.stdin:
        try:
            found = answer(json.loads(line))
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(found) + "\n")
        replies.flush()


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Continue prompts greedily; every log-probability of every position."""
    import gc

    import torch
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    torch._dynamo.reset()  # vLLM's compiled code has no guards: an earlier model's must not be found
    options = {"enforce_eager": True, "dtype": "float32", "skip_tokenizer_init": True} | job.get("options", {})
    started = time.perf_counter()
    with misread() if job.get("misread") else nullcontext():
        engine = LLM(
            model=job["model"],
            max_model_len=64,
            max_num_seqs=8,
            max_logprobs=VOCABULARY,
            enable_prefix_caching=False,
            **options,
        )
    found = {"seconds_to_load": round(time.perf_counter() - started, 1)}
    try:
        found |= embeddings(engine, job) if "embed" in job else generations(engine, job)
    finally:
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()
    return found


@contextmanager
def misread() -> Iterator[None]:
    """One SiLU is taken for a GELU."""
    from flashnorm_cli.runtimes.vllm import deferred

    find = deferred.find

    def wrongly(*arguments: Any) -> Any:
        wiring = find(*arguments)
        linear, (child, _) = next(iter(wiring.activations.items()))
        wiring.activations[linear] = child, "gelu"
        return wiring

    deferred.find = wrongly
    try:
        yield
    finally:
        deferred.find = find


def embeddings(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    asked = [{"prompt_token_ids": tokens} for tokens in job["prompts"]]
    outputs = engine.encode(asked, pooling_task="embed", use_tqdm=False)
    return {"embeddings": [out.outputs.data.tolist() for out in outputs]}


def generations(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    found = generate(engine, job)
    if "times" in job:
        found["times"] = engine.apply_model(norm_times)[0]
    if "count" in job:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as seen:
            generate(engine, job)
        found["operators"] = {event.key: event.count for event in seen.key_averages() if job["count"] in event.key}
    if "reload" in job:
        try:
            engine.collective_rpc("reload_weights", kwargs={"weights_path": job["reload"]})
            found["reloaded"] = generate(engine, job)
        except Exception as error:
            found["reloaded"] = {"error": str(error)}
    return found


def generate(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    from flashnorm_cli.runtimes.vllm.deferred import deferred_state
    from flashnorm_cli.runtimes.vllm.norms import norm_states, norms_with_ones

    asked = [{"prompt_token_ids": tokens} for tokens in job["prompts"]]
    sampling = SamplingParams(
        temperature=0.0, max_tokens=NEW_TOKENS, logprobs=VOCABULARY, detokenize=False, ignore_eos=True
    )
    outputs = [out.outputs[0] for out in engine.generate(asked, sampling, use_tqdm=False)]
    return {
        "norms": engine.apply_model(norm_states)[0],
        "deferred": engine.apply_model(deferred_state)[0],
        "ones": len(engine.apply_model(norms_with_ones)[0]),
        "tokens": [list(out.token_ids) for out in outputs],
        "logprobs": [[[top[i].logprob for i in range(VOCABULARY)] for top in out.logprobs] for out in outputs],
    }


def norm_times(_: Any) -> dict[str, Any]:
    """Microseconds of vLLM's rms_norm with ones, with Gemma's 1 + zeros, and without a weight; taken in turns."""
    import statistics

    import torch
    from vllm import ir

    times = {}
    for rows in (1, 64):
        x = torch.randn(rows, 4096, dtype=torch.bfloat16)
        ones, zeros = torch.ones(4096, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.bfloat16)
        ways = {
            "ones": lambda x=x, w=ones: ir.ops.rms_norm(x, w, 1e-6),
            "1 + zeros": lambda x=x, w=zeros: ir.ops.rms_norm(x, w.float() + 1.0, 1e-6),
            "none": lambda x=x: ir.ops.rms_norm(x, None, 1e-6),
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(2000):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                taken[name].append((time.perf_counter() - start) * 1e6)
        times[f"{rows} x 4096, bfloat16"] = {name: round(statistics.median(t), 2) for name, t in taken.items()}
    return times


class Server:
    """A process that runs one engine after the other, all with the same settings."""

    def __init__(self, plugin: bool, separate: bool, cache: Path, keep_graphs: bool) -> None:
        environment = os.environ | ENVIRONMENT | {"VLLM_CACHE_ROOT": str(cache)}
        environment["VLLM_PLUGINS"] = "flashnorm" if plugin else "none"
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(separate))
        environment["VLLM_DISABLE_COMPILE_CACHE"] = str(int(not keep_graphs))
        self.log = NamedTemporaryFile("w+", errors="replace", suffix=".log")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        start = self.log.seek(0, os.SEEK_END)
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline()
        self.log.seek(start)
        lines = [line.strip() for line in self.log]
        found = json.loads(reply) if reply else {"error": next(reversed(lines), "the process ended")}
        if found.get("error", "").startswith("RuntimeError: Engine core"):  # its own words came before
            words = [line for line in lines if "Error: " in line]
            found["error"] = words[0][words[0].index("]") + 2 :] if words else found["error"]
        said = [line[line.index("flashnorm: ") :] for line in lines if "flashnorm: " in line and "Error" not in line]
        return found | {"said": said}

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


KNOWN: dict[str, dict[str, Any]] = {}
MINE = threading.local()  # each thread's servers


def run(model: Path, *, plugin: bool = True, graphs: Path | None = None, **job: Any) -> dict[str, Any]:
    """An engine's answer, or {"error": its words}. The same question is asked once.

    With `graphs`, a new process keeps compiled graphs in that folder, and finds those that are there.
    """
    separate = job.pop("separate_process", False)
    key = json.dumps([str(model), plugin, separate, job], sort_keys=True)
    job |= {"model": str(model), "prompts": prompts()}
    if graphs is not None:
        server = Server(plugin, separate, graphs, keep_graphs=True)
        found = server.ask(job)
        server.close()
        return found
    if key not in KNOWN:
        settings = plugin, separate
        servers = MINE.__dict__.setdefault("servers", {})
        if settings not in servers:
            servers[settings] = Server(plugin, separate, model.parents[1] / "cache", keep_graphs=False)
        KNOWN[key] = servers[settings].ask(job)
        if "error" in KNOWN[key]:  # who knows what it left behind
            servers.pop(settings).close()
    return KNOWN[key]


def prompts() -> list[list[int]]:
    import random

    numbers = random.Random(7)
    return [[numbers.randrange(3, VOCABULARY) for _ in range(PROMPT_TOKENS - i)] for i in range(PROMPTS)]


# ---- models ----------------------------------------------------------------------------------------------------------


def tiny(family: str) -> Any:
    """A tiny model with large random weights and norms far from the identity; vLLM's CPU build knows head size 32."""
    import families
    import torch
    import transformers

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    wide = {name: value for name, value in sizes.items() if name != "head_dim"} | {"hidden_size": 128}
    config, cls = {
        "llama": (transformers.LlamaConfig(**sizes), transformers.LlamaForCausalLM),
        "qwen3": (transformers.Qwen3Config(**sizes, tie_word_embeddings=True), transformers.Qwen3ForCausalLM),
        "gemma3": (
            transformers.Gemma3TextConfig(**sizes, sliding_window=16, query_pre_attn_scalar=32),
            transformers.Gemma3ForCausalLM,
        ),
        "mixtral": (
            transformers.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2),
            transformers.MixtralForCausalLM,
        ),
        "mistral": (transformers.MistralConfig(**sizes), transformers.MistralForCausalLM),
        "gemma2": (
            transformers.Gemma2Config(**sizes, sliding_window=16, query_pre_attn_scalar=32),
            transformers.Gemma2ForCausalLM,
        ),
        "qwen2": (transformers.Qwen2Config(**wide), transformers.Qwen2ForCausalLM),
        "phi3": (transformers.Phi3Config(**wide), transformers.Phi3ForCausalLM),
        "granite": (
            transformers.GraniteConfig(
                **wide, residual_multiplier=0.4, embedding_multiplier=3.0, attention_multiplier=0.2, logits_scaling=2.0
            ),
            transformers.GraniteForCausalLM,
        ),
    }[family]
    torch.manual_seed(3)
    model = cls(config).float().eval()
    families._randomize_weights(model)
    families.randomize_gains(model, seed=4)
    return model


FAMILIES = ("llama", "qwen3", "gemma3", "mixtral")


class Checkpoints:
    """The source and both layouts of each family, made when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, family: str, layout: str) -> Path:
        from flashnorm_cli import fold

        source = self.folder / family / "source"
        if not source.exists():
            tiny(family).save_pretrained(source)
        folder = self.folder / family / layout
        if not folder.exists():
            fold(str(source), folder, layout=layout)
        return folder


def folded_norms(folder: Path) -> int:
    return sum(norm["folded"] for norm in json.loads((folder / "flashnorm.json").read_text())["norms"])


# ---- checks ----------------------------------------------------------------------------------------------------------


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference of two runs' log-probabilities, over all positions and tokens."""
    import torch

    return float((torch.tensor(a["logprobs"]) - torch.tensor(b["logprobs"])).abs().max())


def compare(found: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    if "error" in found:
        return {"passed": False, "error": found["error"], "said": found["said"]}
    same = found["tokens"] == source["tokens"]
    return {
        "same_tokens": same,
        "logprob_difference": difference(found, source) if same else None,
        "norms_without_weight": sum(found["norms"].values()),
        "norms": len(found["norms"]),
        "said": found["said"],
        "seconds_to_load": found.get("seconds_to_load"),
    }


COMPILED = {"enforce_eager": False}
MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"options": COMPILED},
    "eager, separate engine process": {"separate_process": True},
}
# What runs inside linears: norms, activations, residual adds. Post norms and multipliers keep their adds, experts all.
INSIDE = {
    "llama": (8, 4, 8),
    "qwen3": (8, 4, 8),
    "gemma3": (8, 4, 0),
    "mixtral": (4, 0, 4),
    "mistral": (8, 4, 8),
    "gemma2": (8, 4, 0),
    "qwen2": (8, 4, 8),
    "phi3": (8, 4, 8),
    "granite": (8, 4, 0),
}
DEFERRED = {"additional_config": {"flashnorm": {"deferred": "anywhere"}}}
Check = Callable[[Checkpoints], dict[str, Any]]


def checks() -> Iterator[tuple[str, str, Check]]:
    """(group, name, check). Groups run beside each other, the checks of one after the other in the same processes."""
    for family in FAMILIES:
        for mode, job in MODES.items():
            yield family, f"{family}, {mode}", lambda made, f=family, j=job: with_plugin(made, f, j)
        yield family, f"{family}, without the plugin", lambda made, f=family: without_plugin(made, f)
        for mode in ("eager", "compiled"):
            yield family, f"{family}, unfolded, {mode}", lambda made, f=family, j=MODES[mode]: unfolded(made, f, j)
    both = {"options": COMPILED, "separate_process": True}
    yield "more", "llama, compiled, separate engine process", lambda made: with_plugin(made, "llama", both)
    for family in ("llama", "gemma3"):
        job = {"options": {"model_impl": "transformers"}}
        yield family, f"{family}, model_impl transformers", lambda made, f=family, j=job: with_plugin(made, f, j)
    yield "more", "llama, bfloat16", lambda made: bfloat16(made, "llama")
    for mode, options in (("eager", {}), ("compiled", COMPILED)):
        yield "more", f"llama, this project's kernels, {mode}", lambda made, o=options: kernels(made, o)
    for family in ("llama", "gemma3"):
        yield family, f"{family}, a record that lies", lambda made, f=family: lie(made, f)
    for family in INSIDE:
        for mode, options in (("eager", {}), ("compiled", COMPILED)):
            name = f"{family}, norms inside linears, {mode}"
            yield "inside", name, lambda made, f=family, o=options: inside_linears(made, f, o)
    yield "inside", "llama, norms inside linears, misread", misread_wiring
    yield "inside", "llama, norms inside linears, other weights", lambda made: reload(made, DEFERRED)
    yield "inside", "more rows are compiled apart", compiled_apart
    yield "graphs", "llama, weights changed under a cached graph", changed_after_caching
    yield "more", "llama, other weights loaded into a running engine", lambda made: reload(made, {})
    yield "more", "llama, other weights loaded into a compiled engine", lambda made: reload(made, COMPILED)
    yield "more", "llama, as an embedding model", pooling
    for family, ones in (("llama", 0), ("gemma3", 9)):
        name = f"{family}, a compiler pass that needs weights"
        yield "more", name, lambda made, f=family, o=ones: a_pass_needs_weights(made, f, o)
    yield "graphs", "vLLM's fusion of norm and quantization", fusion_with_quantization
    yield "more", "what a weight costs", weight_costs


def with_plugin(made: Checkpoints, family: str, job: dict[str, Any]) -> dict[str, Any]:
    """Both layouts say what the source says in stock vLLM, and run every folded norm without a weight."""
    options = {"options": job["options"]} if "options" in job else {}
    source = run(made(family, "source"), plugin=False, **options)
    result: dict[str, Any] = {"passed": "error" not in source}
    for layout in ("identity", "dropped") if result["passed"] else ():
        folder = made(family, layout)
        found = compare(run(folder, **job), source)
        found["folded_norms"] = folded_norms(folder)
        found.setdefault(
            "passed",
            found.get("same_tokens") is True
            and found["logprob_difference"] <= TOLERANCE
            and found["norms_without_weight"] == found["folded_norms"],
        )
        result[layout] = found
        result["passed"] &= found["passed"]
    return result if "error" not in source else result | {"error": source["error"]}


def inside_linears(made: Checkpoints, family: str, options: dict[str, Any]) -> dict[str, Any]:
    """Norms, activations and adds inside linears say what the source says in stock vLLM."""
    source = run(made(family, "source"), plugin=False, options=options)
    found = run(made(family, "identity"), options=options | DEFERRED)
    if "error" in source:
        return {"passed": False, "error": source["error"]}
    result = compare(found, source) | {"inside": found.get("deferred")}
    good = result.get("same_tokens") is True and result["logprob_difference"] <= TOLERANCE
    want = dict(zip(("norms", "activations", "adds"), INSIDE[family], strict=True))
    return {"passed": good and found["deferred"] == want, **result}


def misread_wiring(made: Checkpoints) -> dict[str, Any]:
    """A model that was misread gives other numbers when it is tried, and is put back."""
    plain = run(made("llama", "identity"))
    found = run(made("llama", "identity"), options=DEFERRED, misread=True)
    if "error" in plain or "error" in found:
        return {"passed": False, "error": plain.get("error") or found.get("error")}
    reason = found["deferred"].get("why_not", "")
    same = plain["logprobs"] == found["logprobs"]
    return {"passed": same and "other numbers" in reason, "same_bits": same, "why_not": reason}


def compiled_apart(_: Checkpoints) -> dict[str, Any]:
    """In a graph for more rows than there are kernels for, Inductor gets the parts of norm_linear."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from vllm.config.utils import Range

    from flashnorm_cli.runtimes.vllm.many_rows import ManyRows

    x, weight, bias, residual = (torch.randn(*s) for s in ((40, 64), (96, 64), (96,), (40, 96)))
    product, apart = torch.ops.flashnorm.norm_linear, ManyRows()
    worst, calls = 0.0, 0
    for more in ((1e-5, None, residual), (None, bias), (1e-5, bias, None, "silu")):
        torch._dynamo.reset()
        compiled = torch.compile(lambda *a: product(*a) * 1, options={"post_grad_custom_post_pass": apart})
        want, got = product(x, weight, *more), compiled(x, weight, *more)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            compiled(x, weight, *more)
        calls += sum("norm_linear" in event.key for event in seen.key_averages())
        worst = max(worst, ((got - want).norm() / want.norm()).item())
    ranges = [apart.is_applicable_for_range(Range(*ends)) for ends in ((1, 16), (17, 8192))]
    return {"passed": not calls and worst < 1e-6 and ranges == [False, True], "error": worst, "operators_left": calls}


def without_plugin(made: Checkpoints, family: str) -> dict[str, Any]:
    """Identity loads in stock vLLM and multiplies by ones; dropped is refused."""
    source = run(made(family, "source"), plugin=False)
    identity = compare(run(made(family, "identity"), plugin=False), source)
    dropped = run(made(family, "dropped"), plugin=False)
    passed = (
        identity.get("same_tokens") is True
        and identity["logprob_difference"] <= TOLERANCE
        and identity["norms_without_weight"] == 0
        and "not initialized" in dropped.get("error", "")
    )
    return {"passed": passed, "identity": identity, "dropped": {"error": dropped.get("error")}}


def unfolded(made: Checkpoints, family: str, job: dict[str, Any]) -> dict[str, Any]:
    """A model without a record gives the same bits with and without the plugin."""
    source = made(family, "source")
    plain, mine = (run(source, plugin=p, **job) for p in (False, True))
    if "error" in plain or "error" in mine:
        return {"passed": False, "error": plain.get("error") or mine.get("error")}
    same = plain["logprobs"] == mine["logprobs"] and plain["tokens"] == mine["tokens"]
    return {"passed": same and not any(mine["norms"].values()) and not mine["said"], "same_bits": same}


def bfloat16(made: Checkpoints, family: str) -> dict[str, Any]:
    """Without its weights a norm rounds as with ones: the same bits as stock vLLM gives for layout identity."""
    folder = made(family, "identity")
    job = {"options": {"dtype": "bfloat16"}}
    plain, mine = (run(folder, plugin=p, **job) for p in (False, True))
    if "error" in plain or "error" in mine:
        return {"passed": False, "error": plain.get("error") or mine.get("error")}
    same = plain["logprobs"] == mine["logprobs"]
    without = sum(mine["norms"].values())
    return {"passed": same and without == folded_norms(folder), "same_bits": same, "norms_without_weight": without}


def kernels(made: Checkpoints, options: dict[str, Any]) -> dict[str, Any]:
    """vLLM's own option brings in this project's operators; on a CPU they run on torch."""
    source = run(made("llama", "source"), plugin=False, options=options)
    chosen = {"ir_op_priority": {"rms_norm": ["flashnorm"], "fused_add_rms_norm": ["flashnorm"]}}
    found = run(made("llama", "identity"), options=options | chosen, count="flashnorm::")
    result = compare(found, source)
    good = result.get("same_tokens") is True and result["logprob_difference"] <= TOLERANCE
    called = found.get("operators", {})
    return {"passed": good and len(called) == 2, **result, "operators_called": called}


def lie(made: Checkpoints, family: str) -> dict[str, Any]:
    """A norm that is no identity keeps its weight, whatever the record says; one line says so."""
    folder = made.folder / family / "lie"
    if not folder.exists():
        shutil.copytree(made(family, "identity"), folder)
        spoil(folder)
    plain, mine = run(folder, plugin=False), run(folder)
    if "error" in plain or "error" in mine:
        return {"passed": False, "error": plain.get("error") or mine.get("error")}
    result = compare(mine, plain) | {"same_bits": plain["logprobs"] == mine["logprobs"]}
    kept = [name for name, without in mine["norms"].items() if not without and name == "model.layers.1.input_layernorm"]
    spoken = [line for line in mine["said"] if "not the identity" in line]
    return {"passed": result["same_bits"] and len(kept) == len(spoken) == 1, **result}


def spoil(folder: Path) -> None:
    """Give one folded norm a weight that is no identity."""
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.input_layernorm.weight"
    tensors[name] = torch.linspace(0.3, 1.9, len(tensors[name]), dtype=tensors[name].dtype)
    save_file(tensors, path, metadata={"format": "pt"})


def changed_after_caching(made: Checkpoints) -> dict[str, Any]:
    """vLLM finds compiled graphs by a key. One without weights may not be found once a norm has got one.

    The CPU build computes the key, but does not store the graph: that the keys differ is what can be seen here.
    """
    folder, graphs = made.folder / "llama" / "changed", made.folder / "graphs"
    shutil.copytree(made("llama", "identity"), folder)
    keys = graphs / "torch_compile_cache" / "torch_aot_compile"
    first, again = (run(folder, graphs=graphs, options=COMPILED) for _ in range(2))
    before = len(list(keys.iterdir())) if keys.exists() else 0
    spoil(folder)
    plain = run(folder, plugin=False, options=COMPILED)
    mine = run(folder, graphs=graphs, options=COMPILED)
    for found in (first, again, plain, mine):
        if "error" in found:
            return {"passed": False, "error": found["error"]}
    result = compare(mine, plain) | {"keys": [before, len(list(keys.iterdir()))]}
    moved = difference(first, plain)
    good = difference(first, again) == 0 and result["logprob_difference"] <= TOLERANCE < moved
    return {"passed": good and result["keys"] == [1, 2], "what_the_weight_changes": moved, **result}


def reload(made: Checkpoints, options: dict[str, Any]) -> dict[str, Any]:
    """Norms take the weights that come later; where the forward is compiled, they refuse."""
    source = run(made("llama", "source"), plugin=False, options=options)
    found = run(made("llama", "identity"), options=options, reload=str(made("llama", "source")))
    later = found.get("reloaded", {"error": found.get("error")})
    if options:
        return {"passed": "restart the engine" in later.get("error", ""), "error": later.get("error")}
    result = compare(later | {"said": found["said"]}, source)
    return {"passed": result.get("logprob_difference") == 0 and not any(later["norms"].values()), **result}


def pooling(made: Checkpoints) -> dict[str, Any]:
    """A folded final norm would give other embeddings: stock vLLM does, the plugin refuses."""
    from flashnorm_cli.demo import MODEL

    folders = {}
    for layout in ("source", "identity"):
        folders[layout] = made.folder / "llama" / f"{layout}-with-tokenizer"  # vLLM wants one here
        if not folders[layout].exists():
            shutil.copytree(made("llama", layout), folders[layout])
            for path in MODEL.glob("tokenizer*"):
                shutil.copy(path, folders[layout])
    job = {"options": {"runner": "pooling", "convert": "embed", "skip_tokenizer_init": False}, "embed": True}
    source = run(folders["source"], plugin=False, **job)
    stock = run(folders["identity"], plugin=False, **job)
    mine = run(folders["identity"], **job)
    if "error" in source or "error" in stock:
        return {"passed": False, "error": source.get("error") or stock.get("error")}
    rows = zip(source["embeddings"], stock["embeddings"], strict=True)
    cosine = min(sum(x * y for x, y in zip(a, b, strict=True)) for a, b in rows)  # vLLM normalizes them
    refused = "--final-norm keep" in mine.get("error", "")
    return {"passed": refused, "lowest_cosine_in_stock_vllm": cosine, "error": mine.get("error")}


def a_pass_needs_weights(made: Checkpoints, family: str, ones: int) -> dict[str, Any]:
    """Where a pass is on that hands weights to other kernels, norms keep them, and a line says so.

    Gemma's get ones of the activations' dtype: the passes refuse the float32 that vLLM's own norm computes.
    """
    options = COMPILED | {"compilation_config": {"pass_config": {"fuse_allreduce_rms": True}}}
    found = run(made(family, "dropped"), options=options)
    result = compare(found, run(made(family, "source"), plugin=False)) | {"ones": found.get("ones")}
    good = result.get("same_tokens") is True and result["logprob_difference"] <= TOLERANCE
    spoken = any("fuse_allreduce_rms" in line for line in result["said"])
    return {"passed": good and spoken and result["norms_without_weight"] == 0 and result["ones"] == ones, **result}


def fusion_with_quantization(_: Checkpoints) -> dict[str, Any]:
    """Which norms vLLM's pass fuses with a quantization: ours with ones, and not its own `1 + w` in float32.

    A norm without a weight it fuses as well, and hands None to a kernel that wants a tensor, which is why the plugin
    leaves weights where the pass is on. Should `none` ever be false, it need not.
    """
    environment = os.environ | ENVIRONMENT | {"VLLM_PLUGINS": "none"}
    command = [sys.executable, str(Path(__file__).with_name("vllm_patterns.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        return {"passed": False, "error": done.stderr.splitlines()[-1]}
    found = json.loads(done.stdout.splitlines()[-1])
    for name, row in found.items():
        stock = "GemmaRMSNorm, own" in name  # float32 ones would do, but are not of the activations' dtype
        if "without" not in name and (row["matched"], row["none"]) != (int(not stock), False):
            return {"passed": False, "unexpected": name, "found": found}
    return {"passed": len(found) > 0, "found": found}


def weight_costs(made: Checkpoints) -> dict[str, Any]:
    """Eager norms on this processor, with a weight and without. A figure, not a test."""
    found = run(made("llama", "identity"), times=True)
    return {"passed": "error" not in found, "microseconds": found.get("times"), "error": found.get("error")}


# ---- all of it -------------------------------------------------------------------------------------------------------


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", default=[""], help="the checks whose names contain one of these")
    parser.add_argument("--jobs", type=int, default=2, help="how many groups of checks at a time (2)")
    arguments = parser.parse_args()
    names = packages_distributions()
    record: dict[str, Any] = {
        "date": now(),
        "versions": {p: version(names[p][0]) for p in ("vllm", "transformers", "torch", "flashnorm_cli")},
        "vllm_distribution": names["vllm"][0],
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "environment": ENVIRONMENT,
        "prompts": PROMPTS,
        "tokens": PROMPTS * NEW_TOKENS,
        "tolerance": TOLERANCE,
        "checks": {},
    }
    if arguments.only != [""] and arguments.out.exists():
        record["checks"] = json.loads(arguments.out.read_text())["checks"]
    groups: dict[str, list[tuple[str, Check]]] = {}
    for group, name, check in checks():
        if any(part in name for part in arguments.only):
            groups.setdefault(group, []).append((name, check))
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        made = Checkpoints(Path(folder))
        for family in FAMILIES:
            for layout in ("identity", "dropped"):
                made(family, layout)
        lock = threading.Lock()

        def work(group: list[tuple[str, Check]]) -> None:
            for name, check in group:
                started = time.perf_counter()
                try:
                    result = check(made)
                except Exception:
                    result = {"passed": False, "error": traceback.format_exc()}
                result |= {"seconds": round(time.perf_counter() - started, 1), "date": now()}
                with lock:
                    print(f"{'ok  ' if result['passed'] else 'FAIL'} {name} ({result['seconds']} s)", flush=True)
                    result = json.loads(json.dumps(result).replace(folder, "..."))
                    record["checks"] = dict(sorted({**record["checks"], name: result}.items()))
                    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
            for server in MINE.__dict__.pop("servers", {}).values():
                server.close()

        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(work, groups.values()))
    return 0 if all(result["passed"] for result in record["checks"].values()) else 1


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        sys.exit(main())
