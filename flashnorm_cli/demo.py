"""The demo: fold the small trained Llama that comes with the package, and verify it against its source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashnorm_cli.folding.fold import FoldResult, fold
from flashnorm_cli.modeling.quiet import quiet_transformers
from flashnorm_cli.proof.result import Verification
from flashnorm_cli.proof.verify import verify

MODEL = Path(__file__).parent / "demo_model"
HELD_OUT = MODEL / "heldout.txt"
PROMPT = "It is a truth universally acknowledged, "
NEW_BYTES = 76


@dataclass(frozen=True)
class DemoResult:
    """What the demo did and found: the fold, its verification on held-out text, and what both models write.

    `gains` are the smallest and the largest norm weight of the source.
    """

    fold: FoldResult
    verification: Verification
    parameters: int
    gains: tuple[float, float]
    text_source: str
    text_folded: str


def run_demo(output: Path) -> DemoResult:
    """Fold the demo model into `output` and verify it. Deterministic, offline, some seconds on a CPU."""
    folded = fold(MODEL, output)
    verification = verify(output, MODEL, text=HELD_OUT, device="cpu", command="flashnorm demo")
    source = _load(MODEL)
    gains = torch.cat([p.detach() for name, p in source.named_parameters() if "norm" in name])
    return DemoResult(
        fold=folded,
        verification=verification,
        parameters=sum(p.numel() for p in source.parameters()),
        gains=(gains.min().item(), gains.max().item()),
        text_source=_generate(source),
        text_folded=_generate(_load(output)),
    )


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def _generate(model: Any) -> str:
    from transformers import AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompt = tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=NEW_BYTES, do_sample=False)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
