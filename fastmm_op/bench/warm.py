"""Compile what a run is going to launch, in several processes at once: Triton caches it on disk."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch
from rich.console import Console
from rich.progress import track

from fastmm_op.launches import Plan
from fastmm_op.problem import Problem

Work = Sequence[tuple[Problem, Plan]]


def compile_all(work: Work, device: torch.device, processes: int) -> int:
    """Compile the plans of problems for a CUDA device, in so many processes.

    Returns:
        How many plans failed. The run itself meets them again, and says how.
    """
    context = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
    with ProcessPoolExecutor(processes, context, torch.cuda.set_device, (device,)) as pool:
        outcomes = pool.map(compiles, *zip(*work, strict=True))
        bar = track(outcomes, "compiling", len(work), console=Console(stderr=True))
        return sum(not compiled for compiled in bar)


def compiles(problem: Problem, plan: Plan) -> bool:
    """Compile a plan's kernels for the current CUDA device; whether that worked."""
    from fastmm_op import running

    try:
        running.compile_plan(problem, plan)
    except Exception:
        return False
    return True
