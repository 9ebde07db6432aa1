"""vLLM as an engine that `verify` compares with."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashnorm_cli.runtimes.process import TOP, Tops


def run_vllm(job: dict[str, Any]) -> Callable[[list[list[int]]], list[Tops]]:
    """Per prompt and prefix of it, the most likely next tokens."""
    # Settings that its CPU build needs on small machines; others ignore them.
    for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # apply_model sends a function to the engine's process
    from vllm import LLM, SamplingParams

    from flashnorm_cli.runtimes.vllm.norms import norm_states

    longest = max(map(len, job["prompts"])) + 2
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

    def tops(prompts: list[list[int]]) -> list[Tops]:
        asked = [{"prompt_token_ids": p[: t + 1]} for p in prompts for t in range(len(p))]
        outputs = iter(engine.generate(asked, settings, use_tqdm=False))
        return [
            [{token: found.logprob for token, found in next(outputs).outputs[0].logprobs[0].items()} for _ in prompt]
            for prompt in prompts
        ]

    return tops
