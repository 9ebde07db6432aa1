"""Quantizers for `quantization.py`: what a format makes of weights and activations, as float32 values again.

Where a tool defines the format, its rules are used: compressed-tensors' for integers and NVFP4, bitsandbytes' for NF4,
llama.cpp itself for Q8_0, Q4_0 and Q4_K_M. Rounding is to the nearest value: no calibration, nothing is learned.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Rounding = Callable[[torch.Tensor], torch.Tensor]

# bitsandbytes, functional.py: the quantiles of a normal distribution.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST_FP8, LARGEST_FP4 = 448.0, 6.0
TINY = 1e-12


def grouped(values: torch.Tensor, size: int, rounding: Rounding) -> torch.Tensor:
    """`rounding` of groups along the last dimension, whose last group may be shorter."""
    whole = values.shape[-1] // size * size
    parts = []
    if whole:
        parts.append(rounding(values[..., :whole].reshape(-1, size)).reshape(*values.shape[:-1], whole))
    if whole < values.shape[-1]:
        parts.append(rounding(values[..., whole:]))
    return torch.cat(parts, -1)


def integers(bits: int) -> Rounding:
    """Symmetric, a scale for each row, as compressed-tensors has it: the whole range of the integers is used."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def rounding(rows: torch.Tensor) -> torch.Tensor:
        scale = rows.abs().amax(-1, keepdim=True).clamp(min=TINY) * 2 / (high - low)
        return (rows / scale).round().clamp(low, high) * scale

    return rounding


def fp8(rows: torch.Tensor) -> torch.Tensor:
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=TINY) / LARGEST_FP8
    return (rows / scale).to(torch.float8_e4m3fn).float() * scale


def fp8_tensor(values: torch.Tensor) -> torch.Tensor:
    return fp8(values.reshape(1, -1)).reshape(values.shape)


def nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The nearest entry of an ascending table."""
    return table[torch.bucketize(values, (table[1:] + table[:-1]) / 2)]


def nf4(weight: torch.Tensor) -> torch.Tensor:
    blocks = weight.reshape(-1, 64) if weight.numel() % 64 == 0 else weight
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=TINY)
    return (nearest(blocks / scale, torch.tensor(NF4)) * scale).reshape(weight.shape)


def nvfp4(values: torch.Tensor) -> torch.Tensor:
    """Blocks of 16 with a scale in FP8, and one in float32 for the whole tensor."""
    whole = values.abs().max().clamp(min=TINY) / (LARGEST_FP8 * LARGEST_FP4)

    def rounding(blocks: torch.Tensor) -> torch.Tensor:
        scale = (blocks.abs().amax(-1, keepdim=True) / LARGEST_FP4 / whole).clamp(max=LARGEST_FP8)
        scale = scale.to(torch.float8_e4m3fn).float().clamp(min=2**-9) * whole
        return (blocks / scale).sign() * nearest((blocks / scale).abs(), torch.tensor(FP4)) * scale

    return grouped(values, 16, rounding)


def groups(bits: int, size: int) -> Rounding:
    return lambda weight: grouped(weight, size, integers(bits))


# By name: what is done to the weight of each linear layer but the output head, and to what it reads.
ROUNDINGS: dict[str, tuple[Rounding | None, Rounding | None]] = {
    "float32": (None, None),
    "int8": (integers(8), None),
    "fp8": (fp8_tensor, None),
    "int4-g128": (groups(4, 128), None),
    "int4-g32": (groups(4, 32), None),
    "nf4": (nf4, None),
    "w8a8-int8": (integers(8), integers(8)),
    "w8a8-fp8": (fp8, fp8),
    "w4a8": (groups(4, 32), integers(8)),
    "nvfp4": (nvfp4, nvfp4),
    "w8a6": (integers(8), integers(6)),
    "w8a4": (integers(8), integers(4)),
}


@contextmanager
def rounded(model: Any, name: str) -> Iterator[None]:
    """The model with its linear layers rounded; afterwards as it was."""
    weights, activations = ROUNDINGS[name]
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    kept = [m.weight.data for m in linears] if weights else []
    hooks = []
    for linear in linears:
        if weights:
            linear.weight.data = weights(linear.weight.data)
        if activations:
            hooks.append(linear.register_forward_pre_hook(lambda _, args: (activations(args[0]),)))
    try:
        yield
    finally:
        for linear, weight in zip(linears, kept, strict=False):
            linear.weight.data = weight
        for hook in hooks:
            hook.remove()


# ---- llama.cpp -------------------------------------------------------------------------------------------------------

LLAMA_CPP = {"q8_0": 7, "q4_k_m": 15, "q4_0": 2}  # llama.h: enum llama_ftype


class Parameters(ctypes.Structure):
    """The beginning of llama.h's `llama_model_quantize_params`; the rest stays as the library fills it in."""

    _fields_ = (("nthread", ctypes.c_int32), ("ftype", ctypes.c_int), ("rest", ctypes.c_byte * 248))


def by_llama_cpp(library: Path, gguf: Path, out: Path, name: str) -> None:
    """Quantize a GGUF by the function that llama.cpp's own `llama-quantize` calls."""
    for each in ("libggml-base.so", "libggml.*so*", "libllama.*so*"):
        found = next(library.glob(each))
        loaded = ctypes.CDLL(str(found), mode=ctypes.RTLD_GLOBAL)
    loaded.llama_model_quantize_default_params.restype = Parameters
    settings = loaded.llama_model_quantize_default_params()
    settings.nthread, settings.ftype = 1, LLAMA_CPP[name]
    loaded.llama_backend_init()
    failed = loaded.llama_model_quantize(str(gguf).encode(), str(out).encode(), ctypes.byref(settings))
    if failed:
        raise SystemExit(f"llama_model_quantize: {failed}")


def weights_of(gguf: Path) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """What a GGUF holds, under transformers' names in float32, and how many tensors have which type."""
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    types: dict[str, int] = {}
    for tensor in GGUFReader(gguf).tensors:
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    return dict(model.state_dict()), types


# ---- off the grid ----------------------------------------------------------------------------------------------------


def off_the_grid(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each value moved by up to half the smallest distance between two different values of its group of 32.

    That is at most half a step where the group lies on a quantizer's grid, and next to nothing where it does not.
    """
    if weight.dim() != 2 or weight.shape[1] % 32:
        return weight
    blocks = weight.reshape(-1, 32)
    gaps = blocks.sort(-1).values.diff(dim=-1)
    gap = torch.where(gaps > TINY, gaps, math.inf).amin(-1, keepdim=True)
    noise = torch.rand(blocks.shape, generator=generator) - 0.5
    return torch.where(gap.isfinite(), blocks + noise * gap, blocks).reshape(weight.shape)
