"""The model that folds from Hub to Hub start from, and what a local fold makes of it."""

from pathlib import Path

import pytest
from hub_folds import files_of, save

from flashnorm_cli.folding.fold import fold


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "model", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a local fold; card and record are made anew for the Hub."""
    return files_of(fold(model, tmp_path_factory.mktemp("local") / "out").output)
