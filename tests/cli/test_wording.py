"""Messages name arguments as Python has them, and the command line words them as options: one text for both."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import typer

import flashnorm_cli
from flashnorm_cli import FlashNormError
from flashnorm_cli.cli import app, main, wording
from flashnorm_cli.cli.wording import in_flags

PACKAGE = Path(flashnorm_cli.__file__).parent
FUNCTIONS = ("fold", "fold_adapter", "fold_to_hub", "make_plan", "push_to_hub", "verify")
# Options of other programs, and lines that are stored as they were typed.
OTHERS = {
    "hub/licence.py": {"--revision", "--local-dir"},  # hf download
    "hub/published.py": set("--level --runtime --eval --eval-limit --dtype --device --max-algebra".split())
    | {"--max-ratio", "--text", "--token-ids", "--trust-remote-code", "--source"},
    "runtimes/vllm/plugin.py": {"--enforce-eager", "--final-norm"},  # for who types `vllm serve`
}


def options_of() -> dict[str, set[str]]:
    commands = typer.main.get_command(app).commands
    return {name: {o for p in c.params for o in (*p.opts, *p.secondary_opts)} for name, c in commands.items()}


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("add `overwrite=True` to replace it", "add --overwrite to replace it"),
        ('`final_norm="untie"` folds it', "--final-norm untie folds it"),
        ("`base_model='me/it'`: no", "--base-model me/it: no"),
        ("`base_model='a b'`", "--base-model 'a b'"),
        ("say `private=True`, or `private=False`", "say --private, or --no-private"),
        ('`levels=["logits"]` or `levels=["weights", "layers"]`', "--level logits or --level weights --level layers"),
        ("`source_revision` needs `source`", "--source-revision needs --source"),
        ('add `source="<its source>"`', "add --source <its source>"),
        ("run: `verify('a b', source='<it>', adopt=True)`", "run: flashnorm verify 'a b' --source <it> --adopt"),
        ('`fold_adapter("<it>", base="x")` does', "`flashnorm fold-adapter <it> --base x` does"),
        ("in steps: `fold`, `push_to_hub`", "in steps: `flashnorm fold`, `flashnorm push-to-hub`"),
        ("`tasks=['a', 'b']` and `limit=3`", "--eval a,b and --eval-limit 3"),
        # What is not of ours stays.
        *((same, same) for same in (
            "`flashnorm fold` wrote it", "`model.norm.weight` is kept", "`1 + w`", "`hf auth login`", "``", "`a",
            "`fold(x)`", "`verify(**x)`", "`verify(strange=1)`", "`strange=1`", "`overwrite=x`", "`overwrite=True, x`",
            "`f(overwrite=True)`", "`" + "(" * 500 + ")" * 500 + "`", "`\\`", "`a\x00)`",
        )),
    ],
)  # fmt: skip
def test_in_flags(message: str, shown: str) -> None:
    assert in_flags(message) == shown


def test_options_and_arguments_belong_together() -> None:
    """Each name that is worded is an argument of a public function, and an option of the command beside it."""
    arguments = {name for f in FUNCTIONS for name in inspect.signature(getattr(flashnorm_cli, f)).parameters}
    options = set().union(*options_of().values())
    for name in wording.OPTIONS:
        assert wording._flag(name) in options or f"--no-{name}" in options, name
    assert wording.OPTIONS - arguments == {"publish"}  # of a fold on the Hub, which no public function verifies
    assert {name for name in arguments if wording._flag(name) in options} <= wording.OPTIONS
    assert set(wording.COMMANDS.values()) <= set(options_of())


def messages(path: Path) -> list[str]:
    """The texts of a module that are no docstrings."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    holders = (n for n in nodes if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)))
    docstrings = {id(n.body[0].value) for n in holders if ast.get_docstring(n) is not None}
    texts = (n for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return [n.value for n in texts if id(n) not in docstrings]


LIBRARY = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
LIBRARY = {name: path for name, path in LIBRARY.items() if not name.startswith("cli/")}
ARGUMENTS = re.compile(r"`([a-z_]+=[^`{}]+|(?:fold|verify|fold_adapter|push_to_hub)\([^`{}]+\))`")
OF_TRANSFORMERS = {"output_loading_info=True"}


def test_no_message_of_the_library_names_an_option() -> None:
    options = set().union(*options_of().values())
    found = {
        (name, option)
        for name, path in LIBRARY.items()
        for text in messages(path)
        for option in {*re.findall(r"(?<![\w-])--[a-z][\w-]+", text)} & options
    }
    assert {(name, option) for name, option in found if option not in OTHERS.get(name, ())} == set()


def test_every_argument_in_a_message_is_worded() -> None:
    """What stands in backticks as `name=value` or `function(...)` in the source is understood by the command line."""
    found = {code for path in LIBRARY.values() for text in messages(path) for code in ARGUMENTS.findall(text)}
    assert len(found) > 10
    assert {code for code in found - OF_TRANSFORMERS if in_flags(f"`{code}`") == f"`{code}`"} == set()


def test_one_error_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("")
    model = PACKAGE / "demo_model"
    with pytest.raises(FlashNormError, match="add `overwrite=True` to replace it"):
        flashnorm_cli.fold(model, tmp_path / "out")
    with pytest.raises(SystemExit):
        main(["fold", str(model), str(tmp_path / "out")])
    assert "add --overwrite to replace it" in capsys.readouterr().err
