"""Level runtime: source and folded checkpoint in the engine that will serve them, vLLM or llama.cpp.

Three models run one after the other, each in a process of its own: the source in float32, which continues the prompts
greedily and is the reference; the source in its own dtype, which shows the engine's noise; and the folded checkpoint in
its own dtype. The last two are asked for the log-probability of the reference's token after each of its prefixes, so
that texts cannot part. The mean distance of the folded checkpoint from the reference may be twice the noise, since its
weights are rounded once more, plus 1e-4: what float32 itself leaves undecided.

llama.cpp runs by way of `xllamacpp`, a wheel with its binaries. The converter comes with llama.cpp's sources, which
FLASHNORM_LLAMA_CPP names.

    python -m flashnorm_cli.proof.runtimes JOB RESULT    # the process of one model
"""

from __future__ import annotations

import json
import math
import os
import sys
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flashnorm_cli.checkpoint.model import Progress
from flashnorm_cli.proof.result import Finding, LevelResult
from flashnorm_cli.runtimes.llama_cpp import CONVERTER, LLAMA_CPP, converted, run_llama_cpp
from flashnorm_cli.runtimes.process import NEW_TOKENS, PROMPT_TOKENS, PROMPTS, EngineError, Tops, call
from flashnorm_cli.runtimes.vllm.engine import run_vllm

NOISE_FACTOR, FLOAT32_TOLERANCE = 2.0, 1e-4
PACKAGES = {"vllm": ("vllm", "vLLM"), "gguf": ("xllamacpp", "llama.cpp")}


def compare_runtime(
    name: str,
    source: Path,
    folded: Path,
    prompts: list[list[int]],
    dtype: str,
    report: Progress,
    trust_remote_code: bool = False,
) -> LevelResult:
    """Run both checkpoints in an engine.

    Args:
        name: "vllm" or "gguf".
        prompts: token ids; the first few are used, and cut.
        dtype: what the checkpoints run in: "float32", "bfloat16" or "float16".

    figures: `engine`, `version`, `prompts`, `tokens` (positions that were compared), `same_tokens` (where the most
    likely token is the source's), `logprob_difference` (mean distance from the float32 reference, in nats), `noise`
    (that of the source in its own dtype), `tolerance`. From vLLM also `norms` (those that carry a weight) and
    `norms_without_weight` (how many of them run without it, which takes this package's plugin).
    """
    package, title = PACKAGES[name]
    level = f"runtime:{name}"
    if reason := _not_installed(name):
        return LevelResult(level, "skipped", reason=reason)
    asked = [prompt[:PROMPT_TOKENS] for prompt in prompts[:PROMPTS]]
    with TemporaryDirectory() as scratch:

        def run(folder: Path, what: str, dtype: str, follow: list[list[int]] | None) -> dict[str, Any]:
            report(0, 0, f"{title}: the {what} in {dtype}")
            job = {
                "engine": name,
                "model": str(converted(folder, dtype, Path(scratch)) if name == "gguf" else folder.resolve()),
                "dtype": dtype,
                "prompts": asked,
                "follow": follow,
                "trust_remote_code": trust_remote_code,
            }
            return _in_a_process(job, Path(scratch))

        try:
            reference = run(source, "source", "float32", None)
            tokens: list[list[int]] = reference["tokens"]
            plain = reference if dtype == "float32" else run(source, "source", dtype, tokens)
        except EngineError as error:
            return LevelResult(level, "skipped", reason=f"{title} does not run the source: {error}")
        try:
            mine = run(folded, "folded checkpoint", dtype, tokens)
        except EngineError as error:
            finding = Finding(title, f"does not run the folded checkpoint: {error}")
            return LevelResult(level, "failed", {"engine": title, "version": _version(package)}, (finding,))
    figures, findings = judge(reference["tops"], plain["tops"], mine["tops"], tokens)
    figures = {"engine": title, "version": _version(package), "prompts": len(asked), **figures, **mine["facts"]}
    return LevelResult(level, "failed" if findings else "passed", figures, findings)


