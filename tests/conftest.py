import os
import sys
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent / "support"))


def pytest_configure() -> None:
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
