"""Level kernels: this project's CUDA norms against float64, on the sizes of the model's own norms."""

from __future__ import annotations

import torch

from flashnorm_cli.norms import fused_add_rms_norm, info, rms_norm
from flashnorm_cli.proof.figures import KernelsFigures
from flashnorm_cli.proof.pairing import Pair
from flashnorm_cli.proof.result import Finding, LevelResult

EPS = 1e-6
ROWS = (1, 17, 300, 4096)  # decoding, odd, and enough for the variants of prefill
# One rounding of the result to the dtype is half an eps. float32 also sums in another order than float64.
ALLOWED = {torch.bfloat16: 0.51, torch.float16: 0.51, torch.float32: 24.0}


def check_kernels(pair: Pair, dtype: torch.dtype, device: str) -> LevelResult:
    """Run the weightless kernels, and their weighted twins, on fresh random rows of each size that a norm has.

    figures: `KernelsFigures`; `path` as in `norms.info`.
    """
    with torch.cuda.device(torch.device(device)):
        path = info()
    if path["path"] == "torch":
        return LevelResult("kernels", "skipped", reason=f"the norms run on torch here: {path['reason']}")
    if dtype not in ALLOWED:
        return LevelResult("kernels", "skipped", reason=f"there is no kernel for {dtype}")
    sizes = sorted({pair.folded.tensors[name].shape[-1] for name in pair.norms if name in pair.folded.tensors})
    worst, findings = 0.0, []
    for size in sizes:
        error = max(_error(size, rows, dtype, device) for rows in ROWS)
        worst = max(worst, error)
        if not error <= ALLOWED[dtype]:
            message = f"the kernel's error is {error:.3g} eps of {str(dtype).removeprefix('torch.')}"
            findings.append(Finding(f"norms of {size} elements", message, error))
    name = str(dtype).removeprefix("torch.")
    figures = KernelsFigures(path["path"], path["gpu"], tuple(sizes), ROWS, name, worst)
    return LevelResult("kernels", "failed" if findings else "passed", figures, tuple(findings))


def _error(size: int, rows: int, dtype: torch.dtype, device: str) -> float:
    """The largest error, in eps, of the norm and of the fused add and norm, without weight, with w and with 1 + w."""
    eps, worst = torch.finfo(dtype).eps, 0.0
    for offset in (None, 0.0, 1.0):
        x, residual = (torch.randn(rows, size, device=device).mul_(s).to(dtype) for s in (1.0, 3.0))
        weight = None if offset is None else (torch.rand(size, device=device) * 1.4 + 0.4 - offset).to(dtype)
        gain = 1.0 if weight is None else weight.double() + (offset or 0.0)
        total = x + residual
        pairs = [(rms_norm(x, EPS, weight=weight, offset=offset or 0.0), x.double())]
        fused_add_rms_norm(x, residual, EPS, weight=weight, offset=offset or 0.0)
        pairs.append((x, total.double()))
        if not torch.equal(residual, total):
            return float("inf")
        for got, wide in pairs:
            want = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * gain
            gap = (got.double() - want).abs() / want.abs().clamp(min=torch.finfo(dtype).tiny)
            worst = max(worst, gap.max().item() / eps)
    return worst
