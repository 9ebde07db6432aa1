"""Time a whole model with its norms on different code: decoding and prefill, as users run them and as CUDA graphs.

Every way computes the same model (weights that are not the identity are applied), which is checked before it is
timed. So what differs is the code of the norms.
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

from flashnorm_cli.bench.timing import spread
from flashnorm_cli.errors import FlashNormError
from flashnorm_cli.modeling.quiet import first_line, quiet_transformers
from flashnorm_cli.norms import fused_add_rms_norm
from flashnorm_cli.norms.detect import PlainNorm, plain_norms
from flashnorm_cli.runtimes.transformers.swap import norms_replaced, on_kernel

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_LLAMA_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
_LLAMA_8B = {
    **_LLAMA_1B,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
# Shapes of models that are known by name, so that nothing has to be downloaded to time them.
SHAPES = {"llama-3.2-1b": _LLAMA_1B, "llama-3.1-8b": _LLAMA_8B}
WAYS = ("stock", "notebook swap", "F.rms_norm", "flashnorm", "flashnorm fused", "no norms")
MODES = ("decode", "decode, CUDA graph", "decode, compiled", "prefill")
COMPILED_WAYS = ("stock", "flashnorm", "no norms")
PREFILL_TOKENS = 4096
CPU_PREFILL_TOKENS = 256
REPLAYS = 20
CLOSE = 0.05  # of the logits' own size: bf16 models differ by their rounding


def load(name: str, config_only: bool, device: str, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """A model to time: a named shape or, with `config_only`, a config with random weights; else a whole checkpoint.

    Raises:
        FlashNormError: transformers cannot read or build it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    try:
        with quiet_transformers():
            if not config_only and name not in SHAPES:
                model = AutoModelForCausalLM.from_pretrained(
                    name, dtype=dtype, device_map=device, trust_remote_code=trust_remote_code
                )
                return model.eval()
            config: PretrainedConfig
            if name in SHAPES:
                config = LlamaConfig(**SHAPES[name], max_position_embeddings=8192, rms_norm_eps=1e-5)
            else:
                config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            torch.manual_seed(0)
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises anything, remote code included
        raise FlashNormError(f"{name}: cannot be loaded as a causal language model: {first_line(error)}") from error
    return model.eval()


@contextmanager
def swapped(model: PreTrainedModel, way: str) -> Iterator[None]:
    """Run the model's norms another way, one of WAYS, within the block.

    Raises:
        FlashNormError: the way is not for this model.
    """
    if way == "stock":
        yield
    elif way == "flashnorm fused":
        with _fused(model):
            yield
    else:
        choose = on_kernel if way == "flashnorm" else lambda module, norm: _forward(way, module, norm)
        with norms_replaced(model, choose) as names:
            if not names:
                raise FlashNormError("the model has no plain RMSNorm")
            yield


def _forward(way: str, module: nn.Module, norm: PlainNorm) -> Callable[[Tensor], Tensor]:
    weight = norm.parameter(module).detach()
    eps, shape = norm.eps, weight.shape
    gain: Any = None if norm.is_identity(module) else (weight.float() + norm.offset).to(weight.dtype)

    def notebook(x: Tensor) -> Tensor:
        y = F.rms_norm(x.float(), shape, None, eps).to(x.dtype)
        return y if gain is None else y * gain

    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "notebook swap": notebook,
        "F.rms_norm": lambda x: F.rms_norm(x, shape, gain, eps),
        "no norms": lambda x: x,
    }
    return ways[way]


