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
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flashnorm_cli.checkpoint.open import Progress
from flashnorm_cli.errors import FlashNormError
from flashnorm_cli.proof.result import Finding, LevelResult

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, TOP = 6, 48, 12, 20
NOISE_FACTOR, FLOAT32_TOLERANCE = 2.0, 1e-4
SECONDS = 3600.0  # for one model
LLAMA_CPP = "FLASHNORM_LLAMA_CPP"
CONVERTER = "convert_hf_to_gguf.py"
PACKAGES = {"vllm": ("vllm", "vLLM"), "gguf": ("xllamacpp", "llama.cpp")}
OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}

# After each prefix, the most likely next tokens with their log-probabilities.
Tops = list[dict[int, float]]


class EngineError(FlashNormError):
    """The engine did not run a model; the message is its own last word."""


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
                "model": str(_converted(folder, dtype, Path(scratch)) if name == "gguf" else folder.resolve()),
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


def _converted(folder: Path, dtype: str, scratch: Path) -> Path:
    """A checkpoint as GGUF, by llama.cpp's own converter."""
    out = scratch / "model.gguf"
    out.unlink(missing_ok=True)
    converter = Path(os.environ[LLAMA_CPP]).expanduser() / CONVERTER
    command = [sys.executable, str(converter), str(folder), "--outfile", str(out), "--outtype", OUTTYPES[dtype]]
    call(command, os.environ.copy())
    if not out.is_file():
        raise EngineError(f"{CONVERTER} wrote nothing")
    return out


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


def call(command: list[str], environment: dict[str, str]) -> None:
    """Run a command; EngineError with its last words, in one line, if it fails."""
    try:
        done = subprocess.run(
            command,
            env=environment or None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"it took longer than {SECONDS:.0f} s") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        # The engines' own words come before the traceback's last line, which only says that it failed.
        words = next((line for line in lines if "error" in line.lower() and "Error(" not in line), "")
        last = lines[-1] if lines else f"exit code {done.returncode}"
        raise EngineError(last if not words or words == last else f"{words}; {last}")


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    """In the process: the reference continues the prompts, the others follow its tokens."""
    top = {"vllm": _vllm, "gguf": _llama_cpp}[job["engine"]](job)
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


def _vllm(job: dict[str, Any]) -> Callable[[list[list[int]]], Tops]:
    # Settings that its CPU build needs on small machines; others ignore them.
    for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # apply_model sends a function to the engine's process
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    from flashnorm_cli.runtimes.vllm.plugin import norm_states

    longest = max(map(len, job["prompts"])) + NEW_TOKENS + 1
    engine = LLM(
        model=job["model"],
        dtype=job["dtype"],
        max_model_len=longest,
        max_logprobs=TOP,
        enforce_eager=True,
        skip_tokenizer_init=not Path(job["model"], "tokenizer_config.json").exists(),
        enable_prefix_caching=False,
        trust_remote_code=job["trust_remote_code"],
    )
    states = engine.apply_model(norm_states)[0]
    job["facts"] = {"norms": len(states), "norms_without_weight": sum(states.values())}
    settings = SamplingParams(temperature=0.0, max_tokens=1, logprobs=TOP, detokenize=False)

    def top(prefixes: list[list[int]]) -> Tops:
        asked = [{"prompt_token_ids": prefix} for prefix in prefixes]
        outputs = engine.generate(asked, settings, use_tqdm=False)
        return [{token: found.logprob for token, found in out.outputs[0].logprobs[0].items()} for out in outputs]

    return top


def llama_cpp_settings(model: str, context: int) -> Any:
    """xllamacpp's settings for a GGUF on the CPU, with `context` tokens, as exact as llama.cpp computes."""
    import xllamacpp  # type: ignore[import-not-found]

    settings = xllamacpp.CommonParams()
    settings.model.path = model
    settings.n_ctx = context
    settings.n_parallel = 1
    settings.warmup = False
    settings.n_gpu_layers = 0
    # Keys, values and attention in float32: float16 would hide what is looked for.
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return settings


def llama_cpp_top(engine: Any, prefix: list[int], count: int) -> dict[int, float]:
    """The `count` most likely next tokens with their log-probabilities."""
    asked = {"prompt": prefix, "n_predict": 1, "n_probs": count, "cache_prompt": False}
    # Where the next token is a part of a character, the server answers without probabilities. They come from the
    # logits as they are, so the token itself may be any other: a letter.
    answer = engine.handle_completions(asked | {"temperature": 0.0, "logit_bias": [["e", 1000.0]]})
    (place,) = answer["choices"][0]["logprobs"]["content"]
    return {entry["id"]: entry["logprob"] for entry in place["top_logprobs"]}


def _llama_cpp(job: dict[str, Any]) -> Callable[[list[list[int]]], Tops]:
    import xllamacpp

    engine = xllamacpp.Server(llama_cpp_settings(job["model"], max(map(len, job["prompts"])) + NEW_TOKENS + 1))

    def top(prefixes: list[list[int]]) -> Tops:
        found = []
        for prefix in prefixes:
            found.append(llama_cpp_top(engine, prefix, TOP))
        return found

    return top


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(_answer(json.loads(Path(sys.argv[1]).read_text()))))
