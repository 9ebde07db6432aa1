"""How long a file, a class and a function of the package may be: what a reader can still hold at once."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flashnorm_cli"
FILE, CLASS, BODY = 400, 250, 60


def too_long(source: str, name: str) -> list[str]:
    """What is over a limit. A function's signature and docstring do not count, blank lines and comments do."""
    found = []
    if (lines := len(source.splitlines())) > FILE:
        found.append(f"{name} has {lines} lines, over {FILE}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            lines, limit = (node.end_lineno or 0) - node.lineno + 1, CLASS
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1 if ast.get_docstring(node) is not None and len(node.body) > 1 else 0]
            lines, limit = (node.end_lineno or 0) - first.lineno + 1, BODY
        else:
            continue
        if lines > limit:
            found.append(f"{name}: {node.name} has {lines} lines, over {limit}")
    return found


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("x = 1\n" * 400, 0),
        ("x = 1\n" * 401, 1),
        ("class A:\n" + "    x = 1\n" * 249, 0),
        ("class A:\n" + "    x = 1\n" * 250, 1),
        ('def f(\n    a,\n):\n    """One\n\n    two."""\n' + "    x = 1\n" * 60, 0),
        ("def f():\n" + "    x = 1\n" * 61, 1),
        ("class A:\n    async def f(self):\n" + "        x = 1\n" * 61, 1),
    ],
)
def test_the_measure(source, wrong):
    assert len(too_long(source, "a.py")) == wrong


def test_nothing_is_too_long():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    assert [what for path in files for what in too_long(path.read_text(), str(path.relative_to(PACKAGE)))] == []
