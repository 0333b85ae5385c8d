"""Run the RTX 4090's kernels on a Hopper card: test them, time them, hold the model against them.

    python benchmarks/ada_on_hopper.py --out DIR

The plans are sm_89's (FASTMM_ARCH), Triton compiles them for sm_89, and the same PTX (mma.sync and
cp.async) is assembled for sm_90: a wrapper stands in for ptxas. Kernels go to a cache of their own,
where nothing that is meant for an Ada card gets mixed up with them. Writes ``ada_on_hopper.json``
and ``ada_on_hopper.md``. Exit codes: 0 fine, 1 a test failed or a result was wrong, 2 bad
arguments, or no Hopper card.
"""

import argparse
import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    sys.path[0] = str(ROOT)

# Every bottleneck and every kernel that the suite has on the 4090.
CASES = (
    "seed/8205x2949x5921-NN-fp32-tf32",
    "seed/8205x2949x5921-NN-bf16",
    "kernelbench/4096x4096x4096-NN-fp32-tf32",
    "kernelbench/2048x8192x4096-TN-fp32-tf32",
    "kernelbench/2048x8192x4096-TN-bf16",
    "kernelbench/2048x8192x4096-NT-bf16",
    "kernelbench/256x524288x256-NN-bf16",
    "kernelbench/32768x64x32768-NN-bf16",
    "kernelbench/16384x2048x768-NN-fp32-tf32-fold",
    "gpt2_vocab/8192x768x50257-NT-bf16",
    "squares/512x512x512-NN-fp32-tf32",
    "squares/1024x1024x1024-NN-fp16",
    "squares/2048x2048x2048-NN-fp32-tf32",
    "squares/4096x4096x4096-NN-fp16",
    "squares/8192x8192x8192-NN-fp16",
    "odd_sweep/4096x4096x2049-NN-fp32-tf32",
    "odd_sweep/4096x4096x2056-NN-bf16",
    "skinny/1x4096x11008-NN-fp32-tf32",
    "skinny/17x4097x11009-NN-fp32-tf32",
    "skinny/17x4097x11009-NT-bf16",
    "skinny/32x4096x11008-NT-bf16",
)
# The largest median error with which the model counts as right.
TARGET = 0.12
# Kernels that Inductor generates are not what is tested here.
TESTS = ("tests/test_numerics.py", "tests/test_gpu.py")
DESELECT = "not reduce_overhead and not compiled_backward"


def prepare(folder: Path) -> None:
    """Make this process, and those it starts, compile for sm_89 and assemble for sm_90.

    Args:
        folder: for the stand-in of ptxas and the compiled kernels.

    Raises:
        RuntimeError: triton has been imported already.
    """
    if "triton" in sys.modules:
        raise RuntimeError("prepare() comes before the first import of triton")
    # The stand-in first: Triton looks for it once, at its import.
    (triton,) = importlib.util.find_spec("triton").submodule_search_locations
    ptxas = shlex.quote(f"{triton}/backends/nvidia/bin/ptxas")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "ptxas").exists():
        (folder / "ptxas").write_text(
            f'#!/bin/bash\nexec {ptxas} "${{@/gpu-name=sm_89/gpu-name=sm_90}}"\n'
        )
        (folder / "ptxas").chmod(0o755)
    os.environ |= {
        "FASTMM_ARCH": "sm_89",
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "TRITON_PTXAS_PATH": str(folder / "ptxas"),
    }
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    # TRITON_OVERRIDE_ARCH would not do: its PTX is still the card's own.
    CudaDriver.get_current_target = lambda self: GPUTarget("cuda", 89, 32)


