"""The levels of `verify`, one after the other."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import torch

from flashnorm_cli._version import __version__
from flashnorm_cli.checkpoint.model import Progress
from flashnorm_cli.proof.pairing import Pair
from flashnorm_cli.proof.result import LEVELS, LevelResult

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass
class Levels:
    """Runs levels; `hashes` holds the sha256 of each folded shard once one has read it."""

    pair: Pair
    report: Progress
    workers: int
    device: str
    max_algebra: float
    max_ratio: float
    trust_remote_code: bool = False
    dtype: torch.dtype | None = None
    text: Path | None = None
    token_ids: Path | None = None
    insist: bool = False
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)

    def all(
        self, levels: Collection[str], runtimes: Sequence[str], tasks: Sequence[str], limit: int | None
    ) -> list[LevelResult]:
        results: list[LevelResult] = []
        for level in LEVELS:
            if level not in levels:
                continue
            if level == "logits" and not self.insist and any(r.status == "failed" for r in results):
                reason = "the files are not right; --level logits runs it all the same"
                results.append(LevelResult(level, "skipped", reason=reason))
                continue
            results.append(self._timed(level, getattr(self, f"_{level}")))
        if "logits" in levels and self.device.startswith("cuda"):
            results.append(self._timed("kernels", self._kernels))
        results += [self._timed(f"runtime:{name}", partial(self._runtime, name)) for name in runtimes]
        if tasks:
            results.append(self._timed("eval", partial(self._eval, tasks, limit)))
        return results

    def _timed(self, level: str, run: Callable[[], LevelResult]) -> LevelResult:
        started = time.monotonic()
        result = run()
        return dataclasses.replace(result, level=level, seconds=round(time.monotonic() - started, 2))

    def _weights(self) -> LevelResult:
        from flashnorm_cli.proof.weights import check_weights

        result, self.hashes = check_weights(self.pair, self.workers, self.report)
        return result

    def _layers(self) -> LevelResult:
        from flashnorm_cli.proof.layers import check_layers

        return check_layers(self.pair, self.max_ratio, self.device, self.report)

    def _logits(self) -> LevelResult:
        from flashnorm_cli.proof.logits import check_logits
        from flashnorm_cli.proof.models import own_dtype
        from flashnorm_cli.proof.prompts import read_prompts

        return check_logits(
            self.pair,
            read_prompts(self.pair.source, self.text, self.token_ids, self.trust_remote_code),
            dtype=self.dtype or own_dtype(self.pair.source),
            device=self.device,
            max_algebra=self.max_algebra,
            max_ratio=self.max_ratio,
            trust_remote_code=self.trust_remote_code,
            insist=self.insist,
            report=self.report,
        )

    def _kernels(self) -> LevelResult:
        from flashnorm_cli.proof.kernels import check_kernels
        from flashnorm_cli.proof.models import own_dtype

        return check_kernels(self.pair, self.dtype or own_dtype(self.pair.source), self.device)

    def _runtime(self, name: str) -> LevelResult:
        from flashnorm_cli.proof.engines import compare_runtime
        from flashnorm_cli.proof.prompts import read_prompts

        prompts = read_prompts(self.pair.source, self.text, self.token_ids, self.trust_remote_code)
        return compare_runtime(
            name,
            self.pair.source.folder,
            self.pair.folded.folder,
            [list(prompt) for prompt in prompts.ids],
            self._own_dtype(),
            self.report,
            self.trust_remote_code,
        )

    def _own_dtype(self) -> str:
        from flashnorm_cli.proof.models import own_dtype

        return str(self.dtype or own_dtype(self.pair.source)).removeprefix("torch.")

    def _eval(self, tasks: Sequence[str], limit: int | None) -> LevelResult:
        from flashnorm_cli.proof.evaluate import compare_eval

        folders = self.pair.source.folder, self.pair.folded.folder
        return compare_eval(list(tasks), *folders, self._own_dtype(), self.device, limit, self.report)


def environment(device: str, command: str | None) -> dict[str, str]:
    import platform

    import transformers

    name = torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") else platform.machine()
    return {
        "flashnorm": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device} ({name})",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command or "",
    }
