"""How often levels layers and logits refuse a right fold: docs/verify.md quotes the result.

    python docs/experiments/false_alarms.py OUT.json [--seeds 20] [--trained FOLDER] [--names llama,gemma2]

Tiny models of `NAMES` with fresh weights and gains for each seed; or, with --trained, a float32 checkpoint whose
weights are moved by up to 1/256 for each seed, so that each rounds in its own way. Each is stored in bfloat16 and in
float16, folded by `flashnorm fold`, and judged `TEXTS` times: level layers with activations of another seed, level
logits with other prompts (of a text, for the trained model). Rows are added to OUT.json as they are measured; rows
that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from flashnorm_cli import fold  # noqa: E402
from flashnorm_cli.checkpoint.model import Source  # noqa: E402
from flashnorm_cli.checkpoint.open import open_checkpoint  # noqa: E402
from flashnorm_cli.demo import HELD_OUT  # noqa: E402
from flashnorm_cli.proof import logits, models, prompts  # noqa: E402
from flashnorm_cli.proof.layers import check_layers  # noqa: E402
from flashnorm_cli.proof.options import DTYPES, VerifyOptions  # noqa: E402
from flashnorm_cli.proof.pairing import Pair, pair  # noqa: E402
from flashnorm_cli.proof.scores import Score, judge  # noqa: E402

# Gains of w and of 1 + w, experts, latent attention, state spaces, encoders.
NAMES = (
    "llama mistral qwen2 qwen3 smollm3 phi3 glm4 granite helium seed_oss gemma gemma2 gemma3_text t5gemma qwen3_next "
    "qwen2_moe mixtral deepseek_v3 mamba2 jamba"
).split()
TEXTS = 5
PROMPT_TOKENS = 64


def quiet(done: int, total: int, what: str) -> None:
    pass


def tiny(name: str, seed: int, dtype: str, folder: Path) -> None:
    import families

    model = families.build(name, seed=1000 + seed)
    families.randomize_gains(model, seed=2000 + seed)
    families.save(model, folder, dtype=DTYPES[dtype])


def moved(trained: Path, seed: int, dtype: str, folder: Path) -> None:
    """The trained model, each weight times 1 + u, u uniform within 1/256."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    for path in trained.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
            continue
        tensors = {
            key: (t * (1 + (torch.rand(t.shape, generator=generator) - 0.5) / 128)).to(DTYPES[dtype])
            for key, t in load_file(path).items()
        }
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}))


def texts_of(both: Pair, trained: bool) -> list[prompts.Prompts]:
    """Prompts of each text."""
    if not trained:
        made = [prompts._random_ids(both.source, 128, 32, 16, seed) for seed in range(TEXTS)]
        return [prompts.Prompts(ids, "random token ids", random=True) for ids in made]
    built_in = prompts.read_prompts(both.source, None, None, False)
    ids = built_in.tokenizer(HELD_OUT.read_text())["input_ids"]
    found, step = [built_in], 6 * PROMPT_TOKENS
    for k in range(TEXTS - 1):
        rows = [ids[k * step + i : k * step + i + PROMPT_TOKENS] for i in range(0, step, PROMPT_TOKENS)]
        found.append(prompts.Prompts(tuple(tuple(row) for row in rows if len(row) > 1), "held-out text", random=True))
    return found


def part(score: Score, start: int, count: int) -> Score:
    return Score(errors=score.errors[start : start + count], broken=0)


def judged(both: Pair, texts: list[prompts.Prompts], dtype: str) -> list[dict[str, Any]]:
    """Level logits on each text: all texts in one run of the models, and judged one by one."""
    options = VerifyOptions(device="cpu")
    everything = dataclasses.replace(texts[-1], ids=tuple(ids for text in texts for ids in text.ids))
    rows = []
    with TemporaryDirectory() as scratch, models.deterministic():
        setting = models.Setting.of(both, torch.float32, "cpu", False, Path(scratch))
        measured = logits._measure(setting, everything, DTYPES[dtype], torch.float32, quiet)
        start = 0
        for text in texts:
            folded, floor = (part(s, start, len(text.ids)) for s in (measured.folded, measured.floor))
            start += len(text.ids)
            limits = options.max_algebra, options.max_ratio
            first = judge(None, folded, floor, torch.float32, DTYPES[dtype], *limits)
            refused = bool(first.findings)
            if first.doubtful:
                fresh = prompts.drawn_afresh(both.source, len(text.ids))
                second = logits._measure(setting, fresh, DTYPES[dtype], torch.float32, quiet)
                refused = bool(logits._judge(second, DTYPES[dtype], options).findings)
            rows.append(
                {
                    "ratio": first.ratio,
                    "certain": first.certain,
                    "first_look": bool(first.findings),
                    "refused": refused,
                }
            )
        algebra = measured.algebra.error() if measured.algebra else None
    return [{**row, "algebra": algebra} for row in rows]


def measure(name: str, seed: int, dtype: str, trained: Path | None, looks: int) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        work = Path(folder)
        if trained:
            moved(trained, seed, dtype, work / "source")
        else:
            tiny(name, seed, dtype, work / "source")
        fold(work / "source", work / "folded")
        both = pair(open_checkpoint(Source(str(work / "source"))), open_checkpoint(Source(str(work / "folded"))))
        layers = []
        for k in range(looks):
            found = check_layers(both, VerifyOptions().max_ratio, "cpu", quiet, seed=100 * seed + k)
            ratio, again = found.figures["worst_ratio"], found.figures["second_looks"]
            layers.append({"ratio": ratio, "second_looks": again, "refused": found.status == "failed"})
        return {"layers": layers, "logits": judged(both, texts_of(both, trained is not None), dtype)}


def summary(rows: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in ("tiny", "trained"):
        of_kind = [row for key, row in rows.items() if key.startswith("trained") == (kind == "trained")]
        for level in ("layers", "logits"):
            verdicts = [verdict for row in of_kind for verdict in row[level]]
            if verdicts:
                ratios = sorted(verdict["ratio"] for verdict in verdicts)
                first = "second_looks" if level == "layers" else "first_look"
                found[f"{kind} {level}"] = {
                    "verdicts": len(verdicts),
                    "refused": sum(verdict["refused"] for verdict in verdicts),
                    "looked_at_twice": sum(bool(verdict[first]) for verdict in verdicts),
                    "ratio_median": round(ratios[len(ratios) // 2], 4),
                    "ratio_largest": round(ratios[-1], 4),
                }
    return found


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--names", default=",".join(NAMES))
    parser.add_argument("--trained", type=Path)
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    names = ["trained"] if asked.trained else asked.names.split(",")
    for seed in range(asked.first, asked.seeds):
        for name in names:
            for dtype in ("bfloat16", "float16"):
                found = json.loads(asked.out.read_text()) if asked.out.exists() else {"rows": {}}
                key = f"{name} {dtype} {seed}"
                if key in found["rows"]:
                    continue
                found["rows"][key] = measure(name, seed, dtype, asked.trained, TEXTS)
                found["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
                found["summary"] = summary(found["rows"])
                asked.out.write_text(json.dumps(found, indent=1) + "\n")
                print(key, found["rows"][key]["layers"][0], found["rows"][key]["logits"][0], flush=True)


if __name__ == "__main__":
    main()
