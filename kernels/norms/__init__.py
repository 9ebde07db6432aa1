"""The CUDA sources of the norms, shipped as `flashnorm_cli.kernels`; `flashnorm_cli.cuda` compiles and calls them."""
