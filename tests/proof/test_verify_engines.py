"""Levels runtime and eval: what is judged, and what happens where an engine is missing.

The engines themselves are too heavy for every run: docs/llama_cpp.md and docs/vllm.md hold what was seen with
them. Where lm-eval is installed, the last test runs it.
"""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
from command_line import run
from documents import document

from flashnorm_cli.demo import MODEL
from flashnorm_cli.proof import engines as runtimes
from flashnorm_cli.proof import evaluate
from flashnorm_cli.proof.tasks import named_tasks
from flashnorm_cli.runtimes.process import EngineError, call


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "folded"
    assert run("fold", MODEL, folder, "-q") == 0
    return folder


def tops(*rows: list[float]) -> list[list[dict[int, float]]]:
    """Per prompt and position: the log-probability of token 7; token 8 has the rest."""
    return [[{7: p, 8: math.log1p(-math.exp(p))} for p in row] for row in rows]


TOKENS = [[7, 7], [7, 7]]
REFERENCE = tops([-0.1, -0.2], [-0.3, -0.4])


def test_within_three_times_the_noise() -> None:
    noisy = tops([-0.11, -0.21], [-0.31, -0.41])  # off by 0.01 everywhere
    figures, findings = runtimes.judge(REFERENCE, noisy, tops([-0.129, -0.229], [-0.329, -0.429]), TOKENS)
    assert not findings
    assert (figures["tokens"], figures["same_tokens"]) == (4, 4)
    assert figures["logprob_difference"] == pytest.approx(0.029)
    assert figures["tolerance"] == pytest.approx(0.0301)
    figures, (finding,) = runtimes.judge(REFERENCE, noisy, tops([-0.13, -0.23], [-0.33, -0.48]), TOKENS)
    assert "most of all at token 2 of prompt 2: 8.00e-02" in finding.message


def test_float32_has_a_tolerance_of_its_own() -> None:
    shifted = tops([-0.10005, -0.20005], [-0.30005, -0.40005])
    assert not runtimes.judge(REFERENCE, REFERENCE, shifted, TOKENS)[1]
    shifted = tops([-0.1002, -0.2002], [-0.3002, -0.4002])
    assert runtimes.judge(REFERENCE, REFERENCE, shifted, TOKENS)[1]


@pytest.mark.parametrize("broken", [{}, {7: math.nan, 8: -1.0}, {8: 0.0, 9: -30.0}])
def test_a_token_that_is_gone_is_an_error(broken: dict[int, float]) -> None:
    mine = [[dict(top) for top in row] for row in REFERENCE]
    mine[1][0] = broken
    figures, findings = runtimes.judge(REFERENCE, REFERENCE, mine, TOKENS)
    assert findings
    assert figures["same_tokens"] == 3 or 7 in broken


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm(folded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", folded, "--level", "weights", "--runtime", "vllm", "--json") == 4
    level = document(capsys.readouterr().out)["levels"]["runtime:vllm"]
    assert (level["status"], level["reason"]) == ("skipped", "vLLM is not installed: pip install vllm")


def test_llama_cpp_says_what_it_needs(
    folded: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(runtimes.LLAMA_CPP, raising=False)
    assert run("verify", folded, "--level", "weights", "--runtime", "gguf", "--json") == 4  # nothing ran
    level = document(capsys.readouterr().out)["levels"]["runtime:gguf"]
    assert level["status"] == "skipped"
    assert runtimes.LLAMA_CPP in level["reason"]


def test_a_failing_process_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="error: no such head; RuntimeError: stopped") as raised:
        call(
            ["sh", "-c", "echo loading >&2; echo 'error: no such head' >&2; echo 'RuntimeError: stopped' >&2; exit 1"],
            {},
        )
    assert "\n" not in str(raised.value)
    with pytest.raises(EngineError, match="exit code -9"):
        call(["sh", "-c", "kill -9 $$"], {})


def test_eval_is_judged_by_standard_errors() -> None:
    before = {"arc": {"alias": "arc", "acc,none": 0.50, "acc_stderr,none": 0.01, "sample_len": 100, "word,none": 3.0}}
    within = {"arc": {"acc,none": 0.52, "acc_stderr,none": 0.01, "word,none": 9.0, "word_stderr,none": "N/A"}}
    rows, findings = evaluate.judge(before, within)
    assert [(r["metric"], round(r["delta"], 6), r["folded_stderr"]) for r in rows] == [
        ("acc", 0.02, 0.01),
        ("word", 6.0, None),
    ]
    assert not findings
    beyond = {"arc": {"acc,none": 0.45, "acc_stderr,none": 0.01}}
    (finding,) = evaluate.judge(before, beyond)[1]
    assert (finding.what, "acc changes by -0.0500" in finding.message) == ("arc", True)


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-evaluation-harness is installed")
def test_without_lm_eval(folded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", folded, "--level", "weights", "--eval", "arc_easy", "--json") == 4
    level = document(capsys.readouterr().out)["levels"]["eval"]
    assert (level["status"], "pip install" in level["reason"]) == ("skipped", True)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("task: cloze\n", None),
        ("include: base.yaml\ntask: cloze\nprocess_docs: !function utils.process\nmore: !other {a: 1}\n", None),
        ("group: suite\ntask:\n  - a\n  - b\n", "suite"),
    ],
)
def test_a_file_names_its_task(content: str, name: str | None, tmp_path: Path) -> None:
    """Whatever the file is called. A task is asked for by its file, a group by its name."""
    file = tmp_path / "file.yml"
    file.write_text(content)
    assert [task.spec for task in named_tasks(["arc_easy", str(file)])] == ["arc_easy", name or str(file)]


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "No such file"), ("task: [a", "is not YAML"), ("- a\n", "holds no task"), ("task: 3\n", "holds no task")],
)
def test_a_file_without_a_task(
    content: str | None, says: str, folded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.yaml"
    if content is not None:
        file.write_text(content)
    assert run("verify", folded, "--eval", file) == 2
    error = capsys.readouterr().err
    assert says in error and str(file) in error and error.count("\n") == 1


needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")


def task(name: str, data: Path, more: str = "") -> str:
    """A task file: the right end of some text among two."""
    return (
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{ctx}}'\ndoc_to_target: label\n"
        "doc_to_choice: choices\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n    aggregation: mean\n"
        f"    higher_is_better: true\nmetadata:\n  version: 1.0\n{more}"
    )


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = (MODEL / "heldout.txt").read_text().replace("\n", " ")
    rows = [
        {"ctx": text[i : i + 80], "choices": [text[i + 80 : i + 90], "xqzjk vwqp"], "label": 0}
        for i in range(0, 2000, 100)
    ]
    file = tmp_path_factory.mktemp("items") / "items.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@needs_lm_eval
