"""Right folds pass: of models with gains as trained ones have them, of which a few channels outweigh all others."""

from pathlib import Path

import families
import pytest
import torch

from flashnorm_cli import fold, verify
from flashnorm_cli.proof.result import MAX_NOISE_RATIO


def trained_gains(model: torch.nn.Module, seed: int, offset: float) -> None:
    """Gains from 0.001 to 50, a fifth of them negative."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name:
                gain = (torch.randn(parameter.shape, generator=generator) * 1.5 - 1).exp()
                sign = torch.where(torch.rand(parameter.shape, generator=generator) < 0.2, -1.0, 1.0)
                parameter.copy_(gain * sign - offset)


@pytest.mark.parametrize(("family", "offset", "dtype"), [("llama", 0.0, torch.float16), ("gemma", 1.0, torch.bfloat16)])
def test_level_layers_lets_right_folds_pass(family: str, offset: float, dtype: torch.dtype, tmp_path: Path) -> None:
    for seed in (1, 3):
        model = families.build(family, seed=seed)
        trained_gains(model, seed, offset)
        source = tmp_path / f"source-{seed}"
        families.save(model, source, dtype=dtype)
        fold(source, tmp_path / f"folded-{seed}")
        result = verify(tmp_path / f"folded-{seed}", source, levels=["layers"], device="cpu", record=False)
        level = result.level("layers")
        assert (level.status, level.figures.get("second_looks", 0)) == ("passed", 0), level.findings
        assert level.figures["worst_ratio"] < MAX_NOISE_RATIO * 0.9
