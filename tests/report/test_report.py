"""The report of `verify`: what the page says first, that nothing in it can act, that it asks for nothing elsewhere."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from flashnorm_cli.plan.model import Norm, Plan
from flashnorm_cli.proof.result import Finding, LevelResult, Verification
from flashnorm_cli.report import page as report_page
from flashnorm_cli.report.page import render, write_report

SVG = "{http://www.w3.org/2000/svg}"
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&{{ 7 * 7 }}\x00\x1b\u202e\ud800" + "long_" * 200


class Page(HTMLParser):
    """The tags with their attributes, and the text, of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if not self.tags or self.tags[-1][0] != "style":
            self.words.append(data)


def norm_row(i: int, source: Any = 2e-3, ratio: Any = 1.1, **more: Any) -> dict[str, Any]:
    folded = source * ratio if source else 3e-3
    name = f"model.layers.{i}.input_layernorm.weight"
    return {"norm": name, "error_source": source, "error_folded": folded, "ratio": ratio, **more}


def layers(*rows: dict[str, Any], status: str = "passed") -> LevelResult:
    return LevelResult("layers", status, {"dtype": "bfloat16", "norms": list(rows)})


WEIGHTS = LevelResult("weights", "passed", {"tensors": 310, "changed": 57, "identical": 310, "differing": 0})
LOGITS = LevelResult(
    "logits",
    "passed",
    {
        "reference": "float32",
        "dtype": "bfloat16",
        "prompts": 6,
        "tokens": 1024,
        "algebra_error": 3.1e-7,
        "rounding_error": 6.4e-3,
        "noise_floor": 6.1e-3,
        "ratio": 1.05,
        "source": {"kl": 3.2e-4, "top1": 0.98731, "perplexity": 12.38124},
        "folded": {"kl": 3.4e-4, "top1": 0.99996, "perplexity": 12.38301},
        "reference_perplexity": 12.3799,
        "greedy": [{"prompt": "Once", "source": "upon a time", "folded": "upon a hill", "same": 2, "tokens": 3}],
    },
)
RUNTIME = LevelResult("runtime:vllm", "passed", {"engine": "vLLM", "version": "0.24", "tokens": 99, "same_tokens": 98})
EVAL = LevelResult("eval", "passed", {"tasks": [{"task": "hellaswag", "metric": "acc", "source": 0.6, "delta": -0.1}]})
PLAN = Plan(
    source="org/model",
    commit=None,
    architecture="LlamaForCausalLM",
    model_type="llama",
    text_config=(),
    transformers="5.23.0",
    norms=(
        *(Norm(f"layers.{i}.norm.weight", (8,), 1.0, 0.0, (f"layers.{i}.up.weight",), None) for i in range(3)),
        *(Norm(f"layers.{i}.q_norm.weight", (8,), 1.0, 0.0, (), f"layers.{i}.rope rotates it") for i in range(2)),
    ),
    readers=(),
    lm_head="kept",
    untie=False,
    added={},
    folded_flag=False,
    not_traced=("vision.norm.weight",),
    unread=(),
    notes=(),
    bytes_total=1,
    bytes_changed=1,
    bytes_added=0,
)


def verification(*levels: LevelResult, **more: Any) -> Verification:
    result = Verification(
        folded="./model-FlashNorm",
        source="org/model",
        commit="0060bc56",
        foreign=False,
        plan=PLAN,
        levels=levels,
        thresholds={"max_algebra_error": 1e-5, "max_noise_ratio": 1.5},
        environment={
            "torch": "2.13.0",
            "date": "2026-03-14T09:26:53Z",
            "command": "flashnorm verify ./model-FlashNorm",
        },
    )
    return dataclasses.replace(result, **more)


