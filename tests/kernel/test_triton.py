"""The Triton kernels: run in Triton's interpreter or on a GPU, compiled where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from anyrank.algebra import Update
from anyrank.kernels import Affine, AffineFormat
from anyrank.kernels.triton_available import available

CASES = Path(__file__).with_name("triton_cases.py")
TRITON = [int(n) for n in version("triton").split(".")[:2]] if find_spec("triton") else []
needs_triton = pytest.mark.skipif(not TRITON, reason="needs triton, which exists for Linux")
needs_interpreter = pytest.mark.skipif(
    TRITON < [3, 7], reason="needs triton 3.7: the interpreter of 3.6 fails on NumPy 2.4"
)


def run_cases(interpret: str) -> str:
    """The switch is read when Triton is imported, and would hold for every test after it."""
    variables = {**os.environ, "TRITON_INTERPRET": interpret}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_interpreter
def test_bits_in_the_interpreter():
    assert " passed" in run_cases("1")


@pytest.mark.gpu
def test_bits_on_a_gpu():
    assert " passed" in run_cases("0")


@needs_triton
def test_available_on_a_gpu_and_in_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert available(torch.device("cuda", 1))
    assert not available(torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert available(torch.device("cpu"))


def test_not_available_without_triton(monkeypatch):
    monkeypatch.setattr("anyrank.kernels.triton_available.find_spec", lambda name: None)
    assert not available(torch.device("cuda"))


class Compiled:
    """Stands for a kernel: compiles what would be launched and keeps its PTX."""

    def __init__(self, kernel) -> None:
        self.kernel, self.changed = kernel, {}

    def __getitem__(self, grid):
        def launch(*arguments, **options) -> None:
            options = {**options, **self.changed}
            self.ptx = self.kernel.warmup(*arguments, grid=grid, **options).asm["ptx"]

        return launch


@pytest.fixture(params=[80, 90])
def gpu(request, monkeypatch, tmp_path) -> None:
    """A GPU of this compute capability, to compile for."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    stub = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", request.param, 32),
        get_current_device=lambda: request.param,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(driver, "_active", stub)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def launch_affine() -> None:
    from anyrank.kernels.triton_affine import affine_weight

    codes, scales = torch.zeros(64, 512, dtype=torch.uint8), torch.zeros(64, 32)
    weight = Affine(codes, scales, scales, AffineFormat(4, (1, 32), torch.float32))
    change = Update((torch.zeros(16, 32), torch.zeros(64, 16)), 32, 1, 1.0)
    affine_weight(weight, torch.bfloat16, [change])


def launch_nf4() -> None:
    quantize_4bit = pytest.importorskip("bitsandbytes.functional").quantize_4bit
    from anyrank.kernels.triton_nf4 import nf4_weight

    w = torch.zeros(64, 1024, dtype=torch.bfloat16)
    nf4_weight(*quantize_4bit(w, quant_type="nf4", compress_statistics=True))


@needs_triton
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("module", "name", "launch"),
    [("triton_affine", "_affine_weight", launch_affine), ("triton_nf4", "_nf4_weight", launch_nf4)],
)
def test_compiled_code_rounds_products_before_sums(module, name, launch, monkeypatch):
    """Which the interpreter always does; and stores 16 bytes at a time."""
    module = import_module(f"anyrank.kernels.{module}")
    kernel = Compiled(getattr(module, name))
    monkeypatch.setattr(module, name, kernel)
    launch()
    assert "fma." not in kernel.ptx
    assert "add.rn.f32" in kernel.ptx
    assert "st.global.v4.b32" in kernel.ptx
    kernel.changed["enable_fp_fusion"] = True
    launch()
    assert "fma.rn.f32" in kernel.ptx
