"""Which modules are taken for plain RMSNorms, and what a model computes with them replaced."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config

from flashnorm_cli.norms.detect import PlainNorm, plain_norms, read_norm
from flashnorm_cli.runtimes.transformers.swap import is_weightless, norms_replaced, weightless_ways

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
}


def model_of(config, gains=True):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    if gains:
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.uniform_(0.4, 1.8)
    return model


class Odd(nn.Module):
    """Looks like a norm."""

    def __init__(self, n, kind):
        super().__init__()
        self.weight, self.eps, self.kind = nn.Parameter(torch.ones(n)), 1e-6, kind

    def forward(self, x):
        if self.kind == "mean":  # LayerNorm without bias
            x = x - x.mean(-1, keepdim=True)
        power = 1.0 if self.kind == "l1" else 2.0
        size = x.abs().pow(power).mean(-1, keepdim=True)
        if self.kind == "eps outside":
            return x / (size.sqrt() + self.eps) * self.weight
        if self.kind == "square":
            return x * torch.rsqrt(size + self.eps) * self.weight.square()
        return x * torch.rsqrt(size + self.eps) * self.weight


@pytest.mark.parametrize("kind", ["mean", "l1", "eps outside", "square"])
def test_what_is_no_plain_norm_is_left_alone(kind):
    assert read_norm(Odd(32, "plain")) == PlainNorm(1e-6, 0.0, "weight")
    assert read_norm(Odd(32, kind)) is None


def test_defaults_of_the_caller_do_not_matter():
    norm = nn.RMSNorm(16, eps=1e-5)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert read_norm(norm) == PlainNorm(1e-5, 0.0, "weight")
            assert len(weightless_ways(norm, PlainNorm(1e-5, 0.0, "weight"))) >= 3
    finally:
        torch.set_default_dtype(torch.float32)


def test_other_modules():
    assert read_norm(nn.RMSNorm(16, eps=1e-5)) == PlainNorm(1e-5, 0.0, "weight")
    for module in (nn.LayerNorm(16), nn.LayerNorm(16, bias=False), nn.Linear(4, 1, bias=False), nn.PReLU(8)):
        assert read_norm(module) is None
    on_meta = nn.RMSNorm(16, eps=1e-5, device="meta")
    assert read_norm(on_meta) == PlainNorm(1e-5, 0.0, "weight") and not plain_norms(on_meta)


@pytest.mark.parametrize(
    ("config", "offset", "count"),
    [
        (LlamaConfig(**TINY, rms_norm_eps=3e-5), 0.0, 5),
        (Qwen3Config(**TINY, rms_norm_eps=3e-5), 0.0, 9),
        (Gemma3TextConfig(**TINY, rms_norm_eps=3e-5), 1.0, 13),
    ],
    ids=["llama", "qwen3", "gemma3"],
)
def test_models_compute_the_same_with_their_norms_replaced(config, offset, count):
    model = model_of(config)
    ids = torch.randint(0, 128, (2, 9))
    norms = plain_norms(model)
    assert len(norms) == count and {n for _, n in norms.values()} == {PlainNorm(3e-5, offset, "weight")}
    with torch.no_grad():
        want = model(ids).logits
        with norms_replaced(model) as names:
            assert sorted(names) == sorted(norms)
            got = model(ids).logits
        again = model(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(again, want), "the model must be as it was"
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_replacement_that_computes_something_else_is_seen():
    model = model_of(LlamaConfig(**TINY))
    ids = torch.randint(0, 128, (1, 9))
    with torch.no_grad():
        want = model(ids).logits
        with norms_replaced(model, lambda module, norm: lambda x: torch.nn.functional.rms_norm(x, (64,))):
            assert not torch.allclose(model(ids).logits, want, atol=1e-3)


def test_identity_weights_are_dropped_and_others_kept():
    model = model_of(Gemma3TextConfig(**TINY), gains=False)  # zeros: the identity of 1 + w
    model.model.norm.weight.data.fill_(0.5)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        want = model(ids).logits
        with norms_replaced(model) as names:
            dropped = [name for name, module in model.named_modules() if is_weightless(module)]
            assert len(names) == 13 and set(names) - set(dropped) == {"model.norm"}
            for name in dropped:
                model.get_submodule(name).weight.data.fill_(torch.nan)
            torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
        assert not any(is_weightless(module) for module in model.modules())


def test_a_weight_of_another_dtype_goes_the_modules_own_way():
    norm = nn.RMSNorm(16, eps=1e-5)
    model = nn.Sequential(norm)
    x = torch.randn(3, 16, dtype=torch.float64)
    with norms_replaced(model, lambda module, plain: lambda x: x * 0) as names:
        assert names == ["0"]
        assert (model(x.float()) == 0).all()
        assert not (norm.double()(x) == 0).any()
