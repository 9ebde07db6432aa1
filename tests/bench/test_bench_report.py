"""What `flashnorm bench` prints and draws: numbers worked out by hand, and nothing said of what was not measured."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from flashnorm_cli.bench import picture, report
from flashnorm_cli.bench.kernels import Measurement
from flashnorm_cli.cli import tables
from flashnorm_cli.errors import FlashNormError, UsageError


def norm(contender: str, us: float | None = None, tokens: int = 1, hidden: int = 4096, **more: Any) -> Measurement:
    return Measurement(more.pop("operation", "rms_norm"), hidden, tokens, "bfloat16", contender, us, **more)


RESULTS = [
    norm("flashnorm", 2.0, gb_per_s=12.4, of_copy=0.75, host_us=5.04),
    norm("flashnorm, weighted", 2.2, of_copy=0.68),
    norm("F.rms_norm(None)", 3.0, of_copy=0.5, host_us=10.06),
    norm("Liger, None", 1.8, of_copy=0.83),
    norm("vLLM, weight", error="wrong: relative error 0.5"),
    norm("copy", 1.5, of_copy=1.0),
    norm("empty launch", 0.7),
    norm("flashnorm", 10.0, 4096, gb_per_s=6710.0, of_copy=1.0),
    norm("flashnorm, weighted", 10.0, 4096, of_copy=1.0),
    norm("F.rms_norm(None)", 18.2, 4096, of_copy=0.55),
    norm("Liger, None", None, 4096, error="RuntimeError: out of shared memory"),
    norm("copy", 10.0, 4096, of_copy=1.0),
    norm("flashnorm fused", 4.0, gb_per_s=12.4, of_copy=0.5, operation="fused_add_rms_norm"),
    norm("add, F.rms_norm(None)", 10.0, of_copy=0.2, operation="fused_add_rms_norm"),
    norm("copy", 2.0, of_copy=1.0, operation="fused_add_rms_norm"),
]


def test_rows() -> None:
    head, lines = report.rows_of(RESULTS, "rms_norm")
    others = ["flashnorm, weighted", "F.rms_norm(None)", "Liger, None", "vLLM, weight"]
    assert head == ["hidden", "tokens", "us", "GB/s", "of copy", *others]
    assert lines == [
        ["4096", "1", "2.00", "12", "75 %", "1.10x", "1.50x", "0.90x", "wrong"],
        ["4096", "4096", "10.00", "6710", "100 %", "1.00x", "1.82x", "failed", ""],
    ]


def test_rows_without_a_time_of_ours() -> None:
    """There is nothing to divide by: the others' own times, with their unit."""
    results = [norm("flashnorm", error="wrong: relative error 1"), norm("F.rms_norm(None)", 3.0)]
    assert report.rows_of(results, "rms_norm")[1] == [["4096", "1", "wrong", "3.00 us"]]


def test_a_time_of_something_wrong_is_never_shown() -> None:
    results = [norm("flashnorm", 2.0), norm("vLLM, weight", 0.1, error="wrong: relative error 1"), norm("copy", 1.0)]
    assert report.rows_of(results, "rms_norm")[1][0][-1] == "wrong"
    assert report.words(results) == []


def test_host_rows_are_of_the_smallest_shape() -> None:
    larger = norm("flashnorm", 2.0, tokens=16, host_us=99.0)
    assert report.host_rows([larger, *RESULTS]) == (
        ["call", "host us"],
        [["flashnorm", "5.0"], ["F.rms_norm(None)", "10.1"]],
    )
    assert report.host_rows([norm("flashnorm", 2.0)]) == ([], [])


def test_text_table() -> None:
    assert tables.text_table(["call", "us"], [["flashnorm", "5.0"], ["torch", "12.5"]]) == [
        "call         us",
        "---------  ----",
        "flashnorm   5.0",
        "torch      12.5",
    ]
    assert tables.text_table([], []) == []


def test_text_table_too_wide() -> None:
    """Heads break first, then columns go below, behind the keys once more."""
    head = ["hidden", "tokens", "flashnorm, weighted", "F.rms_norm(None)", "transformers"]
    lines = [["576", "1", "1.02x", "1.50x", "9.59x"], ["576", "16", "1.02x", "1.43x", ""], ["8192", "1", "", "", ""]]
    assert tables.text_table(head, lines, width=40) == [
        "                flashnorm,  F.rms_norm",
        "hidden  tokens    weighted      (None)",
        "------  ------  ----------  ----------",
        "   576       1       1.02x       1.50x",
        "   576      16       1.02x       1.43x",
        "",
        "  8192       1",
        "",
        "hidden  tokens  transformers",
        "------  ------  ------------",
        "   576       1         9.59x",
        "   576      16",
        "",
        "  8192       1",
    ]


