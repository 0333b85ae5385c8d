"""The command line, the oracle that judges its results, and the commands and code in README.md."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the command line's tables need rich")

from rich.console import Console

from fastmm_op import ModelNew, __main__, ops
from fastmm_op.arch import ARCHES
from fastmm_op.cli import demo, doctor, explain
from fastmm_op.oracle import Oracle, round_to_tf32, spread
from fastmm_op.plan import make_plan
from fastmm_op.timing import Timing

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SEED = ("--shape", "8205", "2949", "5921")
INTERPRETED, COMPILED = {"TRITON_INTERPRET": "1"}, {"TRITON_INTERPRET": "0"}


def python(*args: str, **env: str) -> subprocess.CompletedProcess:
    """Run this interpreter in the repository's root."""
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


class FakeTimer:
    """Runs what it is given once and claims 1, 2, 3, ... microseconds for it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, fn, seconds=0.2) -> Timing:
        fn()
        self.calls += 1
        return Timing(float(self.calls), self.calls - 0.5, self.calls + 0.5, 10)


# codegen: what it finds is tests/test_codegen.py's matter.


def test_codegen_needs_compiled_kernels():
    done = python(
        "-m", "fastmm_op", "codegen", *SEED, "--arch", "sm_89", "--json", TRITON_INTERPRET="1"
    )
    assert done.returncode == 1
    assert "TRITON_INTERPRET is set" in done.stdout


def test_codegen_prints_every_kernel_of_the_plan():
    shape = ("--shape", "33", "2000", "65")
    done = python(
        "-m", "fastmm_op", "codegen", *shape, "--arch", "sm_89", "--json", TRITON_INTERPRET="0"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = json.loads(done.stdout)["kernels"]
    problem = explain.problem_of(
        33, 2000, 65, batch=1, dtype="fp32", layout="NN", precision="tf32", arch=ARCHES["sm_89"]
    )
    assert [row["kernel"] for row in kernels] == [s.kernel for s in make_plan(problem).launches]
    assert all(row["spills"] == 0 and row["registers"] > 0 for row in kernels)


# explain


def test_explain_prints_the_plan_and_why(capsys):
    assert __main__.main(["explain", *SEED, "--arch", "sm_89"]) == 0
    text = capsys.readouterr().out
    assert '(8205, 2949) @ (2949, 5921), fp32 at precision "tf32", 286.5 GFLOP' in text
    for part in (
        "plan: packed",
        "gemm",
        "workspace",
        "MiB",
        "not a measurement",
        "a is misaligned",
    ):
        assert part in text


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_explain_json_is_the_planners_plan(capsys, arch, dtype):
    for layout in __main__.LAYOUTS:
        args = ["explain", *SEED, "--batch", "2", "--dtype", dtype, "--layout", layout]
        assert __main__.main([*args, "--arch", arch, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        how = {"batch": 2, "dtype": dtype, "layout": layout, "precision": "tf32"}
        problem = explain.problem_of(8205, 2949, 5921, **how, arch=ARCHES[arch])
        plan = make_plan(problem)
        assert found["problem"]["flops"] == 2 * 2 * 8205 * 2949 * 5921
        assert found["plan"]["strategy"] == plan.strategy
        assert found["plan"]["workspace_bytes"] == plan.workspace_bytes
        names = [step["kernel"] for step in found["plan"]["launches"]]
        assert names == [step.kernel for step in plan.launches]


def test_explain_takes_the_cards_size(capsys):
    card = ["--arch", "sm_90", "--sms", "78", "--bandwidth", "2863"]
    assert __main__.main(["explain", *SEED, *card, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["problem"]["arch"]
    assert (found["sms"], found["bandwidth"]) == (78, 2863e9)
    assert found["fp16_flops"] == pytest.approx(ARCHES["sm_90"].fp16_flops * 78 / 132)
    assert __main__.main(["explain", *SEED, *card]) == 0
    assert "on sm_90 with 78 SMs, copying 2863 GB/s" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["NN", "NT", "TN", "TT"])
@pytest.mark.parametrize("batch", [1, 3])
def test_explained_strides_are_those_of_tensors(layout, batch):
    launch = pytest.importorskip("fastmm_op.launch")
    M, K, N = 5, 1, 7
    for K in (1, 6):
        a = torch.empty(batch, K, M).mT if layout[0] == "T" else torch.empty(batch, M, K)
        b = torch.empty(batch, N, K).mT if layout[1] == "T" else torch.empty(batch, K, N)
        how = {"batch": batch, "dtype": "fp32", "layout": layout, "precision": "tf32"}
        problem = explain.problem_of(M, K, N, **how, arch=ARCHES["sm_89"])
        described = launch.describe(a, b, "tf32", ARCHES["sm_89"])
        assert (problem.a.row_stride, problem.a.k_stride, problem.a.batch_stride) == (
            (described.a.row_stride, described.a.k_stride, described.a.batch_stride)
        )
        assert (problem.b.row_stride, problem.b.k_stride, problem.b.batch_stride) == (
            (described.b.row_stride, described.b.k_stride, described.b.batch_stride)
        )


def test_explain_of_a_zero_size(capsys):
    assert __main__.main(["explain", "--shape", "0", "3", "4", "--arch", "sm_80"]) == 0
    assert "plan: zero" in capsys.readouterr().out


def test_explain_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; from fastmm_op.__main__ import main; "
    done = python("-c", code + f"sys.exit(main(['explain', *{SEED!r}]))")
    assert done.returncode == 0, done.stderr
    assert "plan: packed" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "command"),
        (["fly"], "invalid choice: 'fly'"),
        (["explain"], "--shape"),
        (["explain", "--shape", "1", "2"], "expected 3 arguments"),
        (["explain", "--shape", "1", "2", "x"], "'x' is not an integer"),
        (["explain", "--shape", "1", "-2", "3"], "'-2' is not an integer of zero or more"),
        (["explain", *SEED, "--dtype", "fp64"], "invalid choice: 'fp64'"),
        (["explain", *SEED, "--precision", "tf16"], "invalid choice: 'tf16'"),
        (["explain", *SEED, "--arch", "sm_70"], "invalid choice: 'sm_70'"),
        (["explain", *SEED, "--layout", "NX"], "invalid choice: 'NX'"),
        (["explain", *SEED, "--sms", "0"], "must be at least 1"),
    ],
)
def test_bad_arguments_end_with_code_2(capsys, args, message):
    with pytest.raises(SystemExit) as stop:
        __main__.main(args)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# doctor


def test_doctor_reports_what_runs(capsys):
    assert __main__.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["usable"] is True
    assert report["versions"]["torch"] == torch.__version__
    cpu = report["devices"][-1]
    assert cpu["device"] == "cpu"
    assert cpu["runs"] == ("Triton kernels, interpreted" if ops.INTERPRETED else "ATen")
    assert __main__.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "short eager path" in text
    assert "kernel cache" in text


@pytest.mark.parametrize("way", ["wrong", "raises"])
def test_doctor_is_not_content_with_a_broken_machine(capsys, monkeypatch, way):
    def broken(a, b):
        if way == "raises":
            raise RuntimeError("no kernel image")
        return torch.zeros(a.shape[0], b.shape[1])

    monkeypatch.setattr(doctor, "matmul", broken)
    assert __main__.main(["doctor"]) == 1
    assert "NOT usable" in capsys.readouterr().out


def test_doctor_names_the_engine():
    if ops.HAVE_TRITON and not ops.INTERPRETED:
        assert doctor.engine("cuda:0", "sm_90") == "compiled Triton kernels, planned as sm_90"
        assert "below 8.0" in doctor.engine("cuda:0", None)


# demo


def test_demo_runs():
    done = python("-m", "fastmm_op", "demo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All checks passed." in done.stdout
    if not torch.cuda.is_available():
        assert "NOT run" in done.stdout
        assert "interpreted on the CPU" in done.stdout


def test_demo_checks_and_times_the_seed():
    console = Console(record=True, width=120, file=io.StringIO())
    timer = FakeTimer()
    # KernelBench's tolerance is relative to the result: TF32 needs some length of K to pass it.
    assert demo.run_seed(console, torch.device("cpu"), (17, 1025, 33), timer=timer)
    text = console.export_text()
    for name in ("fastmm eager", "fastmm torch.compile", "torch.mm TF32", "torch.mm fp32"):
        assert name in text
    assert text.count("passes") == 2
    assert timer.calls == 4


def test_demo_does_not_time_what_is_wrong(monkeypatch):
    class Wrong(ModelNew):
        def forward(self, A, B):
            return super().forward(A, B) * 1.01

    monkeypatch.setattr(demo, "ModelNew", Wrong)
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    console = Console(record=True, width=120, file=io.StringIO())
    timer = FakeTimer()
    assert not demo.run_seed(console, torch.device("cpu"), (33, 65, 17), timer=timer)
    assert timer.calls == 2
    assert "FAILED fastmm eager: error" in console.export_text()


# oracle


def test_spread_has_both_ends():
    for n, count in ((1, 5), (5, 5), (100, 1), (100, 2), (100, 7)):
        picked = spread(n, count).tolist()
        assert len(picked) == min(n, count)
        assert picked == sorted(set(picked))
        assert picked[0] == 0
        assert count == 1 or picked[-1] == n - 1


@pytest.mark.parametrize(
    ("shape_a", "shape_b"),
    [((7,), (7,)), ((5, 7), (7,)), ((300, 7), (7, 3)), ((20, 50, 7), (20, 7, 3)),
     ((2, 3, 4, 7), (7, 5)), ((2, 1, 4, 7), (3, 7, 5)), ((0, 7), (7, 3)), ((4, 0), (0, 3))],
)  # fmt: skip
def test_oracle_accepts_torchs_product(shape_a, shape_b):
    a, b = torch.randn(shape_a), torch.randn(shape_b)
    oracle = Oracle(a, b)
    verdict = oracle.check(torch.matmul(a, b), oracle.plausible("fp32"))
    assert verdict.failure is None
    assert verdict.error < 1e-6


def test_oracle_finds_one_wrong_value_nan_and_shape():
    a, b = torch.randn(40, 70), torch.randn(70, 9)
    oracle = Oracle(a, b)
    good = a @ b
    wrong = good.clone()
    wrong[39, 4] += 1
    verdict = oracle.check(wrong, oracle.allowed("tf32"))
    assert "worst at (item, row, column) (0, 39, 4)" in verdict.failure
    wrong = good.clone()
    wrong[3, 3] = float("nan")
    assert "1 of 360 values are NaN" in oracle.check(wrong, 1.0).failure
    assert "expected (40, 9)" in oracle.check(good[:-1], 1.0).failure
    assert "torch.float16" in oracle.check(good.half(), 1.0).failure


def test_oracle_tells_rounded_from_truncated():
    a, b = torch.randn(64, 500), torch.randn(500, 64)
    oracle = Oracle(a, b)
    rounded = (round_to_tf32(a).double() @ round_to_tf32(b).double()).float()
    truncated = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    allowed = oracle.allowed("tf32")
    assert oracle.check(rounded, allowed).failure is None
    assert oracle.check(torch.matmul(*truncated), allowed).failure is not None


# README


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_readme_code_runs(code, entry_points):
    torch._dynamo.reset()
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.uninterpreted  # asks for compiled kernels whatever this process has; once is enough
def test_readme_commands_run():
    lines = [line for block in blocks("sh") for line in block.strip().splitlines()]
    commands = [part.strip() for line in lines for part in line.split("&&")]
    assert {"pip install -e .", "python -m fastmm_op demo", "make test"} <= set(commands)
    ours = [c for c in commands if c.startswith("python ") and not c.endswith("demo")]
    assert ours
    for command in ours:
        printed = command.partition(" > ")[0]
        done = python(*shlex.split(printed)[1:], **COMPILED)
        if " tune " in command and not torch.cuda.is_available():
            assert "nothing to measure on" in done.stdout
        else:
            assert done.returncode == 0, done.stdout + done.stderr
