"""What a fold, and a fold with a rotation, do to quantization: docs/quantization.md quotes the result.

    pip install gguf
    python docs/experiments/quantization.py MODEL OUT.json --texts A.txt B.txt ... [--formats int8,w8a8-int8]
        [--llama-cpp FOLDER --converter FOLDER] [--work FOLDER] [--pieces 8] [--tokens 256]

MODEL is a checkpoint with a tokenizer. Its weights are moved off the grid of a quantizer that they may come from
(`off_the_grid`), and this is the source. `flashnorm fold`, and `fold --rotate hadamard`, make the others. Each is
quantized to each format and compared with the source in float32 on pieces of the texts: perplexity, and KL divergence
of the next token. Rows are added to OUT.json as they are measured; rows that are there are not measured again.

--llama-cpp is a folder with libllama.so and libggml-base.so (`npm pack @node-llama-cpp/linux-x64` has them),
--converter llama.cpp's sources. Formats that begin with `llm-compressor` or `torchao` run these tools as their users
do; they may need an environment of their own: run the script in it with the same --work, and another OUT.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from quantizers import LLAMA_CPP, ROUNDINGS, by_llama_cpp, off_the_grid, rounded, weights_of

ROOT = Path(__file__).parents[2]
VARIANTS: dict[str, list[str] | None] = {"source": None, "fold": [], "rotated": ["--rotate", "hadamard"]}
TOOLS = ("llm-compressor-w8a8", "llm-compressor-fp8", "torchao-w8a8", "torchao-int8")
VERSIONS = ("torch", "transformers", "gguf", "llmcompressor", "compressed-tensors", "torchao")
KL_FLOOR = 1e-6  # of float32 sums: what the float32 fold may differ by


class Results:
    """OUT.json, one model per file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}

    def has(self, variant: str, name: str) -> bool:
        return "kl" in self.content["rows"].get(variant, {}).get(name, {})

    def add(self, variant: str, name: str, row: dict[str, Any]) -> None:
        self.content["rows"].setdefault(variant, {})[name] = row
        self.write()
        kl = row.get("kl")
        print(variant, name, f"{sum(kl) / len(kl):.3g}" if kl else row, flush=True)

    def write(self) -> None:
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def make_source(model: Path, out: Path) -> None:
    """The model in float32, its matrices moved off their grid."""
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    out.mkdir(parents=True)
    for path in sorted(model.iterdir()):
        if path.suffix == ".safetensors":
            tensors = {k: off_the_grid(t.float(), generator) for k, t in load_file(path).items()}
            save_file(tensors, out / path.name, metadata={"format": "pt"})
        elif path.is_file() and path.name != "config.json":
            shutil.copy(path, out)
    config = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2))