def run_tests(folder: Path) -> dict:
    """The numerics and GPU tests on these kernels, in processes of their own.

    Args:
        folder: where ``prepare`` was.
    """
    command = [sys.executable, "-m", "pytest", *TESTS, "-q", "-k", DESELECT]
    command += ["-p", "benchmarks.ada_on_hopper_plugin", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "auto"]
    # A thread a worker: what is held against float64 on the CPU is small.
    env = os.environ | {"ADA_ON_HOPPER": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    summary = lines[-1].strip("= ") if lines else done.stderr.strip()[-300:]
    return {"passed": done.returncode == 0, "summary": summary, "failed": failed}


def sm_clock(device, work) -> float:
    """Hz at which the SMs run ``work`` after a while of it, as the driver says."""
    import torch

    from fastmm_op import machine

    for _ in range(200):
        work()
    mhz = machine.nvidia_smi("clocks.sm")
    torch.cuda.synchronize(device)
    if mhz is None:
        raise RuntimeError("nvidia-smi does not say the clock of the SMs (clocks.sm)")
    return float(mhz) * 1e6


def measure(case, device, timer) -> dict:
    """One case: checked, timed as a call and launch by launch, and predicted; microseconds."""
    import torch

    from fastmm_op import contract, launch, matmul
    from fastmm_op.bench.gpu_model import H200
    from fastmm_op.bench.predict import compiled, forecast, run
    from fastmm_op.oracle import Oracle, poison
    from fastmm_op.plan import make_plan

    arch = launch.device_arch(device.index)
    problem = case.problem(arch)
    plan = make_plan(problem)
    a, b = case.inputs(device)
    oracle = Oracle(a, b)
    poison(oracle.out_shape, oracle.out_dtype, device)
    out = matmul(a, b)
    verdict = oracle.check(out, oracle.allowed(case.precision))
    entry = {"case": case.name, "strategy": plan.strategy, "error": verdict.error}
    if verdict.failure is not None:
        return entry | {"failed": verdict.failure}

    card = replace(
        H200,
        sms=torch.cuda.get_device_properties(device).multi_processor_count,
        clock=sm_clock(device, lambda: matmul(a, b)),
    )
    entry["clock_mhz"] = card.clock / 1e6
    entry["us"] = timer(lambda: matmul(a, b), 0.3).us
    entry["predicted_us"] = 1e6 * forecast(problem, plan, card).seconds

    folded_a, folded_b = contract.fold(a, b)
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=device)
    addresses = {"a": a.data_ptr(), "b": b.data_ptr(), "c": out.data_ptr()}
    addresses["workspace"] = workspace.data_ptr()
    stream = torch.cuda.current_stream(device).cuda_stream
    started = launch.run_plan(plan, folded_a, folded_b, out)
    for kernel in started:  # once in order: each finds what the ones before it leave
        kernel(addresses, stream)
    entry["kernels"] = []
    for step, kernel in zip(plan.launches, started, strict=True):
        ((_, _, predicted),) = run([compiled(problem, step)], card, flushed=True)
        us = timer(lambda kernel=kernel: kernel(addresses, stream), 0.2).us
        entry["kernels"].append(
            {
                "kernel": step.kernel,
                "us": us,
                "predicted_us": 1e6 * predicted.seconds,
                "bound_by": predicted.bound_by,
            }
        )
    return entry


def error(entry: dict) -> float:
    """Of a prediction, relative to what was measured; positive if it was too slow."""
    return entry["predicted_us"] / entry["us"] - 1


def medians(rows: list[dict]) -> dict[str, float]:
    """Median absolute errors: of whole calls, and of the launches of each kernel."""
    timed = [row for row in rows if "us" in row]
    kernels = [kernel for row in timed for kernel in row["kernels"]]
    found = {"calls": statistics.median(abs(error(row)) for row in timed)} if timed else {}
    for name in dict.fromkeys(kernel["kernel"] for kernel in kernels):
        errors = [abs(error(kernel)) for kernel in kernels if kernel["kernel"] == name]
        found[name] = statistics.median(errors)
    return found


