"""Folds in several threads of one process leave transformers as they found it."""

import contextlib
import itertools
import os
import threading
from pathlib import Path
from typing import Any

import torch
from small import tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from flashnorm_cli.checkpoint.model import Source
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.checkpoint.tensors import one_thread_each
from flashnorm_cli.modeling.build import build


def meet(barrier: threading.Barrier) -> None:
    """Wait for the other thread, which does not come where one is let in at a time."""
    with contextlib.suppress(threading.BrokenBarrierError):
        barrier.wait(3)


def test_models_built_in_two_threads(tmp_path: Path) -> None:
    """The first to begin ends first, which is how patches that are put back in turn stay for good."""
    barrier, first_is_done, arrivals = threading.Barrier(2), threading.Event(), itertools.count()

    class Waits(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig, *arguments: Any, **more: Any) -> None:
            arrival = next(arrivals)
            meet(barrier)
            super().__init__(config, *arguments, **more)
            if arrival == 1 and not barrier.broken:
                first_is_done.wait(20)

    tiny_llama().save_pretrained(tmp_path)
    checkpoint = open_checkpoint(Source(str(tmp_path)))
    before = PreTrainedModel.tie_weights, logging.get_verbosity(), os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    built = []

    def work() -> None:
        config = LlamaConfig.from_pretrained(tmp_path)
        built.append(build(checkpoint, config, Waits, "eager", "eager"))
        first_is_done.set()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(built) == 2
    assert before == (
        PreTrainedModel.tie_weights,
        logging.get_verbosity(),
        os.environ.get("HF_DEACTIVATE_ASYNC_LOAD"),
    )
    tied = LlamaForCausalLM(
        LlamaConfig(**{**LlamaConfig.from_pretrained(tmp_path).to_dict(), "tie_word_embeddings": True})
    )
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_jobs_that_overlap_give_torch_its_threads_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = one_thread_each(), one_thread_each()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_num_threads() == 1  # the second is still at work
        second.__exit__(None, None, None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