def make_variant(work: Path, variant: str) -> str | None:
    """Make a variant's folder; the reason if `flashnorm` refuses to."""
    folder, options = work / variant, VARIANTS[variant]
    if folder.exists() or options is None:
        return None
    command = [sys.executable, "-m", "flashnorm_cli", "fold", str(work / "source"), str(folder), *options, "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return None if done.returncode == 0 else done.stderr.strip()


def texts_of(folder: Path, files: list[Path], pieces: int, tokens: int) -> list[tuple[str, list[int]]]:
    """Pieces of `tokens` tokens, from the files in turn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"] for path in files]
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    size, found = tokens - len(first), []
    for k in range(pieces):
        file, start = k % len(files), k // len(files) * size
        piece = ids[file][start : start + size]
        if len(piece) < size:
            raise SystemExit(f"{files[file]} is too short")
        found.append((f"{files[file].name} from token {start}", first + piece))
    return found


@torch.no_grad()
def log_probabilities(model: Any, ids: list[int]) -> torch.Tensor:
    """Of each next token: float32 of shape (tokens - 1, vocabulary)."""
    return model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class Measure:
    """KL divergence from, and perplexity beside, the source in float32 on the same pieces of text."""

    def __init__(self, work: Path, texts: list[tuple[str, list[int]]]) -> None:
        self.texts = [ids for _, ids in texts]
        path = work / "reference.pt"
        if not path.exists():
            model = load(work / "source")
            torch.save([log_probabilities(model, ids) for ids in self.texts], path)
        self.reference = torch.load(path, mmap=True)

    def __call__(self, model: Any) -> dict[str, Any]:
        started = time.process_time()
        kl, nll = [], []
        for ids, expected in zip(self.texts, self.reference, strict=True):
            found = log_probabilities(model, ids)
            kl.append(torch.nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean").item())
            nll.append(-found.gather(1, torch.tensor(ids[1:])[:, None]).mean().item())
        row = {"kl": [float(f"{v:.5g}") for v in kl], "nll": [round(v, 5) for v in nll]}
        return {
            **row,
            "perplexity": round(math.exp(sum(nll) / len(nll)), 4),
            "cpu_seconds": round(time.process_time() - started, 1),
        }


# ---- tools -----------------------------------------------------------------------------------------------------------


def gguf_row(asked: argparse.Namespace, measure: Measure, variant: str, name: str) -> dict[str, Any]:
    plain = asked.work / f"{variant}.gguf"
    if not plain.exists():
        command = [sys.executable, str(asked.converter / "convert_hf_to_gguf.py"), str(asked.work / variant)]
        done = subprocess.run([*command, "--outfile", str(plain), "--outtype", "f32"], capture_output=True, text=True)
        if done.returncode:
            return {"refused": f"llama.cpp's converter: {done.stderr.strip().splitlines()[-1]}"}
    with TemporaryDirectory(dir=asked.work) as scratch:
        out = Path(scratch, "quantized.gguf")
        by_llama_cpp(asked.llama_cpp, plain, out, name)
        weights, types = weights_of(out)
    model = load(asked.work / variant)
    model.load_state_dict(weights)
    return {**measure(model), "types": types}


def tool_row(asked: argparse.Namespace, measure: Measure, variant: str, name: str) -> dict[str, Any]:
    model = load(asked.work / variant)
    if name.startswith("llm-compressor"):
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import QuantizationModifier

        scheme = {"llm-compressor-w8a8": "W8A8", "llm-compressor-fp8": "FP8_DYNAMIC"}[name]
        oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"]))
    else:
        from torchao import quantization

        made = {
            "torchao-w8a8": quantization.Int8DynamicActivationInt8WeightConfig,
            "torchao-int8": quantization.Int8WeightOnlyConfig,
        }[name]
        head = model.get_output_embeddings()
        quantization.quantize_(model, made(), lambda m, _: isinstance(m, torch.nn.Linear) and m is not head)
    return measure(model)


def measure_variant(asked: argparse.Namespace, results: Results, measure: Measure, variant: str) -> None:
    wanted = [name for name in asked.formats if not results.has(variant, name)]
    if own := [name for name in wanted if name in ROUNDINGS]:
        model = load(asked.work / variant)
        for name in own:
            with rounded(model, name):
                results.add(variant, name, measure(model))
        del model
    for name in wanted:
        if name in LLAMA_CPP and asked.llama_cpp and asked.converter:
            results.add(variant, name, gguf_row(asked, measure, variant, name))
        if name in TOOLS:
            results.add(variant, name, tool_row(asked, measure, variant, name))


def describe(results: Results, asked: argparse.Namespace, texts: list[tuple[str, list[int]]]) -> None:
    versions = results.content.setdefault("versions", {})
    for package in VERSIONS:
        try:
            versions.setdefault(package, set())
            versions[package] = sorted({*versions[package], version(package)})
        except PackageNotFoundError:
            versions[package] = sorted(versions[package])
    machine = f"{platform.machine()}, {os.cpu_count()} processors"
    about: dict[str, Any] = {"model": asked.name or asked.model.name, "date": str(date.today()), "machine": machine}
    about |= {"texts": [name for name, _ in texts], "tokens": asked.tokens}
    results.content = {**about, **{key: value for key, value in results.content.items() if key not in about}}
    results.write()


def later_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of scripts that look closer at what this one has left with --work."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--name", default="")
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--pieces", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    return parser


def later(asked: argparse.Namespace) -> tuple[Measure, dict[str, Any]]:
    """The measure on the texts that are asked for, and the results: what is in OUT.json already, or none yet."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    texts = texts_of(asked.work / "source", asked.texts, asked.pieces, asked.tokens)
    result: dict[str, Any] = {"model": asked.name, "date": str(date.today()), "texts": [name for name, _ in texts]}
    result |= {"tokens": asked.tokens, "rows": {}}
    if asked.out.exists():  # rows that are there are not measured again
        result = json.loads(asked.out.read_text())
    return Measure(asked.work, texts), result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--name")
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--formats", default=",".join([*ROUNDINGS, *LLAMA_CPP]))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--converter", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--pieces", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    asked = parser.parse_args()
    asked.formats = asked.formats.split(",")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with TemporaryDirectory() as scratch:
        asked.work = asked.work or Path(scratch)
        if not (asked.work / "source").exists():
            make_source(asked.model, asked.work / "source")
        results = Results(asked.out)
        texts = texts_of(asked.work / "source", asked.texts, asked.pieces, asked.tokens)
        describe(results, asked, texts)
        measure = Measure(asked.work, texts)
        for variant in asked.variants.split(","):
            refused = make_variant(asked.work, variant)
            if refused:
                results.content["rows"][variant] = {"refused": refused}
                results.write()
            else:
                measure_variant(asked, results, measure, variant)


if __name__ == "__main__":
    main()
