"""What plan, fold and verify cost on models that cost nothing: start-up, of two checkouts side by side.

    python docs/benchmarks/startup.py startup.json OTHER_CHECKOUT

Each round runs each command on each model with the other checkout and with this one, in turns; the file is
written after each pair. Each run is a process of its own.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from cost import COMMANDS, SMALL, save

ROUNDS = 3  # startup.json was stopped in its first
HERE = Path(__file__).parents[2]
CHOSEN = ("plan", "fold", "verify weights")


def models() -> dict[str, transformers.PretrainedConfig]:
    text = {**SMALL, "intermediate_size": 128, "num_hidden_layers": 2}
    moe = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts_per_tok": 2}
    return {
        "llama": transformers.LlamaConfig(**text, tie_word_embeddings=False),
        "gemma2": transformers.Gemma2Config(**text),
        "qwen2_moe": transformers.Qwen2MoeConfig(**text, **moe, num_experts=8, tie_word_embeddings=False),
    }


def cpu_seconds(arguments: tuple[str, ...], folder: Path, checkout: Path) -> float:
    """CPU seconds of all threads of a run, user and system."""
    env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "flashnorm_cli", *arguments], cwd=folder, env=env)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 4):
        raise SystemExit(f"{arguments}: exit {process.returncode}")
    return round(usage.ru_utime + usage.ru_stime, 2)


def commit(checkout: Path) -> str:
    """What a checkout, or a folder of the same name as its commit, holds."""
    done = subprocess.run(["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if (checkout / ".git").exists() else checkout.name


def main(path: Path, other: Path) -> None:
    runs: dict[str, dict[str, dict[str, list[float]]]] = {}
    checkouts = {"before": other.absolute(), "after": HERE}
    with tempfile.TemporaryDirectory() as place:
        for name, config in models().items():
            save(config, Path(place) / name / "source", 1)
        for _ in range(ROUNDS):
            for name in models():
                for command in CHOSEN:
                    for which, checkout in checkouts.items():
                        seconds = cpu_seconds(COMMANDS[command], Path(place) / name, checkout)
                        runs.setdefault(name, {}).setdefault(command, {}).setdefault(which, []).append(seconds)
                    path.write_text(json.dumps(facts(path, checkouts) | {"runs": runs}, indent=1) + "\n")


def facts(path: Path, checkouts: dict[str, Path]) -> dict[str, object]:
    return {
        "command": f"python docs/benchmarks/startup.py {path.name} OTHER_CHECKOUT",
        "commits": {which: commit(checkout) for which, checkout in checkouts.items()},
        "date": datetime.date.today().isoformat(),
        "processors": os.cpu_count(),
        "load": os.getloadavg()[1],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "method": "user and system CPU seconds of each run, OMP_NUM_THREADS=1, before and after in turns",
    }


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
