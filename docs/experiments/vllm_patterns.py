"""Which norms vLLM's compiler pass fuses with a quantization, without a GPU: one line of JSON.

    VLLM_PLUGINS=none python docs/experiments/vllm_patterns.py

vLLM's own norms, in the states in which the plugin runs them, are traced in front of each quantization that the pass
`fuse_norm_quant` knows (and FlashInfer's NVFP4, which it registers on Blackwell alone), and vLLM's own patterns are
applied to the graph. The fused kernels are in CUDA builds only. Their schemas are enough; they are those of vLLM's
csrc/torch_bindings and csrc/libtorch_stable/torch_bindings.

`matched` is how many norms were replaced, of one; `none` whether the kernel that came in their place was handed None.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor import pattern_matcher
from torch._subclasses.fake_tensor import FakeTensorMode

WIDTH, EPSILON = 256, 1e-6
STATES = (
    ("RMSNorm", "own"),
    ("RMSNorm", "without"),
    ("GemmaRMSNorm", "own"),
    ("GemmaRMSNorm", "ones"),
    ("GemmaRMSNorm", "without"),
)
GROUP = (
    "Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, float fp8_min, float fp8_max, "
    "bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned"
)
FP4 = "Tensor input, Tensor input_scale, bool is_sf_swizzled_layout"
NORM = "Tensor! result, Tensor input, {}Tensor weight, {}float epsilon"
SCHEMAS = {
    "rms_norm_static_fp8_quant": NORM.format("", "Tensor scale, "),
    "fused_add_rms_norm_static_fp8_quant": NORM.format("Tensor! residual, ", "Tensor scale, "),
    "rms_norm_dynamic_per_token_quant": NORM.format("", "Tensor! scale, ") + ", Tensor? scale_ub, Tensor!? residual",
    "rms_norm_per_block_quant": NORM.format("", "Tensor! scale, ")
    + ", Tensor? scale_ub, Tensor!? residual, int group_size, bool is_scale_transposed",
    "per_token_group_fp8_quant": GROUP,
    "scaled_fp4_quant": FP4,
    "scaled_fp4_quant.out": f"{FP4}, *, Tensor(a!) output, Tensor(b!) output_scale",
}
FLASHINFER = (
    "Tensor! result, Tensor! result_block_scale, Tensor! residual, Tensor input, Tensor weight, "
    "Tensor input_global_scale, Tensor block_scale_unswizzled, bool is_sf_swizzled_layout, float epsilon"
)


def declare() -> list[torch.library.Library]:
    """The kernels that this build does not have, by their schemas."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    here, there = torch.library.Library("_C", "FRAGMENT"), torch.library.Library("flashnorm_patterns", "DEF")
    missing = {name: rest for name, rest in SCHEMAS.items() if not hasattr(torch.ops._C, name.partition(".")[0])}
    for name, arguments in missing.items():
        here.define(f"{name}({arguments}) -> {'(Tensor, Tensor)' if name == 'scaled_fp4_quant' else '()'}")
    there.define(f"add_norm_nvfp4({FLASHINFER}) -> ()")
    return [here, there]


