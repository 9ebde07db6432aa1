"""Time a whole model with its norms on different code: decoding as users run it, and as a CUDA graph.

The weights are random and the norms' are ones: every way computes the same, which is checked before it is timed. So
what differs is the code of the norms, which is what a folded checkpoint allows to change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashnorm_cli.norms import fused_add_rms_norm, rms_norm

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Shapes of models that are known by name, so that nothing has to be downloaded to time them.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
WAYS = ("stock", "notebook swap", "F.rms_norm(None)", "flashnorm", "flashnorm fused", "no norms")
CLOSE = 0.05  # of the logits' own size: bf16 models differ by their rounding


def config_of(name: str) -> PretrainedConfig:
    """A named shape, or the config of a local folder."""
    from transformers import AutoConfig, LlamaConfig

    if name in SHAPES:
        return LlamaConfig(
            **SHAPES[name], max_position_embeddings=8192, rms_norm_eps=1e-5, eos_token_id=None, bos_token_id=1
        )
    return AutoConfig.from_pretrained(name)


def random_model(config: PretrainedConfig, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights, norms of ones, eager sdpa attention."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def norms_of(model: nn.Module) -> list[nn.Module]:
    """The RMSNorm modules whose forward is x, weight and eps, and nothing else."""
    return [
        m
        for m in model.modules()
        if type(m).__name__.endswith("RMSNorm")
        and isinstance(getattr(m, "weight", None), Tensor)
        and _eps(m) is not None
    ]


def _eps(norm: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        if isinstance(value := getattr(norm, name, None), float):
            return value
    return None


@contextmanager
def swapped(model: PreTrainedModel, way: str) -> Iterator[None]:
    """Run the model's norms another way, one of WAYS, within the block. Raises ValueError where that cannot be."""
    changed: list[nn.Module] = []

    def give(module: nn.Module, forward: Callable[..., Any]) -> None:
        module.forward = forward
        changed.append(module)

    if way == "flashnorm fused":
        _fuse(model, give)
    elif way != "stock":
        for norm in norms_of(model):
            give(norm, _forward(way, norm))
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _forward(way: str, norm: nn.Module) -> Callable[[Tensor], Tensor]:
    eps, shape = _eps(norm) or 0.0, list(norm.get_parameter("weight").shape)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "notebook swap": lambda x: F.rms_norm(x.float(), shape, None, eps).to(x.dtype),
        "F.rms_norm(None)": lambda x: F.rms_norm(x, shape, None, eps),
        "flashnorm": lambda x: rms_norm(x, eps),
        "no norms": lambda x: x,
    }
    return ways[way]


def _fuse(model: PreTrainedModel, give: Callable[[nn.Module, Callable[..., Any]], None]) -> None:
    """Let each norm add what the block before it left: layers hand on (their output, the residual stream)."""
    base = model.base_model
    layers: Any = getattr(base, "layers", None)
    final: Any = getattr(base, "norm", None)
    parts = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
    if layers is None or final is None or any({n for n, _ in layer.named_children()} != parts for layer in layers):
        raise ValueError("fusing is written for layers of two norms, attention and MLP, as Llama's")
    stream: list[Tensor] = []  # the residual stream, while it is not in the layers' output

    def layer_forward(layer: Any, first: bool) -> Callable[..., Tensor]:
        before, after = _eps(layer.input_layernorm) or 0.0, _eps(layer.post_attention_layernorm) or 0.0
        attention, mlp = layer.self_attn, layer.mlp

        def forward(hidden_states: Tensor, **arguments: Any) -> Tensor:
            if first:
                stream[:] = [hidden_states]
                x = rms_norm(hidden_states, before)
            else:
                x = hidden_states
                fused_add_rms_norm(x, stream[0], before)
            x, _ = attention(hidden_states=x, **arguments)
            fused_add_rms_norm(x, stream[0], after)
            out: Tensor = mlp(x)
            return out

        return forward

    def final_forward(x: Tensor) -> Tensor:
        fused_add_rms_norm(x, stream[0], _eps(final) or 0.0)
        return x

    for i, layer in enumerate(layers):
        give(layer, layer_forward(layer, i == 0))
    give(final, final_forward)


