import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent / "support"))


def pytest_configure() -> None:
    os.environ["FLASHNORM_PROGRESS_SECONDS"] = "0"  # no lines of a slow machine
    torch.set_num_threads(1)  # pytest-xdist runs one process per processor
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Give each process a half of the tests in their order, so that a module's models are made by one of them.

    The default deals tests out in turns. A process that is done takes tests from another.
    """
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.option.dist == "load" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("FLASHNORM_SLOW"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="waits for minutes; FLASHNORM_SLOW=1 runs it"))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Where files or tensors differ, which ones: pytest would compare their bytes for minutes, and print them all."""
    if (
        op != "=="
        or not (isinstance(left, dict) and isinstance(right, dict))
        or max(_bytes(left), _bytes(right)) < 1000
    ):
        return None
    differ = sorted(k for k in {*left, *right} if left.get(k, _bytes) != right.get(k, _bytes))
    return [f"{len(differ)} of {len({*left, *right})} differ: {', '.join(map(str, differ[:20]))}"]


def _bytes(values: dict[str, object]) -> int:
    found = (v if isinstance(v, bytes) else getattr(v, "data", None) for v in values.values())
    return sum(len(data) for data in found if isinstance(data, bytes))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None, None, None]:
    """The names of what failed as the last lines: that is what is left of a long log."""
    yield
    for report in [r for kind in ("failed", "error") for r in terminalreporter.stats.get(kind, [])]:
        terminalreporter.write_line(f"failed: {report.nodeid}")
