"""What is published: what the code reads, what works on the code, and an index page whose links lead somewhere."""

from __future__ import annotations

import email
import os
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]


def files(*tops: str) -> set[str]:
    """Relative paths of what lies below these, but for what Python leaves there."""
    found = (p for top in tops for p in ((ROOT / top).rglob("*") if (ROOT / top).is_dir() else [ROOT / top]))
    return {str(p.relative_to(ROOT)) for p in found if p.is_file() and "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Names of the files in wheel and sdist, and the wheel's metadata."""
    folder = tmp_path_factory.mktemp("built")
    code = f"from hatchling import build as b; b.build_wheel({str(folder)!r}); b.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"TMPDIR": str(folder)}, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        metadata = email.message_from_bytes(wheel.read(next(n for n in names if n.endswith("/METADATA"))))
    with tarfile.open(next(folder.glob("*.tar.gz"))) as sdist:
        members = {str(PurePosixPath(*PurePosixPath(m.name).parts[1:])) for m in sdist if m.isfile()}
    return {n for n in names if ".dist-info/" not in n}, members, metadata


def test_the_wheel_holds_the_package_and_the_kernels(built):
    wheel, _, _ = built
    homes = {"kernels/norms/": "flashnorm_cli/kernels/", "kernels/norm_linear/": "flashnorm_cli/kernels/norm_linear/"}
    kernels = {home + path.removeprefix(top) for top, home in homes.items() for path in files(top)}
    assert "flashnorm_cli/kernels/row.cuh" in kernels
    assert "flashnorm_cli/py.typed" in wheel
    assert wheel == files("flashnorm_cli") | kernels


def test_the_sdist_holds_all_that_works_on_it(built):
    _, sdist, _ = built
    assert {"docs/site/mkdocs.yml", "tests/support/small.py", ".ci/run", ".github/workflows/release.yml"} <= sdist
    tops = ["flashnorm_cli", "kernels", "tests", "docs", ".ci", ".github", "README.md", "pyproject.toml", "LICENSE"]
    tops += ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", ".gitignore", ".pre-commit-config.yaml"]
    assert sdist == files(*tops) | {"PKG-INFO"}


def test_links_work_where_only_the_page_is(built):
    *_, metadata = built
    page = metadata.get_payload()
    assert page.startswith("# flashnorm\n")
    sources = [url for name, url in (u.split(", ", 1) for u in metadata.get_all("Project-URL")) if name == "Source"]
    for target in re.findall(r"\]\(([^)]*)\)", page):
        assert target.startswith(("https://", "#"))
        if not target.startswith("https://arxiv.org/"):
            assert target.startswith(sources[0]), "without an address there is nothing of the project to link to"


def test_relative_links_become_addresses():
    absolute = runpy.run_path(str(ROOT / ".ci" / "readme.py"))["absolute"]
    text = "![a picture](docs/p.svg) and [words](docs/x.md#part), [paper](https://arxiv.org/abs/1), [below](#below)"
    assert absolute(text, "https://example.org/me/it/", "1.2") == (
        "![a picture](https://example.org/me/it/raw/v1.2/docs/p.svg) and "
        "[words](https://example.org/me/it/blob/v1.2/docs/x.md#part), [paper](https://arxiv.org/abs/1), [below](#below)"
    )
    assert absolute(text, None, "1.2") == " and words, [paper](https://arxiv.org/abs/1), [below](#below)"


def test_every_public_name_is_in_the_reference():
    import flashnorm_cli

    shown = set(re.findall(r"^::: flashnorm_cli\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    assert shown == {name for name in flashnorm_cli.__all__ if not name.startswith("_")}