def judge(
    reference: list[Tops], plain: list[Tops], mine: list[Tops], tokens: list[list[int]]
) -> tuple[dict[str, Any], tuple[Finding, ...]]:
    """Compare the log-probabilities that three models give to the reference's tokens.

    Each of the first three holds, per prompt and position, the most likely tokens with their log-probabilities.
    """

    def distance(tops: list[Tops], i: int, t: int) -> float:
        """How far the log-probability of the reference's token is from the reference's."""
        token, top = tokens[i][t], tops[i][t]
        # A token that is not among the most likely is at most as likely as the last of them.
        found = top.get(token, min(top.values(), default=-math.inf))
        gap = abs(found - reference[i][t][token])
        return math.inf if math.isnan(gap) else gap

    places = [(i, t) for i, row in enumerate(tokens) for t in range(len(row))]
    noise = sum(distance(plain, i, t) for i, t in places) / len(places)
    each = {place: distance(mine, *place) for place in places}
    difference = sum(each.values()) / len(places)
    tolerance = NOISE_FACTOR * noise + FLOAT32_TOLERANCE
    same = sum(_likeliest(mine[i][t]) == _likeliest(plain[i][t]) for i, t in places)
    figures = {
        "tokens": len(places),
        "same_tokens": same,
        "logprob_difference": difference,
        "noise": noise,
        "tolerance": tolerance,
    }
    if difference <= tolerance:
        return figures, ()
    i, t = max(each, key=lambda place: each[place])
    message = (
        f"its log-probabilities are off by {difference:.2e} nats (mean; the source's own dtype: {noise:.2e}; "
        f"{tolerance:.2e} is allowed), most of all at token {t + 1} after prompt {i + 1}: {each[i, t]:.2e}"
    )
    return figures, (Finding("folded checkpoint", message, difference),)


def _likeliest(top: dict[int, float]) -> int | None:
    return max(top, key=lambda token: top[token], default=None)


# ---- the engine's process --------------------------------------------------------------------------------------------


def _not_installed(name: str) -> str | None:
    """What to install, or None where the engine is there."""
    package, title = PACKAGES[name]
    if find_spec(package) is None:
        more = f", and set {LLAMA_CPP} to llama.cpp's sources" if name == "gguf" else ""
        return f"{title} is not installed: pip install {package}{more}"
    if name == "gguf":
        where = os.environ.get(LLAMA_CPP)
        if not where or not (Path(where).expanduser() / CONVERTER).is_file():
            return f"set {LLAMA_CPP} to the folder of llama.cpp's sources, which holds {CONVERTER}"
        if find_spec("gguf") is None:
            return "llama.cpp's converter needs the package gguf: pip install gguf"
    return None


def _version(package: str) -> str:
    """The version of the distribution that a module comes from: vLLM's CPU build has a name of its own."""
    names = packages_distributions().get(package)
    return version(names[0]) if names else "?"


def _in_a_process(job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Run one model in a process of its own: a crash of the engine is a message, and its memory is given back."""
    paths = scratch / "job.json", scratch / "result.json"
    paths[0].write_text(json.dumps(job))
    paths[1].unlink(missing_ok=True)
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    call([sys.executable, "-m", __name__, *map(str, paths)], environment)
    if not paths[1].is_file():
        raise EngineError("it left no result")
    result: dict[str, Any] = json.loads(paths[1].read_text())
    result["tops"] = [[{int(i): p for i, p in top.items()} for top in row] for row in result["tops"]]
    return result


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    """In the process: the reference continues the prompts, the others follow its tokens."""
    top = {"vllm": run_vllm, "gguf": run_llama_cpp}[job["engine"]](job)
    prompts: list[list[int]] = job["prompts"]
    tokens: list[list[int]] = job["follow"] or [[] for _ in prompts]
    tops: list[Tops] = [[] for _ in prompts]
    if job["follow"]:
        places = [(i, t) for i, row in enumerate(tokens) for t in range(len(row))]
        for (i, _), found in zip(places, top([prompts[i] + tokens[i][:t] for i, t in places]), strict=True):
            tops[i].append(found)
    else:
        for _ in range(NEW_TOKENS):
            for i, found in enumerate(top([p + t for p, t in zip(prompts, tokens, strict=True)])):
                tops[i].append(found)
                tokens[i].append(max(found, key=lambda token: found[token]))
    return {"tokens": tokens, "tops": tops, "facts": job.get("facts", {})}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(_answer(json.loads(Path(sys.argv[1]).read_text()))))
