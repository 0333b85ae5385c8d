"""Run the RTX 4090's kernels on a Hopper card: test them, time them, hold the model against them.

    python benchmarks/ada_on_hopper.py --out DIR [--part tests | --part times]
    python benchmarks/ada_on_hopper.py --out DIR --merge FILE FILE   (two parts' results; no GPU)
    python benchmarks/ada_on_hopper.py --out DIR --predict FILE      (times, today's model; no GPU)

The plans are sm_89's (FASTMM_ARCH), Triton compiles them for sm_89, and the same PTX (mma.sync and
cp.async) is assembled for sm_90: a wrapper stands in for ptxas. Kernels go to a cache of their own,
where nothing that is meant for an Ada card gets mixed up with them. The tests part is the numerics
and GPU tests, and an exported file by KernelBench's rules. ``ada_on_hopper.json`` and
``ada_on_hopper.md`` are written all along, so that a run that is stopped leaves what it found.
Exit codes: 0 fine, 1 a test failed or did not run, or a result was wrong, 2 bad arguments, or no
Hopper card.
"""

import argparse
import importlib.util
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.ada_on_hopper_report import markdown
from benchmarks.ada_on_hopper_tests import NOT_JUDGED, NOT_RUN, judge_export, run_tests

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
# Seconds for the tests, which 16 cores should need two minutes for, and for an exported file.
TEST_SECONDS = 200
EXPORT_SECONDS = 90


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


def measure(case, device, timer) -> dict:
    """One case: checked, timed as a call and launch by launch, and predicted; microseconds."""
    import torch

    from benchmarks.sm_clock import sm_clock
    from fastmm_op import contract, launch, matmul, running
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

    entry["clock_mhz"] = sm_clock(device, lambda: matmul(a, b)) / 1e6
    entry["us"] = timer(lambda: matmul(a, b), 0.3).us

    folded_a, folded_b = contract.fold(a, b)
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=device)
    addresses = {"a": a.data_ptr(), "b": b.data_ptr(), "c": out.data_ptr()}
    addresses["workspace"] = workspace.data_ptr()
    stream = torch.cuda.current_stream(device).cuda_stream
    started = running.run_plan(plan, folded_a, folded_b, out)
    for kernel in started:  # once in order: each finds what the ones before it leave
        kernel(addresses, stream)
    entry["kernels"] = []
    for step, kernel in zip(plan.launches, started, strict=True):
        us = timer(lambda kernel=kernel: kernel(addresses, stream), 0.2).us
        entry["kernels"].append({"kernel": step.kernel, "us": us})
    return predict(entry, problem, torch.cuda.get_device_name(device))


def machine_at(gpu: str, sms: int, clock_mhz: float):
    """The model of a Hopper card by its name, at a clock it ran at; unknown cards are an H200's."""
    from fastmm_op.bench.gpu_model import H200, MACHINES

    return replace(MACHINES.get(gpu, H200), sms=sms, clock=1e6 * clock_mhz)


def predict(entry: dict, problem, gpu: str) -> dict:
    """What was measured of a case, with the model's times beside it, at the clock it ran at."""
    from fastmm_op.bench.predict import compiled, forecast, run
    from fastmm_op.plan import make_plan

    card = machine_at(gpu, problem.arch.sms, entry["clock_mhz"])
    plan = make_plan(problem)
    kernels = []
    for step, kernel in zip(plan.launches, entry["kernels"], strict=True):
        ((_, _, predicted),) = run([compiled(problem, step)], card, flushed=True)
        found = {"predicted_us": 1e6 * predicted.seconds, "bound_by": predicted.bound_by}
        kernels.append(kernel | found)
    seconds = forecast(problem, plan, card).seconds
    return entry | {"predicted_us": 1e6 * seconds, "kernels": kernels}


def predict_again(results: dict, argv: list[str]) -> dict:
    """Results with today's model in place of the one they were written with.

    Cases that are planned otherwise by now stay as they are, and so does the seed-style kernel.
    """
    from fastmm_op import machine
    from fastmm_op.arch import ARCHES, resized
    from fastmm_op.bench.gpu_model import H200
    from fastmm_op.plan import make_plan

    cases, rows, gpu = suite(), [], results["env"]["times"]["gpu"]
    for row in results["rows"]:
        problem = cases[row["case"]].problem(resized(ARCHES["sm_89"], H200.sms))
        planned = [step.kernel for step in make_plan(problem).launches]
        same = planned == [kernel["kernel"] for kernel in row.get("kernels", ())]
        rows.append(predict(row, problem, gpu) if same else row)
    versions = machine.versions()
    env = written_by(argv) | {name: versions[name] for name in ("torch", "triton")}
    return results | {"rows": rows, "env": results["env"] | {"model": env}}


