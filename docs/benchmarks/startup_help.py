"""What `flashnorm --help` costs in two checkouts, in turns, each run in a process of its own.

python docs/benchmarks/startup_help.py startup_help.json OTHER_CHECKOUT
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 20
HERE = Path(__file__).parents[2]


def run(checkout: Path, folder: str) -> tuple[float, float]:
    """CPU seconds (user and system) and seconds by the clock."""
    env = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": ""}  # "" is off: as installed
    began = time.monotonic()
    command = [sys.executable, "-m", "flashnorm_cli", "--help"]
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command}: exit {process.returncode}")
    return usage.ru_utime + usage.ru_stime, time.monotonic() - began


def commit(checkout: Path) -> str:
    return subprocess.check_output(["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], text=True).strip()


def main(path: Path, other: Path) -> None:
    checkouts = {"before": other.absolute(), "after": HERE}
    found: dict[str, list[tuple[float, float]]] = {which: [] for which in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        for checkout in checkouts.values():
            run(checkout, folder)  # writes the bytecode
        for _ in range(ROUNDS):
            for which, checkout in checkouts.items():
                found[which].append(run(checkout, folder))
    columns = {"cpu_seconds": 0, "seconds": 1}
    runs = {key: {w: [round(r[i], 3) for r in rows] for w, rows in found.items()} for key, i in columns.items()}
    facts = {
        "command": f"python docs/benchmarks/startup_help.py {path.name} OTHER_CHECKOUT",
        "commits": {which: commit(checkout) for which, checkout in checkouts.items()},
        "date": datetime.date.today().isoformat(),
        "processors": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "medians": {key: {w: round(statistics.median(v), 3) for w, v in each.items()} for key, each in runs.items()},
        "runs": runs,
    }
    path.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts["medians"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