@pytest.mark.parametrize("what", ["task", "namesake", "known", "group"])
def test_lm_eval_on_a_task_of_our_own(
    what: str, folded: Path, items: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is the file's task that runs, also where another file of the folder, or the harness, has one of that name."""
    name = "arc_easy" if what == "known" else "cloze"
    file = tmp_path / "of-ours.yml"
    file.write_text(task(name, items, "tag: ours\nprocess_docs: !function code.process\n"))
    (tmp_path / "code.py").write_text("print('noise')\ndef process(docs):\n    return docs\n")
    if what == "namesake":
        (tmp_path / "a.yaml").write_text(task(name, items, "process_docs: !function nothing.there\n"))
    if what == "group":
        (tmp_path / "a.yaml").write_text(task("inner", items))
        file = tmp_path / "suite.yaml"
        file.write_text("group: suite\ntask:\n  - inner\n")
    capfd.readouterr()
    assert run("verify", folded, "--level", "weights", "--eval", file, "--json") == 4
    out, err = capfd.readouterr()
    (row,) = document(out)["levels"]["eval"]["figures"]["tasks"]
    assert (row["task"].split("::")[-1], err) == ("inner" if what == "group" else name, "")
    assert row["source"] > 0.9  # trained text against letters
    assert abs(row["delta"]) <= 0.1


@needs_lm_eval
def test_tasks_that_the_harness_does_not_have(
    folded: Path, items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told before anything is verified."""
    assert run("verify", folded, "--eval", "no_such_task,arc_easy") == 2
    assert capsys.readouterr().err == "flashnorm: lm-evaluation-harness has no task no_such_task\n"
    (tmp_path / "suite.yml").write_text("group: suite\ntask:\n  - inner\n")
    assert run("verify", folded, "--eval", tmp_path / "suite.yml") == 2
    assert "does not find the group suite there: the file's name has to end in .yaml" in capsys.readouterr().err


@needs_lm_eval
@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("items.jsonl", "missing.jsonl", "FileNotFoundError: Unable to find"),
        ("metadata:", "process_docs: !function nothing.there\nmetadata:", "nothing"),
        ("'{{ctx}}'", "'{{nothing}}'", "UndefinedError: 'nothing' is undefined"),
        ("multiple_choice", "no_such_type", "invalid output_type 'no_such_type'"),
    ],
)
def test_a_task_that_does_not_run(
    old: str, new: str, says: str, folded: Path, items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fault of the task is none of the fold's, nor a bug of ours."""
    (tmp_path / "task.yaml").write_text(task("cloze", items).replace(old, new))
    assert run("verify", folded, "--level", "weights", "--eval", tmp_path / "task.yaml", "--json") == 4
    level = document(capsys.readouterr().out)["levels"]["eval"]
    assert (level["status"], level["reason"].split(": ")[0]) == (
        "skipped",
        "lm-evaluation-harness does not run the source",
    )
    assert says in level["reason"]
