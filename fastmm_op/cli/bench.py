"""``bench``: for the owner of a card. Checks, times and compares, and writes a report to attach."""

import shlex
import sys
from argparse import Namespace
from pathlib import Path

import torch

import fastmm_op
from fastmm_op import ops
from fastmm_op.bench import environment, session, tables
from fastmm_op.bench.cases import groups, load_cases
from fastmm_op.timing import Timer

PEERS = ["torch", "seed-style"]


def obstacle() -> str | None:
    """Why there is nothing to measure here; None if there is."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU, and torch finds none"
    if not ops.HAVE_TRITON:
        return "needs Triton, which is not installed: the op would be ATen's"
    if ops.INTERPRETED:
        return "TRITON_INTERPRET is set: interpreted kernels are not worth timing"
    device = torch.device("cuda", torch.cuda.current_device())
    if environment.device_arch(device) is None:
        major, minor = torch.cuda.get_device_capability(device)
        return f"needs compute capability 8.0 or more; {major}.{minor} gets ATen's product"
    return None


def run(options: Namespace, device: torch.device, timer: Timer | None = None) -> int:
    """Measure on a device, write results and report; returns the exit code."""
    gpu = environment.device_name(device)
    out = options.out or Path(f"fastmm-bench-{environment.folder_name(gpu)}-{options.suite}.json")
    cases = load_cases(precision=options.precision)
    if options.suite == "seed":
        cases = [case for case in cases if case.group == "seed"]
    results = session.Session(
        cases,
        PEERS,
        groups(cases) if options.inductor else [],
        options.seconds_per_case,
        options.budget,
        shlex.join(["python", "-m", "fastmm_op", *sys.argv[1:]]),
        predictor(gpu, device),
    ).run(device, out, timer)
    report = out.with_suffix(".md")
    report.write_text(tables.issue_report(results, fastmm_op.__version__))
    print(f"wrote {out} and {report}: please attach both to an issue")
    return session.exit_code(results)


def predictor(gpu: str, device: torch.device):
    """The model's predictions for this card, if it knows the card and kernels are compiled."""
    arch = environment.device_arch(device)
    if arch is None or ops.INTERPRETED:
        return None
    from fastmm_op.bench import predict

    return predict.predictor(gpu, arch)


def main(options: Namespace) -> int:
    """Run for parsed command line options; 1 if there is no card to measure, or a wrong result."""
    if problem := obstacle():
        print(f"bench: {problem}", file=sys.stderr)
        return 1
    return run(options, torch.device("cuda", torch.cuda.current_device()))
