"""The 4090's kernels for a Hopper card: assembled here, run and judged where there is one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import ada_on_hopper
from fastmm_op.bench.cases import load_cases

ROOT = Path(__file__).parent.parent
# In a process of its own: it changes what Triton compiles for.
COMPILE = """
import sys
from pathlib import Path
from benchmarks import ada_on_hopper
ada_on_hopper.prepare(Path(sys.argv[1]))
from triton.backends.nvidia.driver import CudaDriver
from fastmm_op.planned import planned_arch
from fastmm_op.bench.cases import Case
from fastmm_op.codegen import compile_launch, run_tool
from fastmm_op.plan import make_plan
arch = planned_arch((9, 0), 132)
problem = Case("seed", 8205, 2949, 5921, "fp32", "tf32").problem(arch)
kernel = compile_launch(problem, make_plan(problem).launches[-1])
cubin = Path(sys.argv[1]) / "gemm.cubin"
cubin.write_bytes(kernel.asm["cubin"])
header = run_tool("nvdisasm", "-c", str(cubin)).splitlines()[0]
print(arch.name, CudaDriver.get_current_target(None).arch)
print(".target sm_89" in kernel.asm["ptx"], "mma.sync" in kernel.asm["ptx"])
print("EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM89)" in header)
"""


@pytest.mark.compiled
def test_sm_89s_ptx_is_assembled_for_sm_90(tmp_path) -> None:
    command = [sys.executable, "-c", COMPILE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["sm_89 89", "True True", "True"]


def test_enough_cases_of_every_kind() -> None:
    names = {case.name for case in load_cases()}
    assert set(ada_on_hopper.CASES) <= names
    assert len(ada_on_hopper.CASES) >= 12


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0),
    reason="there is a Hopper card",
)
def test_other_machines_are_told(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        ada_on_hopper.main(["--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "needs a Hopper card (compute capability 9.0), but " in capsys.readouterr().err


def results(us: float) -> dict:
    kernel = {"kernel": "gemm", "us": 50.0, "predicted_us": 55.0, "bound_by": "tensor"}
    row = {"case": "squares/x", "strategy": "direct", "clock_mhz": 1755.0, "us": us}
    row |= {"predicted_us": 110.0, "kernels": [kernel]}
    failed = {"case": "squares/y", "strategy": "packed", "error": 1.0, "failed": "error 1 exceeds"}
    env = dict.fromkeys(("gpu", "command", "commit", "date", "torch", "triton", "driver"), "x")
    tests = {"passed": True, "summary": "309 passed", "failed": []}
    return {"env": env, "tests": tests, "rows": [row, failed]}


def test_the_error_table() -> None:
    text = ada_on_hopper.markdown(results(100.0))
    assert "Median error (target: calls below 12%, met): calls 10.0%, gemm 10.0%" in text
    assert "| squares/x | direct | 1755 | 100.0 | 110.0 | +10% | gemm 50.0 / 55.0 |" in text
    assert "**error 1 exceeds**" in text
    assert "passed: 309 passed" in text
    assert "calls below 12%, MISSED): calls 37.5%" in ada_on_hopper.markdown(results(80.0))


def test_a_part_keeps_the_other_of_the_same_commit(tmp_path) -> None:
    from fastmm_op.bench.session import write

    path = tmp_path / "ada_on_hopper.json"
    assert ada_on_hopper.earlier(path, "x")["tests"]["summary"] == "not run"
    write(results(100.0), path)
    assert ada_on_hopper.earlier(path, "x")["tests"]["summary"] == "309 passed"
    assert ada_on_hopper.earlier(path, "y")["rows"] == []
