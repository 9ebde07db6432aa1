"""llama.cpp: converted by its own script, run by its own library."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashnorm_cli.runtimes.process import NEW_TOKENS, TOP, EngineError, Tops, call

LLAMA_CPP = "FLASHNORM_LLAMA_CPP"


CONVERTER = "convert_hf_to_gguf.py"


OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def converted(folder: Path, dtype: str, scratch: Path) -> Path:
    """A checkpoint as GGUF, by llama.cpp's own converter."""
    out = scratch / "model.gguf"
    out.unlink(missing_ok=True)
    converter = Path(os.environ[LLAMA_CPP]).expanduser() / CONVERTER
    command = [sys.executable, str(converter), str(folder), "--outfile", str(out), "--outtype", OUTTYPES[dtype]]
    call(command, os.environ.copy())
    if not out.is_file():
        raise EngineError(f"{CONVERTER} wrote nothing")
    return out


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


def run_llama_cpp(job: dict[str, Any]) -> Callable[[list[list[int]]], Tops]:
    import xllamacpp

    engine = xllamacpp.Server(llama_cpp_settings(job["model"], max(map(len, job["prompts"])) + NEW_TOKENS + 1))

    def top(prefixes: list[list[int]]) -> Tops:
        found = []
        for prefix in prefixes:
            found.append(llama_cpp_top(engine, prefix, TOP))
        return found

    return top
