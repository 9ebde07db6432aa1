"""The same from several threads, and from copies of a model."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def assert_same_in_threads(compute: Callable[[int], torch.Tensor], want: Sequence[torch.Tensor], times: int) -> None:
    """`compute(i)` is `want[i]`, bit for bit, `times` times in a thread for each i at once."""
    wrong = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(times):
                if not torch.equal(compute(i), want[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(want))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def copies_of(model: Model) -> tuple[Model, Model, Model]:
    """A deep copy, one through pickle, and one through torch.save."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)