def markdown(results: dict) -> str:
    env, tests = results["env"], results["tests"]
    found = medians(results["rows"])
    verdict = "no case ran"
    if found:
        verdict = "met" if found["calls"] < TARGET else "MISSED"
    lines = [
        f"# The RTX 4090's kernels on {env['gpu']}",
        "",
        f"`{env['command']}`, {env['date']}, commit `{env['commit'][:12]}`, torch {env['torch']}, "
        f"Triton {env['triton']}, driver {env['driver']}.",
        "",
        "Plans for sm_89, compiled by Triton for sm_89, the same PTX assembled for sm_90. The "
        "model of `fastmm_op/bench/gpu_model.py` with this card's figures, at the clock that the "
        "driver reported under each case.",
        "",
        f"Tests ({', '.join(TESTS)}): {'passed' if tests['passed'] else '**FAILED**'}: "
        f"{tests['summary']}",
        *(f"- {line}" for line in tests["failed"]),
        "",
        f"Median error (target: calls below {TARGET:.0%}, {verdict}): "
        + ", ".join(f"{name} {value:.1%}" for name, value in found.items()),
        "",
        "| case | plan | MHz | measured us | predicted us | error | launches: both |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for row in results["rows"]:
        if "failed" in row:
            lines.append(f"| {row['case']} | {row['strategy']} | | **{row['failed']}** | | | |")
            continue
        kernels = ", ".join(
            f"{k['kernel']} {k['us']:.1f} / {k['predicted_us']:.1f}" for k in row["kernels"]
        )
        lines.append(
            f"| {row['case']} | {row['strategy']} | {row['clock_mhz']:.0f} | {row['us']:.1f} | "
            f"{row['predicted_us']:.1f} | {error(row):+.0%} | {kernels} |"
        )
    return "\n".join(lines) + "\n"


def hopper_card() -> str | None:
    """Why this machine will not do; None if it has a Hopper card."""
    import torch

    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        major, minor = capability
        return f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}"
    return None


def describe(argv: list[str]) -> dict:
    import torch

    from fastmm_op import machine
    from fastmm_op.bench import environment

    versions = machine.versions()
    return {
        "gpu": torch.cuda.get_device_name(),
        "command": shlex.join(["python", "benchmarks/ada_on_hopper.py", *argv]),
        "commit": environment.commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **{name: versions[name] for name in ("torch", "triton", "driver")},
    }


def time_cases(results: dict, path: Path) -> None:
    """Fill ``results["rows"]``, and write them after every case."""
    import torch
    from rich.progress import track

    from fastmm_op.bench.cases import load_cases
    from fastmm_op.bench.session import write
    from fastmm_op.timing import Timer

    device = torch.device("cuda", torch.cuda.current_device())
    cases = {case.name: case for case in load_cases()}
    timer = Timer(device)
    results["rows"] = []
    for name in track(CASES, description="timing"):
        results["rows"].append(measure(cases[name], device, timer))
        torch.cuda.empty_cache()
        write(results, path)


def earlier(path: Path, commit: str) -> dict:
    """The tests and rows of an earlier run of the same commit, for runs that do a part."""
    found = json.loads(path.read_text()) if path.exists() else {}
    same = found.get("env", {}).get("commit") == commit
    not_run = {"passed": False, "summary": "not run", "failed": []}
    return found if same else {"tests": not_run, "rows": []}


def main(argv: list[str] | None = None) -> int:
    """Test, time, compare; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--part", choices=("tests", "times"), help="only this; the other part's results are kept"
    )
    options = parser.parse_args(argv)
    if problem := hopper_card():
        parser.error(f"needs a Hopper card (compute capability 9.0), but {problem}")

    path = options.out / "ada_on_hopper.json"
    with tempfile.TemporaryDirectory(prefix="ada_on_hopper_") as folder:
        prepare(Path(folder))
        env = describe(argv)
        results = earlier(path, env["commit"]) | {"env": env}
        if options.part != "times":
            results["tests"] = run_tests(Path(folder))
        if options.part != "tests":
            time_cases(results, path)
    from fastmm_op.bench.session import write

    write(results, path)
    text = markdown(results)
    (options.out / "ada_on_hopper.md").write_text(text)
    print(text)
    wrong = any("failed" in row for row in results["rows"])
    return int(wrong or not results["tests"]["passed"])


if __name__ == "__main__":
    sys.exit(main())
