"""Hand-made models, each with one trap in it: is the gain folded, or kept for the right reason?

Every trap is a real remote-code checkpoint: its two Python files and its weights are written to a temporary folder,
folded, loaded again through `AutoModelForCausalLM`, and compared on float32 logits. Of each model, only the lines
that make the trap are written here; `MODELING` is the rest: an embedding, two blocks with a norm, a norm, a head.

A kept norm also has a negative control: fold it all the same, as a naive tool would, and see the logits change.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, dynamic_module_utils
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from flashnorm_cli.checkpoint.names import pattern_of
from flashnorm_cli.folding.fold import FoldResult, fold

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
MAX_ERROR, MIN_NAIVE_ERROR = 1e-5, 1e-3
# Prompts of other shapes than the tracer's, a single token as in decoding among them.
SHAPES = ((1, 1), (2, 6), (3, 7), (1, 16))

CONFIGURATION = """
from transformers import PreTrainedConfig

class TrapConfig(PreTrainedConfig):
    model_type = "flashnorm_trap"
    vocab_size = 40
    hidden_size = 16
    num_hidden_layers = 2
"""
MODELING = """
import math
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput
from .configuration_trap import TrapConfig

D, W, V, HEADS = 16, 24, 40, 2  # widths: hidden, inner, vocabulary; HEADS heads of 8 channels

def lin(i, o):
    return nn.Linear(i, o, bias=False)

def par(*shape):
    return nn.Parameter(torch.ones(shape))

