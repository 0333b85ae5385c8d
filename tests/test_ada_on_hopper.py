"""The 4090's kernels for a Hopper card: assembled here, run and judged where there is one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import ada_on_hopper, ada_on_hopper_tests
from benchmarks.ada_on_hopper_report import markdown
from fastmm_op.bench.cases import load_cases

ROOT = Path(__file__).parent.parent
# In a process of its own: it changes what Triton compiles for.
COMPILE = """
import sys
from pathlib import Path
from benchmarks import ada_on_hopper
ada_on_hopper.prepare(Path(sys.argv[1]))
from triton.backends.nvidia.driver import CudaDriver
from fastmm_op.arch import Card
from fastmm_op.planned import planned_arch
from fastmm_op.bench.cases import Case
from fastmm_op.codegen import compile_launch, run_tool
from fastmm_op.plan import make_plan
arch = planned_arch(Card((9, 0), 132))
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


ENV = dict.fromkeys(("gpu", "command", "commit", "date", "torch", "triton", "driver"), "x")
RUN = {"shape": [8, 9, 7], "close": True, "largest_error": 0.01, "same_bits": True}


def times(us: float) -> dict:
    kernel = {"kernel": "gemm", "us": 50.0, "predicted_us": 55.0, "bound_by": "tensor"}
    row = {"case": "squares/x", "strategy": "direct", "clock_mhz": 1755.0, "us": us}
    row |= {"predicted_us": 110.0, "kernels": [kernel]}
    failed = {"case": "squares/y", "strategy": "packed", "error": 1.0, "failed": "error 1 exceeds"}
    style = {"us": 200.0, "predicted_us": 100.0, "clock_mhz": 1755.0}
    found = {"env": {"times": ENV}, "rows": [row, failed], "seed_style": style}
    return ada_on_hopper.nothing() | found


def after_tests() -> dict:
    passed = {"state": "passed", "summary": "309 passed", "failed": []}
    export = {"state": "accepted", "faults": [], "runs": [RUN]}
    return ada_on_hopper.nothing() | {"env": {"tests": ENV}, "tests": passed, "export": export}


def test_the_error_table() -> None:
    text = markdown(ada_on_hopper.merged([times(100.0), after_tests()]))
    assert "Median error (target: calls below 12%, met): calls 10.0%, gemm 10.0%" in text
    assert "| squares/x | direct | 1755 | 100.0 | 110.0 | +10% | gemm 50.0 / 55.0 |" in text
    assert "**error 1 exceeds**" in text
    assert "passed: 309 passed" in text
    assert "rules: accepted\n- 8x9x7: largest error 0.01, within 1e-4; the package's bits" in text
    assert "200.0 us measured, 100.0 predicted (-50%)" in text
    missed = markdown(times(80.0))
    assert "calls below 12%, MISSED): calls 37.5%" in missed
    assert "**NOT RUN**: not run" in missed


def test_a_part_keeps_the_other_of_the_same_commit(tmp_path) -> None:
    from fastmm_op.bench.session import write

    path = tmp_path / "ada_on_hopper.json"
    assert ada_on_hopper.earlier(path, "x")["tests"]["state"] == "not run"
    write(after_tests(), path)
    assert ada_on_hopper.earlier(path, "x")["tests"]["summary"] == "309 passed"
    assert ada_on_hopper.earlier(path, "y")["tests"]["state"] == "not run"


def test_parts_are_merged_into_one_file(tmp_path) -> None:
    """Each with where it comes from; what one of them did not do is the other's."""
    from fastmm_op.bench.session import write

    files = []
    for name, part in (("a", times(100.0)), ("b", after_tests())):
        files.append(tmp_path / name)
        write(part | {"env": {k: v | {"commit": name} for k, v in part["env"].items()}}, files[-1])
    assert (
        ada_on_hopper.main(["--out", str(tmp_path), "--merge", *map(str, files)]) == 1
    )  # squares/y is wrong
    found = json.loads((tmp_path / "ada_on_hopper.json").read_text())
    assert {part: env["commit"] for part, env in found["env"].items()} == {
        "times": "a",
        "tests": "b",
    }
    assert (len(found["rows"]), found["tests"]["state"]) == (2, "passed")
    assert "309 passed" in (tmp_path / "ada_on_hopper.md").read_text()


