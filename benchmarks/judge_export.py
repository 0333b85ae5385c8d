"""Judge what ``export`` writes as KernelBench would: on the GPU, in a process without the package.

    python benchmarks/judge_export.py --arch sm_90 --out DIR

Each file is read (kernelbench_rules.py), run alone on torch.rand inputs of several shapes, held
against torch's IEEE fp32 product at KernelBench's tolerance, and against the package's own bits.
With ADA_ON_HOPPER, a folder of ``ada_on_hopper.prepare``, all code is the RTX 4090's, assembled for
Hopper. Writes ``export_<arch>.json``. Exit codes: 0 accepted, 1 not, 2 bad arguments.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.kernelbench_rules import TOLERANCE, faults

SEED = (8205, 2949, 5921)
# Each file is for the seed workload; its constants are right for these as well. Sums of some 500
# products or more: the rounding of fewer, which is TF32's, is more than 1e-4 of them.
SHAPES = (SEED, (4096, 2048, 4096), (1021, 1031, 1033), (129, 515, 66))
# Where kernels are interpreted.
SMALL_SHAPES = ((33, 530, 65), (40, 517, 34))


def operands(shape: tuple[int, int, int], device: str):
    """KernelBench's inputs: uniform in [0, 1); the same in every process."""
    import torch

    m, k, n = shape
    generator = torch.Generator(device).manual_seed(42)
    return tuple(torch.rand(size, device=device, generator=generator) for size in ((m, k), (k, n)))


def digest(tensor) -> str:
    return hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()


def run_alone(path: Path, shapes: list[tuple[int, int, int]], device: str) -> list[dict]:
    """Each product of the file's ModelNew beside torch's own; this process has no package."""
    sys.modules["fastmm_op"] = None  # importing it is an error
    import torch

    spec = importlib.util.spec_from_file_location("model_new", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = []
    for shape in shapes:
        a, b = operands(shape, device)
        with torch.no_grad():
            got = module.ModelNew().to(device=device, dtype=torch.float32)(a, b)
        want = torch.matmul(a, b)
        close = torch.allclose(got, want, atol=TOLERANCE, rtol=TOLERANCE)
        error = float((got - want).abs().max())
        found.append({"close": close, "largest_error": error, "digest": digest(got)})
    return found


def package_digest(problem, choice, shape: tuple[int, int, int], device: str) -> str:
    """Of the package's own result for a shape, by the choice that the file was written from."""
    import torch

    from fastmm_op import launch, running
    from fastmm_op.export import exported_problem
    from fastmm_op.plan import write_plan

    a, b = operands(shape, device)
    out = torch.full((1, a.shape[0], b.shape[1]), torch.nan, device=device)
    found = launch.describe(a[None], b[None], problem.precision, problem.arch)
    running.run_plan(write_plan(exported_problem(found), choice), a[None], b[None], out)
    return digest(out[0])


def judge(arch: str, size: tuple[int, int, int], shapes, device: str) -> dict:
    """Export for a card, read, run, compare.

    Args:
        arch: a key of ``arch.ARCHES``.
        size: what the file is exported for.
        shapes: what it is run for.
    """
    from fastmm_op.arch import ARCHES
    from fastmm_op.export import export, exported_choice
    from fastmm_op.problem import problem_of

    how = {"batch": 1, "dtype": "fp32", "layout": "NN", "precision": "tf32", "arch": ARCHES[arch]}
    problem = problem_of(*size, **how)
    choice = exported_choice(problem)
    text = export(problem, "benchmarks/judge_export.py", "0", choice)
    with tempfile.TemporaryDirectory(prefix="judge_export_") as folder:
        path = Path(folder) / "model_new.py"
        path.write_text(text)
        command = [sys.executable, __file__, "--alone", str(path), "--device", device]
        command += ["--shapes", json.dumps(shapes)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        return {"arch": arch, "faults": [*faults(text), done.stderr[-2000:]], "runs": []}
    runs = json.loads(done.stdout.splitlines()[-1])
    for shape, run in zip(shapes, runs, strict=True):
        run["shape"] = list(shape)
        run["same_bits"] = run.pop("digest") == package_digest(problem, choice, shape, device)
    return {"arch": arch, "faults": faults(text), "runs": runs}


def accepted(verdict: dict) -> bool:
    runs = verdict["runs"]
    return not verdict["faults"] and bool(runs) and all(r["close"] and r["same_bits"] for r in runs)


def main(argv: list[str] | None = None) -> int:
    """Judge, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="sm_90", help="what the file is exported for")
    parser.add_argument("--out", type=Path, help="folder for the verdict")
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    parser.add_argument("--shapes", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if folder := os.environ.get("ADA_ON_HOPPER"):
        from benchmarks.ada_on_hopper import prepare

        prepare(Path(folder))
    if options.alone:
        shapes = [tuple(shape) for shape in options.shapes]
        print(json.dumps(run_alone(options.alone, shapes, options.device)))
        return 0
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    device = "cpu" if interpreted else "cuda"
    shapes = SMALL_SHAPES if interpreted else SHAPES
    verdict = judge(options.arch, shapes[0], shapes, device)
    print(json.dumps(verdict, indent=1))
    print(f"export for {options.arch}: {'accepted' if accepted(verdict) else 'NOT ACCEPTED'}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"export_{options.arch}.json"
        path.write_text(json.dumps(verdict, indent=1) + "\n")
    return int(not accepted(verdict))


if __name__ == "__main__":
    sys.exit(main())
