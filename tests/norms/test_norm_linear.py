"""norm_linear on a CPU: what it computes, what it refuses, and as an operator of torch."""

import pytest
import torch
import torch.nn.functional as F

from flashnorm_cli.norms.linear import describe, norm_linear

EPS = 1e-5


def exact(x, weight, eps=EPS, bias=None, residual=None, activation=None):
    y = x.double()
    if eps is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    y = y @ weight.double().T + (0 if bias is None else bias.double())
    if activation is not None:
        gate, up = y.chunk(2, -1)
        act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh")}[activation]
        y = act(gate) * up
    return y if residual is None else y + residual.double()


def inputs(dtype=torch.float32, shape=(2, 3), k=24, n=10, doubled=False):
    generator = torch.Generator().manual_seed(0)
    lines = n * (2 if doubled else 1)
    made = [
        torch.randn(size, generator=generator).to(dtype) for size in ((*shape, k), (lines, k), (lines,), (*shape, n))
    ]
    return made[0] * 3, *made[1:]


@pytest.mark.parametrize("activation", [None, "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("eps", [None, EPS])
def test_the_formula(eps, activation):
    for dtype, close in ((torch.float32, 2e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.1)):
        x, weight, bias, residual = inputs(dtype, doubled=activation is not None)
        for b in (None, bias):
            for r in (None, residual):
                got = norm_linear(x, weight, eps, b, r, activation)
                assert got.shape == (2, 3, 10) and got.dtype == dtype and got.is_contiguous()
                torch.testing.assert_close(
                    got.double(), exact(x, weight, eps, b, r, activation), rtol=close, atol=close * 4
                )


def test_refusals():
    x, weight, bias, residual = inputs(doubled=True)
    for arguments, error, says in (
        ((x, weight, EPS, None, None, "relu"), ValueError, "silu"),
        ((x, weight[:, :-1], EPS), ValueError, "weight has shape"),
        ((x, weight[0], EPS), ValueError, "weight has shape"),
        ((x, weight[:-1], EPS, None, None, "silu"), ValueError, "halves"),
        ((x, weight, EPS, bias[:-1]), ValueError, "bias has shape"),
        ((x, weight, EPS, None, residual), ValueError, "residual has shape"),
        ((x, weight.double(), EPS), TypeError, "weight is torch.float64"),
        ((x.long(), weight, EPS), TypeError, "floating point"),
        ((x, weight.to("meta"), EPS), ValueError, "weight is on meta"),
    ):
        with pytest.raises(error, match=says):
            norm_linear(*arguments)


def test_as_an_operator():
    x, weight, bias, residual = inputs(doubled=True)
    arguments = (x, weight, EPS, bias, residual, "silu")
    torch.library.opcheck(torch.ops.flashnorm.norm_linear.default, arguments)
    compiled = torch.compile(lambda x: norm_linear(x, *arguments[1:]), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), norm_linear(*arguments))


def test_gradients_are_torchs():
    x, weight, bias, residual = (t.double().requires_grad_() for t in inputs(doubled=True))
    assert torch.autograd.gradcheck(
        lambda *a: norm_linear(a[0], a[1], EPS, a[2], a[3], "gelu"), (x, weight, bias, residual)
    )


def test_describe_says_why_not():
    if not torch.cuda.is_available():
        assert describe()["norm_linear"] == "torch" and "no CUDA device" in describe()["norm_linear_reason"]
