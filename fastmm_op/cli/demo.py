"""``demo``: the seed workload on a GPU, or small products on the CPU; checked, then timed."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastmm_op import ModelNew, ops
from fastmm_op.oracle import Oracle, Verdict, poison
from fastmm_op.timing import Timer, torch_tf32

# KernelBench level 1, problem 8: (8205, 2949) @ (2949, 5921) in fp32.
SEED_SHAPE = (8205, 2949, 5921)
SMALL_SHAPE = (205, 149, 121)
INTERPRETED_CASES = (((129, 261, 77), "fp32"), ((513, 515, 517), "fp16"))
KERNELBENCH_TOLERANCE = 1e-4
INTERPRETER_TIMEOUT_SECONDS = 120


def say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def random_inputs(
    draw: Callable, shape: tuple[int, int, int], device: torch.device, dtype=torch.float32
) -> tuple[Tensor, Tensor]:
    """A (M, K) and B (K, N), drawn by ``torch.rand`` or ``torch.randn`` from a fixed seed."""
    M, K, N = shape
    generator = torch.Generator(device).manual_seed(0)
    options = {"dtype": dtype, "device": device, "generator": generator}
    return draw(M, K, **options), draw(K, N, **options)


def contenders() -> dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool, str]]:
    """Name -> (function, whether torch may use TF32, the precision it claims)."""
    torch._dynamo.reset()
    return {
        "fastmm eager": (ModelNew(), False, "tf32"),
        "fastmm torch.compile": (torch.compile(ModelNew(), fullgraph=True), False, "tf32"),
        "torch.mm TF32": (torch.mm, True, "tf32"),
        "torch.mm fp32": (torch.mm, False, "fp32"),
    }


def check_all(functions: dict, shape: tuple[int, int, int], device: torch.device) -> dict:
    """Name -> Verdict, each against float64 on randn inputs; nothing has been timed yet."""
    a, b = random_inputs(torch.randn, shape, device)
    oracle = Oracle(a, b)
    with torch_tf32(True):
        tf32_error = oracle.error(torch.mm(a, b))
    verdicts = {}
    for name, (function, tf32, precision) in functions.items():
        is_ours = name.startswith("fastmm")
        allowed = oracle.plausible(precision)
        if is_ours:
            allowed = oracle.allowed(precision, tf32_error)
        poison(oracle.out_shape, oracle.out_dtype, device)
        with torch_tf32(tf32):
            verdicts[name] = oracle.check(function(a, b), allowed)
    return verdicts


def passes_kernelbench(function: Callable, shape: tuple[int, int, int], device) -> bool:
    """KernelBench's own test: allclose to torch's fp32 product on torch.rand inputs."""
    a, b = random_inputs(torch.rand, shape, device)
    tolerance = KERNELBENCH_TOLERANCE
    with torch_tf32(False):
        return torch.allclose(function(a, b), torch.mm(a, b), atol=tolerance, rtol=tolerance)


def run_seed(
    console: Console, device: torch.device, shape=SEED_SHAPE, seconds: float = 0.5, timer=None
) -> bool:
    """Check and time everybody on the seed workload; print a table.

    Args:
        device: where; the seed's own shape wants a GPU with 2 GiB free.
        shape: M, K, N.
        seconds: of timing for each contender.
        timer: a ``timing.Timer`` or its like; made if None.

    Returns:
        Whether every check passed. What failed its check is not timed.
    """
    M, K, N = shape
    functions = contenders()
    verdicts = check_all(functions, shape, device)
    close = {
        name: passes_kernelbench(function, shape, device)
        for name, (function, _, _) in functions.items()
        if name.startswith("fastmm")
    }
    a, b = random_inputs(torch.randn, shape, device)
    timer = timer or Timer(device)
    times = {}
    for name, (function, tf32, _) in functions.items():
        if verdicts[name].failure is None and close.get(name, True):
            with torch_tf32(tf32):
                times[name] = timer(lambda function=function: function(a, b), seconds).us

    table = Table(title=f"fp32 ({M}, {K}) @ ({K}, {N}) on {device_name(device)}")
    headings = ("", "time", "TFLOP/s", "error", "allclose 1e-4", "x torch TF32", "x torch fp32")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for name in functions:
        us = times.get(name)
        table.add_row(
            name,
            f"{us:.0f} us" if us else "failed",
            f"{2 * M * N * K / us / 1e6:.1f}" if us else "-",
            f"{verdicts[name].error:.2e}",
            {True: "passes", False: "fails"}.get(close.get(name), "-"),
            *(speed_up(us, times.get(f"torch.mm {peer}")) for peer in ("TF32", "fp32")),
        )
    console.print(table)
    say(
        console,
        "Time: median between CUDA events, warmed up, cold L2. Error: normwise against float64 on "
        "256 rows of randn inputs.\nallclose: to torch's fp32 product on rand inputs, "
        "atol = rtol = 1e-4.",
    )
    for name, verdict in verdicts.items():
        if verdict.failure:
            say(console, f"FAILED {name}: {verdict.failure}")
    return all(close.values()) and all(v.failure is None for v in verdicts.values())


def speed_up(us: float | None, peer_us: float | None) -> str:
    return f"{peer_us / us:.2f}" if us and peer_us else "-"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def check_product(a: Tensor, b: Tensor) -> Verdict:
    """ModelNew on a and b, against float64."""
    oracle = Oracle(a, b)
    precision = "tf32" if a.dtype is torch.float32 else "fp16"
    return oracle.check(ModelNew()(a, b), oracle.allowed(precision))


def outcome(verdict: Verdict) -> str:
    return f"ok, error {verdict.error:.1e}" if verdict.failure is None else verdict.failure


def run_interpreted(console: Console) -> bool:
    """The Triton kernels in this process's interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    from fastmm_op.launch import INTERPRETED_ARCH
    from fastmm_op.plan import make_plan
    from fastmm_op.problem import problem_of

    passed = True
    for shape, name in INTERPRETED_CASES:
        dtype = {"fp32": torch.float32, "fp16": torch.float16}[name]
        verdict = check_product(*random_inputs(torch.randn, shape, torch.device("cpu"), dtype))
        how = {"batch": 1, "dtype": name, "layout": "NN", "precision": "tf32"}
        plan = make_plan(problem_of(*shape, **how, arch=INTERPRETED_ARCH))
        kernels = ", ".join(step.kernel for step in plan.launches)
        size = "x".join(map(str, shape))
        say(console, f"  {size} {name}, {plan.strategy} ({kernels}): {outcome(verdict)}")
        passed = passed and verdict.failure is None
    return passed


