"""`flashnorm doctor`: what the norms run on here, and why."""

from __future__ import annotations

from flashnorm_cli.cli import options
from flashnorm_cli.cli.output import Output
from flashnorm_cli.cli.tables import aligned

ALWAYS = ("gpu", "gpus", "capability", "driver_cuda", "nvrtc", "cupy", "torch", "torch_cuda")


def doctor(json: options.JsonOpt = False, debug: options.DebugOpt = False) -> None:
    """Tell which code the norms and norm_linear run on here: GPU, driver, CuPy, NVRTC, the path in use and why."""
    out = Output(json)
    from flashnorm_cli.norms import info
    from flashnorm_cli.norms.linear import describe

    found = info() | describe()
    out.data({"runs_on": found})
    names = {
        "path": "Norms run on",
        "reason": "Because",
        "norm_linear": "norm_linear runs on",
        "norm_linear_reason": "Because of",
        "norm_linear_choices": "Shapes measured here",
        "norm_linear_on_kernels": "Of these, on kernels",
        "norm_linear_file": "Kept in",
        "gpu": "GPU",
        "gpus": "GPUs",
        "capability": "Compute capability",
        "driver_cuda": "Driver supports CUDA",
        "nvrtc": "NVRTC",
        "cupy": "CuPy",
        "torch": "torch",
        "torch_cuda": "torch built for CUDA",
    }
    # A reason is shown where there is one, and what was measured only where there are kernels.
    shown = [(label, found[key]) for key, label in names.items() if found[key] is not None or key in ALWAYS]
    out.text(*aligned([(label, "none" if value is None else str(value)) for label, value in shown]))