@pytest.mark.compiled
def test_times_are_predicted_again(tmp_path) -> None:
    """By the model as it is, at the clock that was measured, with no GPU."""
    from fastmm_op.bench.session import write

    kernel = {"kernel": "gemm", "us": 13.0, "predicted_us": 1.0}
    row = {"case": "squares/512x512x512-NN-fp32-tf32", "strategy": "direct", "clock_mhz": 1980.0}
    row |= {"us": 13.7, "predicted_us": 1.0, "kernels": [kernel]}
    planned_otherwise = row | {"kernels": [kernel, kernel]}
    slower = row | {"clock_mhz": 990.0}
    path = tmp_path / "times.json"
    env = {"times": ENV | {"note": "by hand"}}
    write(times(1.0) | {"rows": [row, planned_otherwise, slower], "env": env}, path)
    assert ada_on_hopper.main(["--out", str(tmp_path), "--predict", str(path)]) == 1  # no tests
    found = json.loads((tmp_path / "ada_on_hopper.json").read_text())
    again, other, slow = found["rows"]
    assert 5 < again["predicted_us"] < 14
    assert 5 < again["kernels"][0]["predicted_us"] < 14
    assert (again["us"], again["kernels"][0]["us"]) == (13.7, 13.0)
    assert slow["predicted_us"] > again["predicted_us"]
    assert other == planned_otherwise
    assert "--predict" in found["env"]["model"]["command"]
    assert "Note: by hand." in (tmp_path / "ada_on_hopper.md").read_text()


OUTCOMES = """
{"collected": 4}
{"test": "t::a", "outcome": "passed"}
{"test": "t::b", "outcome": "skipped"}
""".lstrip()


def test_a_run_that_is_stopped_has_a_result(tmp_path) -> None:
    assert ada_on_hopper_tests.result(tmp_path, "stopped")["summary"].startswith("0 passed")
    (tmp_path / "outcomes.jsonl").write_text(OUTCOMES)
    found = ada_on_hopper_tests.result(tmp_path, "stopped")
    assert found["state"] == "stopped"
    assert found["summary"] == "1 passed, 0 failed, 1 skipped of 4; stopped before the others"
    (tmp_path / "outcomes.jsonl").write_text(
        OUTCOMES + '{"test": "t::a", "outcome": "failed"}\n'  # in its teardown, say
    )
    found = ada_on_hopper_tests.result(tmp_path, "stopped")
    assert (found["state"], found["failed"]) == ("failed", ["t::a"])


@pytest.mark.compiled
def test_the_tests_are_run_and_stopped(tmp_path, monkeypatch) -> None:
    """With no GPU they are skipped; the result is written while they run, and at the end."""
    seen = []
    monkeypatch.setattr(ada_on_hopper_tests, "TESTS", ("tests/test_gpu_linear.py",))
    monkeypatch.setattr(ada_on_hopper_tests, "INTERVAL", 0.2)
    found = ada_on_hopper_tests.run_tests(tmp_path, 120, seen.append, "1")
    assert found["failed"] == []
    assert found["state"] == "passed"
    assert found["summary"].endswith(f" of {int(found['summary'].split()[-1])}")
    assert seen[0]["state"] == "stopped"
    assert not found["summary"].endswith(" of 0")
    stopped = ada_on_hopper_tests.run_tests(tmp_path, 0.1, seen.append)
    assert stopped["state"] == "stopped"


@pytest.mark.compiled
def test_the_clocks_kernel_compiles() -> None:
    """It reads both counters before and after it waits."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from benchmarks.sm_clock import clock_kernel

    source = ASTSource(clock_kernel, {"out_ptr": "*i64", "wait_ns": "i32"}, {}, {})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm[
        "ptx"
    ]
    assert (ptx.count(", %clock64"), ptx.count(", %globaltimer")) == (2, 2)