def run_without_gpu(console: Console) -> bool:
    """ATen on the CPU, then the kernels under the interpreter; say what did not run."""
    why = "TRITON_INTERPRET is set" if torch.cuda.is_available() else "No CUDA device"
    say(console, f"{why}: the seed workload and all timing were NOT run. Instead:")
    passed = True
    if not ops.INTERPRETED:
        verdict = check_product(*random_inputs(torch.randn, SMALL_SHAPE, torch.device("cpu")))
        size = "x".join(map(str, SMALL_SHAPE))
        say(console, f"CPU path (ATen)\n  {size} fp32: {outcome(verdict)}")
        passed = verdict.failure is None
    if not ops.HAVE_TRITON:
        say(console, "Triton is not installed: its kernels were NOT run.")
        return passed
    say(console, "Triton kernels, interpreted on the CPU (what they compute, not how fast)")
    if ops.INTERPRETED:
        return run_interpreted(console) and passed
    done = start_interpreter()
    say(console, done.stdout.rstrip())
    if done.returncode != 0:
        say(console, f"FAILED in the interpreter:\n{done.stderr.rstrip()}")
    return passed and done.returncode == 0


def start_interpreter() -> subprocess.CompletedProcess:
    """``run_interpreted`` in a process of its own: Triton decides at its import how it runs."""
    code = "import sys; from rich.console import Console; from fastmm_op.cli import demo; "
    code += "sys.exit(not demo.run_interpreted(Console()))"
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        timeout=INTERPRETER_TIMEOUT_SECONDS,
        capture_output=True,
        text=True,
    )


def main() -> int:
    """Run what this machine can; 0 if every check passed."""
    console = Console()
    if torch.cuda.is_available() and not ops.INTERPRETED:
        passed = run_seed(console, torch.device("cuda", torch.cuda.current_device()))
    else:
        passed = run_without_gpu(console)
    say(console, "All checks passed." if passed else "A check FAILED.")
    return 0 if passed else 1
