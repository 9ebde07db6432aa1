"""The residual stream: found in real models, exact under a random rotation, refused where something else touches it."""

from __future__ import annotations

import families
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

from flashnorm_cli import fold_model_
from flashnorm_cli.folding import in_memory
from flashnorm_cli.plan.planner import trace_plan
from flashnorm_cli.trace.stream import Stream
from flashnorm_cli.trace.stream_rules import trace_stream

SIZE, VOCABULARY = 16, 32


def random_rotation(size: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


def rotate_(model: nn.Module, stream: Stream) -> None:
    """The edit that the stream stands for, by plain torch."""
    rotation = random_rotation(stream.size)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, dims in stream.members.items():
            for dim in dims:
                rotated = parameters[name].double().movedim(dim, -1) @ rotation.T
                parameters[name].copy_(rotated.movedim(-1, dim))


# Biases, MoE, shared experts, MLA, parallel blocks, tied heads, state spaces, convolutions.
@pytest.mark.parametrize("family", ["qwen2", "olmoe", "deepseek_v3", "granite", "gpt_oss", "lfm2", "jamba", "phi3"])
def test_rotated_families_compute_the_same(family):
    model = families.build(family, seed=0)
    families.randomize_gains(model, seed=1)
    model = model.float().eval()
    traced = trace_plan(in_memory._as_checkpoint(model), model.config, type(model), "auto")
    folded = [gain for gain in traced.trace.gains if gain not in traced.kept]
    stream = trace_stream(traced.model, folded)
    assert stream.pinned is None and len(stream.members) > 5 and stream.norms
    fold_model_(model)
    inputs = families.text_inputs(model, seed=3)
    expected = families.logits(model, inputs)
    rotate_(model, stream)
    error = (families.logits(model, inputs) - expected).norm() / expected.norm()
    assert error < 1e-5
    # The same comparison sees one reader that was forgotten.
    rotate_(model, Stream(stream.size, dict([list(stream.members.items())[-1]]), (), None))
    assert (families.logits(model, inputs) - expected).norm() / expected.norm() > 1e-2


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gemma2", "a weight that is kept"),  # post norms
        ("olmo2", "a weight that is kept"),
        ("cohere", "`mean`"),  # LayerNorm
        ("llava", "was not reached"),  # an image tower writes into it
    ],
)
def test_refused_families(family, why):
    model = families.build(family, seed=0)
    families.randomize_gains(model, seed=1)
    traced = trace_plan(in_memory._as_checkpoint(model), model.config, type(model), "auto")
    stream = trace_stream(traced.model, [gain for gain in traced.trace.gains if gain not in traced.kept])
    assert stream.pinned is not None and why in stream.pinned


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(SIZE) + 0.5)

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Tiny(PreTrainedModel):
    """One block; `change` is what a test does to the stream in it."""

    config_class = LlamaConfig

    def __init__(self, change=lambda self, x: x, parts=dict):
        super().__init__(LlamaConfig(hidden_size=SIZE, vocab_size=VOCABULARY, num_attention_heads=1))
        self.embed = nn.Embedding(VOCABULARY, SIZE)
        self.positions = nn.Embedding(64, SIZE)
        self.norm, self.final = Norm(), Norm()
        self.up, self.down = nn.Linear(SIZE, 24), nn.Linear(24, SIZE)
        self.head = nn.Linear(SIZE, VOCABULARY, bias=False)
        for name, module in parts().items():
            setattr(self, name, module)
        self.change = change

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        x = self.embed(input_ids) * 3.0 + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        x = self.change(self, x)
        return self.head(self.final(x)) if isinstance(x, torch.Tensor) else x


FOLDED = ("norm.weight", "final.weight")


def traced(change=lambda self, x: x, parts=dict, folded=FOLDED):
    with torch.device("meta"):
        model = Tiny(change, parts).eval()
    return trace_stream(model, folded)