def normed(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

class Norm(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = par(*shape)
    def forward(self, x):
        return self.weight * normed(x)

{extra}

class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.norm, self.up, self.down = Norm(D), lin(D, W), lin(W, D)
{init}
    def forward(self, x, ids):
{body}
{forward}
        return x + self.down(F.silu(y))

class TrapForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TrapConfig
    _tied_weights_keys = {tied}
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(V, D)
        self.layers = nn.ModuleList([Block(config, i) for i in range(config.num_hidden_layers)])
        self.norm, self.head = Norm(D), lin(D, V)
{model_init}
        self.post_init()
    def get_input_embeddings(self):
        return self.embed
    def get_output_embeddings(self):
        return getattr(self, "head", None)
    def set_output_embeddings(self, head):
        self.head = head
    def _init_weights(self, module):
        pass
    def forward(self, input_ids, **kwargs):
{embed}
        for layer in self.layers:
            x = layer(x, input_ids)
{head}
        return CausalLMOutput(logits=logits)
"""

NORM, FINAL = "layers.*.norm.weight", "norm.weight"


@dataclass(frozen=True)
class Trap:
    """The lines of one model, and what the fold has to do with it.

    `forward` computes `y`, which goes through `silu` and `down`, from the block's input `x` and its norm `h`.
    `folded` are the patterns of the norms that must be folded, `kept` those that must not: pattern -> words of the
    reason. `naive` is what a naive tool would fold: norm -> linears, whose last dimension takes the gain; none where
    that would be right (the tool is careful) or where logits cannot show it.
    """

    name: str
    forward: str = "y = self.up(h)"
    init: str = ""
    body: str = "h = self.norm(x)"  # before `forward`; empty where the norm is written there
    extra: str = ""
    model_init: str = ""
    head: str = "logits = self.head(self.norm(x))"
    embed: str = "x = self.embed(input_ids)"
    tied: str = "{}"
    config: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)  # of `fold`
    folded: tuple[str, ...] = (NORM, FINAL)
    kept: dict[str, str] = field(default_factory=dict)
    naive: dict[str, tuple[str, ...]] = field(default_factory=dict)
    lm_head: str = ""
    bug: str = ""  # a known bug of the tool
    change: Callable[[dict[str, torch.Tensor]], object] = len  # changes the tensors on disk


folds = Trap


def keeps(name: str, reason: str, *lines: str, naive: tuple[str, ...] = ("up",), also: str = "", **rest: Any) -> Trap:
    """A trap that must keep the norms of the blocks (`also`: of another one, too); a naive tool folds into `naive`."""
    norms = {NORM: reason} | ({f"layers.*.{also}.weight": reason} if also else {})
    linears = tuple(f"layers.*.{n}.weight" for n in naive)
    rest = {"folded": (FINAL,), **rest}
    return Trap(name, *lines, kept=norms, naive={NORM: linears} if naive else {}, **rest)


def head(name: str, reason: str, lines: str, init: str = "", **rest: Any) -> Trap:
    """A trap of the final norm, which must be kept; a naive tool folds it into the head."""
    rest = {"folded": (NORM,), "kept": {FINAL: reason}, "lm_head": "kept", **rest}
    return Trap(name, head=lines, model_init=init, **rest)


def without(*names: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            tensors.pop(name, None)

    return change


def copies(*names: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Both layers hold the first one's tensors."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            tensors[f"layers.1.{name}.weight"] = tensors[f"layers.0.{name}.weight"].clone()

    return change


TIE = {"tie_word_embeddings": True}
LINEARS_TIED = '{"layers.1.up.weight": "layers.0.up.weight"}'
NORMS_TIED = '{"layers.1.norm.weight": "layers.0.norm.weight"}'
BOTH_TIED = f"{{**{LINEARS_TIED}, **{NORMS_TIED}}}"
TAIL = """
class Tail(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.image = Norm(D), lin(D, D), lin(D, D)
    def forward(self, x, kwargs):
        h = self.norm(x)
        return x + (self.image(h) if kwargs.get("image") else self.up(h))
"""
TIED = '{"head.weight": "embed.weight"}'
# Names that PyTorch has as well, but other meanings.
CUSTOM = """
from torch.library import custom_op
def define(name, function):
    if not hasattr(torch.ops.flashnorm_trap, name):
        custom_op(f"flashnorm_trap::{name}", function, mutates_args=()).register_fake(lambda x, *_: torch.empty_like(x))
def clone(x: torch.Tensor) -> torch.Tensor:
    return x ** 3
def rms_norm(x: torch.Tensor, shape: list[int], weight: torch.Tensor) -> torch.Tensor:
    return normed(x) * weight.abs()
define("clone", clone)
define("cube", clone)
define("rms_norm", rms_norm)
"""
# Four experts, one of which each token chooses.
EXPERTS = """
    self.router = lin(D, 4)
    self.experts = nn.ModuleList([lin(D, W) for _ in range(4)])
    self.named = nn.ModuleDict({f"expert_{i}": e for i, e in enumerate(self.experts)})
    del self.up
"""
MOE = """
          flat = h.flatten(0, 1)
          chosen = self.router(h).argmax(-1)
          y = torch.zeros(len(flat), W, dtype=h.dtype, device=h.device)"""

# fmt: off
TRAPS = [
    folds("plain"),
    # ---- the output goes somewhere else, too
    keeps("normed value added back (LAuReL)", "added", "y = self.up(h + self.left(h))", "self.left = lin(D, D)",
          naive=("up", "left")),
    keeps("residual after the norm (MiniMax)", "added", "x = h; y = self.up(h)"),
    keeps("a second reader in no linear", "tanh", "y = self.up(h) * h.tanh().mean()"),
    keeps("averaged over the channels", "averaged", "y = self.up(h) * (1 + h.mean(-1, keepdim=True))"),
    keeps("largest channel", "amax", "y = self.up(h) * (1 + h.amax(-1, keepdim=True))"),
    keeps("scores of the normed value with itself", "attention scores",
          "y = torch.softmax(h @ h.transpose(1, 2), -1) @ self.up(h)"),
    folds("a second reader in a later layer", """
          self.shared['h'] = self.shared.get('h', h) if self.layer else h
          y = self.up(h) + self.far(self.shared['h'])""", "self.far = lin(D, W)\nself.shared = SHARED",
          extra="SHARED = {}"),
    Trap("a later layer adds an earlier norm", """
          if self.layer == 0: SHARED['h'] = h
          y = self.up(h)
          if self.layer == 1: y = y + SHARED['h'].repeat(1, 1, 2)[..., :W]""", extra="SHARED = {}",
          folded=(FINAL, NORM), kept={NORM: "added"}),
    folds("router, experts, shared expert and its gate are readers", """
          weights, chosen = self.router(h).softmax(-1).topk(2)
          y = torch.zeros(*h.shape[:-1], W, dtype=h.dtype, device=h.device)
          for e, expert in enumerate(self.experts):
              y = y + expert(h) * (weights * (chosen == e)).sum(-1, keepdim=True)
          y = y + self.shared(h) * self.gate(h).sigmoid() + self.up(h)""", """
          self.router, self.shared, self.gate = lin(D, 4), lin(D, W), lin(D, 1)
          self.experts = nn.ModuleList([lin(D, W) for _ in range(4)])"""),
    keeps("router with a temperature norm of its own", "normalised",
          "y = self.up(h) * self.router(normed(h)).softmax(-1)[..., :1]", "self.router = lin(D, 4)",
          naive=("up", "router")),
    # ---- blocks and weights that are shared
    folds("the same norm and linears used twice", "y = self.up(h) + self.up(self.norm(x * x))"),
    keeps("one linear behind two norms", "also reads an input without this gain",
          "y = self.up(h) + self.up(self.norm2(x))", "self.norm2 = Norm(D)", also="norm2"),
    keeps("one linear for normed and raw input", "also reads an input without this gain",
          "y = self.up(h) + self.up(x * x)"),
    keeps("raw input first", "also reads an input without this gain", "y = self.up(x * x); y = y + self.up(h)"),
    keeps("raw input by a matmul", "also reads an input without this gain",
          "y = self.up(h) + (x * x) @ self.up.weight.T"),
    keeps("raw input through .detach()", "also reads an input without this gain",
          "y = self.up(h) + (x * x) @ self.up.weight.detach().T"),
    keeps("raw input through .data", "also reads", "y = self.up(h) + (x * x) @ self.up.weight.data.T"),
    keeps("linear whose weight is looked up (embedding)", "another use",
          "y = self.up(h) + self.up.weight[ids % 8, :1]"),
    keeps("linear whose weight is regularised", "another use",
          "y = self.up(h) / (1 + self.up.weight.pow(2).mean())"),
    keeps("linear used backwards, too", "also reads", "y = self.up(h); y = self.up(F.silu(y @ self.up.weight))"),
    keeps("gain used twice, with and without one", "two different conventions",
          "y = self.up(h) + self.up2(normed(x) * (1 + self.norm.weight))", "self.up2 = lin(D, W)",
          naive=("up", "up2")),
    # ---- slices of the output
    folds("sliced, each part read by a linear", "y = self.up(h[..., :10] @ self.a.weight.T + self.b(h[..., 10:]))",
          "self.a, self.b = lin(10, D), lin(6, D)"),
    keeps("sliced, one part rotated (RoPE)", "mixed with each other", """
          rot, rest = h.split([6, 10], -1)
          angle = torch.arange(h.shape[1], device=h.device).float()[:, None]
          one, two = rot.chunk(2, -1)
          rot = torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)
          y = self.up(torch.cat([rot, rest], -1))"""),
    folds("two norms side by side into one linear", "y = self.up(torch.cat([h, self.norm2(x * x)], -1))",
          "self.norm2, self.up = Norm(D), lin(2 * D, W)", folded=(NORM, "layers.*.norm2.weight", FINAL)),
    folds("a norm and raw channels side by side", "y = self.up(torch.cat([h, x], -1))", "self.up = lin(2 * D, W)"),
    folds("half of the channels, twice", "y = self.up(torch.cat([h[..., :8], h[..., :8]], -1))"),
    folds("one channel for all", "y = self.up(h[..., 3:4].expand_as(h))"),
    folds("channels reversed, rolled, interleaved",
          "y = self.up(h.flip(-1).roll(3, -1).view(*h.shape[:2], 2, 8).mT.flatten(2))"),
    keeps("channels permuted by an index", "goes through", "y = self.up(h[..., self.order])",
          "self.order = [3, 1, 2, 0] * 4"),
    # ---- q/k norms and heads
    keeps("q and k norm", "attention scores", """
          q, k = (self.norm(t.unflatten(-1, (HEADS, 8))).transpose(1, 2) for t in (self.q(x), self.k(x)))
          y = (q @ k.mT).softmax(-1) @ self.up(x).unflatten(-1, (HEADS, 12)).transpose(1, 2)
          y = y.transpose(1, 2).flatten(2)""", "self.norm, self.q, self.k = Norm(8), lin(D, D), lin(D, D)",
          naive=("q", "k"), body=""),
    folds("norm per head, heads merged (tiled gain)",
          "y = self.up(self.norm(x.unflatten(-1, (HEADS, 8))).flatten(2))", "self.norm = Norm(8)", body=""),
    folds("norm per head with its own gains (2-D)",
          "y = self.up(self.norm(x.unflatten(-1, (HEADS, 8))).flatten(2))", "self.norm = Norm(HEADS, 8)", body=""),
    folds("norm per head, heads transposed", "y = self.up(self.norm(x.unflatten(-1, (HEADS, 8))).mT.flatten(2))",
          "self.norm = Norm(HEADS, 8)", body=""),
    folds("value norm through attention", """
          v = self.norm(x.unflatten(-1, (HEADS, 8))).transpose(1, 2)
          a = torch.ones(x.shape[1], x.shape[1], device=x.device).tril()
          y = self.up(((a / a.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2))""", "self.norm = Norm(8)",
          body=""),
    # ---- between norm and linear
    folds("dropout, casts, gate", """
          y = self.up(F.dropout(h, 0.5, self.training).double().type_as(x) * self.gate(h).sigmoid())""",
          "self.gate = lin(D, 1)"),
    folds("gated norm (Mamba 2)", "y = self.up(self.norm(x * F.silu(self.gate(x))))", "self.gate = lin(D, D)",
          body=""),
    folds("norm, then gate", "y = self.up(h * self.gate(x))", "self.gate = lin(D, D)"),
    folds("chunks of the tokens", "y = torch.cat([self.up(c) for c in h.chunk(2, 1)], 1)"),
    folds("tokens flattened and gathered", """
          y = self.up(h.flatten(0, 1)[torch.arange(h.shape[0] * h.shape[1] - 1, -1, -1)]).view(*h.shape[:2], W)"""),
    folds("shifted by one token", "y = self.up(h - F.pad(h, (0, 0, 1, -1)))"),
    folds("masked tokens", "y = self.up(h.masked_fill((ids % 2 == 0)[..., None], 0.0))"),
    keeps("masked tokens that are not zero", "masked_fill",
          "y = self.up(h.masked_fill((ids % 2 == 0)[..., None], 0.5))"),
    keeps("where", "where", "y = self.up(torch.where((ids % 2 == 0)[..., None], h, x))"),
    keeps("clamped", "clamp", "y = self.up(h.clamp(-0.5, 0.5))"),
    keeps("relu", "relu", "y = self.up(h.relu())"),
    keeps("a number added", "added", "y = self.up(h + 1)"),
    keeps("rounded to integers by a cast", "goes through", "y = self.up((h * 4).to(torch.int8).to(h.dtype))"),
    keeps("a cast to bool", "goes through", "y = self.up((h * 4).int().bool().float())"),
    keeps("a division that rounds", "goes through", "y = self.up(torch.div(h, 0.25, rounding_mode='floor'))"),
    keeps("a division by another that rounds", "goes through",
          "y = self.up(torch.div(h, x.detach() * 0 + 0.25, rounding_mode='trunc'))"),
    keeps("divided by the normed value", "added", "y = self.up(x / (h + 3))"),
    keeps("bits of the normed value", "goes through",
          "y = self.up((h.view(torch.int32) & -65536).view(torch.float32) + h.mean() * 0)"),
    keeps("a cast to 8 bits", "goes through", "y = self.up(h.to(torch.float8_e4m3fn).to(h.dtype))"),
    # ---- how the gain is written
    folds("1 + w (Gemma)", "y = self.up(normed(x) * (1.0 + self.norm.weight.float()))", body=""),
    folds("F.rms_norm", "y = self.up(F.rms_norm(x, (D,), self.norm.weight, 1e-6))", body=""),
    folds("F.rms_norm with 1 + w", "y = self.up(F.rms_norm(x, (D,), self.norm.weight + 1, 1e-6))", body=""),
    folds("F.normalize", "y = self.up(F.normalize(x, dim=-1) * math.sqrt(D) * self.norm.weight)", body=""),
    folds("x / x.norm()", """
          y = self.up(self.norm.weight * (x / (x.norm(dim=-1, keepdim=True) + 1e-6)) * D ** 0.5)""", body=""),
    folds("LayerNorm without bias", "y = self.up(F.layer_norm(x, (D,), self.norm.weight))", body=""),
    keeps("LayerNorm with bias", "bias", "y = self.up(F.layer_norm(x, (D,), self.norm.weight, self.shift))",
          "self.shift = par(D)", body=""),
    folds("weight negated", "y = self.up(normed(x) * -self.norm.weight)", body=""),
    keeps("2 * w", "exactly one", "y = self.up(normed(x) * (2 * self.norm.weight))", body="", naive=()),
    keeps("w + 0.5", "exactly one", "y = self.up(normed(x) * (self.norm.weight + 0.5))", body=""),
    keeps("exp(w)", "does not act as a gain", "y = self.up(normed(x) * self.norm.weight.exp())", body=""),
    keeps("0 * w + 1", "does not act as a gain", "y = self.up(normed(x) * (self.norm.weight * 0 + 1))", body=""),
    keeps("gain times another parameter", "does not act as a gain",
          "y = self.up(normed(x) * (self.norm.weight * self.scale))", "self.scale = par(D)", body="", naive=()),
    keeps("output times another parameter", "multiplied", "y = self.up(h * self.scale)", "self.scale = par(D)",
          naive=()),
    keeps("gain permuted by an index", "does not act as a gain", """
          y = self.up(normed(x) * self.norm.weight[torch.arange(D - 1, -1, -1, device=x.device)])""", body=""),
    folds("gain repeated channel by channel", "y = self.up(normed(x) * self.norm.weight.repeat_interleave(2))",
          "self.norm = Norm(8)", body=""),
    folds("gain expanded over halves", "y = self.up(normed(x) * self.norm.weight.repeat(2))", "self.norm = Norm(8)",
          body=""),
    keeps("gain chosen by the token", "does not act as a gain",
          "y = self.up(normed(x) * self.norm.weight[ids % 3])", "self.norm = Norm(3, D)", body="", naive=()),
    folds("gain chosen by the layer", "y = self.up(normed(x) * self.norm.weight[self.layer])",
          "self.norm = Norm(2, D)", body=""),
    keeps("gain by embedding", "does not act as a gain",
          "y = self.up(normed(x) * F.embedding(ids % 3, self.norm.weight))", "self.norm = Norm(3, D)", body="",
          naive=()),
    folds("a gain of one number", "y = self.up(normed(x) * self.norm.weight)", "self.norm = Norm(1)", body=""),
    folds("a gain without dimensions", "y = self.up(normed(x) * self.norm.weight)", "self.norm = Norm()", body=""),
    # ---- readers that are no nn.Linear
    folds("einsum", "y = torch.einsum('btd,wd->btw', h, self.up.weight)"),
    keeps("einsum by heads", "", "y = torch.einsum('bthd,whd->btw', h.unflatten(-1, (HEADS, 8)), self.up.weight)",
          "self.up = nn.Module(); self.up.weight = par(W, HEADS, 8)", naive=()),
    folds("x @ W, transposed on disk (Conv1D)", "y = h @ self.mat + self.bias",
          "self.mat, self.bias = par(D, W), par(W)\ndel self.up"),
    folds("addmm", "y = torch.addmm(self.bias, h.flatten(0, 1), self.mat).view(*h.shape[:2], W)",
          "self.mat, self.bias = par(D, W), par(W)\ndel self.up"),
    folds("bmm with a stack of experts", """
          y = torch.bmm(h.flatten(0, 1).expand(3, -1, -1), self.mat).sum(0).view(*h.shape[:2], W)""",
          "self.mat = par(3, D, W)\ndel self.up"),
    folds("baddbmm", "y = torch.baddbmm(self.bias, h, self.mat.expand(len(h), -1, -1))",
          "self.mat, self.bias = par(D, W), par(1, 1, W)\ndel self.up"),
    folds("experts' stack gathered per token", """
          y = torch.bmm(h.flatten(0, 1)[:, None], self.mat[(ids % 3).flatten()]).view(*h.shape[:2], W)""",
          "self.mat = par(3, D, W)\ndel self.up"),
    folds("nn.Conv1d of width 1", "y = self.conv(h.mT).mT", "self.conv = nn.Conv1d(D, W, 1)\ndel self.up"),
    folds("nn.Conv1d along the tokens", "y = self.up(F.silu(self.conv(h.mT)[..., :h.shape[1]].mT))",
          "self.conv = nn.Conv1d(D, D, 3, padding=2, bias=False)"),
    folds("depthwise nn.Conv1d", "y = self.up(F.silu(self.conv(h.mT)[..., :h.shape[1]].mT))",
          "self.conv = nn.Conv1d(D, D, 3, padding=2, groups=D)"),
    keeps("depthwise nn.Conv1d with two filters each", "goes through",
          "y = self.up(self.conv(h.mT)[..., :h.shape[1]].mT)",
          "self.conv, self.up = nn.Conv1d(D, 2 * D, 3, padding=2, groups=D), lin(2 * D, W)", naive=()),
    keeps("nn.Conv1d with groups", "goes through", "y = self.up(F.silu(self.conv(h.mT)[..., :h.shape[1]].mT))",
          "self.conv = nn.Conv1d(D, D, 3, padding=2, groups=4)", naive=()),
    keeps("convolution over the channels", "goes through",
          "y = self.up(self.conv(h.flatten(0, 1)[:, None])[:, 0].view_as(h))",
          "self.conv = nn.Conv1d(1, 1, 3, padding=1)"),
    folds("linear along the tokens", """
          y = self.up(h) + self.mix(F.pad(h.mT, (0, 16))[..., :16]).mT.sum(1, keepdim=True) @ self.up.weight.T""",
          "self.mix = lin(16, 3)"),
    folds("fused qkv", "q, k, v = self.qkv(h).chunk(3, -1); y = self.up(F.silu(q * k) + v)",
          "self.qkv = lin(D, 3 * D)"),
    keeps("weight times an activation", "", "y = h @ (self.up.weight * x.mean()).T", naive=()),
    keeps("weight plus its low-rank change", "", "y = h @ (self.up.weight + self.b.weight @ self.a.weight).T",
          "self.a, self.b = lin(D, 3), lin(3, W)", naive=("up",)),
    folds("low-rank change beside it", "y = self.up(h) + self.b(self.a(h))",
          "self.a, self.b = lin(D, 3), lin(3, W)"),
    keeps("weight norm of the linear", "", "w = self.up.weight; y = h @ (w / w.norm(dim=1, keepdim=True)).T"),
    keeps("two weights joined at run time", "",
          "y = F.linear(h, torch.cat([self.up.weight[:10], self.up.weight[10:]]))", naive=()),
    folds("rows of the weight in any order", "y = F.linear(h, self.up.weight[self.order])",
          "self.order = list(range(W))[::-1]"),
    keeps("columns of the weight in another order", "does not read it along",
          "y = F.linear(h, self.up.weight[:, self.order])", "self.order = list(range(D))[::-1]"),
    folds("columns of the weight in halves", """
          y = F.linear(h[..., :8], self.up.weight[:, :8]) + F.linear(h[..., 8:], self.up.weight[:, 8:])"""),
    keeps("halves of the weight crossed", "also reads",
          "y = self.up(h) + F.linear(h[..., :8], self.up.weight[:, 8:])"),
    keeps("a row of one column", "does not read it along",
          "y = self.up(h) + F.linear(h[..., :1], self.up.weight[:, 1:2])"),
    # ---- in place, and through views of the same memory
    keeps("multiplied in place", "does not act as a gain",
          "h = normed(x); h.mul_(self.norm.weight); y = self.up(h)", body="", naive=()),
    keeps("multiplied in place, seen through a view", "does not act as a gain",
          "h = normed(x); v = h[:]; h.mul_(self.norm.weight); y = self.up(v) + self.up2(h)", "self.up2 = lin(D, W)",
          body="", naive=()),
    keeps("multiplied into a buffer, seen through a view", "does not act as a gain", """
          h = torch.empty_like(x)
          v = h[:]
          torch.mul(normed(x), self.norm.weight, out=h)
          y = self.up(v) + self.up2(h)""", "self.up2 = lin(D, W)", body="", naive=()),
    keeps("gated into a buffer, seen through a view", "goes through", """
          b = torch.empty_like(x)
          v = b[:]
          torch.mul(x, h, out=b)
          y = self.up(v) + self.up2(b)""", "self.up2 = lin(D, W)", naive=()),
    keeps("summed into a buffer, seen through a view", "goes through", """
          b = torch.empty_like(h[:, :1])
          v = b[:]
          torch.sum(h, 1, keepdim=True, out=b)
          y = self.up(v) + self.up2(b)""", "self.up2 = lin(D, W)", naive=()),
    keeps("overwritten by a product", "goes through", """
          z = h.clone().flatten(0, 1)
          torch.mm(h.flatten(0, 1), self.mid.weight.T, out=z)
          y = self.up(z.view_as(h))""", "self.mid = lin(D, D)", naive=("mid", "up")),
    keeps("overwritten by copy_", "written into", "z = h.clone(); y = self.up2(h); z.copy_(x); y = y + self.up(z)",
          "self.up2 = lin(D, W)", naive=("up", "up2")),
    keeps("overwritten through .data", "decides what",
          "z = h.clone(); y = self.up2(h); z.data = x.clone(); y = y + self.up(z)", "self.up2 = lin(D, W)",
          naive=("up", "up2")),
    keeps("overwritten by set_", "goes through",
          "z = h.clone(); y = self.up2(h); z.set_(x.clone()); y = y + self.up(z)", "self.up2 = lin(D, W)",
          naive=("up", "up2")),
    keeps("overwritten in part", "written into" if TORCH < (2, 15) else "through `fill`",
          "h[..., 0] = 0.5; y = self.up(h)"),
    keeps("added to in place", "added", "h += x; y = self.up(h)"),
    keeps("added in place to something else", "added", "y = self.up(h); r = x.clone(); r += h; x = r"),
    keeps("copied into a buffer", "written into",
          "b = torch.zeros_like(x); b[:, 0] = h[:, 0]; y = self.up(h) + self.up2(b)", "self.up2 = lin(D, W)",
          naive=("up",)),
    keeps("index_put", "written into",
          "b = x.clone(); b[torch.arange(len(b)), 0] = h[:, 0]; y = self.up(h) + self.up2(b)",
          "self.up2 = lin(D, W)"),
    keeps("scatter", "written into", """
          b = x.scatter(1, torch.zeros_like(ids)[..., None].expand_as(h), h)
          y = self.up(h) + self.up2(b)""", "self.up2 = lin(D, W)"),
    keeps("index_add", "written into",
          "b = x.index_add(1, torch.zeros_like(ids[0]), h); y = self.up(h) + self.up2(b)", "self.up2 = lin(D, W)"),
    keeps("as_strided", "goes through",
          "y = self.up(h) + self.up2(h.as_strided(h.shape, h.stride(), 0)) + self.up2(x)", "self.up2 = lin(D, W)",
          naive=("up", "up2")),
    keeps("list operations (foreach)", "goes through", "torch._foreach_add_([h], [x]); y = self.up(h)"),
    keeps("list operations that multiply", "goes through",
          "a, = torch._foreach_mul([h], 2.0); y = self.up2(h) + self.up(a)", "self.up2 = lin(D, W)", naive=()),
    # ---- what the forward does depends on data that a trace does not have
    keeps("a branch of a sum", "also reads", "y = self.up(h) if (x.sum() + ids.sum()) % 2 > 1 else self.up(x)"),
    keeps("the other branch of a sum", "also reads",
          "y = self.up(x) if (x.sum() + ids.sum()) % 2 > 1 else self.up(h)"),
    keeps("a branch of the length", "also reads", "y = self.up(h) if ids.shape[1] > 1 else self.up(x)"),
    keeps("a branch of a token", "also reads", "y = self.up(x) if ids[0, -1] % 2 else self.up(h)"),
    folds("a branch that reads the same", "y = self.up(h) if x.sum() > 0 else 2 * self.up(h)"),
    # ---- experts, in each way that they are called
    folds("experts: nonzero", MOE + """
          for e, expert in enumerate(self.experts):
              row = (chosen == e).flatten().nonzero()[:, 0]
              y = y.index_add(0, row, expert(flat[row]))
          y = y.view(*h.shape[:2], W)""", EXPERTS),
    folds("experts: where", MOE + """
          for e, expert in enumerate(self.experts):
              row, = torch.where((chosen == e).flatten())
              if row.numel(): y[row] += expert(flat[row])
          y = y.view(*h.shape[:2], W)""", EXPERTS),
    folds("experts: a bool mask", MOE + """
          for e, expert in enumerate(self.experts):
              mask = (chosen == e).flatten()
              y[mask] = expert(flat[mask])
          y = y.view(*h.shape[:2], W)""", EXPERTS),
    folds("experts: any()", MOE + """
          for e, expert in enumerate(self.experts):
              mask = (chosen == e).flatten()
              if mask.any(): y[mask] = expert(flat[mask])
          y = y.view(*h.shape[:2], W)""", EXPERTS),
    folds("experts: sorted and split by tolist()", MOE + """
          order = chosen.flatten().argsort()
          parts = flat[order].split(chosen.flatten().bincount(minlength=4).tolist())
          y[order] = torch.cat([expert(part) for expert, part in zip(self.experts, parts)])
          y = y.view(*h.shape[:2], W)""", EXPERTS),
    folds("experts: a loop over the hit ones", MOE + """
          for e in F.one_hot(chosen.flatten(), 4).sum(0).nonzero().flatten():
              row, = torch.where(chosen.flatten() == e)
              y.index_add_(0, row, self.experts[e](flat[row]))
          y = y.view(*h.shape[:2], W)""", EXPERTS),
    folds("experts: unique()", MOE + """
          for e in chosen.unique().tolist():
              mask = (chosen == e).flatten()
              y[mask] = self.experts[e](flat[mask])
          y = y.view(*h.shape[:2], W)""", EXPERTS,
          bug="the guessed numbers run past the last expert: the model is refused"),
    folds("experts: item() per token", MOE + """
          for t, e in enumerate(chosen.flatten()):
              y[t] = self.experts[e.item()](flat[t])
          y = y.view(*h.shape[:2], W)""", EXPERTS),
    keeps("experts: tolist() per token", "not reached", MOE + """
          y = torch.stack([self.experts[e](flat[t]) for t, e in enumerate(chosen.flatten().tolist())])
          y = y.view(*h.shape[:2], W)""", EXPERTS, naive=()),
    folds("experts: a name (ModuleDict)", MOE + """
          for e in range(4):
              mask = (chosen == e).flatten()
              y[mask] = self.named[f"expert_{e}"](flat[mask])
          y = y.view(*h.shape[:2], W)""", EXPERTS),
    folds("experts: a name made of a tensor (ModuleDict)", MOE + """
          for e in F.one_hot(chosen.flatten(), 4).sum(0).nonzero().flatten():
              mask = chosen.flatten() == e
              y[mask] = self.named[f"expert_{e}"](flat[mask])
          y = y.view(*h.shape[:2], W)""", EXPERTS),
    folds("experts: scatter of the weights", MOE + """
          weights = torch.zeros(len(flat), 4).scatter(1, chosen.view(-1, 1), 1.0)
          y = sum(expert(flat) * weights[:, e, None] for e, expert in enumerate(self.experts))
          y = y.view(*h.shape[:2], W)""", EXPERTS),
    keeps("experts: masked_select", "masked_select", MOE + """
          for e, expert in enumerate(self.experts):
              mask = (chosen == e).view(-1, 1)
              y.masked_scatter_(mask, expert(flat.masked_select(mask).view(-1, D)))
          y = y.view(*h.shape[:2], W)""", EXPERTS, naive=()),
    keeps("a branch for other inputs (vision experts)", "not reached",
          "y = self.up(h) if ids.max() < 1000 else self.vision(h)", "self.vision = lin(D, W)", naive=()),
    # ---- operations that are not PyTorch's own
    keeps("custom operation with a known name", "goes through", "y = self.up(torch.ops.flashnorm_trap.clone(h))",
          extra=CUSTOM),
    keeps("custom operation", "goes through", "y = self.up(torch.ops.flashnorm_trap.cube(h))", extra=CUSTOM),
    keeps("custom norm", "does not act as a gain",
          "y = self.up(torch.ops.flashnorm_trap.rms_norm(x, [D], self.norm.weight))", extra=CUSTOM, body=""),
    folds("TorchScript", "y = self.up(scripted(x, self.norm.weight))", body="", extra="""
          @torch.jit.script
          def scripted(x, weight):
              return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))"""),
    keeps("an autograd function", "normalised or averaged", "y = self.up(Cube.apply(h))", extra="""
          class Cube(torch.autograd.Function):
              @staticmethod
              def forward(ctx, x):
                  return x ** 3"""),
    folds("an autograd function that is the norm", "y = self.up(Own.apply(x, self.norm.weight))", body="",
          extra="""
          class Own(torch.autograd.Function):
              @staticmethod
              def forward(ctx, x, weight):
                  return normed(x) * weight"""),
    folds("vmap over experts", "y = torch.vmap(lambda w: h @ w)(self.mat).sum(0)",
          "self.mat = par(3, D, W)\ndel self.up"),
    keeps("complex numbers", "goes through", """
          y = self.up(torch.view_as_real(torch.view_as_complex(h.unflatten(-1, (8, 2))) * 1j).flatten(-2))"""),
    keeps("a spectrum", "goes through", "y = self.up(torch.fft.rfft(h, dim=-1).real[..., :1] + h)"),
    keeps("a parametrized linear", "", "y = self.up(h)", "nn.utils.parametrizations.weight_norm(self.up)", naive=()),
    folds("linears as a list of parameters", "y = sum(F.linear(h, w) for w in self.ws)",
          "self.ws = nn.ParameterList([par(W, D), par(W, D)])\ndel self.up"),
    # ---- what the model returns
    keeps("returned beside the logits", "returns", "SEEN['h'] = h; y = self.up(h)", naive=(), extra="SEEN = {}",
          config={"num_hidden_layers": 1}, head="""
          logits = self.head(self.norm(x))
          return CausalLMOutput(logits=logits, hidden_states=(SEEN['h'],))"""),
    head("final norm's output returned", "returns",
          "h = self.norm(x); return CausalLMOutput(logits=self.head(h), hidden_states=(h,))"),
    head("final norm's output returned, deep", "returns", """
          h = self.norm(x)
          return CausalLMOutput(logits=self.head(h), hidden_states=[{1: [{2: [{3: [{4: [{5: [{6: h}]}]}]}]}]}])"""),
    head("final norm's output returned in an object", "returns", """
          h = self.norm(x); box = Box(); box.h = h
          return CausalLMOutput(logits=self.head(h), hidden_states=box)""", extra="""
          class Box:
              __slots__ = ('h',)"""),
    # ---- the head
    Trap("a head that scales its logits", head="logits = self.head(self.norm(x)).tanh() * 30"),
    Trap("only the last token's logits", head="logits = self.head(self.norm(x)[:, -1:])"),
    head("the head reads raw activations, too", "also reads", "logits = self.head(self.norm(x)) + self.head(x)",
         naive={FINAL: ("head.weight",)}),
    head("a head in the second place", "", "h = self.norm(x); logits = self.head(h) + self.value(h).tanh()",
          "self.value = lin(D, 1)", folded=(NORM, FINAL), kept={}, lm_head="folded"),
    head("a head only for other calls", "not reached", """
          h = self.norm(x); logits = self.head(h)
          if kwargs.get('values'): logits = self.value(h)""", "self.value = lin(D, 1)"),
    head("a head that generation calls", "not reached", "logits = self.head(self.norm(x))",
          "self.gen_head = lin(D, V)"),
    Trap("tied, untied by auto", tied=TIED, config={"tie_word_embeddings": True}, change=without("head.weight"),
          lm_head="untied"),
    Trap("tied, kept on demand", tied=TIED, config={"tie_word_embeddings": True}, change=without("head.weight"),
          lm_head="kept", options={"final_norm": "keep"}, folded=(NORM,), kept={FINAL: 'final_norm="keep"'},
          naive={FINAL: ("embed.weight",)}),
    Trap("not tied, kept on demand", options={"final_norm": "keep"}, folded=(NORM,),
          kept={FINAL: 'final_norm="keep"'}, lm_head="kept"),
    Trap("tied in the code", head="logits = F.linear(self.norm(x), self.embed.weight)", model_init="del self.head",
          folded=(NORM,), kept={FINAL: "embedding"}, naive={FINAL: ("embed.weight",)}, lm_head="none"),
    Trap("tied in the code through .data", head="logits = F.linear(self.norm(x), self.embed.weight.data)",
          model_init="del self.head", folded=(NORM,), kept={FINAL: ""}, naive={FINAL: ("embed.weight",)},
          lm_head="none"),
    Trap("tied, looked up through .data", tied=TIED, embed="x = F.embedding(input_ids, self.embed.weight.data)",
          change=without("head.weight"), config={"tie_word_embeddings": True}, lm_head="untied"),
    # ---- tensors that the model does not read
    Trap("multi-token prediction tensors", change=lambda t: t.update({"mtp.proj.weight": torch.randn(16, 32)}),
          folded=(NORM,), kept={FINAL: "not read by"}, lm_head="kept"),
    Trap("multi-token prediction tensors, folded on demand",
          change=lambda t: t.update({"mtp.proj.weight": torch.randn(16, 32)}), options={"final_norm": "untie"}),
    Trap("an unread linear in a layer", change=lambda t: t.update({"layers.0.indexer.weight": torch.randn(8, 16)}),
          folded=(NORM,), kept={NORM: "not read by", FINAL: "not read by"}, lm_head="kept"),
    # ---- modules of PyTorch that are no linears
    folds("nn.MultiheadAttention", "y = self.up(self.mha(h, h, h)[0])",
          "self.mha = nn.MultiheadAttention(D, HEADS, bias=False, batch_first=True)"),
    folds("nn.GRU", "y = self.up(self.gru(h)[0])", "self.gru = nn.GRU(D, D, batch_first=True)"),
    keeps("nn.Bilinear", "goes through", "y = self.two(h, h)", "self.two = nn.Bilinear(D, D, W)\ndel self.up",
          naive=()),
    keeps("nn.EmbeddingBag weighted by the normed value", "goes through", """
          zeros, weights = ids.new_zeros(ids.numel(), D), h.flatten(0, 1)
          bag = F.embedding_bag(zeros, self.bag.weight, per_sample_weights=weights, mode='sum')
          y = self.up(h) + bag.view(*h.shape[:2], W)""", "self.bag = nn.Embedding(3, W)"),
    keeps("group norm", "goes through", "y = self.up(F.group_norm(h.flatten(0, 1), 2).view_as(h))"),
    keeps("a norm behind the norm", "normalised", "y = self.up(self.norm2(h))", "self.norm2 = Norm(D)",
          folded=(FINAL, "layers.*.norm2.weight")),
    keeps("a sum to integers", "goes through", """
          y = self.up(x) * torch.sum(h, 1, keepdim=True, dtype=torch.int64).sum(-1, keepdim=True)""", naive=()),
    folds("a norm that is nn.RMSNorm", "y = self.up(h)", "self.norm = nn.RMSNorm(D, eps=1e-6)"),
    folds("a norm over two dimensions", """
          y = self.up(F.rms_norm(x.unflatten(-1, (HEADS, 8)), (HEADS, 8), self.norm.weight).flatten(2))""",
          "self.norm = Norm(HEADS, 8)", body=""),
    # ---- tied by the loader
    keeps("linears of two layers tied, one on disk", "also reads", tied=LINEARS_TIED, config=TIE,
          change=without("layers.1.up.weight")),
    folds("linears of two layers tied, both on disk", tied=LINEARS_TIED, config=TIE, change=copies("up")),
    folds("norms of two layers tied, one on disk", tied=NORMS_TIED, config=TIE,
          change=without("layers.1.norm.weight")),
    folds("norms of two layers tied, both on disk", tied=NORMS_TIED, config=TIE, change=copies("norm")),
    folds("norms and linears of two layers tied, one on disk", tied=BOTH_TIED, config=TIE,
          change=without("layers.1.norm.weight", "layers.1.up.weight")),
    folds("norms and linears of two layers tied, both on disk", tied=BOTH_TIED, config=TIE,
          change=copies("norm", "up")),
    # ---- a module that is not numbered
    Trap("a branch for other inputs, in a module that is not numbered", extra=TAIL, model_init="self.tail = Tail()",
          embed="x = self.tail(self.embed(input_ids), kwargs)", kept={"tail.norm.weight": "not reached"}),
    # ---- a tagged value in a place where nobody looks for one
    keeps("as a bias", "goes through", "y = self.up2(h) + self.up(F.linear(x, self.mid.weight, h[0, 0]))",
          "self.up2, self.mid = lin(D, W), lin(D, D)", naive=("up2",)),
    keeps("as the bias of the linear that reads it", "goes through",
          "y = self.up(F.linear(h, self.mid.weight, h[0, 0]))", "self.mid = lin(D, D)", naive=("mid",)),
    keeps("as the bias of a convolution", "goes through",
          "y = self.up2(h) + self.up(F.conv1d(x.mT, self.mid.weight[..., None], h[0, 0]).mT)",
          "self.up2, self.mid = lin(D, W), lin(D, D)", naive=("up2",)),
    keeps("as the bias of a norm", "normalised or averaged",
          "y = self.up2(h) + F.layer_norm(x, (D,), self.scale, h[0, 0]) @ self.up.weight.T",
          "self.up2, self.scale = lin(D, W), par(D)", naive=("up2",)),
    keeps("as the summand of addmm", "goes through", """
          y = self.up2(h) + self.up(torch.addmm(h[0, 0], x.flatten(0, 1), self.mid.weight).view_as(x))""",
          "self.up2, self.mid = lin(D, W), lin(D, D)", naive=("up2",)),
    keeps("as the value of masked_fill", "goes through", """
          y = self.up2(h) + self.up(self.norm2(x).masked_fill(ids[..., None] % 2 == 0, h[0, 0, 0]))""",
          "self.up2, self.norm2 = lin(D, W), Norm(D)", also="norm2", naive=("up2",)),
    keeps("as a weight", "", "y = self.up2(h) + self.up(F.linear(x, h[0, :1].expand(D, -1)))",
          "self.up2 = lin(D, W)", naive=("up2",)),
    keeps("as an index", "goes through",
          "y = self.up2(h) + self.up(x[:, (h[0, 0, 0] * 100).long() % h.shape[1]])[:, None]",
          "self.up2 = lin(D, W)", naive=("up2",)),
    keeps("as a number of Python", "decides what", "y = self.up2(h) + self.up(x * h[0, 0, 0].item())",
          "self.up2 = lin(D, W)", naive=("up2",)),
    keeps("as the factor of addcmul", "goes through", "y = self.up2(h) + self.up(torch.addcmul(x, h, x))",
          "self.up2 = lin(D, W)", naive=("up2",)),
    keeps("as the weight of lerp", "goes through", "y = self.up2(h) + self.up(torch.lerp(x, x * x, h))",
          "self.up2 = lin(D, W)", naive=("up2",)),
    keeps("as an alpha of its own", "mixed with each other", "y = self.up(torch.add(h, h.flip(-1), alpha=0.5))"),
    folds("the same gain, added with an alpha", "y = self.up(torch.add(h, h.roll(1, 1), alpha=0.5))"),
    keeps("a row of the linear is a gain elsewhere", "", """
          y = self.up(h) + (normed(x) * self.up.weight[0]).sum(-1, keepdim=True)"""),
    keeps("the linear is multiplied with what it reads", "", """
          y = self.up(h) + (self.norm2(x)[..., None, :] * self.up.weight).sum(-1)""", "self.norm2 = Norm(D)",
          also="norm2"),
    keeps("nested branches", "also reads", """
          y = self.up(h)
          if x.sum() > -1e9:
              if x.sum() > 1e9: y = self.up(h)
              else: y = self.up(x)"""),
    keeps("a branch of a number", "also reads", "y = self.up(x) if int(x.abs().sum()) % 5 > 1 else self.up(h)"),
    keeps("one layer's linear computed by a copy of it", "", "import copy; y = copy.deepcopy(self.up)(h)", naive=()),
    keeps("a copy of the linear reads raw values", "another use",
          "import copy; y = self.up(h) + copy.deepcopy(self.up)(x)"),
    keeps("the linear called by functional_call", "also reads", """
          y = self.up(h) + torch.func.functional_call(self.up, dict(self.up.named_parameters()), x)"""),
    keeps("the linear from the state_dict", "also reads", "y = self.up(h) + x @ self.state_dict()['up.weight'].T"),
    keeps("the weight changed in place before", "also reads",
          "self.up.weight.data.mul_(1.0); y = self.up(h) + x @ self.up.weight.data.T"),
    keeps("a view of the weight made before", "also reads",
          "v = self.up.weight.data.view(-1); y = self.up(h) + x @ v.view(W, D).T"),
    keeps("the weight's storage", "another use", """
          v = torch.empty(0, device=x.device).set_(self.up.weight.untyped_storage(), 0, (W, D))
          y = self.up(h) + x @ v.T"""),
    keeps("the weight as a Parameter of its own", "another use",
          "v = nn.Parameter(self.up.weight); y = self.up(h) + x @ v.T"),
    keeps("the weight through as_tensor and numpy-like copies", "also reads",
          "v = torch.as_tensor(self.up.weight).clone(); y = self.up(h) + x @ v.T"),
    keeps("the weight in float16", "also reads", "v = self.up.weight.half().float(); y = self.up(h) + x @ v.T"),
    keeps("the weight in 8 bits", "", "v = self.up.weight.to(torch.float8_e4m3fn).float(); y = h @ v.T"),
    keeps("the weight quantized in the forward", "", """
          s = self.up.weight.abs().amax(1, keepdim=True) / 127
          y = h @ ((self.up.weight / s).round() * s).T"""),
    keeps("activations quantized in the forward", "goes through",
          "s = h.abs().amax(-1, keepdim=True) / 7; y = self.up((h / s).round() * s)"),
]
# fmt: on


def source_of(trap: Trap) -> str:
    def at(n: int, lines: str) -> str:
        return indent(dedent(lines).strip(), " " * n)

    return MODELING.format(
        extra=dedent(trap.extra),
        init=at(8, trap.init),
        body=at(8, trap.body),
        forward=at(8, trap.forward),
        embed=at(8, trap.embed),
        tied=trap.tied,
        model_init=at(8, trap.model_init),
        head=at(8, trap.head),
    )


@torch.no_grad()
def write(trap: Trap, folder: Path) -> dict[str, torch.Tensor]:
    """Write the trap's checkpoint, with gains far from one, and return its tensors."""
    folder.mkdir()
    (folder / "configuration_trap.py").write_text(CONFIGURATION)
    (folder / "modeling_trap.py").write_text(source_of(trap))
    config = {
        "architectures": ["TrapForCausalLM"],
        "model_type": "flashnorm_trap",
        "auto_map": {
            "AutoConfig": "configuration_trap.TrapConfig",
            "AutoModelForCausalLM": "modeling_trap.TrapForCausalLM",
        },
        "tie_word_embeddings": False,
        **trap.config,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    cls = get_class_from_dynamic_module("modeling_trap.TrapForCausalLM", folder)
    model = cls(AutoConfig.from_pretrained(folder, trust_remote_code=True))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, p in model.named_parameters():
        if "norm" in name or p.ndim < 2:
            tensors[name] = torch.empty(p.shape).uniform_(0.4, 1.8, generator=generator)
            tensors[name].flatten()[::5] *= -1  # gains may be negative: no relu lets them through
        else:
            tensors[name] = torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5
    trap.change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 40, shape, generator=generator) for shape in SHAPES]
    return [model(prompt).logits.double() for prompt in prompts]


