"""Files made to hurt: what they hold reaches a terminal escaped and cut, and costs neither time, memory nor work."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from documents import document
from small import tiny_llama

from flashnorm_cli.adapters.kinds import check_adapter_config
from flashnorm_cli.checkpoint.config_values import check_config
from flashnorm_cli.checkpoint.header import TensorEntry, parse_header
from flashnorm_cli.checkpoint.model import Checkpoint, Source
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.errors import MOST_OF_A_LINE, CheckpointError, FlashNormError, escaped, one_line
from flashnorm_cli.hub.card import read_card
from flashnorm_cli.plan.model import Plan
from flashnorm_cli.proof import blocks
from flashnorm_cli.record.read import FoldRecord, config_record, read_record

ESCAPES = "\x1b[2J\x1b]0;owned\x07\u202eevil\x9b31m\x00"


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    tiny_llama().save_pretrained(folder / "source", max_shard_size="5KB")  # many shards
    assert run("fold", folder / "source", folder / "folded", "--quiet") == 0
    return folder


def header_of(fields: dict[str, Any] | str, data: int = 0) -> tuple[bytes, int]:
    text = fields if isinstance(fields, str) else json.dumps(fields)
    raw = len(text.encode()).to_bytes(8, "little") + text.encode()
    return raw, len(raw) + data


# ---- escaped and cut -------------------------------------------------------------------------------------------------


def test_what_a_terminal_would_obey_is_escaped() -> None:
    safe = escaped(ESCAPES + "\ud800\u2028 ünïcödé 模型")
    assert safe.isprintable() and safe.endswith("ünïcödé 模型")
    assert safe.startswith("\\x1b[2J\\x1b]0;owned\\x07\\u202eevil\\x9b31m\\x00\\ud800\\u2028")
    for words in ("x" * 10**6, "word " * 10**6, "\x1b" * 10**6):
        assert len(one_line(words)) <= MOST_OF_A_LINE and one_line(words).isprintable()
    assert len(str(CheckpointError("a " * 10**6))) <= MOST_OF_A_LINE
    # What to do stands at the end, and survives a long name before it.
    assert str(FlashNormError(f"{'n' * 10**6}: is wrong; remove it")).endswith("nnn: is wrong; remove it")


@pytest.mark.parametrize(
    "fields",
    [
        {ESCAPES * 10**4: {"dtype": "F32", "shape": [1], "data_offsets": [0, 5]}},
        {"x": {"dtype": ESCAPES * 10**4, "shape": [1], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [-1] * 10**5, "data_offsets": [0, 4]}},
    ],
)
def test_a_header_s_names_are_short_and_safe(fields: dict[str, Any]) -> None:
    raw, size = header_of(fields, 4)
    with pytest.raises(CheckpointError) as error:
        parse_header(raw, size, "shard")
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


def test_names_from_files_on_stdout_and_stderr(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tensor that nothing reads is listed, and a model type that nobody knows is refused: both by name."""
    model = tmp_path / "model"
    model.mkdir()
    for path in (source / "source").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"][ESCAPES] = "more.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    raw, _ = header_of({ESCAPES: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    (model / "more.safetensors").write_bytes(raw + bytes(4))
    assert run("plan", model) == 0
    shown = capsys.readouterr()
    assert "\\x1b[2J" in shown.out and all(line.isprintable() for line in (shown.out + shown.err).splitlines())
    assert run("plan", model, "--json") == 0
    assert ESCAPES in document(capsys.readouterr().out)["plan"]["unread"]
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": ESCAPES}))
    assert run("plan", model) == 1
    err = capsys.readouterr().err
    assert "\\x1b" in err and len(err.splitlines()) == 1 and err[:-1].isprintable()
    (model / "config.json").write_text(json.dumps({**config, "architectures": [ESCAPES]}))
    assert run("plan", model) == 0  # as the auto classes take it, with a note
    out = capsys.readouterr().out
    assert "transformers does not know \\x1b" in out and all(line.isprintable() for line in out.splitlines())


def test_the_plugin_s_warnings_are_short_and_safe() -> None:
    warned: list[str] = []
    assert (
        read_record(type("C", (), {"flashnorm": {"format": ESCAPES * 999, "folded": []}})(), warn=warned.append) is None
    )
    assert len(warned) == 1 and warned[0].isprintable() and len(warned[0]) <= MOST_OF_A_LINE


# ---- time and memory -------------------------------------------------------------------------------------------------


def test_duplicates_in_a_header_are_found_in_linear_time() -> None:
    entries = ",".join(f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(50_000))
    raw, size = header_of("{" + entries + ',"t49999":{}}')
    begun = time.process_time()
    with pytest.raises(CheckpointError, match="'t49999' occurs twice"):
        parse_header(raw, size, "shard")
    assert time.process_time() - begun < 4  # a quarter of a minute when names were counted one by one


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 2**31},
        {"hidden_size": 2**31, "head_dim": None},
        {"intermediate_size": 2**40},
        {"vocab_size": 2**40},
        {"head_dim": 2**31},
        {"num_key_value_heads": 10**9},
        {"num_hidden_layers": 10**7},
        {"num_labels": 10**9},
        {"hidden_size": -1},
        {"vocab_size": 0},
        {"model_type": ["llama"]},
        {"text_config": [1]},
        {"auto_map": {"AutoConfig": 3}},
        {"layer_types": 3},
        {"id2label": [1]},
        {"quantization_config": "x"},
    ],
)
def test_a_config_that_could_never_be(
    source: Path, tmp_path: Path, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (source / "source").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "source" / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run("plan", tmp_path) == 1
    assert time.process_time() - begun < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
    (line,) = capsys.readouterr().err.splitlines()
    assert next(iter(change)) in line and "config.json" in line


def test_large_models_are_not_refused() -> None:
    tensors = [TensorEntry(str(i), "BF16", (163840, 7168), 0, 0) for i in range(1000)]
    config = {
        "hidden_size": 7168, "vocab_size": 163840, "num_hidden_layers": 61, "n_routed_experts": 384, "num_labels": 2,
        "q_lora_rank": None, "head_dim": 0, "max_position_embeddings": 2**40, "vision_feature_layer": -2,
        "intermediate_size": [16384] * 30, "num_key_value_heads": [0, 0, 8], "sliding_window": -1,
        "text_config": {"model_type": "x", "layer_types": ["full_attention"]},
        "auto_map": {"AutoTokenizer": ["a.B", None], "AutoConfig": "a.C"},
    }  # fmt: skip
    check_config(config, tensors, "config.json")


def test_more_shards_than_open_files(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(Source(str(source / "source")))
    assert len(checkpoint.shards) > 2
    monkeypatch.setattr(blocks, "_open_files", blocks._OpenFiles(2))
    before = len(list(Path("/proc/self/fd").iterdir()))
    readers = [blocks.ShardReader(checkpoint, shard) for shard in checkpoint.shards for _ in range(3)]
    for _ in range(2):
        for reader in readers:
            assert reader.read(0, 8) == reader.path.read_bytes()[:8]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
    for reader in readers:
        reader.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_shard_that_was_replaced_is_not_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed between two reads, a shard is only opened again as the same file."""
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(b"x" * 16)
    here = Checkpoint(Source("x"), tmp_path, None, {}, {}, None)
    monkeypatch.setattr(blocks, "_open_files", blocks._OpenFiles(1))
    one, two = (blocks.ShardReader(here, name) for name in ("one", "two"))
    assert one.read(0, 4) == two.read(0, 4) == b"xxxx"
    (tmp_path / "new").write_bytes(b"y" * 16)
    (tmp_path / "new").rename(tmp_path / "one")
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        one.read(0, 4)


# ---- records, adapters, cards ----------------------------------------------------------------------------------------


RECORDS: list[tuple[tuple[Any, ...], Any, str]] = [
    ((), [1], "its content"),
    (("format",), 2, "format"),
    (("format",), True, "format"),
    (("norms",), {}, "norms"),
    (("norms", 0), 3, r"norms\[0\]"),
    (("norms", 0, "tensor"), ["x"], r"norms\[0\]\.tensor"),
    (("norms", 0, "scale"), 0, r"norms\[0\]\.scale"),
    (("norms", 0, "scale"), float("nan"), r"norms\[0\]\.scale"),
    (("norms", 0, "offset"), "1", r"norms\[0\]\.offset"),
    (("norms", 0, "shape"), [2**40], r"norms\[0\]\.shape"),
    (("norms", 0, "folded"), "yes", r"norms\[0\]\.folded"),
    (("readers", 0, "dim"), -1, r"readers\[0\]\.dim"),
    (("readers", 0, "runs"), [[None, 0, 2**70, 1]], r"readers\[0\]\.runs"),
    (("readers", 0, "runs"), [["no such norm", 0, 1, 1]], r"readers\[0\]\.runs"),
    (("readers", 0, "values_from"), 3, r"readers\[0\]\.values_from"),
    (("untie",), "false", "untie"),
    (("added",), {"x": ["F32"]}, "added"),
    (("lm_head",), ["none"], "lm_head"),
    (("bytes_total",), -1, "bytes_total"),
    (("text_config",), "text", "text_config"),
]


@pytest.mark.parametrize(("path", "value", "key"), RECORDS)
def test_a_record_of_the_wrong_type(source: Path, path: tuple[Any, ...], value: Any, key: str) -> None:
    content = json.loads((source / "folded" / "flashnorm.json").read_text())
    assert {**content, **json.loads(json.dumps(Plan.from_json(content).to_json()))} == content
    where: Any = content
    for step in path[:-1]:
        where = where[step]
    if path:
        where[path[-1]] = value
    else:
        content = value
    with pytest.raises(CheckpointError, match=rf"^here/flashnorm\.json: {key} .*(fold the source again)"):
        Plan.from_json(content, "here/flashnorm.json")


@pytest.mark.parametrize(
    "change",
    [{"layout": "mixed"}, {"layout": ["identity"]}, {"kept": [1]}, {"lm_head": 3}, {"format": "1"}, {"folded": [None]}],
)
def test_a_config_s_record_of_the_wrong_type(source: Path, change: dict[str, Any]) -> None:
    known = json.loads((source / "folded" / "config.json").read_text())["flashnorm"]
    assert config_record(known).folded == frozenset(known["folded"])
    with pytest.raises(CheckpointError, match=r"config\.json.*" + next(iter(change))):
        config_record({**known, **change})


def test_a_record_names_sizes_and_a_source(source: Path) -> None:
    record = FoldRecord.read(source / "folded" / "flashnorm.json")
    assert record.source == (str(source / "source"), None) and record.layout == "identity" and not record.adopted
    assert record.source_sizes["config.json"] == (source / "source" / "config.json").stat().st_size
    for facts in (None, 3, {"x": 3}, {"x": {"size": "1"}}):
        with pytest.raises(CheckpointError, match="source_files"):
            _ = FoldRecord("flashnorm.json", {**record.content, "source_files": facts}).source_sizes


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": ["LORA"]}, {"task_type": {}}, {"layer_replication": 0.5}, {"layer_replication": [[0, 10**9]]},
        {"lora_alpha": "8"}, {"alpha_pattern": {"(": 1}}, {"alpha_pattern": {"(a+)+$": 1}},
        {"alpha_pattern": {"q_proj": "x"}}, {"target_parameters": 3}, {"modules_to_save": [3]},
        {"trainable_token_indices": {"x": 3}}, {"base_model_name_or_path": 3},
    ],
)  # fmt: skip
def test_an_adapter_config_of_the_wrong_type(change: dict[str, Any]) -> None:
    known = {"peft_type": "LORA", "task_type": None, "lora_alpha": 8, "alpha_pattern": {r"^model\.(.*)\.q_proj": 4}}
    check_adapter_config(known, "adapter_config.json")
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {next(iter(change))}"):
        check_adapter_config({**known, **change}, "adapter_config.json")


@pytest.mark.parametrize(
    "matter",
    ["tags: text", "license: {a: 1}", "base_model: 3", "a: " + "[" * 5000, "tags:\n" + "- tag\n" * 200_000,
    ],
)  # fmt: skip
def test_a_card_of_the_wrong_type(matter: str) -> None:
    begun = time.process_time()
    with pytest.raises(CheckpointError, match=r"^README\.md: .*(correct|shorten) the block between the ---"):
        read_card(f"---\n{matter}\n---\n# A model\n")
    assert time.process_time() - begun < 2


# ---- work is not lost at its end -------------------------------------------------------------------------------------


def test_a_report_that_cannot_be_written_is_found_first(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verify = ("verify", source / "folded", "--level", "weights", "--no-record", "--report")
    for path, code in (
        (tmp_path, 2), (tmp_path / "none" / "r.html", 2), (Path("/dev/null"), 2), (tmp_path / ("r" * 250), 1),
        (Path("/proc/r.html"), 1),
    ):  # fmt: skip
        assert run(*verify, path) == code
        shown = capsys.readouterr()
        assert shown.out == "" and len(shown.err.splitlines()) == 1 and path.name in shown.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_goes_away_does_not_take_the_result(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashnorm_cli.proof import verify as proof

    folder, real = tmp_path / "here", proof.verify

    def slow(*arguments: Any, **more: Any) -> Any:
        folder.rmdir()
        return real(*arguments, **more)

    monkeypatch.setattr(proof, "verify", slow)
    for extra in ((), ("--json",)):
        folder.mkdir()
        arguments = ("--level", "weights", "--no-record", "--report", folder / "r.html", *extra)
        assert run("verify", source / "folded", *arguments) == 1
        shown = capsys.readouterr()
        verdict = document(shown.out)["verdict"] if extra else shown.out
        assert verdict.lower().startswith("as planned, not run")
        assert "r.html" in shown.err and "bug" not in shown.err and len(shown.err.splitlines()) == 1


def test_a_measurement_is_printed_though_it_cannot_be_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashnorm_cli.bench import kernels

    folder, real = tmp_path / "here", kernels.measure_cpu

    def slow(*arguments: Any) -> Any:
        folder.rmdir()
        return real(*arguments)

    monkeypatch.setattr(kernels, "measure_cpu", slow)
    monkeypatch.setattr(kernels, "NORMS", [n for n in kernels.NORMS if n[0] in ("flashnorm", "F.rms_norm(None)")])
    folder.mkdir()
    bench = "bench --device cpu --dtype float32 --hidden 64 --tokens 2 --trials 1 --json --save".split()
    assert run(*bench, folder / "x.json") == 1
    shown = capsys.readouterr()
    assert document(shown.out)["benchmark"]["results"] and "x.json" in shown.err and "bug" not in shown.err
    assert run(*bench, tmp_path / "none" / "x.json") == 2
    assert run(*bench, "/proc/x.json") == 1


SAY = """
import sys
from flashnorm_cli.cli import app, main
from flashnorm_cli.cli.output import Output

@app.command()
def say(json: bool = False) -> None:
    out = Output(json)
    out.data({"a": 1})
    out.text("a")

main(sys.argv[1:])
"""


@pytest.mark.parametrize("arguments", [("--version",), ("say",), ("say", "--json")])
def test_stdout_that_takes_nothing(arguments: tuple[str, ...]) -> None:
    """A full disk behind `> file`, and a reader that is gone: one line, exit code 1."""
    command = [sys.executable, "-c", SAY, *arguments]
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "flashnorm: standard output: No space left on device\n")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "flashnorm: standard output: Broken pipe\n")