def test_writers_and_readers():
    stream = traced()
    assert stream.pinned is None and stream.size == SIZE and set(stream.norms) == set(FOLDED)
    assert stream.members == {
        "embed.weight": (1,),
        "positions.weight": (1,),
        "up.weight": (1,),
        "down.weight": (0,),
        "down.bias": (0,),
        "head.weight": (1,),
    }


def test_rotation_of_the_block_is_exact():
    stream = traced()
    torch.manual_seed(5)
    model = Tiny().double().eval()
    with torch.no_grad():
        for gain in (model.norm.weight, model.final.weight):
            gain.fill_(1.0)
    ids = torch.randint(VOCABULARY, (3, 7))
    expected = model(ids)
    rotate_(model, stream)
    assert torch.allclose(model(ids), expected, atol=1e-12)


class Vector(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(*shape))


def halved_(x):
    x[..., :8].mul_(2)
    return x


PINNED = {
    "kept gain": (lambda self, x: x, dict, ("norm.weight",), "`final.weight`, a weight that is kept"),
    "layer scale": (lambda self, x: x * self.scale.weight, lambda: {"scale": Vector(SIZE)}, FOLDED, "scale.weight"),
    "tanh": (lambda self, x: x.tanh(), dict, FOLDED, "`tanh`"),
    "slice": (lambda self, x: torch.cat([x[..., 8:], x[..., :8]], -1), dict, FOLDED, "a part of"),
    # Each of these has all channels again, in their order.
    "half scaled": (lambda self, x: torch.cat([x[..., :8] * 2, x[..., 8:]], -1), dict, FOLDED, "a part of"),
    "half negated": (lambda self, x: torch.cat([x[..., :8], -x[..., 8:]], -1), dict, FOLDED, "a part of"),
    "half scaled in place": (lambda self, x: halved_(x.clone()), dict, FOLDED, "a part of"),
    "half of the token before": (
        lambda self, x: torch.cat([x[..., :8].roll(1, 1), x[..., 8:]], -1),
        dict,
        FOLDED,
        "a part of",
    ),
    "every second one": (
        lambda self, x: torch.stack([x[..., ::2], x[..., 1::2] * 3], -1).flatten(-2),
        dict,
        FOLDED,
        "a part of",
    ),
    "a writer in parts": (
        lambda self, x: (
            x
            + torch.cat(
                [self.up(x) @ self.down.weight[:8].T, torch.roll(self.up(x), 1, 1) @ self.down.weight[8:].T], -1
            )
        ),
        dict,
        FOLDED,
        "a part of",
    ),
    "channels masked": (
        lambda self, x: x.masked_fill(torch.arange(SIZE, device=x.device) > 5, 0.0),
        dict,
        FOLDED,
        "`masked_fill`",
    ),
    "a token for each channel": (
        lambda self, x: x.gather(1, (torch.arange(SIZE, device=x.device) % x.shape[1]).expand(x.shape)),
        dict,
        FOLDED,
        "`gather`",
    ),
    "diagonal": (
        lambda self, x: x + x.repeat(1, SIZE, 1)[:, :SIZE].diagonal(0, 1, 2)[:, None],
        dict,
        FOLDED,
        "`diagonal`",
    ),
    "flip": (lambda self, x: x + x.flip(-1), dict, FOLDED, "`add`"),
    "mean": (lambda self, x: x - x.mean(-1, keepdim=True), dict, FOLDED, "`mean`"),
    "number": (lambda self, x: x + 1.0, dict, FOLDED, "`add`"),
    "gate of its own": (lambda self, x: x * torch.sigmoid(x), dict, FOLDED, "`sigmoid`"),
    "product with itself": (lambda self, x: x * (x * x), dict, FOLDED, "`mul`"),
    "gate by channel": (
        lambda self, x: x * torch.sigmoid(self.gate(self.norm(x))),
        lambda: {"gate": nn.Linear(SIZE, SIZE)},
        FOLDED,
        "`mul`",
    ),
    "half read": (lambda self, x: x + self.part(x[..., :8]), lambda: {"part": nn.Linear(8, SIZE)}, FOLDED, "a part of"),
    "norm of a half": (
        lambda self, x: x * torch.rsqrt(x[..., :8].pow(2).mean(-1, keepdim=True)),
        dict,
        FOLDED,
        "a part of",
    ),
    "maximum": (lambda self, x: x / x.abs().amax(-1, keepdim=True), dict, FOLDED, "`abs`"),
    "returned": (lambda self, x: (x,), dict, FOLDED, "the model returns it"),
    "not reached": (lambda self, x: x, lambda: {"tower": nn.Linear(4, SIZE)}, FOLDED, "`tower.weight` was not reached"),
    "convolution": (
        lambda self, x: x + self.conv(x.transpose(1, 2)).transpose(1, 2)[:, : x.shape[1]],
        lambda: {"conv": nn.Conv1d(SIZE, SIZE, 3, padding=2, groups=SIZE)},
        FOLDED,
        "`convolution`",
    ),
    "weight used twice": (
        lambda self, x: x + self.shared(torch.tanh(self.shared(self.norm(x)))),
        lambda: {"shared": nn.Linear(SIZE, SIZE, bias=False)},
        FOLDED,
        "`tanh`",
    ),
    "written in place": (
        lambda self, x: x.index_copy(1, torch.zeros(1, dtype=torch.long, device=x.device), x[:, :1] * 2),
        dict,
        FOLDED,
        "`index_copy`",
    ),
    "fixed vector": (
        lambda self, x: x + torch.linspace(0, 1, SIZE, device=x.device),
        dict,
        FOLDED,
        "`add`",
    ),
}


