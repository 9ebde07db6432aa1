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
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).resolve()
DONE = ".done"  # holds the commit that has worked in a folder
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
ON_PURPOSE = {
    r"^(demo\.|\w+\.(fold|dropped|plan|verify)\.(?!.*\.levels))printed\.json: \.out\.\w+(\[\])?$": (
        "what commands print with --json has one schema for all of them (docs/json.md)"
    ),
    r"^deepseek_v3\.(?!.*\.verify\.levels|verify\.printed)": (
        "config.json announces a multi-token prediction head (num_nextn_predict_layers), which reads hidden states: so "
        "the final norm is kept, and lm_head and the flag follow (docs/limits.md)"
    ),
    r"\.levels\.layers\.figures": (
        "level layers draws other activations, 64 rows of them, and looks twice at what is close to the limit "
        "(docs/benchmarks/false_alarms.json)"
    ),
    r"\.levels\.logits\.figures\.(judged|from_disk)": "new figures: positions judged; whether weights came from disk",
    r"\.verdict$": "three verdicts instead of two (docs/verify.md)",
    r"\.notes(\[\])?$": "a note says which hidden states come out without the final norm's gain",
    r"^deepseek_v3\.": "figures and hashes of the fold that keeps its final norm",
}
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


@dataclass(frozen=True)
class Side:
    """A checkout, and the folder that it has worked in."""

    tree: Path
    folder: Path

    def values(self, name: str) -> Any:
        """A JSON file, without the places of checkout and folder."""
        text = (self.folder / name).read_text()
        value = json.loads(text.replace(str(self.folder), "").replace(str(self.tree), ""))
        if name.endswith(".plan.printed.json") and "plan" in value["out"]:  # since commands have one schema
            return {**value, "plan": value["out"]["plan"]}
        if name.endswith(".plan.printed.json"):
            return {**value, "plan": {k: v for k, v in value["out"].items() if k not in ("left_out", "stream")}}
        return value


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


def compare(before: Side, after: Side) -> tuple[dict[str, Any], list[str]]:
    """What is the same, what differs and why; and what differs for no reason that is listed."""
    files = (p.relative_to(side.folder) for side in (before, after) for p in side.folder.rglob("*") if p.is_file())
    names = sorted({str(name) for name in files} - {DONE})
    same, on_purpose, strange = 0, dict[str, dict[str, Any]](), list[str]()

    def differs(what: str, a: Any, b: Any) -> None:
        reason = next((why for pattern, why in ON_PURPOSE.items() if re.search(pattern, what)), None)
        if reason is None:
            strange.append(f"{what}: {str(a)[:200]} -> {str(b)[:200]}")
        else:
            found = on_purpose.setdefault(reason, {"places": 0, "for example": what})
            found["places"] += 1

    for name in names:
        a, b = before.folder / name, after.folder / name
        if not a.exists() or not b.exists():
            differs(name, *("there" if path.exists() else "not there" for path in (a, b)))
        elif _hash(a) == _hash(b):
            same += 1
        elif name.endswith(".json"):
            found = [d for d in differences(before.values(name), after.values(name)) if not VOLATILE.search(d[0])]
            same += not found
            for path, old, new in found:
                differs(f"{name}: {path}", old, new)
        else:
            differs(name, _hash(a)[:12], _hash(b)[:12])
    shards = sum(name.endswith(".safetensors") for name in names)
    return {"files": len(names), "of them shards": shards, "same": same, "on purpose": on_purpose}, strange


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--save", type=Path)
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder for all of it; a commit's work that is there is not redone",
    )
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.before, options.families)
        return
    with TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        if not (folder / "sources").exists():
            sources_in(folder / "sources", options.families)
        commits = {}
        sides = [Side(t.resolve(), folder / n) for n, t in (("before", options.before), ("after", options.after))]
        for side in sides:
            side.folder.mkdir(parents=True, exist_ok=True)
            git = ["git", "-C", str(side.tree), "rev-parse", "--short", "HEAD"]
            commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
            commits[side.folder.name] = commit
            done = side.folder / DONE
            if done.exists() and done.read_text() == commit:
                continue
            environment = os.environ | {"PYTHONPATH": str(side.tree), "HF_HUB_OFFLINE": "1"}
            arguments = [str(folder / "sources"), ".", "--work", "--families", *options.families]
            subprocess.run([sys.executable, HERE, *arguments], cwd=side.folder, env=environment, check=True)
            done.write_text(commit)
        result, strange = compare(*sides)
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    result = {**commits, "date": date, **versions, "families": options.families, **result, "otherwise": strange}
    print(json.dumps(result, indent=1))
    if options.save:
        options.save.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(1 if strange else 0)


if __name__ == "__main__":
    main()
