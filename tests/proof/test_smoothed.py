"""AWQ and SmoothQuant put scales back into folded norms: such a checkpoint is not taken for a weightless one."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
import torch
from transformers import AutoModelForCausalLM

import flashnorm_cli
from flashnorm_cli.errors import FlashNormError
from flashnorm_cli.folding.fold import fold
from flashnorm_cli.proof.result import NOT_EQUIVALENT
from flashnorm_cli.proof.verify import verify


def smooth(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """SmoothQuant with strength 1/2 (arXiv 2211.10438, equation 4), as its own code does it for Llama and for 1 + w."""
    largest: dict[torch.nn.Module, torch.Tensor] = {}

    def seen(module: torch.nn.Module, _: object, output: torch.Tensor) -> None:
        largest[module] = output.detach().flatten(0, -2).abs().amax(0)

    def readers(layer: torch.nn.Module) -> list[tuple[torch.nn.Module, list[torch.nn.Linear]]]:
        attention, mlp = layer.self_attn, layer.mlp
        second = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
        return [
            (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (second, [mlp.gate_proj, mlp.up_proj]),
        ]

    pairs = [pair for layer in model.model.layers for pair in readers(layer)]
    hooks = [norm.register_forward_hook(seen) for norm, _ in pairs]
    with torch.no_grad():
        model(ids)
        for norm, linears in pairs:
            weights = torch.cat([linear.weight for linear in linears]).abs().amax(0)
            scale = (largest[norm] / weights).sqrt().clamp(min=1e-5)
            offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0
            norm.weight.copy_((norm.weight + offset) / scale - offset)
            for linear in linears:
                linear.weight.mul_(scale)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_scales_in_norms(family: str, tmp_path: Path) -> None:
    made = families.build(family, 0)
    families.randomize_gains(made, 1)
    families.save(made, tmp_path / "source", torch.float32)
    fold(tmp_path / "source", tmp_path / "folded")
    ids = torch.randint(0, made.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(2))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    with torch.no_grad():
        before = model(ids).logits
        smooth(model, ids)
        after = model(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)  # the smoothing is right
    model.save_pretrained(tmp_path / "smoothed")
    config = json.loads((tmp_path / "smoothed" / "config.json").read_text())
    assert "flashnorm" in config  # what it says is no longer so

    with pytest.raises(FlashNormError, match=r"AWQ, SmoothQuant"):
        flashnorm_cli.weightless(model)
    with pytest.raises(FlashNormError, match=r"AWQ, SmoothQuant"):
        flashnorm_cli.from_pretrained(tmp_path / "smoothed")
    found = verify(tmp_path / "smoothed", tmp_path / "source", record=False, levels=("weights",))
    assert found.verdict == NOT_EQUIVALENT
    said = [finding.message for level in found.levels for finding in level.findings]
    assert any("AWQ and SmoothQuant put their scales there" in line for line in said), said
    if config.get("flashnorm_folded"):
        assert any("flashnorm_folded is true, but" in line for line in said), said
