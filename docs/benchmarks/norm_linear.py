"""norm_linear on the products of 1B, 3B, 8B and 70B / 8 models, beside norm + library and a read of the matrix.

    python docs/benchmarks/norm_linear.py docs/benchmarks/norm_linear.json

Needs a GPU. Choices are measured first, into the cache of the user. Raw turns are in the file.
"""

import json
import sys
import time
from pathlib import Path

import torch

from flashnorm_cli.bench.kernels import record
from flashnorm_cli.bench.linear import line_of, sweep

if __name__ == "__main__":
    start = time.perf_counter()
    rows = sweep(on_result=lambda row: print(line_of(row), flush=True))
    data = record("python docs/benchmarks/norm_linear.py", [], device="cuda", model=None, models=[])
    data |= {"seconds": round(time.perf_counter() - start, 1), "norm_linear": rows}
    Path(sys.argv[1]).write_text(json.dumps(data, indent=1) + "\n")
    print(torch.cuda.get_device_name(), data["seconds"], "s")
