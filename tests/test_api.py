"""The package from Python: what is public, how it is found, documented and shown, and what results are good for."""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import families
import pytest

import flashnorm_cli
from flashnorm_cli import (
    Finding,
    LevelResult,
    NotRunError,
    Source,
    UsageError,
    Verification,
    VerificationError,
    fold,
    make_plan,
    open_checkpoint,
    verify,
)
from flashnorm_cli.demo import MODEL
from flashnorm_cli.display import Shown

PACKAGE = Path(flashnorm_cli.__file__).parent
NAMES = [name for name in flashnorm_cli.__all__ if name != "__version__"]


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    model = families.build("llama", seed=1)
    families.randomize_gains(model, seed=2)
    families.save(model, folder / "source")
    return fold(folder / "source", folder / "folded").output


# ---- names -----------------------------------------------------------------------------------------------------------


def test_dir_shows_the_names_and_loads_nothing() -> None:
    code = (
        "import sys, flashnorm_cli, rlcompleter\nnames = dir(flashnorm_cli)\n"
        "assert {*flashnorm_cli.__all__} <= {*names}, names\n"
        "assert not [n for n in names if n not in flashnorm_cli.__all__ and not n.startswith('__')], names\n"
        "assert 'torch' not in sys.modules\n"
        "found = rlcompleter.Completer({'flashnorm_cli': flashnorm_cli}).complete\n"
        "assert found('flashnorm_cli.make_p', 0).startswith('flashnorm_cli.make_plan')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_name_is_there_and_checkers_read_the_same() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imports = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imports == {name: f"flashnorm_cli.{home}" for name, home in flashnorm_cli._HOME.items()}
    assert sorted(imports) == sorted(NAMES)
    for name in NAMES:
        assert getattr(flashnorm_cli, name).__module__ == imports[name], name
    with pytest.raises(AttributeError, match="fodl"):
        flashnorm_cli.fodl  # noqa: B018


@pytest.mark.parametrize("name", NAMES)
def test_documented(name: str) -> None:
    """Every public name, its public methods and properties; functions say every argument, what returns, what raises."""
    public = getattr(flashnorm_cli, name)
    assert len(public.__doc__ or "") > 40
    if inspect.isclass(public):
        if dataclasses.is_dataclass(public):
            assert not public.__doc__.startswith(f"{name}("), "made by dataclass"
        for attribute, value in vars(public).items():
            inner = getattr(value, "fget", getattr(value, "__func__", getattr(value, "func", value)))
            if not attribute.startswith("_") and inspect.isfunction(inner):
                assert inner.__doc__, f"{name}.{attribute}"
        return
    for parameter in inspect.signature(public).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            assert re.search(rf"\b{parameter.name}\b", public.__doc__), f"{name}: {parameter.name}"
    if len(inspect.signature(public).parameters) > 1:
        for part in ("Args:", "Returns:", "Raises:"):
            assert f"\n{part}\n" in (inspect.getdoc(public) or ""), f"{name}: {part}"


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_make_plan_takes_what_names_a_checkpoint(folded: Path) -> None:
    source = folded.parent / "source"
    expected = make_plan(open_checkpoint(Source(str(source))))
    assert len(expected.folded) > 3
    for model in (source, str(source), Source(str(source))):
        assert make_plan(model) == expected
    assert make_plan(source, "keep").folded_flag is False
    with pytest.raises(UsageError, match=r"`final_norm` is one of auto, keep, untie, not 'no'"):
        make_plan(source, "no")
    with pytest.raises(UsageError, match="no such folder"):
        make_plan("./nowhere")


def test_messages_name_arguments(folded: Path) -> None:
    reasons = {norm.reason for norm in make_plan(MODEL, final_norm="keep").kept}
    assert reasons == {'`final_norm="keep"`'}
    with pytest.raises(UsageError, match="`overwrite=True` replaces it"):
        fold(folded.parent / "source", folded, layout="dropped")
    with pytest.raises(UsageError, match="`source_revision` needs `source`"):
        verify(folded, source_revision="main")
    with pytest.raises(UsageError, match=r"`levels` is one of weights, layers, logits, not 'bits'"):
        verify(folded, levels=["bits"])
    assert verify(folded, levels="weights", record=False).level("weights").status == "passed"  # a word alone


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0.0, -1.0])
def test_limits_are_numbers(folded: Path, value: float) -> None:
    """JSON, and so the record, has no infinity; and a limit that everything passes proves nothing."""
    with pytest.raises(UsageError, match="finite"):
        verify(folded, max_ratio=value)


