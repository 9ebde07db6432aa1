"""A model rotated in memory, on a processor and on a GPU, beside its checkpoint rotated on disk: time and values.

    python docs/benchmarks/rotate_in_memory.py FOLDER --json result.json

The checkpoint `llama` of fold_speed.py is made in FOLDER (1.1 billion bf16 parameters, hidden size 2048), and rotated
by `fold` there; then it is loaded on each device and rotated by `fold_model_`, three times. `differ` are the values
that are not those on disk, of `values`; `steps` the most by which one differs, in steps of bf16.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from pathlib import Path
from typing import Any

import fold_speed
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from flashnorm_cli import fold, fold_model_


def compared(model: torch.nn.Module, folded: Path) -> dict[str, int]:
    """Each tensor of the rotated checkpoint with the model's."""
    mine = model.state_dict()
    differ = steps = values = 0
    for shard in sorted(folded.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                # The bits of a bf16 number, in the order of the numbers: neighbours are one apart.
                here, there = (
                    torch.where(bits < 0, -32768 - bits, bits)
                    for bits in (t.view(torch.int16).int() for t in (mine[name].cpu(), file.get_tensor(name)))
                )
                apart = (here - there).abs()
                values += apart.numel()
                differ += int(apart.count_nonzero())
                steps = max(steps, int(apart.max()))
    return {"values": values, "differ": differ, "steps": steps}


def measured(device: str, source: Path, folded: Path) -> dict[str, Any]:
    seconds = []
    for _ in range(3):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).to(device)
        start = time.perf_counter()
        fold_model_(model, rotate="hadamard")
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(round(time.perf_counter() - start, 2))
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    return {"device": name, "seconds": seconds, **compared(model, folded)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    source, folded = args.folder / "llama", args.folder / "llama-rotated"
    if not source.exists():
        fold_speed.make_checkpoint(source, "llama")
    if not folded.exists():
        fold(source, folded, rotate="hadamard")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    result = {
        "command": "python docs/benchmarks/rotate_in_memory.py FOLDER",
        "date": date.today().isoformat(),
        "machine": fold_speed.machine(args.folder),
        "devices": {device: measured(device, source, folded) for device in devices},
    }
    print(json.dumps(result["devices"], indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
