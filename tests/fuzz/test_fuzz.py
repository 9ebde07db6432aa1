"""Whatever a file of the user's holds, a command ends with a documented exit code and at most one line on stderr.

CI runs a fixed set of examples, about a minute in all. FLASHNORM_FUZZ=5000 draws that many new ones per target.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unicodedata import category

import mutations
import peft
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from small import tiny_llama

from flashnorm_cli.cli import main
from flashnorm_cli.errors import EXIT_NOT_RUN, MOST_OF_A_LINE
from flashnorm_cli.record.read import left_out, read_record

EXAMPLES = int(os.environ.get("FLASHNORM_FUZZ", "0"))
SECONDS = 30  # of one command on a model of 50 kB; usually a tenth of one
SPARE_BYTES = 3 << 30  # what a command may allocate beyond what the process has


def fuzz(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=EXAMPLES or examples,
        deadline=None,
        derandomize=not EXAMPLES,
        database=None,
        suppress_health_check=list(HealthCheck),
        # A failing example is printed as it was found: shrinking one costs minutes.
        phases=[Phase.generate] if EXAMPLES else [Phase.generate, Phase.shrink],
    )


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, its verified fold, and an adapter of the source."""
    folder = tmp_path_factory.mktemp("fuzz")
    model = tiny_llama()
    model.to(torch.bfloat16).save_pretrained(folder / "source", max_shard_size="6KB")
    assert (folder / "source" / "model.safetensors.index.json").exists()
    (folder / "source" / "README.md").write_text(
        "---\nlicense: mit\ntags:\n- text\nmodel-index:\n- name: m\n  results: []\n---\n# A model\n\nWords.\n"
    )
    adapter = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    adapter.save_pretrained(folder / "adapter")
    config_path = folder / "adapter" / "adapter_config.json"
    plain = json.loads(config_path.read_text())
    config_path.write_text(json.dumps({**plain, "base_model_name_or_path": "source"}))
    os.chdir(folder)
    for command, code in (("fold source folded --quiet", 0), ("verify folded --quiet --level weights", EXIT_NOT_RUN)):
        with pytest.raises(SystemExit) as done:
            main(command.split())
        assert (done.value.code or 0) == code
    return folder


