"""The kernels on a GPU: against float64, on odd values as torch has them, and as guests of torch."""

import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from flashnorm_cli.cuda import driver, norm_calls
from flashnorm_cli.norms import fused_add_rms_norm, info, rms_norm

pytestmark = pytest.mark.gpu
EPS = 1e-5
# One rounding of the result; float32 also sums in another order than float64.
TOLERANCE = {torch.bfloat16: 2**-8 * 1.01, torch.float16: 2**-11 * 1.01, torch.float32: 3e-6}
SMALLEST = {torch.bfloat16: 1e-38, torch.float16: 2**-25 * 1.01, torch.float32: 1e-38}
DTYPES = list(TOLERANCE)


def random(*shape, dtype=torch.bfloat16, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def exact(x, weight=None, offset=0, eps=EPS):
    wide = x.double()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * (weight.double() + offset)


def check(got, want):
    assert got.shape == want.shape
    worst = (got.double() - want).abs() - TOLERANCE[got.dtype] * want.abs() - SMALLEST[got.dtype]
    assert not worst.isnan().any()
    assert worst.max() <= 0, f"off by {worst.max().item():.3g} at {worst.argmax().item()}"


def check_all(shape, dtype, weighted=True):
    for weight, offset in [(None, 0), *([(1, 0), (1, 1)] if weighted else [])]:
        weight = weight and (torch.rand(shape[-1], device="cuda") * 1.4 + 0.4 - offset).to(dtype)
        x, residual = random(*shape, dtype=dtype), random(*shape, dtype=dtype, scale=3)
        check(rms_norm(x, EPS, weight=weight, offset=offset), exact(x, weight, offset))
        total = x + residual
        want = exact(total, weight, offset)
        assert fused_add_rms_norm(x, residual, EPS, weight=weight, offset=offset) is None
        assert torch.equal(residual, total), "the sum must have torch's own bits"
        check(x, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 2, 3, 8, 31, 64, 100, 128, 257, 576, 1000, 2048, 2880, 4097])
def test_small_shapes(hidden, dtype):
    for rows in (1, 3, 37):
        check_all((rows, hidden), dtype, weighted=rows == 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [3072, 4096, 5120, 7168, 8192, 12288, 16384, 32768, 65535, 65536])
def test_long_rows(hidden, dtype):
    for rows in (1, 5, 40, 300):
        check_all((rows, hidden), dtype, weighted=rows == 5)


@pytest.mark.parametrize("shape", [(70000, 128), (1 << 20, 64), (300_001, 96), (100_003, 256), (2_000_000, 1)], ids=str)
def test_many_rows(shape):
    check_all(shape, torch.bfloat16)


@pytest.mark.parametrize("shape", [(9000, 4096), (20_001, 2048), (70_001, 576), (3000, 16384)], ids=str)
def test_prefill_variants_of_every_dtype(shape):
    for dtype in DTYPES:
        check_all(shape, dtype)


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (2, 0, 8), (1, 1, 1, 5), (7,)], ids=str)
def test_small_zero_rows_and_odd_ranks(shape):
    x, residual = random(*shape), random(*shape)
    y = rms_norm(x, EPS)
    assert y.shape == x.shape
    want, total = exact(x), x + residual
    fused_add_rms_norm(x, residual, EPS)
    assert torch.equal(residual, total)
    if x.numel():
        check(y, want)
        check(x, exact(total))