# ---- results ---------------------------------------------------------------------------------------------------------


def verification(folded: str = "out", **statuses: str) -> Verification:
    levels = tuple(
        LevelResult(
            name,
            status,
            findings=(Finding("a.weight", "is wrong"), Finding("b", "too")) if status == "failed" else (),
            reason="no memory" if status == "skipped" else None,
        )
        for name, status in statuses.items()
    )
    return Verification(folded, "in", None, False, None, levels, {}, {})


def test_a_verification_is_its_verdict(folded: Path) -> None:
    right = verification(weights="passed", logits="passed")
    assert right and right.raise_for_failure() is right
    open_ = verification(weights="passed", logits="skipped")
    assert not open_
    with pytest.raises(NotRunError, match="out: as planned, not run: logits: no memory") as raised:
        open_.raise_for_failure()
    assert (raised.value.exit_code, raised.value.verification) == (4, open_)
    wrong = verification(weights="failed", logits="skipped")
    assert not wrong
    with pytest.raises(
        VerificationError, match=r"not equivalent: weights: a.weight: is wrong \(and 1 more\)"
    ) as raised:
        wrong.raise_for_failure()
    assert (type(raised.value), raised.value.exit_code) == (VerificationError, 3)
    with pytest.raises(NotRunError, match="no level that runs both models"):
        verify(folded, levels=["weights"], record=False).raise_for_failure()
    # Nothing else is a verdict: a result is there, and so it is true.
    public = {getattr(flashnorm_cli, name) for name in NAMES}
    assert [each.__name__ for each in public if "__bool__" in vars(each)] == ["Verification"]


def test_results_are_short(folded: Path) -> None:
    source = folded.parent / "source"
    result = fold(source, folded.parent / "again")
    plan = result.plan
    found = verify(result.output, levels=["weights"], record=False)
    shown = [result, plan, found, found.levels[0], plan.norms[0], plan.readers[0], open_checkpoint(Source(str(source)))]
    for each in shown:
        assert isinstance(each, Shown)
        assert repr(each) == str(each) and repr(each).startswith(f"{type(each).__name__}(")
        assert len(repr(each)) < 700 and "\n" not in repr(each)
        assert each._repr_html_().startswith("<table><caption>")
    assert "verdict='as planned, not run'" in repr(found) and "weights='passed'" in repr(found)
    assert f"norms_folded={len(plan.folded)}" in repr(result)
    assert "hf_secret" not in repr(Source("a/b", token="hf_secret"))
    # Every public class that holds more than a few plain values shows itself so.
    big = {"AdapterResult", "Checkpoint", "FoldResult", "LevelResult", "Norm", "Plan", "PushResult", "Reader"}
    big |= {"StreamResult", "Verification"}
    assert {
        name for name in NAMES if inspect.isclass(c := getattr(flashnorm_cli, name)) and issubclass(c, Shown)
    } == big


def test_what_files_say_is_escaped() -> None:
    name = "<script>alert(1)</script>\x1b[2J\n&'\""
    found = verification(name, weights="passed")
    page = found._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page and "\x1b" not in page and "\n" not in page
    assert "\x1b" not in repr(found) and "\n" not in repr(found)
    page = LevelResult("logits", "skipped", reason=name)._repr_html_()
    assert "<script>" not in page and "\x1b" not in page