def check(model: PreTrainedModel, way: str) -> str | None:
    """Compare a forward's logits with the stock model's. Returns what is wrong."""
    if way == "no norms":
        return None  # another model on purpose: the limit
    ids = torch.arange(1, 33, device=model.device).view(1, -1)
    with torch.no_grad():
        want = model(ids).logits.float()
        with swapped(model, way):
            got = model(ids).logits.float()
    error = ((got - want).norm() / want.norm()).item()
    return None if error <= CLOSE else f"wrong: logits differ by {error:.2g} of their size"


def decode_eager(model: PreTrainedModel, way: str, tokens: int, batch: int = 1) -> float:
    """Tokens per second and sequence of `generate`, greedy, from a prompt of 8 tokens."""
    ids = torch.arange(1, 9, device=model.device).expand(batch, -1).contiguous()
    with torch.no_grad(), swapped(model, way):
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return (out.shape[1] - ids.shape[1]) / seconds


def decode_graph(model: PreTrainedModel, way: str, length: int = 256, batch: int = 1) -> Any:
    """One step of decoding at position `length`, captured as a CUDA graph."""
    from transformers import StaticCache

    device = model.device
    with torch.no_grad(), swapped(model, way):
        cache = StaticCache(config=model.config, max_cache_len=length + 8)
        ids = torch.arange(1, length + 1, device=device).expand(batch, -1).contiguous() % model.config.vocab_size
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        step = torch.ones(batch, 1, dtype=torch.long, device=device)
        position = torch.full((batch, 1), length, dtype=torch.long, device=device)

        def run() -> Any:
            return model(step, position_ids=position, past_key_values=cache, use_cache=True).logits

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(), run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graph.result = run()  # type: ignore[attr-defined]
        graph.cache = cache  # type: ignore[attr-defined]
    return graph


def bench(
    name: str,
    trials: int = 20,
    tokens: int = 256,
    ways: tuple[str, ...] = WAYS,
    modes: tuple[str, ...] = ("eager", "graph"),
    dtype: torch.dtype = torch.bfloat16,
    on_progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Decode, one sequence, in every way; ways take turns, and gains are medians over pairs of one turn.

    Returns:
        One row per mode and way: tok_per_s (median), trials (each), gain over stock in percent, or error.
    """
    model = random_model(config_of(name), "cuda", dtype)
    rows: list[dict[str, Any]] = []
    good = []
    for way in ways:
        try:
            error = check(model, way)
        except ValueError as problem:
            error = str(problem)
        if error:
            rows.append({"model": name, "mode": "all", "way": way, "error": error})
        else:
            good.append(way)
    for mode in modes:
        speeds: dict[str, list[float]] = {way: [] for way in good}
        if mode == "eager":
            for way in good:
                decode_eager(model, way, 16)
            for trial in range(trials):
                on_progress(f"{name} {mode} {trial + 1}/{trials}")
                for way in good[trial % len(good) :] + good[: trial % len(good)]:
                    speeds[way].append(decode_eager(model, way, tokens))
        else:
            graphs = {way: decode_graph(model, way) for way in good}
            for _ in range(trials):
                for way, graph in graphs.items():
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    for _ in range(20):
                        graph.replay()
                    end.record()
                    torch.cuda.synchronize()
                    speeds[way].append(20_000 / start.elapsed_time(end))
        for way in good:
            gains = [100 * (a / b - 1) for a, b in zip(speeds[way], speeds[good[0]], strict=True)]
            rows.append(
                {
                    "model": name,
                    "mode": mode,
                    "way": way,
                    "tok_per_s": round(median(speeds[way]), 2),
                    f"gain_over_{good[0]}_percent": round(median(gains), 2),
                    "trials": [round(s, 2) for s in speeds[way]],
                }
            )
    return rows
