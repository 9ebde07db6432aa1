"""docs/benchmarks/deferred.svg, README's picture, shows what the results beside it hold."""

import runpy
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "docs" / "benchmarks"


def test_the_picture_is_that_of_the_results():
    picture = runpy.run_path(str(FOLDER / "deferred_picture.py"))["picture"]
    assert (FOLDER / "deferred.svg").read_text() == picture(), "python docs/benchmarks/deferred_picture.py"
    assert "578 tokens/s  +58 %" in picture()
