"""The seed-style kernel on a card that need not be there, by the model of our own kernels."""

from dataclasses import replace

from fastmm_op.bench import seed_style
from fastmm_op.bench.gpu_model import Machine
from fastmm_op.bench.predict import Forecast, forecast_steps, step_of
from fastmm_op.codegen import compile_kernel, resources
from fastmm_op.launches import Launch, Pointer
from fastmm_op.problem import Problem, cdiv

# It goes through row after row of tiles.
ORDER = {"GROUP_M": 1}
# What a plan's launch says of batches and splits; here there are none.
ALONE = {"batch": 1, "split_k": 1, "stride_ab": 0, "stride_bb": 0}


def forecast_seed_style(problem: Problem, machine: Machine, flushed: bool = True) -> Forecast:
    """Predict the time of seed_style_matmul.

    Args:
        problem: fp32, one item; its architecture is what the kernel is compiled for.
        machine, flushed: as ``predict.forecast``.
    """
    a, b = problem.a, problem.b
    blocks = {f"BLOCK_{side}": getattr(seed_style, f"BLOCK_{side}") for side in "MNK"}
    launch = Launch(
        "gemm",
        cdiv(problem.M, blocks["BLOCK_M"]) * cdiv(problem.N, blocks["BLOCK_N"]),
        tuple(Pointer(buffer, problem.dtype) for buffer in "abc")
        + (problem.M, problem.N, problem.K)
        + (a.row_stride, a.k_stride, b.k_stride, b.row_stride, problem.N, 1),
        blocks,
        num_warps=seed_style.NUM_WARPS,
        num_stages=seed_style.NUM_STAGES,
    )
    kernel = seed_style.seed_style_kernel
    found = resources(compile_kernel(kernel, problem, launch))
    args = dict(zip(kernel.arg_names, launch.args, strict=False))
    ordered = replace(launch, constexprs=blocks | ORDER)
    return forecast_steps([step_of(ordered, found, args | ALONE)], machine, flushed)
