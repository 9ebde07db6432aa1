"""`weightless` on a GPU: kernels in use, CUDA graphs, static caches, torch.compile, device maps; tiny models."""

import copy

import families
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedModel, Qwen3Config, StaticCache

from flashnorm_cli import fold_model_, from_pretrained, weighted, weightless
from flashnorm_cli.norms import info
from flashnorm_cli.runtimes.transformers.swap import is_weightless

pytestmark = pytest.mark.gpu

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma3": Gemma3TextConfig}
FOLDED = 5  # norms that are folded in each of these
# Two forwards of one bfloat16 model whose norms round differently here and there.
CLOSE = 0.03


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def folded(family: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**SIZES), dtype=dtype).eval()
    families.randomize_gains(model, 1)
    return fold_model_(model.to(device))


def ids(length: int = 12) -> torch.Tensor:
    return torch.randint(3, 500, (2, length), generator=torch.Generator().manual_seed(5)).cuda()


def logits(model: PreTrainedModel, tokens: torch.Tensor, **more: object) -> torch.Tensor:
    return model(tokens, **more).logits.float()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def spoil(model: nn.Module) -> None:
    """Make the weights of weightless norms NaN: whoever still reads one computes NaN."""
    for module in model.modules():
        if is_weightless(module):
            module.weight.data.fill_(torch.nan)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_kernels_run_the_folded_norms_and_no_others(family):
    if not info()["path"].startswith("cuda"):
        pytest.skip(f"no kernels here: {info()['reason']}")
    model, tokens = folded(family), ids()
    want = logits(model, tokens)
    weightless(model)
    logits(model, tokens)  # compiles
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        got = logits(model, tokens)
        torch.cuda.synchronize()
    counts = {event.key: event.count for event in seen.key_averages()}
    assert counts.get("rms_norm") == FOLDED, sorted(counts)
    assert distance(got, want) < CLOSE
    spoil(model)
    assert torch.equal(logits(model, tokens), got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_each_norm_within_one_rounding(family, dtype):
    model = folded(family, dtype=dtype)
    stock = copy.deepcopy(model)
    weightless(model)
    unit = torch.finfo(dtype).eps
    for name, module in model.named_modules():
        if is_weightless(module):
            x = (torch.randn(2, 7, 256, device="cuda") * 3).to(dtype)
            got, want = module(x), stock.get_submodule(name)(x)
            assert got.dtype == want.dtype
            allowed = unit * (8 if dtype == torch.float32 else 1)  # in float32 the sums differ as well
            assert ((got.double() - want.double()).abs() <= allowed * want.double().abs()).all()
            for other in {torch.bfloat16, torch.float32} - {dtype}:  # mixed dtypes
                got, want = module(x.to(other)), stock.get_submodule(name)(x.to(other))
                assert got.dtype == want.dtype
                torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-6)


def test_an_unfolded_model_is_untouched():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=torch.bfloat16).eval()
    families.randomize_gains(model, 1)
    model, tokens = model.cuda(), ids()
    want = logits(model, tokens)
    other = weightless(folded("llama"))
    assert torch.equal(logits(model, tokens), want) and not any(is_weightless(m) for m in model.modules())
    assert distance(logits(other, tokens), want) < CLOSE


def test_folded_on_the_gpu_the_same_bits_as_on_the_cpu():
    for family in CONFIGS:
        here, there = folded(family).state_dict(), folded(family, "cpu").state_dict()
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name].cpu(), there[name]) for name in here)


def test_moved_and_copied():
    model, tokens = weightless(folded("llama", "cpu", torch.float32)), ids()
    want = logits(model, tokens.cpu())
    assert distance(logits(model.cuda(), tokens).cpu(), want) < 1e-4
    other = copy.deepcopy(model).to(torch.bfloat16)
    got = logits(other, tokens)
    assert distance(got.cpu(), want) < CLOSE
    spoil(other)
    assert torch.equal(logits(other, tokens), got)
    with torch.autocast("cuda", torch.bfloat16):
        a, b = logits(weighted(copy.deepcopy(model)), tokens), logits(model, tokens)
    assert a.dtype == b.dtype and distance(b, a) < CLOSE


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_decoding_in_a_cuda_graph_with_a_static_cache(family):
    model, tokens = weightless(folded(family)), ids(16)
    step, position = tokens[:, -1:].clone(), torch.full((2, 1), 15, device="cuda")
    want = logits(model, tokens, use_cache=False)[:, -1]

    def prefilled() -> StaticCache:
        cache = StaticCache(config=model.config, max_cache_len=64)
        model(tokens[:, :15], past_key_values=cache, use_cache=True)
        return cache

    def forward(cache: StaticCache) -> torch.Tensor:
        return model(step, position_ids=position, past_key_values=cache, use_cache=True).logits

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager = forward(prefilled()).float()[:, -1]
        cache = prefilled()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward(cache)
    spoil(model)  # a replay reads no weight either
    graph.replay()
    torch.cuda.synchronize()
    assert distance(out.float()[:, -1], eager) < 1e-3 and distance(eager, want) < CLOSE
    step.copy_(tokens[:, :1])  # another token of another row: the graph follows its input
    graph.replay()
    torch.cuda.synchronize()
    assert out.isfinite().all() and distance(out.float()[:, -1], eager) > 1e-2


def test_generate():
    model, tokens = folded("llama", dtype=torch.float32), ids(8)
    more = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    want = model.generate(tokens, **more)
    weightless(model)
    assert torch.equal(model.generate(tokens, **more), want)
    cache = StaticCache(config=model.config, max_cache_len=32)
    assert torch.equal(model.generate(tokens, past_key_values=cache, disable_compile=True, **more), want)


def test_compiled():
    model, tokens = weightless(folded("qwen3")), ids()
    want = logits(model, tokens, use_cache=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            got = logits(compiled, tokens, use_cache=False)
    assert distance(got, want) < CLOSE
    spoil(model)
    assert torch.equal(logits(compiled, tokens, use_cache=False), got)
    torch._dynamo.reset()


def test_training():
    tokens, grads = ids(), []
    for change in (lambda model: model, weightless):
        model = change(folded("llama", dtype=torch.float32)).train()
        with torch.enable_grad():
            model(tokens, labels=tokens).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) == FOLDED
    for name, grad in grads[0].items():
        if name in frozen:
            assert grads[1][name] is None
        else:
            torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("places", ["cuda", "auto", "part on the CPU", "part on disk"])
def test_device_map(places, tmp_path):
    stock, tokens = folded("llama", "cpu"), ids()
    stock.save_pretrained(tmp_path / "folded")
    want = logits(stock, tokens.cpu())
    device_map: object = places
    if places.startswith("part"):
        device_map = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.rotary_emb", "lm_head"], 0)
        elsewhere = "cpu" if places.endswith("CPU") else "disk"
        device_map |= {"model.layers.1": elsewhere, "model.norm": elsewhere}
    model = from_pretrained(tmp_path / "folded", device_map=device_map, offload_folder=tmp_path / "offload")
    assert sum(is_weightless(m) for m in model.modules()) == FOLDED
    assert distance(logits(model, tokens).cpu(), want) < CLOSE