KERNELS = LevelResult("kernels", "passed", {"gpu": "NVIDIA H200", "sizes": [64, 2048], "error": 0.4987})
USERS = LevelResult(
    "users", "passed", {"users": [{"user": "modules.json", "compared": "embeddings", "numbers": 9, "error": 2e-7}]}
)
FULL = verification(WEIGHTS, layers(*map(norm_row, range(16))), LOGITS, USERS, KERNELS, RUNTIME, EVAL)


def charts(page: str) -> list[ET.Element]:
    found = re.findall(r'<svg class="chart.*?</svg>', page, re.DOTALL)
    return [ET.fromstring(svg) for svg in found]


@pytest.mark.parametrize(
    ("levels", "headline", "sentence"),
    [
        ((WEIGHTS, LOGITS), "Equivalent", "it passed all 2 levels that were run (weights and logits)."),
        (
            (WEIGHTS, LevelResult("logits", "skipped")),
            "As planned, not run",
            "no run of both models was compared (passed: weights). Not run: log",
        ),
        (
            (WEIGHTS, LOGITS, LevelResult("users", "skipped", reason="no sentence-transformers")),
            "As planned, not run",
            "Not everything that this checkpoint is used for was compared (passed: weights and logits). Not run: users",
        ),
        ((LevelResult("weights", "failed"), LOGITS), "NOT equivalent", "weights failed. Passed: logits."),
        ((LevelResult("weights", "skipped"),), "Not verified", "No level ran"),
        ((), "Not verified", "No level ran"),
    ],
)
def test_verdict_comes_first(levels: tuple[LevelResult, ...], headline: str, sentence: str) -> None:
    page = Page(render(verification(*levels)))
    assert page.text.startswith(
        f"{headline}: ./model-FlashNorm Folded checkpoint, verified against its source2026-03-14 09:26 UTC {headline} "
    )
    assert sentence in page.text
    assert page.text.index(sentence) < page.text.index("What was compared")


def test_findings_that_decide_stand_below_the_verdict() -> None:
    findings = (Finding("small.weight", "differs", 1e-3), Finding("large.weight", "differs", 0.5))
    missing = Finding("lost.weight", "is missing")
    bad = LevelResult("weights", "failed", {}, (*findings, missing, Finding("nan.weight", "differs", math.nan)))
    text = Page(render(verification(bad))).text
    verdict = text[: text.index("What was compared")]
    where = [verdict.find(name) for name in ("lost.weight", "nan.weight", "large.weight")]
    assert -1 not in where and sorted(where) == where
    assert "small.weight" not in verdict and "and 1 more" in verdict


def test_thousands_of_findings_are_cut() -> None:
    findings = tuple(Finding(f"<tensor {i}>", "differs", 1 / (i + 1)) for i in range(1234))
    text = Page(render(verification(LevelResult("weights", "failed", {}, findings)))).text
    listed = text[text.index("Levels") :]
    assert listed.count("differs") == 50
    assert "1,234 findings" in listed and "and 1,184 more" in listed
    assert "<tensor 49>" in listed and "<tensor 50>" not in listed