def test_small_strides_and_offsets():
    for dtype in DTYPES:
        base = random(6, 10, 3, 130, dtype=dtype)
        views = {
            "a slice of every row": base[..., :128],
            "an unaligned slice": base[..., 1:129],
            "a middle slice": base[:, :, 1, 2:66],
            "heads before tokens": base.transpose(1, 2)[..., :128],
            "dimensions turned around": base.permute(2, 1, 0, 3)[..., 2:128],
            "every second element": base[..., ::2],
            "last dimension not contiguous": base.transpose(-1, -2),
            "rows that are one": base[:1, :1, :1, :64].expand(4, 5, 3, 64),
            "an odd storage offset": base.flatten()[3 : 3 + 64 * 9].view(9, 64),
        }
        for what, x in views.items():
            y = rms_norm(x, EPS)
            assert y.is_contiguous(), what
            check(y, exact(x))
            out = torch.full((*x.shape[:-1], x.shape[-1] + 3), 7.0, dtype=dtype, device="cuda")
            assert rms_norm(x, EPS, out[..., 2:-1]).data_ptr() == out[..., 2:-1].data_ptr()
            check(out[..., 2:-1], exact(x))
            assert (out[..., :2] == 7).all() and (out[..., -1] == 7).all(), what
            if what != "rows that are one":
                whole, residual = base.clone(), random(*x.shape, dtype=dtype)
                mine = torch.as_strided(whole, x.shape, x.stride(), x.storage_offset())
                others = torch.ones_like(whole, dtype=torch.bool)
                torch.as_strided(others, x.shape, x.stride(), x.storage_offset()).fill_(False)
                total = mine + residual
                fused_add_rms_norm(mine, residual, EPS)
                assert torch.equal(residual, total), what
                check(mine, exact(total))
                assert torch.equal(whole[others], base[others]), what


def test_small_in_place():
    for hidden in (5, 128, 4096, 16384, 65536):
        x = random(3, hidden)
        want = exact(x)
        assert rms_norm(x, EPS, x) is x
        check(x, want)