@contextmanager
def _fused(model: PreTrainedModel) -> Iterator[None]:
    """Let each norm add what the block before it left: layers hand on (their output, the residual stream)."""
    base: Any = model.base_model
    found = {id(module): norm for module, norm in plain_norms(model).values()}
    layers: Any = getattr(base, "layers", None)
    final: Any = getattr(base, "norm", None)
    parts = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
    if layers is None or id(final) not in found or any(set(dict(x.named_children())) != parts for x in layers):
        raise FlashNormError("fusing is written for layers of two norms, attention and MLP, as Llama's")
    if any(id(n) not in found for layer in layers for n in (layer.input_layernorm, layer.post_attention_layernorm)):
        raise FlashNormError("fusing is written for plain RMSNorms")
    stream: list[Tensor] = []  # the residual stream, while it is not in the layers' output

    def add_norm(module: nn.Module) -> Callable[[Tensor], None]:
        norm = found[id(module)]
        eps, offset = norm.eps, norm.offset
        weight = None if norm.is_identity(module) else norm.parameter(module)
        return lambda x: fused_add_rms_norm(x, stream[0], eps, weight=weight, offset=offset)

    def layer_forward(layer: Any, first: bool) -> Callable[..., Tensor]:
        before, after = add_norm(layer.input_layernorm), add_norm(layer.post_attention_layernorm)
        start, attention, mlp = (
            on_kernel(layer.input_layernorm, found[id(layer.input_layernorm)]),
            layer.self_attn,
            layer.mlp,
        )

        def forward(hidden_states: Tensor, **arguments: Any) -> Tensor:
            x = hidden_states
            if first:
                stream[:] = [x]
                x = start(x)
            else:
                before(x)
            x, _ = attention(hidden_states=x, **arguments)
            after(x)
            out: Tensor = mlp(x)
            return out

        return forward

    last = add_norm(final)

    def final_forward(x: Tensor) -> Tensor:
        last(x)
        return x

    changed = [*layers, final]
    for i, layer in enumerate(layers):
        layer.forward = layer_forward(layer, i == 0)
    final.forward = final_forward
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def check(model: PreTrainedModel, way: str) -> str | None:
    """Compare a forward's logits with the stock model's. Returns what is wrong."""
    ids = torch.arange(1, 33, device=model.device).view(1, -1) % model.config.get_text_config().vocab_size
    try:
        with torch.no_grad():
            want = model(ids).logits.float()
            with swapped(model, way):
                got = model(ids).logits.float()
    except FlashNormError as error:
        return str(error)
    if way == "no norms":
        return None  # another model on purpose: the limit
    error_size = ((got - want).norm() / want.norm()).item()
    return None if error_size <= CLOSE else f"wrong: logits differ by {error_size:.2g} of their size"