@pytest.fixture
def place(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the files as the current folder, with a bound on what may be allocated from now on."""
    shutil.copytree(files, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE_BYTES, before[1]))
    yield tmp_path / "here"
    resource.setrlimit(resource.RLIMIT_AS, before)


def check(capfd: pytest.CaptureFixture[str], *commands: str) -> None:
    """Run commands in this process and judge what they print."""
    for command in commands:
        begun = time.monotonic()
        with pytest.raises(SystemExit) as done:
            main(command.split())
        out, err = capfd.readouterr()
        assert time.monotonic() - begun < SECONDS, command
        code = done.value.code or 0
        assert code in (0, 1, 2, 3, 4), (command, code)
        shown = f"{command}: exit code {code}\n{err}"
        assert "Traceback" not in err and "a bug in flashnorm" not in err, shown
        lines = err.splitlines()
        assert len(lines) == (1 if code in (1, 2) else 0), shown
        assert all(len(line) <= MOST_OF_A_LINE + 20 for line in lines), shown
        for text in (out, err):
            assert not {c for c in text if not c.isprintable() and c != "\n" and category(c) != "Zs"}, repr(text)


def written(path: str, data: bytes) -> Path:
    Path(path).write_bytes(data)
    return Path(path)


def json_of(path: str) -> Any:
    return json.loads(Path(path).read_text())


def safetensors_of(path: str) -> tuple[dict[str, Any], bytes]:
    raw = Path(path).read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:size]), raw[size:]


INDEX = "source/model.safetensors.index.json"


def fuzzed_file(place: Path, capfd: Any, path: str, examples: int, *commands: str, spoil: Any = None) -> None:
    """Fuzz one JSON file, and put it back."""
    original = Path(path).read_bytes()
    content = json.loads(original)

    @fuzz(examples)
    @given(mutations.as_bytes(mutations.mutated(content)))
    def run(data: bytes) -> None:
        shutil.rmtree("out", ignore_errors=True)
        Path(path).write_bytes(data)
        check(capfd, *commands)

    run()
    Path(path).write_bytes(original)


def test_config(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fuzzed_file(place, capfd, "source/config.json", 40, "plan source", "fold source out")


def test_index(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fuzzed_file(place, capfd, INDEX, 25, "fold source out")


def test_record(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fuzzed_file(
        place, capfd, "folded/flashnorm.json", 25,
        "fold-adapter adapter out --base folded --source source",
        "push-to-hub folded me/model --dry-run --unverified",
        "verify folded --level weights --no-record",
    )  # fmt: skip


def test_config_of_a_fold(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fuzzed_file(place, capfd, "folded/config.json", 25, "verify folded --level weights --no-record")


def test_adapter_config(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fuzzed_file(place, capfd, "adapter/adapter_config.json", 40, "fold-adapter adapter out --base folded")


def fuzzed_header(path: str, capfd: Any, examples: int, *commands: str) -> None:
    original = Path(path).read_bytes()
    fields, data = safetensors_of(path)

    @fuzz(examples)
    @given(mutations.as_bytes(mutations.mutated(fields)))
    def run(text: bytes) -> None:
        shutil.rmtree("out", ignore_errors=True)
        Path(path).write_bytes(len(text).to_bytes(8, "little") + text + data)
        check(capfd, *commands)

    run()
    Path(path).write_bytes(original)


def test_header(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fuzzed_header(str(next(Path("source").glob("model-00001-*"))), capfd, 60, "plan source")


def test_header_of_an_adapter(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fuzzed_header("adapter/adapter_model.safetensors", capfd, 40, "fold-adapter adapter out --base folded")


def test_card(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    matter = {
        "license": "mit", "license_name": "x", "license_link": "LICENSE", "language": ["en"], "tags": ["text"],
        "base_model": "org/base", "base_model_relation": "quantized", "datasets": ["org/data"],
        "pipeline_tag": "text-generation", "library_name": "transformers", "extra_gated_prompt": "x",
        "model-index": [{"name": "m", "results": [{
            "task": {"type": "text-generation", "name": "t"},
            "dataset": {"type": "d", "name": "d", "config": "c", "split": "test", "args": {"a": 1}},
            "metrics": [{"type": "acc", "value": 0.5, "name": "n"}],
            "source": {"url": "https://example.com", "name": "s"},
        }]}],
    }  # fmt: skip

    @fuzz(25)
    @given(mutations.as_bytes(mutations.mutated(matter)), st.sampled_from(["---\n", "---\r\n", "", "--- \n"]))
    def run(text: bytes, fence: str) -> None:
        card = fence.encode() + text + b"\n---\n# A model\n"  # JSON is YAML
        for name in ("source", "folded", "adapter"):
            Path(name, "README.md").write_bytes(card)
        shutil.rmtree("out", ignore_errors=True)
        check(capfd, "push-to-hub folded me/model --dry-run --unverified", "fold-adapter adapter out --base folded")

    run()


def test_token_ids(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("ids.json").write_text(json.dumps([[1, 2, 3, 4] * 16, [5, 6]]))
    fuzzed_file(place, capfd, "ids.json", 12, "verify folded --level logits --no-record --token-ids ids.json")


def test_records_that_runtimes_read(place: Path) -> None:
    """Loading a fold in Python raises errors of the package only; what vLLM's plugin asks for does not raise at all."""
    config, record = json_of("folded/config.json"), json_of("folded/flashnorm.json")
    dropped = {**config["flashnorm"], "layout": "dropped"}

    @fuzz(40)
    @given(mutations.mutated(dropped), mutations.mutated(record))
    def run(nested: Any, content: Any) -> None:
        warned: list[str] = []
        known = read_record(type("Config", (), {"flashnorm": nested})(), warn=warned.append)
        assert (known is None) == (nested is not None and bool(warned)) or nested is None
        assert all(w.isprintable() and len(w) <= MOST_OF_A_LINE for w in warned)
        if known is not None:
            try:
                left_out(known, content, [])
            except ValueError as error:
                assert str(error).isprintable()

    run()
