"""`weightless(model, deferred=True)`: readers that run together with their norm, on the CPU's reference operator."""

import copy

import families
import pytest
import torch
from alike import assert_same_in_threads, copies_of
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, StaticCache

from flashnorm_cli import deferred_modules, fold_model_, from_pretrained, weighted, weightless
from flashnorm_cli.errors import UsageError
from flashnorm_cli.runtimes.transformers import deferred, products
from flashnorm_cli.runtimes.transformers.gated_mlp import read_mlp
from flashnorm_cli.runtimes.transformers.products import Layer, Mlp, Product, Reader, Swapped

# (norms, layers with their adds in the products, gated MLPs without a norm) that are merged, of four layers.
MERGED = {
    "llama": (8, 4, 0),
    "mistral": (8, 4, 0),
    "qwen2": (8, 4, 0),
    "qwen3": (8, 4, 0),
    "gemma2": (8, 0, 0),
    "gemma3_text": (8, 0, 0),
    "phi3": (8, 4, 0),
    "olmo2": (0, 0, 4),
    "smollm3": (8, 4, 0),
    "granite": (8, 0, 0),
    "qwen3_moe": (4, 4, 0),
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def folded(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = families.build(family, 0)
    families.randomize_gains(model, 1)
    return fold_model_(model.to(dtype)).eval()


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def count(model: nn.Module, kind: type) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("family", MERGED)
def test_the_same_model_and_the_same_state(family, monkeypatch):
    model = folded(family)
    before = {name: (tensor.clone(), tensor.shape, tensor.stride()) for name, tensor in model.state_dict().items()}
    bytes_before = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    inputs = families.text_inputs(model, seed=3)
    want = families.logits(model, inputs)
    assert weightless(model, deferred=True) is model
    states, (norms, layers, mlps) = deferred_modules(model), MERGED[family]
    merged = [name for name, why in states.items() if why is None]
    assert sum(hasattr(model.get_submodule(name), "_deferred") and model.get_submodule(name)._deferred is not None
               for name in merged) == norms  # fmt: skip
    assert count(model, Layer) == layers
    assert sum(isinstance(model.get_submodule(name), Mlp) for name in merged) == mlps
    calls: list[tuple] = []
    real = products.norm_linear
    monkeypatch.setattr(products, "norm_linear", lambda *a: calls.append(a) or real(*a))
    assert off(families.logits(model, inputs), want) < 3e-6
    assert len(calls) >= max(norms, mlps) + layers
    assert sum(a[4] is not None for a in calls) >= layers, "no residual was added in a product"
    after = model.state_dict()
    assert list(after) == list(before)
    for name, (tensor, shape, stride) in before.items():
        assert torch.equal(after[name], tensor) and after[name].shape == shape and after[name].stride() == stride
    bytes_after = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in after.values()}
    assert sum(bytes_after.values()) == sum(bytes_before.values())
    # The way back.
    assert weighted(model) is model and not count(model, Swapped) and not deferred_modules(model)
    assert torch.equal(families.logits(model, inputs), want)


def test_every_reader_is_read_from_the_merged_matrix():
    """NaN in one parameter shows in the product: what is multiplied are the parameters themselves."""
    for name in ("q_proj", "v_proj", "o_proj"):
        model = weightless(folded("llama"), deferred=True)
        inputs = families.text_inputs(model, seed=3)
        want = families.logits(model, inputs)
        weight = model.get_parameter(f"model.layers.1.self_attn.{name}.weight")
        weight.mul_(1.5)
        changed = families.logits(model, inputs)
        assert off(changed, want) > 1e-3
        assert off(changed, families.logits(weighted(model), inputs)) < 3e-6


def test_saved_and_loaded_again(tmp_path):
    model = folded("qwen2", torch.bfloat16)
    model.save_pretrained(tmp_path / "before")
    weightless(model, deferred=True).save_pretrained(tmp_path / "after")
    a, b = (load_file(tmp_path / each / "model.safetensors") for each in ("before", "after"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "before" / "config.json").read_text() == (tmp_path / "after" / "config.json").read_text()
    again = from_pretrained(tmp_path / "after", deferred=True)
    assert count(again, Layer) == 4 and all(
        torch.equal(p, again.state_dict()[n]) for n, p in model.state_dict().items()
    )
    state = model.state_dict()
    state = {name: tensor + 1 if name.endswith("k_proj.weight") else tensor for name, tensor in state.items()}
    again.load_state_dict(state)
    inputs = families.text_inputs(again, seed=3)
    assert off(families.logits(again, inputs), families.logits(weighted(again), inputs)) < 0.05


def test_moved_cast_copied_and_pickled():
    model = weightless(folded("llama"), deferred=True)
    inputs = families.text_inputs(model, seed=3)
    want = families.logits(model, inputs)
    for other in copies_of(model):
        assert count(other, Layer) == 4 and off(families.logits(other, inputs), want) < 1e-6
        assert None in set(deferred_modules(other).values())
        for parameter in other.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.9)
        assert off(families.logits(other, inputs), families.logits(weighted(other), inputs)) < 3e-6
        assert torch.equal(families.logits(model, inputs), want), "a copy shares memory with its origin"
    wide = model.double()
    assert off(families.logits(wide, inputs).float(), want) < 1e-5
    half = wide.bfloat16()
    assert off(families.logits(half, inputs).float(), want) < 0.05
    group = half.model.layers[0].input_layernorm._deferred
    assert group.weight.dtype == torch.bfloat16 and group._merged(group.parameters)


def refuse(change, family="llama", says="", part="model.layers.1.input_layernorm"):
    model = folded(family)
    inputs = families.text_inputs(model, seed=3)
    change(model)
    want = families.logits(model, inputs)
    weightless(model, deferred=True)
    assert says in (deferred_modules(model)[part] or "runs merged"), deferred_modules(model)[part]
    assert deferred_modules(model)["model.layers.2.input_layernorm"] is None
    assert off(families.logits(model, inputs), want) < 3e-6


class _OtherLinear(nn.Linear):
    pass


def test_what_does_not_fit_keeps_the_plain_path_with_a_reason():
    def other_class(model):
        model.model.layers[1].self_attn.k_proj.__class__ = _OtherLinear

    def hook(model):
        model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda m, a, out: out * 1.0)

    def shared(model):
        model.model.layers[1].self_attn.q_proj.weight = model.model.layers[3].self_attn.q_proj.weight

    def dtype(model):
        model.model.layers[1].self_attn.q_proj.double()
        q = model.model.layers[1].self_attn.q_proj
        q.forward = lambda x: nn.functional.linear(x.double(), q.weight).float()

    refuse(other_class, says="not a plain linear")
    refuse(hook, says="has a hook")
    refuse(shared, says="shares its weight")
    refuse(dtype, says="also read by double")
    refuse(lambda m: m.model.layers[1].input_layernorm.register_forward_hook(lambda m, a, o: None), says="hook")