def error(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The largest relative difference over the prompts."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(one, other, strict=True))


def naively_folded(tensors: dict[str, torch.Tensor], naive: dict[str, tuple[str, ...]]) -> dict[str, torch.Tensor]:
    """What a tool would write that folds norms by their names and looks at nothing else."""
    new = {name: t.clone() for name, t in tensors.items()}
    for norm in [n for n in tensors if pattern_of(n) in naive]:
        layer = norm.split(".")[:2] if norm.startswith("layers.") else None
        for name in tensors:
            if pattern_of(name) in naive[pattern_of(norm)] and (layer is None or name.split(".")[:2] == layer):
                gain = tensors[norm].flatten()
                new[name] *= gain.repeat(-(-new[name].shape[-1] // len(gain)))[: new[name].shape[-1]]
        new[norm].fill_(1.0)
    return new


def check(trap: Trap, folder: Path) -> FoldResult:
    name = re.sub(r"\W+", "_", trap.name)  # transformers caches a model's code by the name of its folder
    source, output = folder / name, folder / f"{name}_folded"
    tensors = write(trap, source)
    expected = logits(load(source))
    result = fold(source, output, trust_remote_code=True, workers=1, **trap.options)

    wrong = error(logits(load(output)), expected)
    assert wrong < MAX_ERROR
    assert result.plan.lm_head == trap.lm_head or not trap.lm_head
    reasons = {pattern_of(n.tensor): n.reason or "" for n in result.plan.kept}
    folded = {pattern_of(n.tensor) for n in result.plan.folded}
    assert folded == set(trap.folded), reasons
    for norm, words in trap.kept.items():
        assert norm in reasons
        assert words in reasons[norm]

    if trap.naive:  # the logits above would have shown a wrong fold
        save_file(naively_folded(tensors, trap.naive), source / "model.safetensors", metadata={"format": "pt"})
        wrong = error(logits(load(source)), expected)
        assert wrong > MIN_NAIVE_ERROR
    return result


@pytest.fixture(autouse=True, scope="module")
def own_code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remote code is copied to the user's cache otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        for name in [n for n in sys.modules if n.partition(".")[0] == "transformers_modules"]:
            patch.delitem(sys.modules, name)  # of another test's cache
        yield
        for name in [n for n in sys.modules if n.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]


@pytest.mark.parametrize(
    "trap",
    [pytest.param(t, id=t.name, marks=[pytest.mark.xfail(strict=True, reason=t.bug)] if t.bug else []) for t in TRAPS],
)
def test_trap(trap: Trap, tmp_path: Path) -> None:
    check(trap, tmp_path)
