"""Time a whole model with its norms on different code: decoding and prefill, as users run them and as CUDA graphs.

Every way computes the same model (weights that are not the identity are applied), which is checked before it is
timed. So what differs is the code of the norms.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashnorm_cli.bench.timing import spread
from flashnorm_cli.bench.ways import COMPILED_WAYS, TUNED_INDUCTOR, WAYS, swapped
from flashnorm_cli.checkpoint.hub_ids import hub_id
from flashnorm_cli.checkpoint.progress import Steps
from flashnorm_cli.errors import FlashNormError
from flashnorm_cli.modeling.quiet import first_line, quiet_transformers
from flashnorm_cli.norms.detect import plain_norms

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
MODES = ("decode", "decode, CUDA graph", "decode, compiled", "prefill")
PREFILL_TOKENS = 4096
CPU_PREFILL_TOKENS = 256
REPLAYS = 20
CLOSE = 0.05  # of the logits' own size: bf16 models differ by their rounding


def load(name: str, config_only: bool, device: str, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """A model to time: a named shape or, with `config_only`, a config with random weights; else a whole checkpoint.

    A Hub id may be its page's address, with a revision.

    Raises:
        FlashNormError: transformers cannot read or build it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    where, revision = hub_id(name)
    hub: dict[str, Any] = {"trust_remote_code": trust_remote_code} | ({"revision": revision} if revision else {})
    try:
        with quiet_transformers():
            if not config_only and name not in SHAPES:
                model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, device_map=device, **hub)
                return model.eval()
            config: PretrainedConfig
            if name in SHAPES:
                config = LlamaConfig(**SHAPES[name], max_position_embeddings=8192, rms_norm_eps=1e-5)
            else:
                config = AutoConfig.from_pretrained(where, **hub)
            torch.manual_seed(0)
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises anything, remote code included
        raise FlashNormError(f"{name}: cannot be loaded as a causal language model: {first_line(error)}") from error
    return model.eval()


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
            more: Any = {"coordinate_descent_tuning": True} if way == TUNED_INDUCTOR else None
            forward = torch.compile(forward, dynamic=False, options=more)
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
    ways: tuple[str, ...] = (*WAYS, TUNED_INDUCTOR),
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    seconds: float | None = None,
) -> list[dict[str, Any]]:
    """Time the model in every mode and way. Ways take turns; gains are medians over pairs of one turn.

    Args:
        model: on the device that it is timed on. On a CPU, only "decode" and "prefill" are.
        tokens: to decode; also the position of the step that is captured in a graph.
        on_progress: called with (turns done, turns in all, what is going on).
        on_row: called with each row as soon as it is known, also with those of turns that Ctrl-C has ended.
        seconds: for each mode; after them no turn is begun, but the first.
    Returns:
        A row per mode and way: tok_per_s and sequence (median), spread (10th and 90th percentile), trials (each),
        gain_percent over stock; or error.
    """
    gpu = model.device.type == "cuda"
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        on_row(row)

    good = []
    for way in ways:
        if error := check(model, way):
            add({"mode": "all", "way": way, "error": error})
        else:
            good.append(way)
    for mode in modes:
        if not gpu and mode not in ("decode", "prefill"):
            continue
        compiled = mode == "decode, compiled"
        mine = [way for way in good if (way in COMPILED_WAYS if compiled else way != TUNED_INDUCTOR)]
        timers: dict[str, Callable[[], float]] = {}
        for way in mine:
            on_progress(0, 0, f"Preparing {mode}: {way}")
            try:
                timers[way] = _timer(model, mode, way, tokens, batch)
                timers[way]()
            except Exception as problem:  # a model of any kind, under a compiler or in a graph
                timers.pop(way, None)
                add({"mode": mode, "way": way, "error": first_line(problem)})
        speeds: dict[str, list[float]] = {way: [] for way in timers}
        try:
            _take_turns(mode, timers, speeds, trials, on_progress, seconds)
        finally:  # Ctrl-C, too
            for way, each in speeds.items():
                if each:
                    add(_row(mode, way, each, speeds.get("stock")))
    return rows


def _take_turns(
    mode: str,
    timers: dict[str, Callable[[], float]],
    speeds: dict[str, list[float]],
    trials: int,
    on_progress: Callable[[int, int, str], None],
    seconds: float | None,
) -> None:
    over = time.perf_counter() + (seconds or float("inf"))
    for trial in range(trials):
        if trial and time.perf_counter() > over:
            return
        on_progress(trial, trials, Steps(f"Timing {mode}"))
        turn = list(timers)
        for way in turn[trial % len(turn) :] + turn[: trial % len(turn)]:  # nobody always follows the same one
            speeds[way].append(timers[way]())


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
        pairs = list(zip(speeds, stock, strict=False))  # the last turn may have been cut short
        if pairs:
            row["gain_percent"] = round(median(100 * (a / b - 1) for a, b in pairs), 2)
    return row


def norm_sizes(model: PreTrainedModel) -> list[int]:
    """The hidden sizes of the model's plain norms, to time the kernels on."""
    return sorted({norm.parameter(module).numel() for module, norm in plain_norms(model).values()})
