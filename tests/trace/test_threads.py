"""A trace and other threads of the same process."""

import threading
from typing import Any

import torch

from flashnorm_cli.trace.state import State


class Waits(torch.nn.Module):
    """Has begun before a trace, and ends during it."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.register_forward_hook(lambda *_: None)  # with one of its own, torch also asks for those of all modules

    def forward(self, x: Any) -> Any:
        self.begun.set()
        assert self.go_on.wait(60)
        return x


def test_modules_of_other_threads_are_not_of_the_trace() -> None:
    model, other, said = torch.nn.Linear(2, 2), Waits(), []

    def run() -> None:
        try:
            said.append(other(1))
        except IndexError as error:
            said.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert other.begun.wait(60)
    state = State(model)
    with state.watching_modules():
        other.go_on.set()
        thread.join(60)
        model(torch.zeros(1, 2))
    assert said == [1]
