"""llama.cpp: converted by its own script, run by its own library."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flashnorm_cli.runtimes.process import TOP, EngineError, Tops, call

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


SLOTS = 8  # prompts that advance together: each step then reads the weights once for all of them


def llama_cpp_settings(model: str, context: int, slots: int = 1) -> Any:
    """xllamacpp's settings for a GGUF on the CPU, `context` tokens in each slot, as exact as llama.cpp computes."""
    import xllamacpp  # type: ignore[import-not-found]

    settings = xllamacpp.CommonParams()
    settings.model.path = model
    settings.n_ctx = context * slots
    settings.n_parallel = slots
    settings.warmup = False
    settings.n_gpu_layers = 0
    # Keys, values and attention in float32: float16 would hide what is looked for.
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return settings


def llama_cpp_top(engine: Any, prefix: list[int], count: int, slot: int = 0) -> dict[int, float]:
    """The `count` most likely next tokens with their log-probabilities. A slot keeps what it has evaluated already."""
    asked = {"prompt": prefix, "n_predict": 1, "n_probs": count, "cache_prompt": True, "id_slot": slot}
    # Where the next token is a part of a character, the server answers without probabilities. They come from the
    # logits as they are, so the token itself may be any other: a letter.
    answer = engine.handle_completions(asked | {"temperature": 0.0, "logit_bias": [["e", 1000.0]]})
    (place,) = answer["choices"][0]["logprobs"]["content"]
    return {entry["id"]: entry["logprob"] for entry in place["top_logprobs"]}


def run_llama_cpp(job: dict[str, Any]) -> Callable[[list[list[int]]], list[Tops]]:
    """Per prompt and prefix of it, the most likely next tokens. Each prefix costs one token: the rest is kept."""
    import xllamacpp

    slots = min(SLOTS, len(job["prompts"]))
    engine = xllamacpp.Server(llama_cpp_settings(job["model"], max(map(len, job["prompts"])) + 2, slots))

    def tops(prompts: list[list[int]]) -> list[Tops]:
        found: list[Tops] = [[] for _ in prompts]

        def walk(slot: int) -> None:
            for i in range(slot, len(prompts), slots):
                found[i] = [llama_cpp_top(engine, prompts[i][: t + 1], TOP, slot) for t in range(len(prompts[i]))]

        with ThreadPoolExecutor(slots) as pool:
            list(pool.map(walk, range(slots)))
        return found

    return tops