def test_everybody_installed_fits_a_terminal() -> None:
    from flashnorm_cli.bench import kernels

    for operation, table in (("rms_norm", kernels.NORMS), ("fused_add_rms_norm", kernels.FUSED)):
        results = [norm(name, 12345.67, gb_per_s=4321, of_copy=1.0, operation=operation) for name, _, _ in table]
        assert max(map(len, tables.text_table(*report.rows_of(results, operation)))) <= 100


def test_markdown_table() -> None:
    assert tables.markdown_table(["call", "us"], [["a|b", "5.0"]]) == [
        "| call | us |",
        "| :-- | --: |",
        "| a\\|b | 5.0 |",
    ]


def test_words() -> None:
    assert report.words(RESULTS) == [
        "Dropping the weight (rms_norm): our kernel with a weight takes 1.10x as long as flashnorm up to 256 tokens, "
        "1.00x with more.",
        "Kernel and launch (rms_norm): torch without a weight takes 1.50x as long as flashnorm up to 256 tokens, "
        "1.82x with more.",
        "The fastest of the others (rms_norm) takes 0.90x as long as flashnorm up to 256 tokens, 1.82x with more; "
        "it is faster than we are on 1 of 2 shapes.",
        "Fusion, kernel and launch (fused_add_rms_norm): torch without a weight takes 2.50x as long as "
        "flashnorm fused up to 256 tokens.",
        "The fastest of the others (fused_add_rms_norm) takes 2.50x as long as flashnorm fused up to 256 tokens; "
        "it is faster than we are on 0 of 1 shapes.",
        "Host: a call of flashnorm takes 5.0 us of the host's time, one of F.rms_norm(None) 10.1 us.",
    ]


def test_words_give_ranges() -> None:
    results = [norm("copy", 1.0)]
    for tokens, us in ((257, 1.5), (512, 1.2), (1024, 1.1)):
        results += [norm("flashnorm", 1.0, tokens), norm("flashnorm, weighted", us, tokens)]
    assert report.words(results) == [
        "Dropping the weight (rms_norm): our kernel with a weight takes 1.10x to 1.50x as long as flashnorm with more "
        "than 256 tokens (median 1.20x of 3 shapes)."
    ]


def test_words_say_why_more_than_a_copy() -> None:
    results = [norm("flashnorm", 1.0, of_copy=1.375), norm("copy", 1.375, of_copy=1.0)]
    text = "Up to 138 % of the copy (rms_norm): the copy is launched without programmatic dependent launch"
    assert report.words(results) == [f"{text}."]
    results.append(norm("flashnorm, no PDL", 1.5, of_copy=0.92))
    assert report.words(results)[-1] == f"{text}; our kernel without it reaches 92 %."


def test_words_claim_nothing_without_data() -> None:
    assert report.words([]) == []
    assert report.words([norm("flashnorm", 2.0), norm("copy", 1.0)]) == []
    # Two contenders, but never on the same shape.
    assert report.words([norm("flashnorm", 2.0), norm("F.rms_norm(None)", 4.0, 16), norm("copy", 1.0)]) == []


