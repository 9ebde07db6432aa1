"""CUDA sources of norm_linear, shipped as flashnorm_cli.kernels.norm_linear. Not imported by anyone."""
