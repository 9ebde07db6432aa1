"""`flashnorm fold-adapter`: folded base with folded adapter computes what source with adapter computes, in real peft."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from flashnorm_cli import fold, fold_adapter
from flashnorm_cli.cli import main

peft = pytest.importorskip("peft", reason="peft is not installed")

# The error of the logits that the fold of the adapter may add, and one that nobody could overlook.
EXACT, WRONG = 1e-5, 1e-2
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEARS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that makes a family's source and folded checkpoint once; returns the folder that holds both."""
    made: dict[str, Path] = {}

    def make(family: str, tied: bool = False) -> Path:
        name = f"{family}-tied" if tied else family
        if name not in made:
            folder = made[name] = tmp_path_factory.mktemp(name)
            model = families.build(family, seed=0)
            if tied:
                model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = True
                model.tie_weights()
            families.randomize_gains(model, seed=1)
            families.save(model, folder / "source")
            fold(folder / "source", folder / "folded")
        return folder

    return make


def load(folder: Path, auto: Any = AutoModelForCausalLM, **more: Any) -> Any:
    torch.manual_seed(0)  # a head for classification is not in the files
    return auto.from_pretrained(folder, dtype=torch.float32, **more).eval()


@torch.no_grad()
def train(folder: Path, config: Any, out: Path, auto: Any = AutoModelForCausalLM, **more: Any) -> Path:
    """An adapter of the source with random weights, as peft saves it."""
    model = peft.get_peft_model(load(folder / "source", auto, **more), config)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if "magnitude" in name or "norm" in name:
            parameter.mul_(1 + 0.3 * noise.tanh())
        else:
            parameter.add_(0.4 * noise / max(parameter.shape[-1], 1) ** 0.5 if parameter.ndim > 1 else 0.3 * noise)
    model.save_pretrained(out)
    return out


def outputs(model_folder: Path, adapter: Path, auto: Any = AutoModelForCausalLM, **more: Any) -> torch.Tensor:
    model = load(model_folder, auto, **more)
    inputs = families.text_inputs(model, seed=3)
    return families.logits(peft.PeftModel.from_pretrained(model, adapter).eval(), inputs)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def check(folder: Path, adapter: Path, auto: Any = AutoModelForCausalLM, unfolded: str = "wrong", **more: Any) -> Any:
    """Fold an adapter and compare. `unfolded` says what the original is on the folded base: wrong, right, or unusable."""
    result = fold_adapter(adapter, folder / "folded", adapter.with_name("out"), overwrite=True)
    expected = outputs(folder / "source", adapter, auto, **more)
    without = families.logits(load(folder / "source", auto, **more), families.text_inputs(load(folder / "source"), 3))
    assert difference(expected, without) > WRONG, "the adapter does nothing"
    assert difference(outputs(folder / "folded", result.output, auto, **more), expected) < EXACT
    if unfolded != "unusable":
        error = difference(outputs(folder / "folded", adapter, auto, **more), expected)
        assert error > WRONG if unfolded == "wrong" else error < EXACT
    return result


def lora(**more: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "target_modules": LINEARS, **more})


# ---- families: where the gain comes from, and how the readers lie ----------------------------------------------------


@pytest.mark.parametrize(
    ("family", "tied", "targets"),
    [
        ("llama", False, "all-linear"),
        ("llama", True, "all-linear"),
        ("qwen3", False, LINEARS),
        ("gemma3_text", True, [*LINEARS, "lm_head"]),  # 1 + w, a tied head that becomes untied
        ("gemma2", True, [*LINEARS, "lm_head"]),  # the final norm is kept
        ("phi3", False, ["qkv_proj", "o_proj", "gate_up_proj"]),  # fused readers
        ("deepseek_v2", False, "all-linear"),  # latent attention: norms inside of it, read in part
        ("qwen3_next", False, ["in_proj_qkvz", "out_proj", "q_proj", "o_proj", "shared_expert_gate"]),  # tiled gain
    ],
)
def test_lora(base: Callable[..., Path], family: str, tied: bool, targets: Any, tmp_path: Path) -> None:
    folder = base(family, tied)
    check(folder, train(folder, lora(target_modules=targets), tmp_path / "adapter"))
