"""Level runtime: source and folded checkpoint in the engine that will serve them, vLLM or llama.cpp.

Three models run one after the other, each in a process of its own: the source in float32, which is the reference; the
source in its own dtype, which shows the engine's noise; and the folded checkpoint in its own dtype. Each says, after
every token of some text, how likely the next tokens are; compared is the log-probability of the one that the reference
finds most likely. The mean distance of the folded checkpoint from the reference may be three times the noise, plus
1e-4: what float32 itself leaves undecided. Engines keep activations in float32 where they can, so that the source has
few roundings, and a fold adds that of its weights: in the output head it is drawn for each token of the vocabulary
apart, and does not cancel as the rounding of the one activation does. SmolLM2-135M has 2.0 times in llama.cpp.

llama.cpp runs by way of `xllamacpp`, a wheel with its binaries. The converter comes with llama.cpp's sources, which
FLASHNORM_LLAMA_CPP names.

    python -m flashnorm_cli.proof.engines JOB RESULT    # the process of one model
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
from flashnorm_cli.proof.figures import RuntimeFigures
from flashnorm_cli.proof.result import Finding, LevelResult
from flashnorm_cli.runtimes.llama_cpp import CONVERTER, LLAMA_CPP, converted, run_llama_cpp
from flashnorm_cli.runtimes.process import POSITIONS, PROMPT_TOKENS, EngineError, Tops, in_a_process
from flashnorm_cli.runtimes.vllm.engine import run_vllm

NOISE_FACTOR, FLOAT32_TOLERANCE = 3.0, 1e-4
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
        prompts: token ids; as many as make `POSITIONS` positions are used, and cut.
        dtype: what the checkpoints run in: "float32", "bfloat16" or "float16".

    figures: `RuntimeFigures`; that norms run without their weight takes this package's plugin in vLLM.
    """
    package, title = PACKAGES[name]
    level = f"runtime:{name}"
    if reason := _not_installed(name):
        return LevelResult(level, "skipped", reason=reason)
    asked = _enough(prompts)
    with TemporaryDirectory() as scratch:

        def run(folder: Path, what: str, dtype: str) -> dict[str, Any]:
            report(0, 0, f"Running the {what} in {title} in {dtype}")
            job = {
                "engine": name,
                "model": str(converted(folder, dtype, Path(scratch)) if name == "gguf" else folder.resolve()),
                "dtype": dtype,
                "prompts": asked,
                "trust_remote_code": trust_remote_code,
            }
            return _in_a_process(job)

        try:
            reference = run(source, "source", "float32")
            if not all(top for row in reference["tops"] for top in row):
                raise EngineError("it gives no log-probabilities")
            plain = reference if dtype == "float32" else run(source, "source", dtype)
        except EngineError as error:
            return LevelResult(level, "skipped", reason=f"{title} does not run the source: {error}")
        try:
            answer = run(folded, "folded checkpoint", dtype)
        except EngineError as error:
            finding = Finding(title, f"does not run the folded checkpoint: {error}")
            return LevelResult(level, "failed", RuntimeFigures(title, _version(package)), (finding,))
    tokens = [[_likeliest(top) for top in row] for row in reference["tops"]]
    measured, findings = judge(reference["tops"], plain["tops"], answer["tops"], tokens)
    figures = RuntimeFigures(title, _version(package), len(asked), **measured, **answer["facts"])
    return LevelResult(level, "failed" if findings else "passed", figures, findings)


def _enough(prompts: list[list[int]]) -> list[list[int]]:
    """The first prompts, cut to `PROMPT_TOKENS`, that make `POSITIONS` positions together."""
    asked: list[list[int]] = []
    for prompt in prompts:
        left = POSITIONS - sum(map(len, asked))
        if left > 0:
            asked.append(prompt[: min(PROMPT_TOKENS, left)])
    return asked


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
        f"{tolerance:.2e} is allowed), most of all at token {t + 1} of prompt {i + 1}: {each[i, t]:.2e}"
    )
    return figures, (Finding("folded checkpoint", message, difference),)


def _likeliest(top: dict[int, float]) -> int:
    """The most likely token; -1 where the engine said nothing."""
    return max(top, key=lambda token: top[token], default=-1)


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


def _in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    result = in_a_process(__name__, job)
    result["tops"] = [[{int(i): p for i, p in top.items()} for top in row] for row in result["tops"]]
    return result


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    """In the process: the most likely next tokens after every prefix of every prompt."""
    tops = {"vllm": run_vllm, "gguf": run_llama_cpp}[job["engine"]](job)
    return {"tops": tops(job["prompts"]), "facts": job.get("facts", {})}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(_answer(json.loads(Path(sys.argv[1]).read_text()))))