def test_small_odd_values_as_torch_treats_them():
    values = [0.0, -0.0, 1e-40, 1e-30, 1e-20, 1e19, 3e38, float("inf"), float("-inf"), float("nan"), 65504.0, 6e-8]
    for dtype in DTYPES:
        for hidden in (8, 33, 2048):
            x = random(len(values) + 1, hidden, dtype=dtype)
            for row, value in enumerate(values):
                x[row, hidden // 2] = value
                if row % 2:
                    x[row] = value
            wide = x.float()
            for eps in (0.0, 1e-6):
                want = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(dtype)
                if hidden % 4 == 0:
                    # Its other path, for sizes that it cannot vectorize, makes the whole row NaN where one is inf.
                    native = F.rms_norm(wide, (hidden,), None, eps).to(dtype)
                    assert torch.equal(native.isnan(), want.isnan())
                for got in (rms_norm(x, eps), *fused(x, eps)):
                    assert torch.equal(got.isnan(), want.isnan())
                    torch.testing.assert_close(
                        got, want, rtol=TOLERANCE[dtype] * 2, atol=SMALLEST[dtype] * 2, equal_nan=True
                    )


def fused(x, eps):
    a, b = x.clone(), torch.zeros_like(x)
    fused_add_rms_norm(a, b, eps)
    return [a]


def test_more_than_two_billion_elements():
    hidden, rows = 4096, (1 << 31) // 4096 + 3
    if torch.cuda.mem_get_info()[0] < 5 * rows * hidden * 2:
        pytest.skip("needs 45 GB of free GPU memory")
    x = torch.empty(rows, hidden, dtype=torch.bfloat16, device="cuda").normal_()
    y = rms_norm(x, EPS)
    for part in (slice(0, 5), slice(rows // 2, rows // 2 + 5), slice(rows - 5, rows)):
        check(y[part], exact(x[part]))
    tail = (x[-5:] + y[-5:]).clone()
    fused_add_rms_norm(x, y, EPS)
    assert torch.equal(y[-5:], tail)
    check(x[-5:], exact(tail))


def test_the_fast_path_is_in_use_and_the_other_agrees(monkeypatch):
    assert info()["path"] == "cuda, direct launch", info()
    assert info()["reason"] is None
    x = random(5, 2048)
    fast = rms_norm(x, EPS)
    strided = rms_norm(x[:, 3:1999], EPS)
    monkeypatch.setattr(driver, "driver_launch", lambda: None)
    norm_calls._local.ready.clear()
    assert info()["path"] == "cuda, RawKernel"
    assert torch.equal(rms_norm(x, EPS), fast)
    assert torch.equal(rms_norm(x[:, 3:1999], EPS), strided)


def test_what_worked_once_is_checked_again():
    """The second call takes a shorter way, which must not let through what the first would have refused."""
    x, residual = random(6, 512), random(6, 512)
    weight = torch.rand(512, device="cuda", dtype=x.dtype) + 0.5
    for _ in range(3):
        rms_norm(x, EPS)
        rms_norm(x, EPS, out=torch.empty_like(x), weight=weight)
        fused_add_rms_norm(x.clone(), residual.clone(), EPS)
    for wrong in (residual[:5], residual[:, :256], residual.float(), residual.cpu()):
        with pytest.raises((ValueError, TypeError)):
            fused_add_rms_norm(x, wrong, EPS)
        with pytest.raises((ValueError, TypeError)):
            rms_norm(x, EPS, out=wrong)
    for wrong in (weight[:256], weight.cpu()):
        with pytest.raises(ValueError):
            rms_norm(x, EPS, weight=wrong)
    with pytest.raises(ValueError, match="share one place"):
        rms_norm(x, EPS, out=residual[:1].expand(6, -1))
    check(rms_norm(x, EPS, weight=weight.float()), exact(x, weight))
    check(rms_norm(x, EPS, weight=weight.repeat_interleave(2)[::2]), exact(x, weight))
    check(rms_norm(x, EPS, weight=weight, offset=1), exact(x, weight, 1))
    check(rms_norm(x, 0.5), exact(x, eps=0.5))
    columns = residual.t().contiguous().t()  # the shape is right, the strides are not
    rms_norm(x, EPS, out=columns)
    check(columns, exact(x))
    inside = x.clone()
    rms_norm(inside, EPS, out=inside)
    check(inside, exact(x))


def test_who_looks_on_is_noticed_each_time():
    """Modes and kinds of tensors that a kernel would pass by, in turns with plain calls of the same shape."""
    x = random(6, 512)

    def plain():
        for _ in range(2):
            check(rms_norm(x, EPS), exact(x))

    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        check(rms_norm(x.to(dtype), EPS), exact(x.to(dtype)))
    with torch.inference_mode():
        check(rms_norm(x * 1, EPS), exact(x))
        plain()
    plain()
    negative = torch.conj(torch.complex(x.float(), -x.float())).imag  # its memory holds -x
    assert negative.is_neg()
    check(rms_norm(negative.contiguous(), EPS), exact(x.float()))
    check(rms_norm(negative, EPS), exact(x.float()))
    wants = x.clone().requires_grad_()
    for _ in range(2):
        assert rms_norm(wants, EPS).requires_grad
        with torch.no_grad():
            assert not rms_norm(wants, EPS).requires_grad
        plain()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.float(), torch.ones_like(x.float()))
        plain()
        primal, tangent = torch.autograd.forward_ad.unpack_dual(rms_norm(dual, EPS))
        assert tangent is not None
        check(primal, exact(x.float()))
    with FlopCounterMode(display=False):
        plain()
    traced = torch.jit.trace(lambda x: rms_norm(x, EPS) + 1, x, check_trace=False)
    other = random(6, 512)
    assert torch.equal(traced(other), rms_norm(other, EPS) + 1)
    weight = torch.rand(512, device="cuda", dtype=x.dtype) + 0.5
    for kind in (weight, torch.nn.Parameter(weight, requires_grad=False), weight):
        check(rms_norm(x, EPS, weight=kind), exact(x, weight))
    plain()


def test_autograd_notices_what_the_kernels_write():
    """A tensor that autograd keeps for a gradient was written: the gradient would be wrong without a word."""
    for write in (
        lambda x: fused_add_rms_norm(x, torch.ones_like(x), EPS),
        lambda x: rms_norm(torch.ones_like(x), EPS, out=x),
        lambda x: torch.ops.flashnorm.fused_add_rms_norm(x, torch.ones_like(x), EPS),
    ):
        for _ in range(2):
            x = random(4, 256)
            weight = torch.ones(256, device="cuda", dtype=x.dtype, requires_grad=True)
            product = weight * x
            write(x)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                product.sum().backward()


def test_follows_torchs_current_stream_and_never_waits():
    x = random(64, 4096)
    fused_add_rms_norm(rms_norm(x, EPS), x, EPS)  # compiles
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(400_000_000)  # about 0.2 s of GPU time
        x.mul_(3)
        start = time.perf_counter()
        y = rms_norm(x, EPS)
        fused_add_rms_norm(y, x, EPS)
        assert time.perf_counter() - start < 0.05, "the call waited for the GPU"
        assert not side.query()
    side.synchronize()
    wide = random(64, 4096)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(40_000_000)
        late = wide * 2 + 1
        y = rms_norm(late, EPS)
    side.synchronize()
    check(y, exact(late))


@pytest.mark.parametrize("hidden", [2048, 1352])
def test_cuda_graph(hidden):
    """1352 is a size that nothing else uses: it is compiled while the stream is captured."""
    x, residual = random(4, hidden), random(4, hidden)
    if hidden == 2048:
        rms_norm(x, EPS)
        fused_add_rms_norm(x.clone(), residual.clone(), EPS)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = rms_norm(x, EPS)
        fused_add_rms_norm(x, residual, EPS)
    for _ in range(3):
        x.normal_(), residual.normal_()
        before, total = x.clone(), x + residual
        graph.replay()
        check(y, exact(before))
        assert torch.equal(residual, total)
        check(x, exact(total))


def test_threads():
    failures = []

    def work(seed):
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream), torch.no_grad():
                for i in range(200):
                    x = torch.full(
                        (1 + (seed + i) % 5, 64 * (1 + seed)), float(seed + 1), device="cuda", dtype=torch.bfloat16
                    )
                    x[:, ::2] *= -1
                    y = rms_norm(x, 0.0)
                    stream.synchronize()
                    if not torch.equal(y, x.sign()):
                        failures.append((seed, i))
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failures, failures[:3]


def test_a_fresh_thread_has_a_context():
    x, got = random(3, 640), []
    rms_norm(x, EPS)
    thread = threading.Thread(target=lambda: got.append(rms_norm(x, EPS, torch.empty_like(x))))
    thread.start()
    thread.join()
    check(got[0], exact(x))


def test_allocates_the_output_and_nothing_else():
    x, residual = random(16, 4096), random(16, 4096)
    rms_norm(x, EPS), fused_add_rms_norm(x, residual, EPS)
    count = lambda: torch.cuda.memory_stats()["allocation.all.allocated"]  # noqa: E731
    before = count()
    y = rms_norm(x, EPS)
    assert count() == before + 1
    rms_norm(x, EPS, y), fused_add_rms_norm(x, residual, EPS), rms_norm(x[:, 1:99], EPS, y[:, 3:101])
    assert count() == before + 1


def test_gradients_are_torchs():
    x = random(5, 64, dtype=torch.float32).requires_grad_()
    weight = random(64, dtype=torch.float32).requires_grad_()
    rms_norm(x, EPS, weight=weight).square().sum().backward()
    got = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    F.rms_norm(x, (64,), weight, EPS).square().sum().backward()
    torch.testing.assert_close(got, (x.grad, weight.grad))
    with torch.no_grad():
        assert not rms_norm(x, EPS).requires_grad
    with pytest.raises(RuntimeError, match="leaf"):
        fused_add_rms_norm(x, torch.zeros_like(x), EPS)


def test_operators():
    x, residual, weight = random(4, 256), random(4, 256), random(256)
    torch.library.opcheck(torch.ops.flashnorm.rms_norm, (x, EPS, weight, 1.0))
    torch.library.opcheck(torch.ops.flashnorm.fused_add_rms_norm, (x, residual, EPS, None, 0.0))
    check(torch.ops.flashnorm.rms_norm(x, EPS, weight, 1.0), exact(x, weight, 1.0))
    wide = torch.func.vmap(lambda r: rms_norm(r, EPS))(x.float())
    check(wide, exact(x.float()))


def test_compiled_functions_step_aside():
    x = random(4, 256)
    seen = []

    def backend(module, _):
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    got = torch.compile(lambda x: rms_norm(x * 2, EPS), backend=backend, fullgraph=True)(x)
    check(got, exact(x * 2))
    assert any("rms_norm" in name for name in seen) and not any("flashnorm" in name for name in seen)
    got = torch.compile(lambda x: torch.ops.flashnorm.rms_norm(x * 2, EPS), fullgraph=True)(x)
    check(got, exact(x * 2))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current_one():
    x = random(4, 2048).to("cuda:1")
    y = rms_norm(x, EPS)
    assert y.device == x.device
    check(y, exact(x))
