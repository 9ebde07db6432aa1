"""RMSNorm without weights, and its weighted twins, on CUDA kernels of this project where there is a GPU for them.

    from flashnorm_cli.norms import fused_add_rms_norm, info, norm_linear, rms_norm

Elsewhere (no GPU, no CuPy, float64, gradients wanted, under torch.compile) the same functions run on torch.
"""

from flashnorm_cli.norms.linear import norm_linear
from flashnorm_cli.norms.ops import fused_add_rms_norm, info, rms_norm

__all__ = ["fused_add_rms_norm", "info", "norm_linear", "rms_norm"]