def quantizations(fusion: Any) -> dict[str, tuple[list[Any], Callable[[torch.Tensor], tuple[torch.Tensor, ...]]]]:
    """By name: vLLM's patterns (behind an addition, and without one), and what it quantizes a norm's output with."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape, get_fp8_min_max

    fp8, block = torch.float8_e4m3fn, {"group_shape": GroupShape(1, 128), "has_col_major_scales": False}
    static = [
        part(EPSILON, fp8) for part in (fusion.FusedAddRMSNormStaticQuantPattern, fusion.RMSNormStaticQuantPattern)
    ]
    token = [
        part(EPSILON, fp8) for part in (fusion.FusedAddRMSNormDynamicQuantPattern, fusion.RMSNormDynamicQuantPattern)
    ]
    blocks = [
        part(EPSILON, fp8, **block, is_tma_aligned=False)
        for part in (fusion.FusedAddRMSNormGroupQuantPattern, fusion.RMSNormGroupQuantPattern)
    ]
    fp4 = [fusion.FusedAddRMSNormNvfp4QuantPattern(EPSILON, True)]
    least, most = get_fp8_min_max()

    def in_blocks(normed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scales = torch.empty(normed.shape[0], WIDTH // 128)
        found: tuple[torch.Tensor, ...] = auto_functionalized(
            torch.ops._C.per_token_group_fp8_quant.default,
            input=normed,
            output_q=torch.empty(normed.shape, dtype=fp8),
            output_s=scales,
            group_size=128,
            eps=1e-10,
            fp8_min=least,
            fp8_max=most,
            scale_ue8m0=False,
            dummy_is_scale_transposed=False,
            dummy_is_tma_aligned=False,
        )
        return found[1:]

    def in_fp4(normed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found: tuple[torch.Tensor, ...] = auto_functionalized(
            torch.ops._C.scaled_fp4_quant.out,
            input=normed,
            input_scale=torch.ones(1),
            is_sf_swizzled_layout=True,
            output=torch.empty(normed.shape[0], WIDTH // 2, dtype=torch.uint8),
            output_scale=torch.empty(128, WIDTH // 64, dtype=torch.int32),
        )
        return found[1:]

    return {
        "FP8, static": (static, lambda normed: static[0].quant_matcher(normed, torch.ones(1, 1))[:1]),
        "FP8 per token": (token, lambda normed: token[0].quant_matcher(normed)),
        "FP8 in blocks of 128": (blocks, in_blocks),
        "NVFP4": (fp4, in_fp4),
    }


def norms() -> dict[str, Any]:
    """A norm of each class in each of its states, as vLLM builds it and the plugin tells it to run."""
    from vllm.model_executor.layers import layernorm

    from flashnorm_cli.runtimes.vllm.norms import GEMMA, PLAIN

    found = {}
    torch.set_default_dtype(torch.bfloat16)  # as vLLM builds a model
    for name, state in STATES:
        norm = getattr(layernorm, name)(WIDTH, eps=EPSILON)
        (PLAIN if name == "RMSNorm" else GEMMA).run(norm, state)
        found[f"{name}, {state}"] = norm
    torch.set_default_dtype(torch.float32)
    return found


def quantized(norm: Any, quantize: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], add: bool) -> Callable[..., Any]:
    """A norm, behind an addition or not, and its quantized output."""

    def forward(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        normed, *rest = norm(x, residual) if add else (norm(x),)
        return (*quantize(normed), *rest)

    return forward


def main() -> None:
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config

    libraries = declare()
    found: dict[str, Any] = {}
    settings = VllmConfig(compilation_config=CompilationConfig(custom_ops=["none"]))
    with set_current_vllm_config(settings, check_compile=False), FakeTensorMode(), torch.no_grad():
        from vllm.compilation.passes.fusion import rms_quant_fusion as fusion

        fusion._FLASHINFER_NVFP4_RMS_QUANT_OP = torch.ops.flashnorm_patterns.add_norm_nvfp4.default
        x, residual = (torch.randn(5, WIDTH, dtype=torch.bfloat16) for _ in range(2))
        for quantization, (patterns, quantize) in quantizations(fusion).items():
            passes = pattern_matcher.PatternMatcherPass()
            for pattern in patterns:
                pattern.register(passes)
            for state, norm in norms().items():
                for add in (True, False) if len(patterns) > 1 else (True,):
                    row = found[f"{quantization}; {state}{', added' * add}"] = {}
                    graph = pattern_matcher.fwd_only(quantized(norm, quantize, add), [x, residual]).graph
                    for node in graph.nodes:  # as a pass of vLLM's does before this one
                        if getattr(node.target, "_overloadname", "") == "maybe_inplace":
                            node.target = node.target.overloadpacket.default
                    row["matched"] = passes.apply(graph)
                    fused = [node for node in graph.nodes if "epsilon" in node.kwargs and "weight" in node.kwargs]
                    row["none"] = any(node.kwargs["weight"] is None for node in fused)
    del libraries
    print(json.dumps(found))


if __name__ == "__main__":
    main()