def seed_style(device, timer) -> dict:
    """A kernel like the seed's, by its own code for sm_89: checked as far as it is meant to be."""
    import torch

    from benchmarks.sm_clock import sm_clock
    from fastmm_op import launch
    from fastmm_op.bench.predict_seed_style import forecast_seed_style
    from fastmm_op.bench.seed_style import seed_style_matmul

    case = suite()[CASES[0]]
    a, b = case.inputs(device)
    clock = sm_clock(device, lambda: seed_style_matmul(a, b))
    arch = launch.device_arch(device.index)
    card = machine_at(torch.cuda.get_device_name(device), arch.sms, clock / 1e6)
    found = forecast_seed_style(case.problem(arch), card)
    us = timer(lambda: seed_style_matmul(a, b), 0.3).us
    return {"us": us, "predicted_us": 1e6 * found.seconds, "clock_mhz": clock / 1e6}


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

    versions = machine.versions()
    return {
        "gpu": torch.cuda.get_device_name(),
        **written_by(argv),
        **{name: versions[name] for name in ("torch", "triton", "driver")},
    }


def written_by(argv: list[str]) -> dict:
    from fastmm_op.bench import environment

    return {
        "command": shlex.join(["python", "benchmarks/ada_on_hopper.py", *argv]),
        "commit": environment.commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def suite() -> dict:
    from fastmm_op.bench.cases import load_cases

    return {case.name: case for case in load_cases()}


def time_cases(results: dict, save: Callable[[], object]) -> None:
    """Fill ``results["rows"]``, and save them after every case."""
    import torch
    from rich.progress import track

    from fastmm_op.timing import Timer

    device = torch.device("cuda", torch.cuda.current_device())
    timer = Timer(device)
    results["rows"] = []
    cases = suite()
    for name in track(CASES, description="timing"):
        results["rows"].append(measure(cases[name], device, timer))
        torch.cuda.empty_cache()
        save()
    results["seed_style"] = seed_style(device, timer)


def test(results: dict, folder: Path, seconds: float, save: Callable[[], object]) -> None:
    """Fill ``results["export"]`` and ``results["tests"]``, saved all along."""

    def so_far(tests: dict) -> None:
        results["tests"] = tests
        save()

    results["export"] = judge_export(folder, EXPORT_SECONDS)
    so_far(NOT_RUN)
    so_far(run_tests(folder, seconds, so_far))


def nothing() -> dict:
    return {"env": {}, "tests": NOT_RUN, "export": NOT_JUDGED, "rows": []}


def merged(parts: list[dict]) -> dict:
    """Results of several runs: of each part the last that has it, with its own env."""
    found = nothing()
    for part in parts:
        found["env"] |= part["env"]
        names = {"tests": ("tests", "export"), "times": ("rows", "seed_style")}
        for name in part["env"]:
            found |= {key: part[key] for key in names.get(name, ()) if key in part}
    return found


def earlier(path: Path, commit: str) -> dict:
    """What earlier runs of the same commit left in a folder, for runs that do a part."""
    found = json.loads(path.read_text()) if path.exists() else nothing()
    if "export" not in found:  # of an older form
        return nothing()
    runs = [env for part, env in found["env"].items() if part != "model"]  # which needs no card
    same = all(env["commit"] == commit for env in runs)
    return found if same else nothing()


def is_fine(results: dict) -> bool:
    wrong = any("failed" in row for row in results["rows"])
    states = results["tests"]["state"], results["export"]["state"]
    return not wrong and states == ("passed", "accepted")


def main(argv: list[str] | None = None) -> int:
    """Test, time, compare; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--part", choices=("tests", "times"), help="only this; the other part's results are kept"
    )
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="parts' JSON files")
    parser.add_argument("--predict", type=Path, metavar="FILE", help="times of an earlier run")
    parser.add_argument("--seconds", type=float, default=TEST_SECONDS, help="for the tests")
    options = parser.parse_args(argv)
    path = options.out / "ada_on_hopper.json"

    def save() -> None:
        from fastmm_op.bench.session import write

        write(results, path)
        path.with_suffix(".md").write_text(markdown(results))

    if options.merge:
        results = merged([json.loads(file.read_text()) for file in options.merge])
        save()
        return int(not is_fine(results))
    if options.predict:
        results = predict_again(json.loads(options.predict.read_text()), argv)
        save()
        return int(not is_fine(results))
    if problem := hopper_card():
        parser.error(f"needs a Hopper card (compute capability 9.0), but {problem}")
    with tempfile.TemporaryDirectory(prefix="ada_on_hopper_") as folder:
        prepare(Path(folder))
        env = describe(argv)
        results = earlier(path, env["commit"])
        # The cases first: should the tests take the rest of the time, these are there.
        if options.part != "tests":
            results["env"]["times"] = env
            time_cases(results, save)
            save()
        if options.part != "times":
            results["env"]["tests"] = env
            test(results, Path(folder), options.seconds, save)
    print(path.with_suffix(".md").read_text())
    return int(not is_fine(results))


if __name__ == "__main__":
    sys.exit(main())
