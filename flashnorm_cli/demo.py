"""The demo: fold the small trained Llama that comes with the package, and compare it with its source."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from flashnorm_cli.folding import FoldResult, fold
from flashnorm_cli.runtime import quiet_transformers

MODEL = Path(__file__).parent / "demo_model"
PROMPT = "It is a truth universally acknowledged, "
NEW_BYTES = 76
# What `flashnorm` calls equivalent: exact algebra in float32, and rounding no worse than the dtype's own.
MAX_ALGEBRA_ERROR = 1e-5
MAX_NOISE_RATIO = 1.5


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured on its held-out text.

    Errors are relative to the norm of the source's float32 logits: `algebra` of a float32 fold, `rounding` of the
    bfloat16 fold, `noise_floor` of the source itself in bfloat16. Perplexities are per byte.
    """

    fold: FoldResult
    parameters: int
    gains: tuple[float, float]
    algebra: float
    rounding: float
    noise_floor: float
    agreement: float
    perplexity_source: float
    perplexity_folded: float
    text_source: str
    text_folded: str

    @property
    def equivalent(self) -> bool:
        return self.algebra <= MAX_ALGEBRA_ERROR and self.rounding <= MAX_NOISE_RATIO * self.noise_floor


def run_demo(output: Path) -> DemoResult:
    """Fold the demo model into `output` and compare both. Deterministic, offline, some seconds on a CPU."""
    from transformers import AutoTokenizer

    folded = fold(MODEL, output)
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
    source = _load(MODEL, torch.float32)
    gains = torch.cat([p.detach() for name, p in source.named_parameters() if "norm" in name])
    text = (MODEL / "heldout.txt").read_text(encoding="utf-8")
    with quiet_transformers():  # no warning that the whole text is longer than the context: it is cut below
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    rows = ids[: len(ids) // 256 * 256].view(-1, 256)

    reference = _logits(source, rows)
    with TemporaryDirectory() as scratch:  # the same fold without rounding to bfloat16
        with quiet_transformers():
            source.save_pretrained(f"{scratch}/float32")
        fold(f"{scratch}/float32", f"{scratch}/folded")
        exact = _logits(_load(Path(scratch) / "folded", torch.float32), rows)
    target = _load(output, torch.float32)
    mine = _logits(target, rows)
    noisy = _logits(_load(MODEL, torch.bfloat16), rows)
    return DemoResult(
        fold=folded,
        parameters=sum(p.numel() for p in source.parameters()),
        gains=(gains.min().item(), gains.max().item()),
        algebra=_distance(exact, reference),
        rounding=_distance(mine, reference),
        noise_floor=_distance(noisy, reference),
        agreement=(mine.argmax(-1) == reference.argmax(-1)).float().mean().item(),
        perplexity_source=_perplexity(reference, rows),
        perplexity_folded=_perplexity(mine, rows),
        text_source=_generate(source, tokenizer),
        text_folded=_generate(target, tokenizer),
    )


def _load(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.inference_mode()
def _logits(model: Any, rows: torch.Tensor) -> torch.Tensor:
    return model(rows).logits.double()


@torch.inference_mode()
def _generate(model: Any, tokenizer: Any) -> str:
    prompt = tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=NEW_BYTES, do_sample=False)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def _perplexity(logits: torch.Tensor, rows: torch.Tensor) -> float:
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    return math.exp(loss.item())