def evil(value: Any) -> Any:
    """The same result with every text replaced by a hostile one."""
    if isinstance(value, str):
        return EVIL
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = ("level", "status")
        changes = {f.name: evil(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name not in kept}
        return dataclasses.replace(value, **changes)
    if isinstance(value, dict):
        return {key: evil(inner) for key, inner in value.items()}
    return type(value)(map(evil, value)) if isinstance(value, list | tuple) else value


def test_hostile_text_stays_text() -> None:
    levels = [*FULL.levels, LevelResult(f"runtime:{EVIL}", "failed", {}, (Finding("", "", 1.0),), ("note",), "why")]
    keys = {**FULL.environment, EVIL: "value"}
    hostile = evil(dataclasses.replace(FULL, levels=tuple(levels), environment=keys, notes=("note",), recorded="file"))
    page = render(hostile)
    plain, mine = Page(render(dataclasses.replace(FULL, notes=("note",), recorded="file"))), Page(page)
    assert {tag for tag, _ in mine.tags} <= {tag for tag, _ in plain.tags} | {"wbr", "a", "ul"}
    assert not [name for _, attributes in mine.tags for name in attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in mine.text and "{{ 7 * 7 }}" in mine.text
    assert not re.search("[\x00\x1b\u202e\ud800]", page)
    page.encode()
    assert len(charts(page)) == 2


def test_page_asks_for_nothing_elsewhere() -> None:
    page = render(FULL, "https://example.org/it")
    tags = Page(page).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "use"}
    loads = [value for _, attributes in tags for name, value in attributes.items() if name in ("src", "srcset")]
    links = [attributes["href"] for tag, attributes in tags if "href" in attributes and tag == "a"]
    assert loads == [] and {tag for tag, attributes in tags if "href" in attributes} <= {"a"}
    assert [link for link in links if not link.startswith("#")] == ["https://example.org/it"]  # nothing loads a link
    assert "url(" not in page and "@import" not in page and "@font-face" not in page
    policy = [attributes["content"] for tag, attributes in tags if attributes.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


@pytest.mark.parametrize("figures", [{}, {"norms": [{}]}, {"greedy": [{}]}, {"tasks": [{}]}, {"source": None}])
@pytest.mark.parametrize(
    "name", ["weights", "layers", "logits", "kernels", "runtime:vllm", "runtime:", "eval", "unheard of"]
)
def test_every_figure_may_be_missing(name: str, figures: dict[str, Any]) -> None:
    level = LevelResult(name, "passed", figures)
    page = render(verification(level, plan=None, commit=None, thresholds={}, environment={}, source=""))
    headline = "Equivalent" if name.startswith(("logits", "runtime:")) else "As planned, not run"
    assert headline in page and "None" not in page and "nan" not in Page(page).text


@pytest.mark.parametrize("name", [level.level for level in FULL.levels])
def test_each_figure_may_be_missing(name: str) -> None:
    level = FULL.level(name)
    assert level is not None
    for key in level.figures:
        for other in (None, "text", math.nan):
            page = render(verification(dataclasses.replace(level, figures={**level.figures, key: other})))
            assert "None" not in Page(page).text, key


def test_level_kernels() -> None:
    text = Page(render(verification(WEIGHTS, LOGITS, KERNELS))).text
    assert "NVIDIA H200" in text and "64, 2048" in text and "0.4987" in text


def test_numbers_are_for_people() -> None:
    text = Page(render(FULL)).text
    assert "3.1e-07" in text and "1.10 \u00d7" in text.replace("\u00a0", " ") and "1,024 tokens" in text
    assert "> 99.99 %" in text.replace("\u00a0", " ") and "100.00" not in text  # not quite all is not all
    assert "12.3812" in text and "12.3830" in text


def test_what_was_compared() -> None:
    text = Page(render(FULL)).text.replace("\u00a0", " ")
    assert "3 folded, 2 kept, 1 not reached" in text
    assert "3 \u00d7 layers.*.norm.weight into up" in text
    assert "2 \u00d7 layers.*.q_norm.weight layers.*.rope rotates it" in text
    assert "the final norm keeps its weight" in text
    assert "flashnorm verify ./model-FlashNorm" in text


def test_names_are_code_and_not_between_backticks() -> None:
    skipped = LevelResult("layers", "skipped", reason="`torch` is too small", notes=("see `a.b` and `c`",))
    wrong = LevelResult("weights", "failed", {}, (Finding("x", "differs from `<y>`"),))
    kept = Norm("layers.0.q_norm.weight", (8,), 1.0, 0.0, (), "mixed in `layers.0.attn`")
    plan = dataclasses.replace(PLAN, norms=(*PLAN.norms, kept), notes=("`note` of the plan",))
    page = render(verification(wrong, skipped, plan=plan, notes=("`note` of the result",)))
    assert "`" not in page
    for name in ("torch", "a.b", "c", "&lt;y&gt;", "layers.*.attn", "note"):
        assert f"<code>{name}</code>" in page
    texts = {**LOGITS.figures, "greedy": [{"prompt": "`x`", "source": "`", "folded": "`", "same": 1, "tokens": 1}]}
    assert "`x`" in render(verification(dataclasses.replace(LOGITS, figures=texts)))  # what a model writes stays


def failed_tiles(page: str) -> list[str]:
    tiles = re.findall(r'<div(?: class="(failed)")?><dt>(.*?)</dt>', page[: page.index("What was compared")])
    assert all(("failed" in what) == (kind == "failed") for kind, what in tiles)  # in words, not by colour alone
    return [what.removesuffix(": failed") for kind, what in tiles if kind]


def test_failed_tiles_say_so() -> None:
    assert failed_tiles(render(FULL)) == []
    weights = LevelResult("weights", "failed", {**WEIGHTS.figures, "differing": 2})
    worst = layers(norm_row(0), norm_row(1, ratio=9.0), status="failed")
    assert failed_tiles(render(verification(weights, worst, LOGITS))) == ["Tensors as planned", "Worst layer"]
    for figures, tiles in (
        ({"algebra_error": 1e-2, "ratio": 1.0}, ["Algebra"]),
        ({"algebra_error": math.nan, "ratio": math.inf}, ["Algebra", "Rounding of the logits"]),
        ({"ratio": 7.0}, ["Rounding of the logits"]),
        ({}, ["Same next token"]),  # NaN in some rows: a failure that no other figure tells of
    ):
        logits = LevelResult("logits", "failed", {**LOGITS.figures, **figures})
        assert failed_tiles(render(verification(WEIGHTS, logits))) == tiles


def test_layers_are_in_the_order_of_their_numbers() -> None:
    as_in_files = sorted(map(norm_row, range(24)), key=lambda row: row["norm"])
    final = {**norm_row(0), "norm": "model.norm.weight"}
    chart = charts(render(verification(layers(*as_in_files, final))))[0]
    titles = [point.findtext(f"{SVG}title", "") for point in chart.iter(f"{SVG}g") if point.get("class") == "point"]
    expected = [f"model.layers.{i}.input_layernorm.weight" for i in range(24)]
    assert [title.split("\n")[0].split(". ")[1] for title in titles] == [*expected, "model.norm.weight"]


def test_the_plan_is_drawn_for_a_desk_and_for_a_phone() -> None:
    page = render(FULL)
    assert re.findall(r'<svg[^>]*class="fn (\w+)"', page) == ["wide", "narrow"]
    without = render(dataclasses.replace(FULL, plan=dataclasses.replace(PLAN, norms=())))
    assert 'class="fn' not in without


def test_the_project_is_linked() -> None:
    assert 'Made by <a href="https://example.org/it">flashnorm</a> 0' in render(FULL, "https://example.org/it")
    assert "Made by flashnorm 0" in Page(render(FULL)).text  # without an address: no link, or to the one there is


def test_greedy_texts_are_marked_where_they_part() -> None:
    page = render(verification(LOGITS))
    assert "upon a <mark>time</mark>" in page and "upon a <mark>hill</mark>" in page
    assert "The first 2 of 3 tokens agree." in page


@pytest.mark.parametrize("number", [1, 3, 16, 250, 2000])
def test_chart_holds_every_norm_in_file_order(number: int) -> None:
    rows = [norm_row(i, 2e-3 * (1 + i % 7 / 10), 1.7 if i == number // 2 else 0.9) for i in range(number)]
    found = charts(render(verification(layers(*rows))))
    assert [chart.get("class") for chart in found] == ["chart wide", "chart narrow"]
    for chart in found:
        points = [g for g in chart.iter(f"{SVG}g") if g.get("class") == "point"]
        names = [point.findtext(f"{SVG}title", "").split("\n")[0] for point in points]
        assert names == [f"{i + 1}. {row['norm']}" for i, row in enumerate(rows)]
        crosses = [i for i, point in enumerate(points) if point.findall(f"{SVG}path")]
        assert crosses == [number // 2]  # the one over the limit is marked by its shape, not by colour alone
        assert f"norm {number // 2 + 1}, {rows[number // 2]['norm']}" in chart.findtext(f"{SVG}desc", "")
        width, height = (float(v) for v in chart.get("viewBox", "").split()[2:])
        for element in chart.iter():
            for name, end in (("x", width), ("cx", width), ("y", height), ("cy", height)):
                assert 0 <= float(element.get(name, 0)) <= end


def test_chart_is_to_scale() -> None:
    rows = [norm_row(0, 1e-3, 1.0), norm_row(1, 1e-2, 1.0), norm_row(2, 1e-1, 1.5)]
    chart = charts(render(verification(layers(*rows))))[0]
    dots = [
        [float(circle.get("cy", "nan")) for circle in g.findall(f"{SVG}circle")]
        for g in chart.iter(f"{SVG}g")
        if g.get("class") == "point"
    ]
    assert dots[0][0] - dots[1][0] == pytest.approx((dots[0][0] - dots[2][0]) / (2 + math.log10(1.5)), abs=0.2)
    bound = next(line for line in chart.iter(f"{SVG}line") if line.get("class") == "bound")
    assert dots[2][1] == pytest.approx(float(bound.get("y1", "nan")), abs=0.1)  # a ratio of 1.5 lies on the limit
    assert dots[0][1] == dots[1][1] > dots[2][1]


@pytest.mark.parametrize("broken", [0.0, math.nan, math.inf, None, "text", -1.0, 1e-320, 1e300])
def test_chart_bears_any_number(broken: Any) -> None:
    row = {**norm_row(0), "error_folded": broken, "error_source": broken, "ratio": broken}
    found = charts(render(verification(layers(row, norm_row(1)))))
    assert len(found) == 2
    assert not [
        v for chart in found for e in chart.iter() for k, v in e.items() if k in ("x", "y", "cy", "d") and "n" in v
    ]


def test_no_chart_where_all_errors_are_zero() -> None:
    page = render(verification(layers({**norm_row(0), "error_folded": 0.0, "error_source": 0.0, "ratio": 0.0})))
    assert not charts(page) and "nothing to draw" in page


def test_nan_is_over_the_limit() -> None:
    text = Page(render(verification(layers(norm_row(0), norm_row(1, ratio=math.nan), status="failed")))).text
    assert "1 of 2 folded norms are within the limit; the worst has nan" in text


def test_page_is_written_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, elsewhere = tmp_path / "report.html", tmp_path / "elsewhere"
    path.write_text("before")
    elsewhere.write_text("precious")
    (tmp_path / ".report.html.partial").symlink_to(elsewhere)
    names = sorted(p.name for p in tmp_path.iterdir())

    def full(*_: object, **more: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        with pytest.raises(OSError, match="no space"):
            write_report(FULL, path)
    assert path.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    write_report(FULL, path)
    assert path.read_text() == render(FULL)
    assert elsewhere.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("before")
    monkeypatch.setattr(report_page, "TEMPLATE", tmp_path / "none.jinja")
    with pytest.raises(Exception, match="none"):
        write_report(FULL, path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"]


def test_limits_are_those_of_the_run() -> None:
    result = verification(
        layers(norm_row(0, ratio=1.9)), LOGITS, thresholds={"max_algebra_error": 2e-4, "max_noise_ratio": 2.0}
    )
    text = Page(render(result)).text.replace("\u00a0", " ")
    assert "limit 2.0e-04" in text and "limit, 2.00 \u00d7 the noise floor" in text
    assert "1 of 1 folded norms are within the limit" in text