def test_changes_after_the_fact_fall_back():
    model = weightless(folded("llama"), deferred=True)
    inputs = families.text_inputs(model, seed=3)
    want = families.logits(model, inputs)
    layer = model.model.layers[1]
    seen = []
    handle = layer.self_attn.q_proj.register_forward_hook(lambda m, a, out: seen.append((a[0], out)))
    assert off(families.logits(model, inputs), want) < 3e-6
    x, q = seen[0]
    assert x.shape[-1] == 64 and torch.equal(q, nn.functional.linear(x, layer.self_attn.q_proj.weight))
    assert "hook" in deferred_modules(model)["model.layers.1.input_layernorm"]
    handle.remove()
    for part in (layer.self_attn, layer.self_attn.o_proj, layer.mlp, layer.mlp.down_proj):
        handle = part.register_forward_hook(lambda m, a, out: seen.append(out))
        del seen[:]
        assert off(families.logits(model, inputs), want) < 3e-6
        out = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        handle.remove()
        plain = weighted(copy.deepcopy(model)).model.layers[1]
        at = {"self_attn": plain.self_attn, "o_proj": plain.self_attn.o_proj}.get("self_attn")
        assert at is not None and out.shape[-1] == 64
    layer.self_attn.k_proj.weight = nn.Parameter(layer.self_attn.k_proj.weight * 2)  # another parameter
    changed = families.logits(model, inputs)
    assert off(changed, want) > 1e-4 and off(changed, families.logits(weighted(model), inputs)) < 3e-6


def test_a_listener_sees_what_the_module_itself_gives():
    """Not the sum with the residual."""
    model = weightless(folded("llama"), deferred=True)
    inputs, seen = families.text_inputs(model, seed=3), []
    model.model.layers[1].mlp.register_forward_hook(lambda m, a, out: seen.append(out))
    families.logits(model, inputs)
    families.logits(weighted(model), inputs)
    assert off(seen[0], seen[1]) < 1e-5


