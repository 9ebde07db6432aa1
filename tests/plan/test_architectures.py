"""Every RMSNorm family of the installed transformers: fold a tiny random checkpoint, compare the logits, verify it.

`python tests/plan/test_architectures.py` writes docs/architectures.md, from the same plans and with every level of
`flashnorm verify` in three dtypes; with `--changed`, families whose plan is still what the page says keep their ratios.
The test below takes one dtype per family, and level logits for a quarter of them: all of it takes half an hour on one
processor. It compares each plan with the page, so that a stale one fails.
"""

import json
import multiprocessing
import re
import secrets
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import families
import pytest
import torch
import transformers
from command_line import run
from documents import document
from packaging.version import Version
from safetensors.torch import load_file, save_file

from flashnorm_cli.checkpoint.model import Source
from flashnorm_cli.checkpoint.names import grouped
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.errors import PlanError
from flashnorm_cli.folding.fold import fold
from flashnorm_cli.plan.model import Plan
from flashnorm_cli.plan.planner import make_plan
from flashnorm_cli.proof.result import MAX_NOISE_RATIO, Verification
from flashnorm_cli.proof.verify import verify

DOC = Path(__file__).parents[2] / "docs" / "architectures.md"
MAX_ERROR = 1e-5
DTYPES = ("bfloat16", "float16", "float32")
# Norms without weights, LayerNorms with biases, or norms behind the sums of a residual stream only.
NOTHING_TO_FOLD = ("hrm_text", "kosmos-2.5", "nanochat", "neomme")
# A text forward is not enough for them, or depends on data too much: refused, with the words below.
REFUSED = {
    "blt": "stopped in `model.patcher`",
    "idefics": "pixel_values",
    "pix2struct": "flattened_patches",
    "udop": "Bbox is required",
    "voxtral_realtime": "input_features",
}
if transformers.__version__ == "5.24.0":  # its own forward stops without an image
    REFUSED["llama4"] = "image_outputs"


def lines_of_doc() -> dict[str, str]:
    """The page's lines by family."""
    found = {m[1]: m[0] for m in re.finditer(r"^\| (\S+) \|.*$", DOC.read_text(), re.MULTILINE)}
    return {family: line for family, line in found.items() if family != "family"}


def doc_is_newer() -> bool:
    """Whether the page was written with a newer transformers than is installed, which may plan otherwise."""
    written = re.search(r"family of transformers (\d[\d.]*\d)", DOC.read_text())
    assert written, f"{DOC} does not say which transformers it was written with"
    return Version(written[1]) > Version(transformers.__version__)


def assert_in_doc(family: str, line: str) -> None:
    assert doc_is_newer() or lines_of_doc().get(family, "").startswith(line), (
        f"docs/architectures.md is stale: run `python tests/plan/test_architectures.py --changed`; {line}"
    )


def checkpoint_of(family: str, folder: Path) -> transformers.PreTrainedModel:
    model = families.build(family, seed=0)
    families.randomize_gains(model, seed=1)
    families.save(model, folder)
    return model


