"""norm_linear on a GPU: every variant against float64, and as a guest of torch."""

import pytest
import torch
import torch.nn.functional as F
from alike import assert_same_in_threads
from own_choices import start_without_choices

from flashnorm_cli.cuda import choices, driver, linear
from flashnorm_cli.cuda.choices import Choice
from flashnorm_cli.cuda.linear import Problem
from flashnorm_cli.cuda.linear_variants import ACTIVATIONS, bucket_of, candidates
from flashnorm_cli.norms import tuning
from flashnorm_cli.norms.linear import norm_linear, problem_of

pytestmark = pytest.mark.gpu
EPS = 1e-5
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    start_without_choices(tmp_path, monkeypatch)
    linear.ready().clear()
    with torch.no_grad():
        yield


def random(*shape, dtype=torch.bfloat16, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def exact(x, weight, eps=EPS, bias=None, residual=None, activation=None):
    """In float64, rounded where norm_linear says it rounds."""
    wide = x.double()
    if eps is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = wide @ weight.double().T
    if bias is not None:
        y = y + bias.double()
    if activation is not None:
        gate, up = y.chunk(2, -1)
        act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh")}[activation]
        y = act(gate) * up
    return y if residual is None else y.to(x.dtype).double() + residual.double()


def check(got, want, more=0.0):
    """One rounding of the result, and what float32 sums of K products lose against float64."""
    assert got.shape == want.shape
    size = want.square().mean().sqrt()
    allowed = (1.01 + more) * UNIT[got.dtype] * want.abs() + 3e-5 * size + UNIT[got.dtype] * more * size
    worst = (got.double() - want).abs() - allowed
    assert not worst.isnan().any() and worst.max() <= 0, f"off by {worst.max().item():.3g}"


def force(variant, x, weight, eps=EPS, residual=None, activation=None):
    """Let norm_linear run this variant for this shape."""
    problem = problem_of(x, weight, eps, residual, activation)
    rows = x.numel() // x.size(-1)
    choices.remember(problem, bucket_of(rows), 0, Choice(variant), save=False)
    linear.ready().clear()


def variants_of(k, activation, rows):
    return candidates(k, ACTIVATIONS.index(activation or "none"), rows, driver.device(0).arch)


def compile_ahead(variants, x, weight, eps, residual, activation):
    problem = problem_of(x, weight, eps, residual, activation)
    tuning.compile_all([(v, problem) for v in variants], 0)


def check_all(k, n, rows, dtype, step=1, activations=(None, "silu")):
    for activation in activations:
        lines = n * (2 if activation else 1)
        weight, x = random(lines, k, dtype=dtype, scale=k**-0.5), random(rows, k, dtype=dtype, scale=3)
        bias, residual = random(lines, dtype=dtype), random(rows, n, dtype=dtype, scale=2)
        variants = variants_of(k, activation, rows)[::step]
        assert variants
        compile_ahead(variants, x, weight, EPS, None, activation)
        for variant in variants:
            force(variant, x, weight, EPS, None, activation)
            poison = torch.full((rows, n), float("nan"), dtype=dtype, device="cuda")
            del poison  # the next output lies there
            for _ in range(2):  # the second one reads weights early
                check(
                    norm_linear(x, weight, EPS, None, None, activation), exact(x, weight, EPS, None, None, activation)
                )
        force(variants[0], x, weight, EPS, residual, activation)
        got = norm_linear(x, weight, EPS, bias, residual, activation)
        check(got, exact(x, weight, EPS, bias, residual, activation), 1.0)
        force(variants[0], x, weight, None, residual, activation)
        got = norm_linear(x, weight, None, None, residual, activation)
        check(got, exact(x, weight, None, None, residual, activation), 1.0)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 15, 16])
def test_every_variant(rows):
    check_all(2048, 360, rows, torch.bfloat16, step=1 if rows in (1, 8, 16) else 3)


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("k", [8, 24, 64, 72, 248, 264, 520, 584, 1000, 2880, 5120, 8200])
def test_small_odd_sizes(k, dtype):
    for rows, n in ((1, 8), (1, 72), (5, 8), (5, 136), (12, 40)):
        check_all(k, n, rows, dtype, step=4, activations=(None, "gelu_tanh", "gelu"))


@pytest.mark.parametrize("k", [14336, 16384, 28672])
def test_long_rows(k):
    for rows in (1, 6, 16):
        check_all(k, 264, rows, torch.bfloat16, step=3, activations=(None,))


def test_small_values_and_epilogues():
    x, weight = random(1, 512, scale=1e-20), random(64, 512)
    for scale in (1e-30, 1e-18, 1.0, 1e15):
        x = random(1, 512).mul(scale)
        force(variants_of(512, None, 1)[0], x, weight)
        check(norm_linear(x, weight, EPS), exact(x, weight), 0.1)
    for size in (1.0, 30.0, 200.0):
        for activation in ("silu", "gelu", "gelu_tanh"):
            for rows in (1, 8):
                x = random(rows, 512, scale=size)
                force(variants_of(512, activation, rows)[0], x, weight, None, None, activation)
                got = norm_linear(x, weight, None, None, None, activation)
                check(got, exact(x, weight, None, None, None, activation), 0.5)


def test_small_residual_is_added_as_a_model_does():
    for rows in (1, 8):
        x, weight, residual = random(rows, 1024), random(256, 1024), random(rows, 256)
        force(variants_of(1024, None, rows)[0], x, weight, None, residual)
        force(variants_of(1024, None, rows)[0], x, weight, None)
        assert torch.equal(norm_linear(x, weight, None, None, residual), residual + norm_linear(x, weight, None))


