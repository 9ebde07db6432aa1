"""The CUDA sources of the norms, shipped as `flashnorm_cli.kernels`; `flashnorm_cli.norms` compiles and calls them."""
