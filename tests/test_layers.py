"""Imports run one way: the order of the package's folders, lazy imports included."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "flashnorm_cli"
# From the top. A folder imports those of later lines only; folders of one line do not know each other.
ORDER = [
    {"cli"},
    {"hub", "demo"},
    {"report", "bench"},
    {"proof"},
    {"runtimes"},
    {"folding", "adapters"},
    {"record"},
    {"plan"},
    {"modeling"},
    {"trace", "norms"},
    {"checkpoint", "cuda"},
    {"display"},
    {"choices", "errors", "_version"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
# What checks a fold may not share its arithmetic, nor the functions that write its config and index.
APART = {("proof", "folding")}
APART_MODULES = {"proof": f"{PACKAGE.name}.record.write"}


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == PACKAGE.name:
                found |= {f"{PACKAGE.name}.{alias.name}" for alias in node.names}
            elif node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith(f"{PACKAGE.name}.")}


def wrong_imports(package: Path) -> list[str]:
    wrong = []
    for path in sorted(package.rglob("*.py")):
        here = path.relative_to(package).with_suffix("").parts[0]
        if here in ("__init__", "__main__"):  # the public names, loaded lazily
            continue
        for name in imports(path):
            there = name.split(".")[1]
            upward = there != here and (there not in RANK or RANK[there] <= RANK[here])
            apart = (here, there) in APART or name.startswith(APART_MODULES.get(here, "nothing"))
            if upward or apart:
                wrong.append(f"{path.relative_to(package)} imports {name}")
    return wrong


def test_every_folder_has_its_place():
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    modules = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert folders | modules == set(RANK)


def test_imports_run_one_way():
    assert wrong_imports(PACKAGE) == []


def test_no_circles_within_a_folder():
    graph = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): imports(path)
        for path in PACKAGE.rglob("*.py")
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module in done:
            return
        for other in graph.get(module, ()):
            visit(other, (*way, module))
        done.add(module)

    for module in graph:
        if module not in ("flashnorm_cli.__init__", "flashnorm_cli.__main__"):
            visit(module, ())
