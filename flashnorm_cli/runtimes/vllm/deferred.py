"""vLLM runs the norms of a folded checkpoint inside the linears behind them (Proposition 2 of the FlashNorm paper).

    vllm serve MODEL --additional-config '{"flashnorm": {"deferred": true}}'

Before the model is compiled, one forward of it is watched (observe.py). From which tensor went where it follows

- which linears read which weightless norm, and nobody else does: these norm it themselves;
- which linears are followed by SiLU or GELU of the first half times the second: these do that, too;
- which linears' output a norm adds to the residual stream: these add it themselves. Not under tensor parallelism,
  where their outputs are parts of a sum, nor in models of images, which may add something between layers.

The rewired model has to give the same hidden states, or it is put back. Names and classes of models play no part.
Needs vLLM; what is touched are norms (`_forward_method`), linears (`quant_method`) and activations of this model.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm import envs
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.platforms import current_platform

from flashnorm_cli.cuda import linear as kernels
from flashnorm_cli.cuda.linear_variants import MEASURED_ROWS
from flashnorm_cli.norms import tuning
from flashnorm_cli.norms.linear import problem_of
from flashnorm_cli.runtimes.vllm.norms import log, norms_of
from flashnorm_cli.runtimes.vllm.observe import Call, NotFit, body_of, is_plain_linear, observe, replace, run

# Of the hidden states' own size: what the same model may differ by when it rounds elsewhere. A wrong wiring
# differs by 1.
_CLOSE, _CLOSE_IN_HALVES = 1e-3, 0.15


class Slot:
    """What modules of one model hand on beside vLLM's own arguments, within one forward."""

    def __init__(self) -> None:
        self.stream: Tensor | None = None  # the residual stream, for the product that adds it
        self.summed: Tensor | None = None  # the product that has

    def total(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The residual stream, of what a norm is given."""
        summed, self.summed = self.summed, None
        if summed is None:
            return x if residual is None else x + residual
        if x is not summed or residual is None:
            raise RuntimeError(
                "flashnorm: a norm was given another tensor than the product that holds the residual stream: this "
                "forward differs from the one that was watched; start vLLM without deferred norms"
            )
        return x


class Wiring(NamedTuple):
    """What was found, by the names of modules."""

    readers: dict[str, tuple[str, ...]]  # weightless norms, and the linears that norm for themselves
    activations: dict[str, tuple[str, str]]  # linear -> its parent's child that is its activation, and which it is
    adds: dict[str, tuple[str, str]]  # linear -> norm that knows the stream before it, norm that adds its output


class _Product(UnquantizedLinearMethod):  # type: ignore[misc]
    """In the place of a linear's quant_method: a product with the norm before it and what comes behind."""

    def __init__(self, slot: Slot, eps: float | None, activation: str | None, adds: bool) -> None:
        self.slot, self.eps, self.activation, self.adds = slot, eps, activation, adds

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        product = torch.ops.flashnorm.norm_linear
        if not self.adds:
            return product(x, layer.weight, self.eps, bias, None, self.activation)
        stream, self.slot.stream = self.slot.stream, None
        y: Tensor = product(x, layer.weight, self.eps, bias, stream, self.activation)
        self.slot.summed = y
        return y

    def process_weights_after_loading(self, layer: Any) -> None:
        """vLLM's CPU build would pack the weight and drop it."""


class _Norm:
    """In the place of a norm's `_forward_method`."""

    def __init__(self, slot: Slot, own: Any, deferred: bool, feeds: bool) -> None:
        self.slot, self.flashnorm_own = slot, own
        self.deferred = deferred  # its readers norm
        self.feeds = feeds  # a product adds to the stream that is known here

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        stream = self.slot.total(x, residual)
        if self.feeds:
            self.slot.stream = stream
        y = stream if self.deferred else self.flashnorm_own(stream)
        return y if residual is None else (y, stream)


def defer(model: nn.Module, config: Any, without: list[str]) -> dict[str, Any]:
    """Rewire a loaded model whose norms `without` run without a weight.

    Returns:
        norms, activations, adds: how many of each run inside a linear; or `why_not`, and nothing is changed.
    """
    modules = dict(model.named_modules())
    norms = {name: modules[name] for name in without}
    try:
        if reason := _why_not(config):
            raise NotFit(reason)
        if not norms:
            raise NotFit("no norm runs without a weight")
        body = body_of(model)
        vocabulary = config.model_config.get_vocab_size()
        calls, want = observe(body, norms, vocabulary)
        # Parts of a sum are added up elsewhere, and what an image adds between layers was not watched.
        alone = config.parallel_config.tensor_parallel_size == 1 and not config.model_config.is_multimodal_model
        wiring = find(modules, norms, calls, alone)
        if not wiring.readers:
            raise NotFit("no norm is read by linears alone")
        with ExitStack() as way_back:
            products = _rewire(way_back, modules, wiring)
            _choose_kernels([(modules[name], product) for name, product in products.items()])
            off = _distance(run(body, vocabulary), want)
            if not off <= (_CLOSE if want.dtype == torch.float32 else _CLOSE_IN_HALVES):
                raise NotFit(f"the rewired forward gives other numbers (off by {off:.2g} of their size)")
            way_back.pop_all()  # it stays
    except NotFit as reason:
        return {"why_not": str(reason)}
    return _counts(model)


def deferred_state(model: nn.Module) -> dict[str, Any]:
    """What came of `deferred` for a loaded vLLM model, for `LLM.apply_model`.

    Returns:
        norms, activations, adds: how many of each run inside a linear, as the modules are now; or why_not; nothing
        where it was not asked for.
    """
    found: dict[str, Any] = getattr(model, "_flashnorm_deferred", {})
    return _counts(model) if "norms" in found else found


def _counts(model: nn.Module) -> dict[str, Any]:
    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    products = [method for method in methods if isinstance(method, _Product)]
    norms = [getattr(getattr(m, "_forward_method", None), "__self__", None) for m in model.modules()]
    return {
        "norms": sum(isinstance(norm, _Norm) and norm.deferred for norm in norms),
        "activations": sum(product.activation is not None for product in products),
        "adds": sum(product.adds for product in products),
    }


def _why_not(config: Any) -> str | None:
    """What in vLLM's configuration does not go with it."""
    if not current_platform.is_cuda() and config.additional_config["flashnorm"]["deferred"] != "anywhere":
        return "there are kernels for CUDA GPUs only"
    if config.model_config.quantization is not None:
        return "the model is quantized"
    if config.lora_config is not None:
        return "LoRA adapters have products of their own"
    if config.speculative_config is not None:
        return "speculative decoding may read hidden states between the layers"
    if config.parallel_config.pipeline_parallel_size > 1:
        return "pipeline stages hand on hidden states and residual apart"
    if getattr(config.parallel_config, "use_ubatching", False):
        return "two halves of a batch run beside each other in threads"
    if getattr(config.compilation_config.pass_config, "enable_sp", False):
        return "sequence parallelism splits the norms' input"
    if envs.VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT asks for products that do not depend on the batch"
    return None


# ---- what follows from the calls -------------------------------------------------------------------------------------


def find(modules: dict[str, nn.Module], norms: dict[str, Any], calls: list[Call], may_add: bool) -> Wiring:
    """Wiring of a watched forward. A module that was called more than once stays as it is."""
    counts: dict[str, int] = {}
    for call in calls:
        counts[call.name] = counts.get(call.name, 0) + 1
    made = {id(call.out[0]): call.name for call in calls if call.out and is_plain_linear(modules[call.name])}
    once = [(at, call) for at, call in enumerate(calls) if counts[call.name] == 1 and call.out and call.given]
    readers: dict[str, tuple[str, ...]] = {}
    activations: dict[str, tuple[str, str]] = {}
    adds: dict[str, tuple[str, str]] = {}
    for at, call in once:
        if call.name in norms and norms[call.name].__dict__.get("variance_size_override") is None:
            users = _users(calls[at + 1 :], call.out[0])
            plain = [u.name for u in users if is_plain_linear(modules[u.name]) and u.given[0] is call.out[0]]
            around = tuple(f"{name}." for name in plain)
            if plain and all(u.name in plain or any(r.startswith(f"{u.name}.") for r in around) for u in users):
                readers[call.name] = tuple(plain)
    for call in calls:
        kind, product = _kind_of(modules[call.name]), made.get(id(call.given[0])) if call.given else None
        if kind and product and [u.name for u in _users(calls, call.given[0])] == [call.name]:
            parent = modules[product.rpartition(".")[0]]
            child = next((key for key, each in parent.named_children() if each is modules[call.name]), None)
            if child:
                activations[product] = child, kind
    if may_add:
        adds = dict(_adds(modules, once, made, calls))
    return Wiring(readers, activations, adds)


def _adds(
    modules: dict[str, nn.Module], once: list[tuple[int, Call]], made: dict[int, str], calls: list[Call]
) -> Iterator[tuple[str, tuple[str, str]]]:
    all_norms = {name for name, _, _ in norms_of(modules[""])}
    ended = {call.name: at for at, call in enumerate(calls)}
    knows: dict[int, tuple[str, int]] = {}  # the residual stream -> the norm after which it is known
    for at, call in once:
        if call.name not in all_norms:
            continue
        if len(call.given) == 2 and len(call.out) == 2:
            x, residual = call.given
            product, source = made.get(id(x)), knows.get(id(residual))
            others = {u.name for u in _users(calls, x) if not call.name.startswith(f"{u.name}.")} - {call.name}
            if product and source and not others and source[1] < ended[product] and x.shape == residual.shape:
                yield product, (source[0], call.name)
            knows[id(call.out[1])] = call.name, at
        elif len(call.given) == 1:
            knows[id(call.given[0])] = call.name, at


def _users(calls: list[Call], tensor: Tensor) -> list[Call]:
    """The calls that were given a tensor, or a part of it."""
    where = tensor.untyped_storage().data_ptr()
    return [call for call in calls if any(t.untyped_storage().data_ptr() == where for t in call.given)]


def _kind_of(module: nn.Module) -> str | None:
    if type(module) is SiluAndMul:
        return "silu"
    if type(module) is GeluAndMul:
        return {"tanh": "gelu_tanh", "none": "gelu"}.get(str(module.approximate))
    return None


# ---- the rewired model -----------------------------------------------------------------------------------------------


def _rewire(way_back: ExitStack, modules: dict[str, nn.Module], wiring: Wiring) -> dict[str, _Product]:
    """Rewire modules until `way_back` is closed; returns the products, by the names of their linears."""
    slot = Slot()

    def put(name: str, attribute: str, value: Any) -> None:
        replace(way_back, modules[name], attribute, value)

    eps: dict[str, float] = {r: modules[norm].variance_epsilon for norm, rs in wiring.readers.items() for r in rs}  # type: ignore[misc]
    kinds = {name: kind for name, (_, kind) in wiring.activations.items()}
    products = {
        name: _Product(slot, eps.get(name), kinds.get(name), name in wiring.adds)
        for name in {*eps, *kinds, *wiring.adds}
    }
    for name, product in products.items():
        put(name, "quant_method", product)
    for name, (child, _) in wiring.activations.items():
        # Not the activation itself: vLLM has one for all layers and models of a process.
        put(name.rpartition(".")[0], child, nn.Identity())
    feeding = {source for source, _ in wiring.adds.values()}
    for name in {*wiring.readers, *feeding, *(taker for _, taker in wiring.adds.values())}:
        norm: Any = modules[name]
        put(name, "_forward_method", _Norm(slot, norm._forward_method, name in wiring.readers, name in feeding).forward)
    return products


def _choose_kernels(products: Iterable[tuple[Any, _Product]]) -> None:
    """Measure which kernels run, where that is not known yet."""
    wanted: dict[int, set[kernels.Problem]] = {}
    for layer, product in products:
        weight = layer.weight
        if not weight.is_cuda or weight.dtype not in kernels.DTYPES or weight.size(1) % 8:
            continue
        x = weight.new_empty(1, weight.size(1))
        residual = weight.new_empty(1, weight.size(0)) if product.adds else None
        problem = problem_of(x, weight, product.eps, residual, product.activation)
        wanted.setdefault(weight.get_device(), set()).add(problem)
    start = time.perf_counter()
    for index, problems in wanted.items():
        if tuning.measuring_allowed():
            tuning.tune(sorted(problems), index, MEASURED_ROWS)
            torch.cuda.empty_cache()  # vLLM counts what is left
    log.info("flashnorm: kernels chosen in %.1f s", time.perf_counter() - start)


def _distance(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()