def test_hidden_states_and_attentions_are_those_of_the_model():
    model = folded("llama")
    model.set_attn_implementation("eager")
    inputs = families.text_inputs(model, seed=3)
    want = model(**inputs, output_hidden_states=True, output_attentions=True)
    got = weightless(model, deferred=True)(**inputs, output_hidden_states=True, output_attentions=True)
    for one, other in ((got.hidden_states, want.hidden_states), (got.attentions, want.attentions)):
        assert len(one) == len(other) > 0
        assert all(off(a, b) < 3e-6 for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_decoding(family):
    model = folded(family)
    ids = families.text_inputs(model, seed=3)["input_ids"][:, :5]
    more = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, **more)
    weightless(model, deferred=True)
    assert torch.equal(model.generate(ids, **more), want)
    cache = StaticCache(config=model.config, max_cache_len=32)
    assert torch.equal(model.generate(ids, past_key_values=cache, disable_compile=True, **more), want)


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
def test_compiled(family):
    model = weightless(folded(family), deferred=True)
    inputs = families.text_inputs(model, seed=3)
    want = families.logits(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert off(compiled(**inputs).logits, want) < 3e-6
    graphs = torch._dynamo.explain(model)(**inputs).graphs
    names = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("norm_linear" in name for name in names) >= 4, set(names)
    torch._dynamo.reset()


def test_training_takes_the_plain_path():
    grads = []
    for deferred_too in (False, True):
        model = weightless(folded("llama"), deferred=deferred_too).train()
        inputs = families.text_inputs(model, seed=3)
        with torch.enable_grad():
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.step()
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 20
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)
    model.eval()  # what was trained is what is multiplied
    assert off(families.logits(model, inputs), families.logits(weighted(model), inputs)) < 3e-6


def test_lora_on_top():
    peft = pytest.importorskip("peft")
    model = weightless(folded("llama"), deferred=True)
    inputs = families.text_inputs(model, seed=3)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    got = tuned(**inputs).logits
    states = deferred_modules(tuned)
    assert "replaced" in states["model.layers.0.input_layernorm"]
    weighted(model)
    assert off(got, tuned(**inputs).logits) < 3e-6


def test_a_wrong_wiring_is_undone(monkeypatch):
    """If the parts were taken in another order, the forward that follows would show it."""
    model = folded("llama")
    inputs = families.text_inputs(model, seed=3)
    want = families.logits(model, inputs)
    real = Reader.forward
    monkeypatch.setattr(Reader, "forward", lambda self, x: real(self, x).flip(-1))
    weightless(model, deferred=True)
    states = deferred_modules(model)
    assert states and all("other numbers" in why for why in states.values()) and not count(model, Swapped)
    assert torch.equal(families.logits(model, inputs), want)


def test_a_tensor_that_is_not_the_product_is_refused():
    model = weightless(folded("llama"), deferred=True)
    attention = model.model.layers[0].self_attn
    x = torch.randn(1, 2, 64)
    plain = nn.functional.linear(x, attention.q_proj.weight)
    assert torch.equal(attention.q_proj(x), plain)
    model.model.layers[0].input_layernorm(x)
    with pytest.raises(RuntimeError, match="another tensor"):
        attention.q_proj(x)
    assert torch.equal(attention.q_proj(x), plain)


def test_two_models_and_threads():
    model = weightless(folded("llama"), deferred=True)
    inputs = [families.text_inputs(model, seed=seed) for seed in range(4)]
    want = [families.logits(model, each) for each in inputs]
    assert_same_in_threads(lambda i: families.logits(model, inputs[i]), want, 5)


def test_gated_mlps_are_told_from_what_they_compute():
    class Swish(nn.Module):
        def __init__(self, order):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
            self.act, self.order = nn.SiLU(), order

        def forward(self, x):
            return (
                self.c(self.act(self.a(x)) * self.b(x)) if self.order == 0 else self.c(self.a(x) * self.act(self.b(x)))
            )

    assert read_mlp(Swish(0))[:3] == ("a", "b", "c") and read_mlp(Swish(1))[:3] == ("b", "a", "c")

    class Scaled(Swish):
        def forward(self, x):
            return super().forward(x) * 1.01

    class Clamped(Swish):
        def forward(self, x):
            return super().forward(x.clamp(-0.5, 0.5))

    assert read_mlp(Scaled(0)) is None and read_mlp(Clamped(0)) is None
    relu = Swish(0)
    relu.act = nn.ReLU()
    assert read_mlp(relu) is None
    relu.act = nn.GELU(approximate="tanh")
    assert read_mlp(relu).activation == "gelu_tanh"


def test_what_cannot_be_observed_keeps_the_plain_path(monkeypatch):
    model = folded("llama")
    monkeypatch.setattr(deferred, "observe", lambda model: (_ for _ in ()).throw(ValueError("no such input")))
    weightless(model, deferred=True)
    assert all("no such input" in why for why in deferred_modules(model).values()) and not count(model, Product)
    with pytest.raises(UsageError, match="not a transformers model"):
        deferred_modules(nn.Linear(2, 2))
