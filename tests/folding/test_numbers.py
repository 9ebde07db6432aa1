"""Products at the ends of what a dtype holds: float64 all the way, overflow and mass flushing refused, flushes counted.

The reference is numpy on the bytes of source and fold.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from families import build, save
from safetensors.torch import load_file, save_file

from flashnorm_cli.checkpoint.header import TensorEntry
from flashnorm_cli.cli import main
from flashnorm_cli.errors import FlashNormError, GainOverflowError, GainUnderflowError
from flashnorm_cli.folding.edits import Scale, _Scaling
from flashnorm_cli.folding.fold import fold
from flashnorm_cli.folding.in_memory import fold_model_

NORM = "model.layers.0.input_layernorm.weight"
READERS = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]


def gains(model: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """Norms far from one, of either sign, with a few zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 1.4 + 0.4
                values[::7] *= -1
                values[3::11] = 0
                parameter.copy_(values)
    return model


def make(folder: Path, dtype: torch.dtype, **changed: torch.Tensor) -> Path:
    """A Llama in one file; `changed` are tensors, with `__` for dots, that take other values."""
    model = gains(build("llama", seed=0).to(dtype))
    save(model, folder, dtype, "5GB")
    tensors = load_file(folder / "model.safetensors")
    for name, value in changed.items():
        name = name.replace("__", ".")
        tensors[name] = value.to(tensors[name].dtype) if value.dtype != torch.float64 else value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def norm_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")[NORM]


def test_float64_all_the_way(tmp_path: Path) -> None:
    """On the disk, in memory, and as verify computes it: the bits of float64, which float32 gains would not give."""
    source = make(tmp_path / "model", torch.float64)
    precise = norm_of(source) + torch.rand(norm_of(source).shape, dtype=torch.float64) * 1e-9
    source = make(tmp_path / "model", torch.float64, **{NORM.replace(".", "__"): precise})
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(fold(source, tmp_path / "out").output / "model.safetensors"),
    )
    for name in READERS:
        wanted = before[name].numpy() * precise.numpy()
        assert (after[name].numpy() == wanted).all(), name
        assert (after[name].numpy() != before[name].numpy() * precise.float().double().numpy()).any()
    with pytest.raises(SystemExit) as code:
        main(["verify", str(tmp_path / "out"), "--source", str(source), "--level", "weights", "--level", "logits"])
    assert code.value.code == 0
    model = build("llama", seed=0).double()
    model.load_state_dict(before)
    in_memory = fold_model_(model).state_dict()
    for name in READERS:
        assert torch.equal(in_memory[name], after[name])


def test_large_float64_gains_are_no_inf(tmp_path: Path) -> None:
    source = make(tmp_path / "model", torch.float64)
    large = norm_of(source) * 1e60
    source = make(tmp_path / "model", torch.float64, **{NORM.replace(".", "__"): large})
    before, after = (load_file(f / "model.safetensors") for f in (source, fold(source, tmp_path / "out").output))
    for name in READERS:
        assert (after[name].numpy() == before[name].numpy() * large.numpy()).all()