def test_small_strides():
    base = random(4, 3, 1040)
    weight = random(96, 1104, scale=0.03)[:, 8:1032]
    for x in (base[:, -1:, :1024], base[:, 1, 8:1032], base[:, 1, 3:1027], base.transpose(0, 1)[..., :1024]):
        rows = x.numel() // 1024
        force(variants_of(1024, None, rows)[0], x, weight)
        for _ in range(2):
            got = norm_linear(x, weight, EPS)
            assert got.is_contiguous()
            check(got, exact(x, weight))
    odd = random(96, 1031, scale=0.03)[:, 5:1029]  # cannot be read 16 bytes at a time: the library's
    check(norm_linear(x, odd, EPS), exact(x, odd), 4.0)  # which rounds the norm before the product


def test_beyond_sixteen_rows_and_other_dtypes():
    weight = random(64, 256)
    for rows in (0, 17, 300):
        x = random(rows, 256)
        assert norm_linear(x, weight, EPS).shape == (rows, 64)
    x = torch.randn(2, 256, device="cuda")
    torch.testing.assert_close(
        norm_linear(x, weight.float(), EPS), exact(x, weight.float()).float(), rtol=1e-3, atol=1e-3
    )


def test_small_streams_graphs_and_weights_that_change():
    """A weight that the kernel before writes is not read ahead of it."""
    x, left, right = random(1, 2048), random(3072, 512), random(512, 2048)
    weight = torch.empty(3072, 2048, dtype=torch.bfloat16, device="cuda")
    force(variants_of(2048, None, 1)[0], x, weight, None)
    for _ in range(20):
        left = random(3072, 512)
        torch.mm(left, right, out=weight)
        got = norm_linear(x, weight, None)
        check(got, exact(x, weight, None), 0.2)
        again = norm_linear(x, weight, None)
        assert torch.equal(got, again)
    for _ in range(20):  # another tensor at the same address
        fresh = torch.mm(random(3072, 512), right)
        force(variants_of(2048, None, 1)[0], x, fresh, None)
        check(norm_linear(x, fresh, None), exact(x, fresh, None), 0.2)
        del fresh
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        norm_linear(x, weight, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x
        for _ in range(8):
            y = norm_linear(norm_linear(y, weight, EPS), weight.T.contiguous()[:, :3072], None)
    x.copy_(random(1, 2048))
    graph.replay()
    want = x
    for _ in range(8):
        want = norm_linear(norm_linear(want, weight, EPS), weight.T.contiguous()[:, :3072], None)
    assert torch.equal(y, want)


def test_small_threads():
    x, weight = [random(1, 1024) for _ in range(4)], random(512, 1024)
    force(variants_of(1024, None, 1)[0], x[0], weight)
    want = [norm_linear(each, weight, EPS) for each in x]
    torch.cuda.synchronize()
    assert_same_in_threads(lambda i: norm_linear(x[i], weight, EPS), want, 200)


def test_as_an_operator():
    x, weight, residual = random(2, 1, 256), random(128, 256), random(2, 1, 64)
    force(variants_of(256, "silu", 2)[0], x, weight, EPS, residual, "silu")
    torch.library.opcheck(torch.ops.flashnorm.norm_linear.default, (x, weight, EPS, None, residual, "silu"))
    want = norm_linear(x, weight, EPS, None, residual, "silu")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: norm_linear(x, weight, EPS, None, residual, "silu") * 2, fullgraph=True)
    assert torch.equal(compiled(x), want * 2)
    with torch.enable_grad():
        wide = x.clone().requires_grad_()
        norm_linear(wide, weight, EPS, None, residual, "silu").sum().backward()
        assert wide.grad is not None and wide.grad.isfinite().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus():
    for index in (0, 1):
        x, weight = random(1, 256).to(f"cuda:{index}"), random(64, 256).to(f"cuda:{index}")
        for current in (0, 1):
            with torch.cuda.device(current):
                check(norm_linear(x, weight, EPS), exact(x, weight))


def test_a_choice_is_measured_once_and_kept(monkeypatch):
    monkeypatch.delenv("FLASHNORM_TUNE")
    x, weight = random(1, 2048), random(3072, 2048)
    check(norm_linear(x, weight, EPS), exact(x, weight))
    problem = Problem(2048, 3072, 0, True, 0, False)
    first = choices.choice_of(problem, 1, 0)
    assert first is not None and first.us and choices.file_of(choices.gpu_name(0)).exists()
    monkeypatch.setattr(choices, "_known", {})
    monkeypatch.setattr(tuning, "measure", lambda *a, **k: pytest.fail("measured again"))
    assert choices.choice_of(problem, 1, 0) == first
    linear.ready().clear()
    norm_linear(x, weight, EPS)
    choices.file_of(choices.gpu_name(0)).write_text("{")
    monkeypatch.setattr(choices, "_known", {})
    assert choices.choice_of(problem, 1, 0) is None


def test_the_kernel_is_what_runs():
    from torch.profiler import ProfilerActivity, profile

    for rows, name in ((1, "one_row"), (4, "few_rows")):
        x, weight = random(rows, 512), random(64, 512)
        force(variants_of(512, None, rows)[0], x, weight)
        norm_linear(x, weight, EPS)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            norm_linear(x, weight, EPS)
            torch.cuda.synchronize()
        kernels = {e.key for e in seen.key_averages() if e.device_time_total > 0}
        assert kernels == {name}
