"""`flashnorm doctor`: this machine in lines to paste, what the norms run on here, and what would help."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flashnorm_cli._version import __version__
from flashnorm_cli.cli import options
from flashnorm_cli.cli.output import Output
from flashnorm_cli.cli.tables import aligned
from flashnorm_cli.errors import one_line

PACKAGES = ("torch", "transformers", "huggingface_hub", "safetensors")
# Packages that one command or option needs, what for, and how they are installed.
OPTIONAL = (
    ("lm_eval", "verify --eval", "flashnorm-cli[eval]"),
    ("vllm", "verify --runtime vllm", "flashnorm-cli[vllm]"),
    ("xllamacpp", "verify --runtime gguf", "xllamacpp"),
    ("matplotlib", "bench --plot", "flashnorm-cli[plot]"),
    ("distributed", "fold --dask", "flashnorm-cli[cluster]"),
)
DRIVER = Path("/proc/driver/nvidia/version")
LABELS = {
    "torch_cuda": "torch built for CUDA",
    "cupy": "CuPy",
    "nvrtc": "NVRTC",
    "gpu": "GPU",
    "gpus": "GPUs",
    "capability": "Compute capability",
    "driver_cuda": "Driver supports CUDA",
    "path": "Norms run on",
    "reason": "Because",
    "norm_linear": "Norm in the linear runs on",
    "norm_linear_reason": "Because of",
    "norm_linear_choices": "Shapes measured here",
    "norm_linear_on_kernels": "Of these, on kernels",
    "norm_linear_file": "Kept in",
}
# Shown also where there is none: somebody who reads a report has to know it.
ALWAYS = ("gpu", "cupy", "torch_cuda")


def doctor(json: options.JsonOpt = False, quiet: options.QuietOpt = False, debug: options.DebugOpt = False) -> None:
    """Describe this machine for a bug report, and tell what the norms run on here, why, and what would help.

    Versions, GPU and driver; whether norms and the norm inside the linear (`weightless(model, deferred=True)`) run on
    this project's kernels; and what is not installed.
    """
    out = Output(json, quiet)
    versions = _versions()
    try:
        from flashnorm_cli.norms import info
        from flashnorm_cli.norms.linear import describe

        found, broken = info() | describe(), None
        versions["torch"] = found["torch"]  # with what it was built for, which its package does not say
    except Exception as error:  # a torch that cannot be imported, say: this command is for that, too
        found, broken = None, one_line(f"{type(error).__name__}: {error}")
    advice = _advice(versions, found, broken)
    out.data({"versions": versions, "runs_on": found, "advice": advice})
    rows = [(name, value or "none") for name, value in versions.items()]
    for key, label in LABELS.items() if found else ():
        value = found[key] if found else None
        if value is not None or key in ALWAYS:
            text = "none" if value is None else str(value)
            rows.append((label, f"{text}, which gains nothing" if (key, text) == ("norm_linear", "torch") else text))
    out.text(*aligned(rows))
    if advice:
        out.text("", "What would help:", *(f"- {line}" for line in advice))


def _versions() -> dict[str, str | None]:
    """What a bug report has to say."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {"flashnorm": __version__, "Python": platform.python_version()}
    found["OS"] = f"{_distribution()}{platform.system()} {platform.release()} {platform.machine()}"
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return {**found, "NVIDIA driver": _driver()}


def _distribution() -> str:
    import platform

    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, "
    except (OSError, KeyError):  # not Linux, or one without a name
        return ""


def _driver() -> str | None:
    try:
        found = re.search(r"\s(\d+\.[\d.]+)\s", DRIVER.read_text())
    except (OSError, UnicodeDecodeError):
        return None
    return found[1] if found else "of an unknown version"


def _advice(versions: dict[str, str | None], found: dict[str, Any] | None, broken: str | None) -> list[str]:
    """What to install, and what it is good for; nothing that is there already."""
    lines = []
    missing = [package for package in PACKAGES if versions[package] is None]
    if missing:
        lines.append(f"{', '.join(missing)} cannot be found, and nothing works without: pip install flashnorm-cli")
    if broken is not None:
        lines.append(f"torch cannot be used, which plan, fold and verify need: {broken}")
    elif found is not None:
        lines += _for_the_gpu(versions["NVIDIA driver"] is not None, found)
    lines += [f"for {what}: pip install '{how}'" for name, what, how in OPTIONAL if find_spec(name) is None]
    if find_spec("xllamacpp") is not None and not os.environ.get("FLASHNORM_LLAMA_CPP"):
        lines.append("for verify --runtime gguf: set FLASHNORM_LLAMA_CPP to the folder of llama.cpp's sources")
    return lines


def _for_the_gpu(has_driver: bool, found: dict[str, Any]) -> list[str]:
    if found["gpu"] is None:
        if not has_driver:
            return ["no NVIDIA GPU is here: all commands work, the norms run on torch"]
        if found["torch_cuda"] is None:
            return [
                "there is an NVIDIA driver, but this torch is built without CUDA: install one that is (pytorch.org)"
            ]
        return [
            "there is an NVIDIA driver, but torch sees no GPU: look at nvidia-smi and CUDA_VISIBLE_DEVICES; the driver "
            f"has to support CUDA {found['torch_cuda']}"
        ]
    if found["cupy"] is None:
        major = str(found["torch_cuda"] or "13").split(".")[0]
        return [f"for the kernels on this GPU: pip install 'flashnorm-cli[cuda{major}]'"]
    return []
