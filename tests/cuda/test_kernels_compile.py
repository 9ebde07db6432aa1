"""Every variant of the kernels that can be chosen compiles, for GPUs that are not here."""

from itertools import product

import pytest

from flashnorm_cli.cuda import variants
from flashnorm_cli.cuda.variants import Device, Launch

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")

# Multiprocessors and bytes of L2: T4, A100, H100, B200.
GPUS = {
    75: Device(75, 40, 4 << 20),
    80: Device(80, 108, 40 << 20),
    90: Device(90, 132, 50 << 20),
    100: Device(100, 148, 126 << 20),
}
HIDDEN = (1, 3, 64, 257, 576, 2048, 4096, 8192, 16384, 65536)
FULL = (3, 128, 2048, 8192)  # with every dtype and gain; the others in bfloat16 without weight
ROWS = (1, 16, 200, 1 << 20)


def chosen(device: Device) -> set[tuple[str, Launch, int, int, int]]:
    """What `choose` picks over sizes, row counts, dtypes, gains, alignments and layouts."""
    found = set()
    for operation, hidden, rows in product(variants.OPERATIONS, HIDDEN, ROWS):
        for dtype, gain in product(range(3), range(3)) if hidden in FULL else [(0, 0)]:
            size = 4 if dtype == 2 else 2
            for width, dims in {(variants.width_of(hidden * size), 1), (size, 3)}:
                choice = variants.choose(operation, hidden, size, width, rows, device, dims, weighted=gain > 0)
                found.add((operation, choice, dtype, gain, hidden))
    return found | {("copy", Launch(16, 256, 4, policy=True, pdl=device.arch >= 90), 0, 0, 8)}


def compile_one(operation: str, choice: Launch, dtype: int, gain: int, hidden: int, arch: int) -> tuple[int, str]:
    """Size of the machine code, and what NVRTC says."""
    code = variants.source(operation).encode()
    _, program = nvrtc.nvrtcCreateProgram(code, operation.encode(), 0, [], [])
    # As CuPy compiles: flushing denormals unless the source says otherwise.
    options = [f"--gpu-architecture=sm_{arch}", "--ftz=true", "--std=c++17", *choice.options(dtype, gain, hidden)]
    nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    _, length = nvrtc.nvrtcGetProgramLogSize(program)
    log = b""
    if length > 1:  # a NUL at least; and Python has one object for all bytes of length 1, which NVRTC would write into
        log = b" " * length
        nvrtc.nvrtcGetProgramLog(program, log)
    error, size = nvrtc.nvrtcGetCUBINSize(program)
    nvrtc.nvrtcDestroyProgram(program)
    return (size if error == nvrtc.nvrtcResult.NVRTC_SUCCESS else 0), log.decode(errors="replace").strip("\0 \n")


@pytest.mark.parametrize("arch", GPUS)
def test_every_variant_compiles(arch):
    for variant in sorted(chosen(GPUS[arch]), key=str):
        size, log = compile_one(*variant, arch)
        assert size > 0 and not log, f"{variant}: {log}"


def test_broken_source_is_seen(monkeypatch):
    monkeypatch.setattr(variants, "source", lambda operation: "__global__ void rms_norm(")
    size, log = compile_one("rms_norm", Launch(16, 32), 0, 0, 64, 80)
    assert size == 0 and "error" in log
