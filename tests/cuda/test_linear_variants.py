"""The variants of norm_linear compile for GPUs that are not here, fit their shared memory, and choices are kept."""

import json

import pytest

from flashnorm_cli.cuda import choices, linear_variants
from flashnorm_cli.cuda.choices import Choice
from flashnorm_cli.cuda.linear import Problem
from flashnorm_cli.cuda.linear_variants import ACTIVATIONS, MEASURED_ROWS, bucket_of, candidates, shared_limit

ARCHS = (80, 86, 89, 90, 100, 120)


@pytest.mark.parametrize("arch", ARCHS)
def test_there_are_variants_that_fit(arch):
    for k in (8, 64, 264, 2048, 14336):
        for rows in MEASURED_ROWS:
            for activation in range(len(ACTIVATIONS)):
                found = candidates(k, activation, rows, arch)
                assert len(found) >= 3 and len(set(found)) == len(found)
                for each in found:
                    assert each.kernel == ("one_row" if rows == 1 else "few_rows")
                    assert each.shared_bytes <= shared_limit(arch) and each.threads <= 1024
                    assert each.rows8 == (0 if rows == 1 else 1 if rows <= 8 else 2)
                    outputs = 1000
                    per_block = each.groups * each.lines or each.tiles * 16
                    assert each.blocks(outputs, activation) * per_block >= outputs * (2 if activation else 1)
                    of_a_turn = each.parts * (256 if rows == 1 else 32 * each.chunks)
                    turns = (k + of_a_turn - 1) // of_a_turn
                    assert 1 <= each.depth <= turns


def test_rows_take_the_choice_of_the_next_measured_number():
    assert [bucket_of(rows) for rows in range(1, 17)] == [1, 2, 4, 4, *[8] * 4, *[16] * 8]


@pytest.mark.parametrize("arch", (80, 90, 100))
def test_variants_compile(arch):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    some = [(k, a, rows) for k, a in ((264, 3), (2048, 0), (2048, 1)) for rows in (1, 8, 16)]
    for number, (k, activation, rows) in enumerate(some):
        for each in candidates(k, activation, rows, arch)[number % 3 :: 4]:
            code = linear_variants.source(each.kernel).encode()
            _, program = nvrtc.nvrtcCreateProgram(code, b"norm_linear.cu", 0, [], [])
            more = each.options(number % 2, k, rows != 8, activation, arch >= 90)
            options = [f"--gpu-architecture=sm_{arch}", "--ftz=true", "--std=c++17", *more]
            nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
            _, length = nvrtc.nvrtcGetProgramLogSize(program)
            log = b" " * length
            if length > 1:
                nvrtc.nvrtcGetProgramLog(program, log)
            error, size = nvrtc.nvrtcGetCUBINSize(program)
            nvrtc.nvrtcDestroyProgram(program)
            assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS and size > 0 and length <= 1, (each, log)


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHNORM_CACHE", str(tmp_path))
    monkeypatch.setattr(choices, "_known", {})
    monkeypatch.setattr(choices, "gpu_name", lambda index: f"Some GPU/{index}")
    return tmp_path


def forget(monkeypatch):
    monkeypatch.setattr(choices, "_known", {})


PROBLEM = Problem(2048, 3072, 0, True, 0, False)


def test_a_choice_is_kept_per_gpu_and_sources(gpu, monkeypatch):
    variant = candidates(2048, 0, 1, 90)[2]
    assert choices.choice_of(PROBLEM, 1, 0) is None
    choices.remember(PROBLEM, 1, 0, Choice(variant, 4.5, 9.0))
    choices.remember(PROBLEM, 2, 0, Choice(None, 9.5, 9.0))
    forget(monkeypatch)
    assert choices.choice_of(PROBLEM, 1, 0) == Choice(variant, 4.5, 9.0)
    assert choices.choice_of(PROBLEM, 2, 0) == Choice(None, 9.5, 9.0)
    assert choices.choice_of(PROBLEM, 1, 1) is None, "another GPU"
    assert choices.choice_of(PROBLEM._replace(residual=True), 1, 0) is None
    (file,) = gpu.iterdir()
    assert choices.sources_hash() in file.name
    monkeypatch.setattr(choices, "sources_hash", lambda: "other")
    forget(monkeypatch)
    assert choices.choice_of(PROBLEM, 1, 0) is None, "measured with other sources"


def test_two_processes_add_to_one_file(gpu, monkeypatch):
    choices.remember(PROBLEM, 1, 0, Choice(None))
    forget(monkeypatch)
    first = choices.known_choices(0)
    assert len(first) == 1
    forget(monkeypatch)
    monkeypatch.setattr(choices, "_read", lambda path: {})  # this process read before the other wrote
    choices.known_choices(0)
    monkeypatch.undo()
    monkeypatch.setenv("FLASHNORM_CACHE", str(gpu))
    monkeypatch.setattr(choices, "gpu_name", lambda index: f"Some GPU/{index}")
    choices.remember(PROBLEM, 8, 0, Choice(None))
    forget(monkeypatch)
    assert len(choices.known_choices(0)) == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 9}', '{"format": 1, "sources": "x", "choices": 3}', "null"]
)
def test_a_file_that_is_not_ours_is_measured_anew(gpu, text, monkeypatch):
    choices.file_of("Some GPU/0").write_text(text)
    assert choices.choice_of(PROBLEM, 1, 0) is None
    choices.remember(PROBLEM, 1, 0, Choice(None))
    assert json.loads(choices.file_of("Some GPU/0").read_text())["format"] == choices.FORMAT


def test_a_folder_that_cannot_be_written_costs_only_the_memory(gpu, monkeypatch):
    (gpu / "file").write_text("")
    monkeypatch.setenv("FLASHNORM_CACHE", str(gpu / "file" / "below"))
    choices.remember(PROBLEM, 1, 0, Choice(None))
    assert choices.choice_of(PROBLEM, 1, 0) == Choice(None)
