"""Compile what a run is going to launch, in several processes at once: Triton caches it on disk."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat

import torch

from fastmm_op.bench.cases import Case
from fastmm_op.bench.contenders import ours


def compile_all(cases: list[Case], device: torch.device, processes: int) -> int:
    """Call our eager function once for every case, in so many processes that share the device.

    Each holds the operands of one case at a time.

    Returns:
        How many cases failed. The run itself meets them again, and says how.
    """
    by_size = sorted(cases, key=lambda case: case.bytes)
    shares = [by_size[first::processes] for first in range(processes)]
    context = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return sum(pool.map(compile_cases, shares, repeat(device)))


def compile_cases(cases: list[Case], device: torch.device) -> int:
    """The same in this process."""
    failed = 0
    for case in cases:
        eager = ours(case)[0]
        try:
            eager.make()(*case.inputs(device))
        except Exception:
            failed += 1
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return failed