@pytest.mark.parametrize(
    ("weights", "norm"),
    [
        (torch.bfloat16, torch.float64),
        (torch.float16, torch.float64),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
)
def test_gains_of_another_dtype_than_their_readers(tmp_path: Path, weights: torch.dtype, norm: torch.dtype) -> None:
    """A norm in float64 multiplies in float64, whatever its readers are; verify computes the same."""
    source = make(tmp_path / "model", weights)
    tensors = load_file(source / "model.safetensors")
    values = (torch.rand(tensors[NORM].shape, dtype=torch.float64) + 0.3).to(norm)
    tensors[NORM] = values
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    after = load_file(fold(source, tmp_path / "out").output / "model.safetensors")
    for name in READERS:
        assert torch.equal(after[name], (tensors[name].double() * values.double()).to(weights)), name
    with pytest.raises(SystemExit) as code:
        main(["verify", str(tmp_path / "out"), "--source", str(source), "--level", "weights"])
    assert code.value.code in (0, 4)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gains_that_are_no_numbers(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    source = make(tmp_path / "model", dtype)
    broken = norm_of(source).clone()
    broken[5] = value
    source = make(tmp_path / "model", dtype, **{NORM.replace(".", "__"): broken})
    with pytest.raises(FlashNormError, match=f"{NORM}: holds inf or NaN"):
        fold(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("dtype", "gain"),
    [
        (torch.bfloat16, 1e-40),
        (torch.bfloat16, -1e-40),
        (torch.float16, 1e-6),
        (torch.float16, 3e-7),
        (torch.float32, 1e-45),
    ],
)
def test_mass_flushing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: torch.dtype, gain: float
) -> None:
    """With the tensor's name, nothing left behind; in memory too, before the first change."""
    source = make(tmp_path / "model", dtype)
    tiny = torch.full(norm_of(source).shape, gain).to(dtype)
    assert bool((tiny != 0).all())
    source = make(tmp_path / "model", dtype, **{NORM.replace(".", "__"): tiny})
    with pytest.raises(SystemExit) as code:
        main(["fold", str(source), str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert code.value.code == 1
    assert err.count("\n") == 1
    assert re.search(r"layers\.0\.self_attn\.[qkv]_proj\.weight", err)
    assert "would become zero" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    model = build("llama", seed=0).to(dtype)
    model.load_state_dict(load_file(source / "model.safetensors"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(GainUnderflowError, match=r"[qkv]_proj.weight: .* would become zero"):
        fold_model_(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_one_dead_channel_is_no_mass_flushing(tmp_path: Path) -> None:
    """Channels that the gain switches off: their products are counted, and the rest of the tensor is right."""
    source = make(tmp_path / "model", torch.float16)
    values = norm_of(source).clone()
    values[:] = 1.5
    tensors = load_file(source / "model.safetensors")
    rows, columns = tensors[READERS[0]].shape
    few = max(rows * columns // 100, 1)
    assert few < rows
    tensors[READERS[0]][:few, 0] = 2.0**-24
    values[0] = 0.25
    tensors[NORM] = values
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    result = fold(source, tmp_path / "out")
    assert result.flushed == {READERS[0]: few}
    assert json.loads((tmp_path / "out" / "flashnorm.json").read_text())["flushed_to_zero"] == result.flushed


def test_fp16_overflow(tmp_path: Path) -> None:
    source = make(tmp_path / "model", torch.float16)
    large = torch.full(norm_of(source).shape, 60000.0)
    tensors = load_file(source / "model.safetensors")
    tensors[READERS[1]][2, 3] = 1.25
    tensors[NORM] = large.half()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(GainOverflowError, match=r"k_proj.weight"):
        fold(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("gain_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_denormal_gains_of_either_sign_are_computed(dtype: str, gain_dtype: torch.dtype) -> None:
    """Against numpy, over gains from the smallest denormals to one."""
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    gain = torch.logspace(-44, 0, 64, dtype=torch.float64).to(gain_dtype)
    gain[::3] *= -1
    weight = (torch.rand(8, 64, dtype=torch.float64) * 100).to(kinds[dtype])
    scaling = _Scaling(TensorEntry("w", dtype, (8, 64), 0, 0), Scale(1, gain))
    wide = weight.to(scaling.product_dtype, copy=True).flatten()
    scaling.multiply(wide, 0, scaling.gain)
    got = wide.to(kinds[dtype]).view(8, 64)
    product = np.float64 if torch.float64 in (gain_dtype, kinds[dtype]) else np.float32
    wanted = torch.from_numpy(weight.double().numpy().astype(product) * gain.double().numpy().astype(product))
    assert torch.equal(got, wanted.to(kinds[dtype]))