@pytest.mark.parametrize("name", PINNED)
def test_what_does_not_commute_pins_the_stream(name):
    change, parts, folded, why = PINNED[name]
    stream = traced(change, parts, folded)
    assert stream.pinned is not None and why in stream.pinned, stream.pinned


COMMUTES = {
    "scaled by its norm": lambda self, x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    "mean over tokens": lambda self, x: x + x.mean(1, keepdim=True),
    "gate per token": lambda self, x: x * torch.sigmoid(self.up(self.norm(x))[..., :1]),
    "similarity": lambda self, x: torch.softmax(x @ x.transpose(1, 2), -1) @ x,
    "negated": lambda self, x: -x,
    "tokens masked": lambda self, x: x.masked_fill(torch.arange(x.shape[1], device=x.device)[:, None] > 1, 0.0),
    "tokens picked": lambda self, x: x.gather(1, (torch.arange(x.shape[1]) // 2).to(x.device)[:, None].expand(x.shape)),
}


@pytest.mark.parametrize("name", COMMUTES)
def test_what_commutes_is_rotated(name):
    stream = traced(COMMUTES[name])
    assert stream.pinned is None
    model = Tiny(COMMUTES[name]).double().eval()
    with torch.no_grad():
        for gain in (model.norm.weight, model.final.weight):
            gain.fill_(1.0)
    ids = torch.randint(VOCABULARY, (3, 7))
    expected = model(ids)
    rotate_(model, stream)
    assert torch.allclose(model(ids), expected, atol=1e-10)


def test_steps():
    """Who writes, who reads, and the norms, in the order of the forward."""
    assert [(s.kind, s.name, s.dim) for s in traced().steps] == [
        ("write", "embed.weight", 1),
        ("write", "positions.weight", 1),
        ("norm", "norm.weight", 0),
        ("read", "up.weight", 1),
        ("write", "down.weight", 0),
        ("write", "down.bias", 0),
        ("norm", "final.weight", 0),
        ("read", "head.weight", 1),
    ]


def test_a_square_matrix_writes_by_one_side_and_reads_by_the_other():
    stream = traced(lambda self, x: x + self.mix(self.norm(x)), lambda: {"mix": nn.Linear(SIZE, SIZE, bias=False)})
    assert stream.pinned is None and stream.members["mix.weight"] == (0, 1)
    assert stream.parameters("write")["mix.weight"] == (0,) and stream.parameters("read")["mix.weight"] == (1,)


def test_a_gate_with_one_output_is_a_number_per_token():
    """As the shared expert's of Qwen2-MoE. A single row of a writer is not."""
    gate = traced(lambda self, x: x * torch.sigmoid(self.gate(self.norm(x))), lambda: {"gate": nn.Linear(SIZE, 1)})
    assert gate.pinned is None and gate.parameters("read")["gate.weight"] == (1,)
    row = traced(lambda self, x: x * torch.sigmoid(torch.tanh(self.up(self.norm(x))) @ self.down.weight[5:6].T))
    assert row.pinned is not None


HEADS, KEYS, HEAD = 4, 2, 6


class Attention(nn.Module):
    """Grouped queries; `change` is what a test does to the values (batch, heads, tokens, channels) or their sums."""

    def __init__(self, change=lambda self, v: v, after=lambda self, out: out):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(SIZE, HEAD * n) for n in (HEADS, KEYS, KEYS))
        self.o = nn.Linear(HEADS * HEAD, SIZE)
        self.scale = nn.Parameter(torch.rand(HEAD))
        self.change, self.after = change, after

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = (m(x).view(batch, length, -1, HEAD).transpose(1, 2) for m in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(HEADS // KEYS, 1) for t in (k, self.change(self, v)))
        sums = (q @ k.transpose(2, 3)).softmax(-1) @ v
        return self.o(self.after(self, sums).transpose(1, 2).reshape(batch, length, -1))


def heads(**changes):
    return traced(lambda self, x: x + self.attention(self.norm(x)), lambda: {"attention": Attention(**changes)}).carried


def test_heads_of_the_values_that_arrive_at_the_output_projection():
    source, channels = heads()["attention.o.weight"]
    assert source == "attention.v.weight"
    assert channels.tolist() == [*range(HEAD), *range(HEAD), *range(HEAD, 2 * HEAD), *range(HEAD, 2 * HEAD)]
    assert (
        heads(after=lambda self, out: out.flip(-1))["attention.o.weight"][1].tolist()
        == channels.view(HEADS, HEAD).flip(-1).flatten().tolist()
    )
    # A factor that the channels of a head share does no harm.
    assert "attention.o.weight" in heads(after=lambda self, out: out * out.new_ones(HEADS, 1, 1))


@pytest.mark.parametrize(
    "changes",
    [
        {"change": lambda self, v: v * self.scale},
        {"change": lambda self, v: v.tanh()},
        {"change": lambda self, v: v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True))},
        {"change": lambda self, v: torch.cat([-v[..., 3:], v[..., :3]], -1)},
        {"change": lambda self, v: torch.cat([-v[..., :3], v[..., 3:]], -1)},
        {"after": lambda self, out: out * torch.sigmoid(out)},
        {"after": lambda self, out: out + self.scale},
    ],
    ids=["gain", "tanh", "norm", "half turned", "half negated", "gate", "vector added"],
)
def test_values_that_something_else_touches(changes):
    assert "attention.o.weight" not in heads(**changes)


class Factorised(Tiny):
    """A small embedding that a linear widens, as ALBERT and OPT have it."""

    def __init__(self):
        super().__init__()
        self.embed, self.widen = nn.Embedding(VOCABULARY, 8), nn.Linear(8, SIZE)

    def forward(self, input_ids):
        x = self.widen(self.embed(input_ids)) + self.positions(torch.arange(input_ids.shape[1]))
        return self.head(self.final(x + self.down(torch.tanh(self.up(self.norm(x))))))


def test_an_embedding_that_is_not_the_residual_stream():
    with torch.device("meta"):
        model = Factorised().eval()
    assert "no norm normalises what `embed.weight` gives" in trace_stream(model, FOLDED).pinned


def test_why_a_weight_is_kept_is_said():
    with torch.device("meta"):
        model = Tiny().eval()
    pinned = trace_stream(model, FOLDED[:1], {"final.weight": "somebody reads it"}).pinned
    assert "`final.weight`, a weight that is kept (somebody reads it)" in pinned