@pytest.mark.parametrize("family", families.families())
def test_family(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    cls = type(checkpoint_of(family, source))
    if family in NOTHING_TO_FOLD or family in REFUSED:
        assert run("fold", source, output) == 1
        assert REFUSED.get(family, "there is nothing to fold") in capsys.readouterr().err
        assert not output.exists()
        assert_in_doc(family, line_of_plan(family, source)[0])
        return

    assert run("fold", source, output, "--json") == 0, capsys.readouterr().err
    report = document(capsys.readouterr().out)
    assert report["counts"]["norms_folded"] > 0
    assert_in_doc(family, row(family, Plan.from_json(json.loads((output / "flashnorm.json").read_text()))))

    original = cls.from_pretrained(source, dtype=torch.float32).eval()
    folded, info = cls.from_pretrained(output, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    # Fresh inputs each time. A router or an indexer that is nearly undecided may flip by rounding alone: then other
    # inputs have to agree. A wrong fold is wrong on all of them.
    for attempt in (1, 2):
        seed = secrets.randbelow(1 << 31)
        inputs = families.text_inputs(original, seed)
        expected = families.logits(original, inputs)
        error = distance(families.logits(folded.eval(), inputs), expected)
        if (images := families.image_inputs(original, seed)) is not None:
            with_images = families.logits(original, images)
            error = max(error, distance(families.logits(folded, images), with_images))
        if error < MAX_ERROR:
            break
        # On a few inputs float32 itself is that far from the truth.
        exact = families.logits(cls.from_pretrained(source, dtype=torch.float64).eval(), inputs)
        own = distance(expected, exact)
        if images is None and error < 4 * own < 1e-4:
            break
        assert attempt == 1, f"relative error {error:.1e}, the source's own {own:.1e}, seed {seed}"

    # The same comparison sees a fold that forgot the readers: norms at the identity, linears untouched.
    tensors = load_file(source / "model.safetensors")
    for norm in json.loads((output / "flashnorm.json").read_text())["norms"]:
        if norm["folded"]:
            tensors[norm["tensor"]].fill_(1.0 - norm["offset"])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    forgetful = cls.from_pretrained(source, dtype=torch.float32).eval()
    assert distance(families.logits(forgetful, inputs), expected) > 100 * MAX_ERROR, f"seed {seed}"


def verified(family: str, folder: Path, dtype: str, levels: tuple[str, ...]) -> Verification:
    """Fold and verify a family whose weights are stored in a dtype; the folder has to be empty."""
    model = families.build(family, seed=0)
    families.randomize_gains(model, seed=1)
    families.save(model, folder / "source", dtype=getattr(torch, dtype))
    fold(folder / "source", folder / "folded")
    return verify(folder / "folded", folder / "source", levels=levels, device="cpu", workers=1)


@pytest.mark.parametrize("family", [f for f in families.families() if f not in (*NOTHING_TO_FOLD, *REFUSED)])
def test_family_passes_verify(family: str, tmp_path: Path) -> None:
    number = list(families.families()).index(family)
    levels = ("weights", "layers", "logits") if number % 4 == 0 else ("weights", "layers")
    result = verified(family, tmp_path, DTYPES[number % 3], levels)
    logits = result.level("logits")
    wanted = "equivalent" if logits and logits.status == "passed" else "as planned, not run"
    assert result.verdict == wanted, [(level.findings, level.reason) for level in result.levels]
    assert result.level("weights").figures["folded"] > 0
    assert result.level("layers").figures["norms"]
    assert result.level("logits") is None or result.level("logits").status in ("passed", "skipped")


def test_doc_lists_these_families() -> None:
    if doc_is_newer():
        pytest.skip("docs/architectures.md was written with a newer transformers")
    assert list(lines_of_doc()) == list(families.families()), (
        "docs/architectures.md is stale: run `python tests/plan/test_architectures.py --changed`"
    )


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def noise(family: str) -> list[str]:
    """Per dtype: what the fold adds to rounding, at the logits and in the worst layer. Raises if one does not pass."""
    cells = []
    for dtype in DTYPES:
        with TemporaryDirectory() as folder:
            result = verified(family, Path(folder), dtype, ("weights", "layers", "logits"))
        if any(level.status == "failed" for level in result.levels):  # level logits may be skipped: the source may fail
            raise SystemExit(f"{family} in {dtype} does not pass: {[level.findings for level in result.levels]}")
        logits: dict[str, Any] = result.level("logits").figures
        ratio = logits.get("ratio")
        layers = result.level("layers").figures["worst_ratio"]
        cells.append(f"{'-' if ratio is None else f'{ratio:.2f}'}, {layers:.2f}")
    return [*cells, transformers.__version__]


def row(family: str, plan: Plan) -> str:
    """A line of docs/architectures.md up to the ratios, without counts, which depend on the tiny models' layers."""

    def short(name: str) -> str:
        return f"`{name.removesuffix('.weight')}`"

    folded = [short(p) for p, _ in grouped(n.tensor for n in plan.folded)]
    kept: dict[str, list[str]] = {}
    for norm in plan.kept:
        reason = re.sub(r" in `[^`]*`$", "", re.sub(r"\.\d+\b", ".*", norm.reason or ""))
        names = kept.setdefault(reason, [])
        pattern = short(grouped([norm.tensor])[0][0])
        if pattern not in names:
            names.append(pattern)
    why = "<br>".join(f"{', '.join(names)}: {reason}" for reason, names in kept.items())
    return f"| {family} | {plan.architecture} | {'<br>'.join(folded)} | {why} | {plan.lm_head} | "


def line_of_plan(family: str, folder: Path) -> tuple[str, bool]:
    """A family's line up to the ratios, and whether there are ratios to measure."""
    try:
        plan = make_plan(open_checkpoint(Source(str(folder))))
    except PlanError as error:
        return f"| {family} | | refused | {error} | | ", False
    return row(family, plan), bool(plan.folded)


def line(family: str, before: str | None) -> str:
    """A family's line, from tiny checkpoints that are made for it; `before`, if nothing but the ratios could differ."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        checkpoint_of(family, Path(folder))
        start, folds = line_of_plan(family, Path(folder))
    if before is not None and before.startswith(start):
        return before
    return f"{start}{' | '.join(noise(family) if folds else [''] * (len(DTYPES) + 1))} |"


def write_doc(changed_only: bool) -> None:
    before = lines_of_doc() if changed_only else {}
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        names = families.families()
        rows = list(pool.map(line, names, [before.get(name) for name in names]))
    DOC.write_text(
        f"""# Architectures

What `flashnorm fold` does to each family of transformers {transformers.__version__} that carries an RMSNorm, as
planned for a tiny random model of it. Written by `python tests/plan/test_architectures.py`; the test in that file folds
each of them and compares float32 logits (relative error under {MAX_ERROR:.0e}). A family that is not listed is
planned in the same way, from its own forward: run `flashnorm plan`.

`*` stands for layer numbers. `lm_head`: *folded*, *untied* (a tied head gets weights of its own), *kept* (the final
norm keeps its weight), *none* (no head). Norms of image and audio towers, which a text forward does not reach, are
left alone and not listed.

Each family was then stored in three dtypes, folded, and passed `flashnorm verify`. The last columns hold its ratios
to the noise floor, at the logits and in the worst layer: 1 means that the folded model rounds as its source does, and
{MAX_NOISE_RATIO} is allowed. A `-` stands for logits without a ratio: the source does not run in this dtype, or
not in float64, which would be the reference of float32 (level logits compares with float32 itself then). *measured*
names the transformers that they were measured with; the plans are all of {transformers.__version__}.

| family | class | folded | kept, and why | lm_head | bf16 | fp16 | fp32 | measured |
|--|--|--|--|--|--|--|--|--|
"""
        + "\n".join(rows)
        + "\n"
    )


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    write_doc("--changed" in sys.argv)
