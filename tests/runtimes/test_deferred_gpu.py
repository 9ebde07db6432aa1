"""Merged readers on a GPU: the kernels run, in eager mode, in CUDA graphs and compiled; as right as the model was."""

import copy

import families
import pytest
import torch
from own_choices import start_without_choices
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
)

from flashnorm_cli import deferred_modules, fold_model_, weighted, weightless
from flashnorm_cli.cuda.choices import Choice
from flashnorm_cli.cuda.linear_variants import candidates
from flashnorm_cli.norms import linear as norms_linear
from flashnorm_cli.runtimes.transformers.products import Layer

pytestmark = pytest.mark.gpu
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "gemma3": Gemma3TextConfig}


@pytest.fixture(autouse=True)
def kernels_whatever_is_faster(tmp_path, monkeypatch):
    """Choose a kernel for every shape, so that tiny models run on them too."""
    start_without_choices(tmp_path, monkeypatch)

    def first(problem, rows, index):
        return Choice(candidates(problem.k, problem.activation, rows, 90)[0])

    monkeypatch.setattr(norms_linear.choices, "choice_of", first)
    with torch.no_grad():
        yield


def folded(family: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**SIZES), dtype=torch.float32).eval()
    families.randomize_gains(model, 1)
    return fold_model_(model.to("cuda")).to(dtype)


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 500, (rows, length), generator=torch.Generator().manual_seed(5)).cuda()


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


@pytest.mark.parametrize("rows", [1, 3, 16, 40])
@pytest.mark.parametrize("family", CONFIGS)
def test_no_further_from_float32_than_stock(family, rows):
    stock = folded(family)
    tokens = ids(rows, 1)
    want = copy.deepcopy(stock).float()(tokens).logits
    before = off(stock(tokens).logits, want)
    model = weightless(stock, deferred=True)
    assert sum(why is None for why in deferred_modules(model).values()) >= 4, deferred_modules(model)
    assert off(model(tokens).logits, want) < 1.3 * before + 1e-4


@pytest.mark.parametrize("rows", [1, 4])
def test_the_kernels_and_nothing_beside_them(rows):
    model, tokens = weightless(folded("llama"), deferred=True), ids(rows, 1)
    assert sum(isinstance(m, Layer) for m in model.modules()) == 2
    model(tokens)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        model(tokens)
        torch.cuda.synchronize()
    counts = {event.key: event.count for event in seen.key_averages()}
    assert counts.get("one_row" if rows == 1 else "few_rows") == 9, counts  # four a layer, and the head
    assert counts.get("rms_norm") == 1, counts
    assert not any("silu" in key for key in counts), counts


def decoded(model, tokens, compiled=False):
    """The logits of a step in a graph with a static cache, as a function of its token."""
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(tokens[:, :-1], past_key_values=cache, use_cache=True)
    step = tokens[:, -1:].clone()
    position = torch.full_like(step, tokens.shape[1] - 1)

    def forward():
        return model(step, position_ids=position, past_key_values=cache, use_cache=True).logits

    run = torch.compile(forward, dynamic=False) if compiled else forward
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    counters = [t for layer in cache.layers for t in vars(layer).values()
                if isinstance(t, torch.Tensor) and not t.is_floating_point()]  # fmt: skip
    start = [t.clone() for t in counters]
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay(token):
        for counter, value in zip(counters, start, strict=True):
            counter.copy_(value)
        step.copy_(token)
        graph.replay()
        torch.cuda.synchronize()
        return out.float().clone()

    replay.held = cache, step, position
    return replay


# Not Gemma 3 compiled: its sliding cache counts in Python, so that stock and deferred alike compile each step anew.
@pytest.mark.parametrize(
    ("family", "compiled"), [("llama", False), ("gemma3", False), ("llama", True), ("qwen2", True)], ids=str
)
def test_decoding_in_a_graph(family, compiled):
    model, tokens = folded(family), ids(2, 12)
    wide = copy.deepcopy(model).float()
    want = wide(tokens).logits[:, -1:]
    before = off(decoded(model, tokens)(tokens[:, -1:]), want)
    weightless(model, deferred=True)
    assert sum(why is None for why in deferred_modules(model).values()) >= 4
    torch._dynamo.reset()
    step = decoded(model, tokens, compiled)
    assert off(step(tokens[:, -1:]), want) < 1.3 * before + 1e-3
    other = step(tokens[:, :1])
    assert other.isfinite().all() and off(other, want) > 0.01
    assert torch.equal(step(tokens[:, -1:]), step(tokens[:, -1:]))
    torch._dynamo.reset()


def test_generate_and_moves():
    model, tokens = folded("llama"), ids(1, 8)
    more = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    weightless(model, deferred=True)
    first = model.generate(tokens, **more)
    assert first.shape == (1, 20)
    moved = model.cpu().cuda()
    assert torch.equal(moved.generate(tokens, **more), first)
    half = copy.deepcopy(moved).half()
    assert off(half(tokens).logits, weighted(half)(tokens).logits) < 0.01