def test_words_on_a_cpu_are_of_torch_alone() -> None:
    """Our function is torch's there, so that no gain of its kernel may be claimed."""
    results = [norm("flashnorm", 2.0), norm("F.rms_norm(None)", 2.0), norm("F.rms_norm(weight)", 2.5)]
    assert report.words(results) == [
        "Dropping the weight in torch (rms_norm): torch with a weight takes 1.25x as long as F.rms_norm(None) "
        "up to 256 tokens."
    ]


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture.plot(RESULTS, tmp_path / "a.svg")
    picture.plot(RESULTS, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    texts = [node.text or "" for node in ET.parse(tmp_path / "a.svg").iter("{http://www.w3.org/2000/svg}text")]
    drawn = {"flashnorm", "F.rms_norm(None)", "Liger, None", "flashnorm fused"}
    assert drawn | {"add, F.rms_norm(None)", "1", "4k"} <= set(texts)
    assert texts.count("hidden 4096") == 2  # a row of panels for each operation
    assert "vLLM, weight" not in texts  # it was wrong, and has no line
    assert "copy" not in texts
    assert "flashnorm, weighted" not in texts  # a line a family
    picture.plot(RESULTS, tmp_path / "c.svg", "NVIDIA H200")
    assert "rms_norm in bfloat16 on NVIDIA H200" in (tmp_path / "c.svg").read_text()
    assert "rms_norm in bfloat16" in texts  # nobody said on what


@pytest.mark.parametrize("hiddens", [1, 5])
def test_plot_has_room_for_everybody(tmp_path: Path, hiddens: int) -> None:
    """Legends are as wide as their names: nothing may lie left of the picture, or right of it."""
    pytest.importorskip("matplotlib")
    from flashnorm_cli.bench import kernels

    tables = (("rms_norm", kernels.NORMS), ("fused_add_rms_norm", kernels.FUSED))
    shapes = [
        (operation, name, 512 << i) for operation, table in tables for name, _, _ in table for i in range(hiddens)
    ]
    picture.plot([norm(n, 1.0, hidden=h, of_copy=1.0, operation=o) for o, n, h in shapes], tmp_path / "a.svg")
    root = ET.parse(tmp_path / "a.svg").getroot()
    width = float(root.attrib["viewBox"].split()[2])
    names = {
        "flashnorm", "F.rms_norm(None)", "transformers", "Inductor, None", "Liger, None", "quack, None",
        "FlashInfer, weight", "vLLM, weight", "flashnorm fused", "add, F.rms_norm(None)", "Inductor fused, None",
        "Liger fused, weight", "vLLM fused, weight",
    }  # fmt: skip
    assert names < {name for _, name, _ in shapes}
    found = {}
    for node in root.iter("{http://www.w3.org/2000/svg}text"):
        if node.text in names:
            found[node.text] = float(
                node.attrib.get("x") or re.findall(r"translate\(([-\d.]+)", node.attrib["transform"])[0]
            )
    assert set(found) == names
    assert all(30 < x < width - 4.5 * len(name) for name, x in found.items())  # 30 points for the line before a name


def test_ticks_can_be_read(tmp_path: Path) -> None:
    """Labels of one axis do not run into each other, and tell a reader round numbers."""
    pytest.importorskip("matplotlib")
    tokens = [1 << i for i in range(17)]
    picture.plot([norm("flashnorm", 1.0, t, h, of_copy=1.37) for t in tokens for h in (64, 128)], tmp_path / "a.svg")
    texts = ET.parse(tmp_path / "a.svg").iter("{http://www.w3.org/2000/svg}text")
    found = [(n.text or "", n.attrib["style"], float(n.attrib["x"]))
             for n in texts if re.fullmatch(r"\d+k?", n.text or "")]  # fmt: skip
    assert {str(share) for share in range(0, 151, 25)} >= {text for text, style, _ in found if "end" in style} > {"100"}
    ticks = sorted(x for text, style, x in found if "middle" in style)
    assert 6 <= len(ticks) <= 18 and min(b - a for a, b in pairwise(ticks)) > 20  # points; "64k" takes 18


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.PDF", b"%PDF")])
def test_plot_by_suffix(tmp_path: Path, name: str, start: bytes) -> None:
    pytest.importorskip("matplotlib")
    picture.plot(RESULTS, tmp_path / name)
    once = (tmp_path / name).read_bytes()
    picture.plot(RESULTS, tmp_path / name)
    assert once.startswith(start) and (tmp_path / name).read_bytes() == once


def test_plot_heeds_no_settings_of_the_user(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    picture.plot(RESULTS, tmp_path / "a.svg")
    with matplotlib.rc_context({"svg.fonttype": "path", "axes.facecolor": "black", "font.size": 30}):
        picture.plot(RESULTS, tmp_path / "b.svg")
        assert matplotlib.rcParams["font.size"] == 30  # and leaves them as they were
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_plot_refuses(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a\.jpg: pictures are \.svg, \.png or \.pdf"):
        picture.plot(RESULTS, tmp_path / "a.jpg")
    pytest.importorskip("matplotlib")
    with pytest.raises(FlashNormError, match="nothing to draw"):
        picture.plot([norm("flashnorm", 2.0)], tmp_path / "a.svg")  # as on a CPU: no copy
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FlashNormError, match=r"pip install 'flashnorm-cli\[plot\]'"):
        picture.plot(RESULTS, tmp_path / "a.svg")