def _wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _prompt(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    ids = torch.arange(1, length + 1, device=model.device) % model.config.get_text_config().vocab_size
    return ids.expand(batch, -1).contiguous()


def _decode(model: PreTrainedModel, way: str, tokens: int, batch: int) -> float:
    """Tokens per second and sequence of `generate`, greedy, from a prompt of 8 tokens."""
    ids = _prompt(model, batch, 8)
    with torch.no_grad(), swapped(model, way):
        _wait(model)
        start = time.perf_counter()
        generate: Any = model.generate  # annotated as a Tensor, as any attribute of a module
        generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        _wait(model)
        return tokens / (time.perf_counter() - start)


def _prefill(model: PreTrainedModel, way: str, tokens: int, batch: int) -> float:
    """Tokens per second and sequence of a forward over a prompt."""
    ids = _prompt(model, batch, tokens)
    with torch.no_grad(), swapped(model, way):
        _wait(model)
        start = time.perf_counter()
        model(ids, use_cache=False, logits_to_keep=1)
        _wait(model)
        return tokens / (time.perf_counter() - start)


def _graph(model: PreTrainedModel, way: str, length: int, batch: int, compiled: bool) -> Callable[[], float]:
    """One step of decoding at position `length`, in a CUDA graph. The result times it: steps per second."""
    from transformers import StaticCache

    with torch.no_grad(), swapped(model, way):
        cache = StaticCache(config=model.config, max_cache_len=length + REPLAYS + 8)
        model(_prompt(model, batch, length), past_key_values=cache, use_cache=True, logits_to_keep=1)
        step = torch.ones(batch, 1, dtype=torch.long, device=model.device)
        position = torch.full((batch, 1), length, dtype=torch.long, device=model.device)
        # A step moves counters of the cache on; more replays than it has places for would write beside it.
        counters = [
            t
            for layer in cache.layers
            for t in vars(layer).values()
            if isinstance(t, Tensor) and not t.is_floating_point()
        ]
        start = [t.clone() for t in counters]

        def rewind() -> None:
            for counter, value in zip(counters, start, strict=True):
                counter.copy_(value)

        def forward() -> Tensor:
            logits: Tensor = model(step, position_ids=position, past_key_values=cache, use_cache=True).logits
            return logits

        if compiled:
            torch._dynamo.reset()
            forward = torch.compile(forward, dynamic=False)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                forward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = forward()
    held = cache, step, position, logits  # a graph knows their addresses, and does not keep them alive

    def timed() -> float:
        rewind()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        for _ in range(REPLAYS):
            graph.replay()
        marks[1].record()
        torch.cuda.synchronize()
        if way != "no norms" and not held[-1].isfinite().all():  # without norms, a deep model overflows
            raise FlashNormError("the logits are not finite")
        return REPLAYS * 1000 / marks[0].elapsed_time(marks[1])

    return timed


def bench(
    model: PreTrainedModel,
    trials: int = 20,
    tokens: int = 256,
    batch: int = 1,
    modes: tuple[str, ...] = MODES,
    ways: tuple[str, ...] = WAYS,
    on_progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Time the model in every mode and way. Ways take turns; gains are medians over pairs of one turn.

    Args:
        model: on the device that it is timed on. On a CPU, only "decode" and "prefill" are.
        tokens: to decode; also the position of the step that is captured in a graph.
    Returns:
        A row per mode and way: tok_per_s and sequence (median), spread (10th and 90th percentile), trials (each),
        gain_percent over stock; or error.
    """
    gpu = model.device.type == "cuda"
    rows: list[dict[str, Any]] = []
    good = []
    for way in ways:
        if error := check(model, way):
            rows.append({"mode": "all", "way": way, "error": error})
        else:
            good.append(way)
    for mode in modes:
        if not gpu and mode not in ("decode", "prefill"):
            continue
        mine = [way for way in good if mode != "decode, compiled" or way in COMPILED_WAYS]
        timers: dict[str, Callable[[], float]] = {}
        for way in mine:
            on_progress(f"{mode}: {way}")
            try:
                timers[way] = _timer(model, mode, way, tokens, batch)
                timers[way]()
            except Exception as problem:  # a model of any kind, under a compiler or in a graph
                timers.pop(way, None)
                rows.append({"mode": mode, "way": way, "error": first_line(problem)})
        speeds: dict[str, list[float]] = {way: [] for way in timers}
        for trial in range(trials):
            on_progress(f"{mode}: turn {trial + 1} of {trials}")
            turn = list(timers)
            for way in turn[trial % len(turn) :] + turn[: trial % len(turn)]:  # nobody always follows the same one
                speeds[way].append(timers[way]())
        rows += [_row(mode, way, each, speeds.get("stock")) for way, each in speeds.items()]
    return rows


def _timer(model: PreTrainedModel, mode: str, way: str, tokens: int, batch: int) -> Callable[[], float]:
    if mode == "decode":
        return lambda: _decode(model, way, tokens, batch)
    if mode == "prefill":
        many = PREFILL_TOKENS if model.device.type == "cuda" else CPU_PREFILL_TOKENS
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or many
        return lambda: _prefill(model, way, min(many, longest), batch)
    if mode == "decode, compiled":
        return _graph(model, way, tokens, batch, compiled=True)
    # Each turn captures anew: one capture of the same model can be 2 % faster than the next.
    return lambda: _graph(model, way, tokens, batch, compiled=False)()


def _row(mode: str, way: str, speeds: list[float], stock: list[float] | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "mode": mode,
        "way": way,
        "tok_per_s": round(median(speeds), 2),
        "spread": list(spread(speeds, 2)),
        "trials": [round(s, 2) for s in speeds],
    }
    if stock is not None:
        row["gain_percent"] = round(median(100 * (a / b - 1) for a, b in zip(speeds, stock, strict=True)), 2)
    return row


def norm_sizes(model: PreTrainedModel) -> list[int]:
    """The hidden sizes of the model's plain norms, to time the kernels on."""
    return sorted({norm.parameter(module).numel() for module, norm in plain_norms(model).values()})
