"""Beyond the rows that this project's kernels are for, compiled code is what vLLM's would be.

vLLM compiles one graph for ranges of batch sizes. With a range that ends at 16 rows, the graphs of the larger ones
get the norm, the product, the activation and the add as separate operations, which Inductor fuses as it always does.
Needs vLLM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.pattern_matcher import CallFunctionVarArgs, Match, PatternMatcherPass, register_graph_pattern
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.config import CompilationMode
from vllm.platforms import current_platform

import flashnorm_cli.norms.linear  # noqa: F401  defines torch.ops.flashnorm.norm_linear
from flashnorm_cli.cuda.linear_variants import MAX_ROWS
from flashnorm_cli.norms.linear_torch import torch_norm_linear

_patterns = PatternMatcherPass("flashnorm_many_rows")


class ManyRows(InductorPass):  # type: ignore[misc]
    """Takes norm_linear apart in graphs for more than MAX_ROWS rows."""

    def is_applicable_for_range(self, compile_range: Any) -> bool:
        return bool(compile_range.start > MAX_ROWS)

    def __call__(self, graph: fx.Graph) -> None:
        _patterns.apply(graph)


def compile_apart(config: Any) -> bool:
    """Have more than MAX_ROWS rows compiled by themselves. False where somebody else's pass is in the place of ours."""
    compilation = config.compilation_config
    if compilation.mode != CompilationMode.VLLM_COMPILE:
        return False
    passes, key = compilation.inductor_compile_config, current_platform.pass_key
    ends = compilation.compile_ranges_endpoints
    if key in passes or not ends or max(ends) <= MAX_ROWS:
        return False
    passes[key] = ManyRows()
    compilation.compile_ranges_endpoints = sorted({MAX_ROWS, *ends})
    return True


@register_graph_pattern(CallFunctionVarArgs(torch.ops.flashnorm.norm_linear.default), pass_dict=_patterns)
def _take_apart(match: Match, *args: Any, **kwargs: Any) -> None:
    given = dict(zip(("x", "weight", "eps", "bias", "residual", "activation"), args, strict=False)) | kwargs
    eps, activation = given.get("eps"), given.get("activation")
    tensors = {name: given[name] for name in ("x", "weight", "bias", "residual") if given.get(name) is not None}

    def plain(*values: Tensor) -> Tensor:
        return _plain(eps=eps, activation=activation, **dict(zip(tensors, values, strict=True)))

    match.replace_by_example(plain, list(tensors.values()), run_functional_passes=False)


def _plain(
    x: Tensor,
    weight: Tensor,
    eps: float | None,
    activation: str | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    if eps is not None:  # spelt out: `rms_norm` would be an operator again
        wide = x.float()
        x = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return torch_norm_linear(x, weight, None, bias, residual, activation)
