"""Weights on a quantizer's grid are recognised, whatever quantizer and dtype; others never."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import families
import pytest
import torch
from torch import Tensor

from flashnorm_cli.errors import FlashNormError
from flashnorm_cli.folding.fold import fold
from flashnorm_cli.folding.in_memory import fold_model_
from flashnorm_cli.plan.grid import grid_in

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def grouped(weight: Tensor, size: int) -> Tensor:
    return weight.reshape(-1, size) if size else weight


def symmetric(bits: int, size: int, top: float) -> Callable[[Tensor], Tensor]:
    """Whole numbers times a scale per group (0: per row): llama.cpp's legacy formats, GPTQ, compressed-tensors."""

    def quantize(weight: Tensor) -> Tensor:
        groups = grouped(weight, size)
        scale = groups.abs().amax(1, keepdim=True) / top
        whole = (groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return (whole * scale).reshape(weight.shape)

    return quantize


def with_zero_point(bits: int, size: int) -> Callable[[Tensor], Tensor]:
    def quantize(weight: Tensor) -> Tensor:
        groups, top = grouped(weight, size), 2**bits - 1
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        scale = (high - low) / top
        zero = (-low / scale).round()
        return (((groups / scale).round() + zero).clamp(0, top) - zero).mul(scale).reshape(weight.shape)

    return quantize


def learned(bits: int) -> Callable[[Tensor], Tensor]:
    """A step that was learned, as in quantization-aware training: no value need be the largest of the integers."""

    def quantize(weight: Tensor) -> Tensor:
        step = weight.std(1, keepdim=True) * 3.11 / 2 ** (bits - 1)
        return (weight / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step

    return quantize


def float8(kind: torch.dtype, size: int) -> Callable[[Tensor], Tensor]:
    def quantize(weight: Tensor) -> Tensor:
        groups = grouped(weight, size)
        scale = groups.abs().amax(1, keepdim=True) / torch.finfo(kind).max
        return ((groups / scale).to(kind).float() * scale).reshape(weight.shape)

    return quantize


def float4(weight: Tensor) -> Tensor:
    """MXFP4: groups of 32 with a power of two."""
    table = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    groups = weight.reshape(-1, 32)
    scale = groups.abs().amax(1, keepdim=True).log2().floor().exp2() / 4
    nearest = ((groups / scale).abs()[..., None] - table).abs().argmin(-1)
    return (table[nearest] * groups.sign() * scale).reshape(weight.shape)


def ternary(weight: Tensor) -> Tensor:
    scale = weight.abs().mean()
    return (weight / scale).round().clamp(-1, 1) * scale


QUANTIZERS = {
    "int8 per channel": symmetric(8, 0, 127.5),
    "int8 per channel, 127": symmetric(8, 0, 127),
    "Q8_0": symmetric(8, 32, 127),
    "Q6_K": symmetric(6, 16, 32),
    "int4, groups of 128": symmetric(4, 128, 7.5),
    "int3": symmetric(3, 64, 3.5),
    "int8, zero point": with_zero_point(8, 0),
    "int8, zero point, groups of 64": with_zero_point(8, 64),
    "Q5_1": with_zero_point(5, 32),
    "int5, groups of 32": symmetric(5, 32, 15),
    "Q4_1": with_zero_point(4, 32),
    "learned 8 bits": learned(8),
    "learned 5 bits": learned(5),
    "learned 4 bits": learned(4),
    "FP8 per channel": float8(torch.float8_e4m3fn, 0),
    "FP8 in blocks": float8(torch.float8_e4m3fn, 128),
    "FP8 e5m2": float8(torch.float8_e5m2, 0),
    "MXFP4": float4,
    "ternary": ternary,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_grid_is_seen(name: str, dtype: torch.dtype) -> None:
    for seed, width in ((0, 128), (1, 640)):
        weight = torch.randn(32, width, generator=torch.Generator().manual_seed(seed)) * 0.02
        assert grid_in(QUANTIZERS[name](weight).to(dtype).double())


def pruned(weight: Tensor) -> Tensor:
    """2 of 4."""
    fours = weight.reshape(-1, 4)
    kept = fours.abs().topk(2, 1).indices
    return torch.zeros_like(fours).scatter(1, kept, fours.gather(1, kept)).reshape(weight.shape)


ORDINARY: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda w: w,
    "uniform": lambda w: w.erf(),
    "heavy tails": lambda w: w**3,
    "a massive channel": lambda w: w * torch.where(torch.arange(w.shape[1]) == 5, 80.0, 1.0),
    "rows of other sizes": lambda w: w * torch.logspace(-3, 1, len(w))[:, None],
    "pruned": pruned,
    "nearly all zero": lambda w: w * (w.abs() > 1.8),
    "zero": lambda w: w * 0,
    "one": lambda w: w * 0 + 1,
    "an adapter's start": lambda w: w * (torch.arange(len(w)) < 3)[:, None],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ORDINARY)
def test_other_weights_are_on_none(name: str, dtype: torch.dtype) -> None:
    """bfloat16 and float16 are grids, too."""
    for seed, (size, width) in enumerate(((1e-3, 32), (0.02, 64), (0.02, 576))):
        weight = torch.randn(32, width, generator=torch.Generator().manual_seed(seed)) * size
        assert grid_in(ORDINARY[name](weight).to(dtype).double()) is None


def model(change: Callable[[Tensor], Tensor], suffix: tuple[str, ...], seed: int = 0) -> torch.nn.Module:
    """A Llama; some of its matrices changed."""
    made = families.build("llama", seed)
    families.randomize_gains(made, seed + 1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(suffix):
                parameter.copy_(change(parameter))
    return made


READERS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
FEW_BITS = {
    "int4": symmetric(4, 32, 7.5),
    "int4 per channel, learned": learned(4),
    "int3": symmetric(3, 32, 3.5),
    "int4, zero point": with_zero_point(4, 32),
    "MXFP4": float4,
    "ternary": ternary,
}


@pytest.mark.parametrize("name", FEW_BITS)
def test_weights_made_for_few_bits_are_refused_with_the_tensor(name: str, tmp_path: Path) -> None:
    made = model(FEW_BITS[name], READERS)
    families.save(made, tmp_path / "in", torch.bfloat16)
    with pytest.raises(FlashNormError, match=r"model\.layers\.\*\.(mlp|self_attn)\..* holds .* `leave_grid=True`"):
        fold(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = fold(tmp_path / "in", tmp_path / "out", leave_grid=True)
    assert any("off that grid" in note for note in result.plan.notes)
    with pytest.raises(FlashNormError, match=r"holds .* `leave_grid=True`"):
        fold_model_(made)
    fold_model_(made, leave_grid=True)


def q4_1(weight: Tensor) -> Tensor:
    """llama.cpp's: a scale and a minimum for each 32, both of any value."""
    groups = weight.reshape(-1, 32)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (high - low) / 15
    return (((groups - low) / scale).round() * scale + low).reshape(weight.shape)


@pytest.mark.parametrize(
    ("change", "suffix"),
    [
        (symmetric(8, 32, 127), READERS),
        (float8(torch.float8_e4m3fn, 128), READERS),
        (q4_1, READERS),
        (symmetric(4, 32, 7.5), ("up_proj.weight",)),
    ],
    ids=["Q8_0", "FP8", "Q4_1", "one of five"],
)
def test_a_grid_that_costs_little_is_a_note(
    change: Callable[[Tensor], Tensor], suffix: tuple[str, ...], tmp_path: Path
) -> None:
    """Checkpoints made from FP8 or from a GGUF are folded by those who run them as they are."""
    made = model(change, suffix)
    families.save(made, tmp_path / "in", torch.bfloat16)
    result = fold(tmp_path / "in", tmp_path / "out")
    assert any("off that grid" in note for note in result.plan.notes)
    fold_model_(made)


def test_a_rotation_looks_at_writers_too(tmp_path: Path) -> None:
    writers = ("down_proj.weight", "o_proj.weight")
    families.save(model(learned(4), READERS + writers), tmp_path / "in", torch.bfloat16)
    with pytest.raises(FlashNormError, match="holds"):
        fold(tmp_path / "in", tmp_path / "rotated", rotate="hadamard")
    families.save(model(learned(4), READERS), tmp_path / "readers", torch.bfloat16)
    fold(tmp_path / "readers", tmp_path / "also", rotate="hadamard")  # the writers are ordinary


def test_stacked_experts_are_looked_at_along_their_input(tmp_path: Path) -> None:
    """gpt-oss holds them with the input in the middle; its float4 is often stored as bfloat16."""
    made = families.build("gpt_oss", 0)
    families.randomize_gains(made, 1)
    families.save(made, tmp_path / "ordinary", torch.bfloat16)
    fold(tmp_path / "ordinary", tmp_path / "folded")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("experts.gate_up_proj"):
                parameter.copy_(float4(parameter.transpose(1, 2).contiguous()).transpose(1, 2))
    families.save(made, tmp_path / "in", torch.bfloat16)
    result = fold(tmp_path / "in", tmp_path / "out")
    assert any("experts.gate_up_proj` holds" in note for note in result.plan.notes)
