"""Whether two checkouts of this repository do the same: demo, plan, fold and verify of ten families, byte by byte.

    git worktree add ../before d9bc24e
    python docs/experiments/same_bytes.py ../before . --save docs/benchmarks/same_bytes.json

Tiny models with gains far from one are made once, by this checkout's `tests/support`. Each checkout then runs its own
commands on them, in a process of its own. Files of the outputs are compared by their bytes, what commands print with
--json and the records value by value. What differs on purpose is listed in `ON_PURPOSE` with the reason; anything else
makes the exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).resolve()
FAMILIES = (
    "deepseek_v3",  # latent attention, experts
    "gemma2",  # 1 + w, the tie is hard-wired: the final norm is kept
    "gemma3",  # 1 + w, a nested config
    "llama",
    "mamba2",  # gated norms
    "minimax",  # norms that the residual stream reads
    "qwen3_moe",  # experts that are merged when they are loaded
    "qwen3_next",  # gains repeated over heads
    "smollm3",  # tied: the output head gets weights of its own
    "t5",  # encoder and decoder
)
# Where values may differ, and why: expressions of "command or file: path within it".
ON_PURPOSE: dict[str, str] = {}
VOLATILE = re.compile(r"\b(seconds|date|command|python|bytes_per_second|recorded)\b|verified_seconds")


def work(sources: Path, families: list[str]) -> None:
    """Run every command of the checkout that is imported here, in this folder."""
    import torch

    from flashnorm_cli.cli import main

    torch.set_num_threads(1)

    def run(name: str, *arguments: str) -> None:
        out, err = io.StringIO(), io.StringIO()
        code: object = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main([*arguments])
            except SystemExit as stopped:
                code = stopped.code
        try:
            printed: object = json.loads(out.getvalue())
        except ValueError:
            printed = out.getvalue()
        Path(f"{name}.printed.json").write_text(json.dumps({"code": code, "out": printed, "err": err.getvalue()}))
        print(name, code, err.getvalue().strip()[:200], file=sys.stderr, flush=True)

    run("demo", "demo", "demo", "--json")
    for family in families:
        source = str(sources / family)
        run(f"{family}.plan", "plan", source, "--json")
        run(f"{family}.fold", "fold", source, f"{family}.identity", "--json")
        run(f"{family}.dropped", "fold", source, f"{family}.dropped", "--layout", "dropped", "--json")
        run(f"{family}.verify", "verify", f"{family}.identity", "--source", source, "--json")


def sources_in(folder: Path, families: list[str]) -> None:
    sys.path.insert(0, str(HERE.parents[2] / "tests" / "support"))
    import families as small  # type: ignore[import-not-found]
    import torch

    torch.set_num_threads(1)
    for family in families:
        model = small.build(family, seed=0)
        small.randomize_gains(model, seed=1)
        small.save(model, folder / family, dtype=torch.bfloat16, max_shard_size="200KB")


def differences(a: Any, b: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, before, after) of everything in which two JSON values differ; lists of other lengths differ as a whole."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            yield from differences(a.get(key, "(none)"), b.get(key, "(none)"), f"{at}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for one, other in zip(a, b, strict=True):
            yield from differences(one, other, f"{at}[]")
    elif a != b:
        yield at, a, b


def compare(before: Path, after: Path) -> tuple[dict[str, Any], list[str]]:
    """What is the same, what differs and why; and what differs for no reason that is listed."""
    names = sorted({str(p.relative_to(root)) for root in (before, after) for p in root.rglob("*") if p.is_file()})
    same, on_purpose, strange = 0, dict[str, dict[str, Any]](), []

    def differs(what: str, a: Any, b: Any) -> None:
        reason = next((why for pattern, why in ON_PURPOSE.items() if re.search(pattern, what)), None)
        if reason is None:
            strange.append(f"{what}: {str(a)[:200]} -> {str(b)[:200]}")
        else:
            found = on_purpose.setdefault(reason, {"places": 0, "for example": what})
            found["places"] += 1

    for name in names:
        a, b = before / name, after / name
        if not a.exists() or not b.exists():
            differs(name, *("there" if path.exists() else "not there" for path in (a, b)))
        elif _hash(a) == _hash(b):
            same += 1
        elif name.endswith(".json"):
            one, other = (
                json.loads(p.read_text().replace(str(p), "").replace(str(r), "")) for p, r in ((a, before), (b, after))
            )
            found = [d for d in differences(one, other) if not VOLATILE.search(d[0])]
            same += not found
            for path, old, new in found:
                differs(f"{name}: {path}", old, new)
        else:
            differs(name, _hash(a)[:12], _hash(b)[:12])
    tensors = sum(name.endswith(".safetensors") for name in names)
    return {"files": len(names), "of them shards": tensors, "same": same, "on purpose": on_purpose}, strange


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--save", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for the outputs, instead of a temporary one")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.before, options.families)
        return
    with TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        sources_in(folder / "sources", options.families)
        commits = {}
        for name, tree in (("before", options.before.resolve()), ("after", options.after.resolve())):
            (folder / name).mkdir(parents=True, exist_ok=True)
            environment = os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
            arguments = [str(folder / "sources"), ".", "--work", "--families", *options.families]
            subprocess.run([sys.executable, HERE, *arguments], cwd=folder / name, env=environment, check=True)
            git = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
            commits[name] = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
        result, strange = compare(folder / "before", folder / "after")
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    result = {**commits, "date": date, **versions, "families": options.families, **result, "otherwise": strange}
    print(json.dumps(result, indent=1))
    if options.save:
        options.save.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(1 if strange else 0)


if __name__ == "__main__":
    main()
