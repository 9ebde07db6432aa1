"""What plan, fold and verify cost as models get deeper, wider in experts, and spread over more shards.

    python docs/benchmarks/cost.py cost.json

Makes small random checkpoints that have the number of layers, experts and shards of large ones, runs each command as
a process of its own, and writes its CPU seconds (of all its threads) and its peak resident memory. The first
row is a model of one layer: what is left of it is start-up, most of it the import of transformers.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "head_dim": 16}
LAYERS, EXPERTS = (1, 8, 16, 32, 64, 128, 256), (8, 32, 64, 128, 256)
SHARDS = 171
COMMANDS = {
    "plan": ("plan", "source", "--quiet"),
    "fold": ("fold", "source", "folded", "--overwrite", "--quiet"),
    "verify weights": ("verify", "folded", "--source", "source", "--level", "weights", "--no-record", "--quiet"),
    "verify layers": ("verify", "folded", "--source", "source", "--level", "layers", "--no-record", "--quiet"),
    "verify logits": ("verify", "folded", "--source", "source", "--level", "logits", "--no-record", "--quiet"),
}


def models() -> dict[str, tuple[transformers.PretrainedConfig, int]]:
    """Configs by name, and in how many shards to save them."""
    llama = {**SMALL, "intermediate_size": 128, "tie_word_embeddings": False}
    moe = {**llama, "moe_intermediate_size": 32, "num_hidden_layers": 4, "num_experts_per_tok": 2}
    found = {f"{n} layers": (transformers.LlamaConfig(**llama, num_hidden_layers=n), 1) for n in LAYERS}
    found |= {f"{n} experts": (transformers.Qwen3MoeConfig(**moe, num_experts=n), 1) for n in EXPERTS}
    found[f"{SHARDS} shards, 61 layers, 64 experts"] = (
        transformers.Qwen3MoeConfig(**{**moe, "num_hidden_layers": 61}, num_experts=64),
        SHARDS,
    )
    return found


def save(config: transformers.PretrainedConfig, folder: Path, shards: int) -> int:
    """A random model with gains far from one; returns its bytes."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.4, 1.8)
    size = sum(p.numel() * 2 for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size if shards == 1 else max(size // shards, 1) + 20_000)
    return size


def measure(arguments: tuple[str, ...], folder: Path) -> dict[str, float]:
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "flashnorm_cli", *arguments], cwd=folder)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 4):
        raise SystemExit(f"{arguments}: exit {process.returncode}")
    return {
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "wall_s": round(time.monotonic() - start, 2),
        "peak_mb": round(usage.ru_maxrss / 1024),
    }


def main(path: Path) -> None:
    rows = []
    for name, (config, shards) in models().items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            size = save(config, folder / "source", shards)
            files = len(list((folder / "source").glob("*.safetensors")))
            row = {"model": name, "bytes": size, "shards": files}
            row |= {command: measure(arguments, folder) for command, arguments in COMMANDS.items()}
            rows.append(row)
            print(name, files, {command: row[command]["cpu_s"] for command in COMMANDS}, flush=True)
            facts = {
                "command": f"python docs/benchmarks/cost.py {path.name}",
                "date": datetime.date.today().isoformat(),
                "processors": os.cpu_count(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "method": "each command once, as a process; CPU seconds of all its threads, peak resident memory",
                "rows": rows,
            }
            path.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    main(Path(sys.argv[1]))
