"""What is installed: every folder of the package, and every file that the code reads."""

from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or newer reads TOML")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def setuptools():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_is_listed(setuptools):
    folders = {p.parent.relative_to(ROOT) for p in (ROOT / "flashnorm_cli").rglob("__init__.py")}
    assert set(setuptools["packages"]) == {".".join(f.parts) for f in folders} | {
        "flashnorm_cli.kernels",
        "flashnorm_cli.kernels.norm_linear",
        "flashnorm_cli.demo_model",
    }


def test_every_data_file_is_listed(setuptools):
    listed = set()
    for package, patterns in setuptools["package-data"].items():
        folder = setuptools["package-dir"].get(package, package.replace(".", "/"))
        listed |= {p for pattern in patterns for p in (ROOT / folder).glob(pattern)}
    data = {
        p
        for top in ("flashnorm_cli", "kernels/norms", "kernels/norm_linear")
        for p in (ROOT / top).rglob("*")
        if p.is_file() and p.suffix not in (".py", ".pyc")
    }
    assert data <= listed
