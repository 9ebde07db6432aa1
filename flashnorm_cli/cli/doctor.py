"""`flashnorm doctor`: what the norms run on here, and why."""

from __future__ import annotations

from flashnorm_cli.cli import options
from flashnorm_cli.cli.output import Output


def doctor(json: options.JsonOpt = False, debug: options.DebugOpt = False) -> None:
    """Tell which code the norms run on here: GPU, driver, CuPy, NVRTC, the path in use and why."""
    out = Output(json)
    from flashnorm_cli.norms import info

    found = info()
    out.data(found)
    names = {
        "path": "Norms run on",
        "reason": "Because",
        "gpu": "GPU",
        "gpus": "GPUs",
        "capability": "Compute capability",
        "driver_cuda": "Driver supports CUDA",
        "nvrtc": "NVRTC",
        "cupy": "CuPy",
        "torch": "torch",
        "torch_cuda": "torch built for CUDA",
    }
    shown = [(label, found[key]) for key, label in names.items() if not (key == "reason" and found[key] is None)]
    width = max(len(label) for label, _ in shown)
    out.text(*(f"{label:{width}}  {'none' if value is None else value}" for label, value in shown))
