"""Packs a weight once, and multiplies by the copy: launch.py's calls for ``linear_prepacked``."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from fastmm_op import contract, launch, running
from fastmm_op.arch import Arch
from fastmm_op.kept import Keeping, keep
from fastmm_op.kept_weight import column_exponents, is_current
from fastmm_op.launches import Plan
from fastmm_op.packing import BALANCE_BLOCK
from fastmm_op.plan import make_plan
from fastmm_op.problem import COPY_BYTES, Epilogue, Operand, Problem, cdiv

# Rows of x for which a copy is asked whether a plan would read it.
ROWS = tuple(2**i for i in range(1, 17))


def weight_problem(weight: Tensor, precision: str, arch: Arch, bias: bool, rows: int) -> Problem:
    """``linear`` of so many dense rows with a weight (N, K), a copy of which is at hand."""
    n, k = weight.shape
    described = launch.describe(weight.new_empty(1, 2, k), weight.mT[None], precision, arch)
    a = Operand(0, k if rows > 1 else 0, 1 if k > 1 else 0)
    epilogue = Epilogue(bias=bias)
    return replace(described, M=rows, N=n, a=a, epilogue=epilogue, prepacked=True)


def rows_served(weight: Tensor, precision: str, arch: Arch, bias: bool) -> list[int]:
    """Those of ROWS for which the planner would read a packed copy of the weight."""
    problems = (weight_problem(weight, precision, arch, bias, rows) for rows in ROWS)
    return [problem.M for problem in problems if reads_copy(problem, make_plan(problem))]


def reads_copy(problem: Problem, plan: Plan) -> bool:
    """Whether a prepacked problem's plan reads the copy, and is to be preferred to the plain op's.

    That one may pack a long K in slabs, which a copy is not made of.
    """
    if plan.choice is None or not plan.choice.pack_b:
        return False
    return plan.seconds <= make_plan(replace(problem, prepacked=False)).seconds


def pack_weight(weight: Tensor, precision: str, arch: Arch) -> Tensor:
    """The packed copy of a weight (N, K), on its device: bytes, as ``kept.keep`` lays them out.

    Waits for the device, so that every stream may read the copy.
    """
    keeping = keep(weight_problem(weight, precision, arch, False, ROWS[0]))
    packed = torch.empty(keeping.kept_bytes, dtype=torch.uint8, device=weight.device)
    if keeping.balance:
        write_exponents(keeping, column_exponents(weight), packed)
    buffers = {"b": weight.mT[None], "packed_b": packed}
    with torch.cuda.device(weight.device) if weight.is_cuda else nullcontext():
        running.run_launches(keeping.launches, keeping.workspace_bytes, buffers, weight.device)
        if weight.is_cuda:
            torch.cuda.current_stream().synchronize()
    return packed


def write_exponents(keeping: Keeping, exponents: Tensor, packed: Tensor) -> None:
    """What kernels/balance.py would leave, (K,) int32 for x, at its places in a copy."""
    blocks = cdiv(len(exponents), BALANCE_BLOCK)
    padded = exponents.new_zeros(blocks * BALANCE_BLOCK)
    padded[: len(exponents)] = exponents.abs()
    written = (
        (keeping.balance.k_exp["a"], exponents),
        (keeping.balance.k_exp["b"], -exponents),
        (keeping.balance.moved, padded.view(blocks, BALANCE_BLOCK).amax(1)),
    )
    for pointer, values in written:
        end = pointer.offset + 4 * pointer.elements
        packed[pointer.offset : end].view(torch.int32).copy_(values)


def linear_prepacked(
    x: Tensor,
    weight: Tensor,
    source: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    version: int,
    precision: str,
) -> Tensor:
    """The Triton implementation of ``fastmm::linear_prepacked``; ``linear`` where the copy is old.

    So it is in a CUDA graph: a replay asks nobody whether the weight has changed since.
    """
    usable = is_current(weight, source, version)
    if usable and x.is_cuda:
        usable = not torch.cuda.is_current_stream_capturing()
    if not usable:
        return launch.linear(x, weight, bias, None, "none", precision)
    key = (
        "prepacked",
        x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() % COPY_BYTES,
        weight.shape, weight.stride(), weight.dtype, weight.get_device(),
        weight.data_ptr() % COPY_BYTES, packed.shape, packed.dtype, packed.get_device(),
        bias is None or (bias.shape, bias.dtype, bias.get_device()),
        precision,
    )  # fmt: skip
    call = launch._calls.get(key)
    if call is None:
        contract.check_linear(x, weight, bias, None, "none", precision)
        call = prepacked_call(x, weight, packed, bias, precision)
        launch.remember(key, call)
    return call(x, weight, packed, bias)


def prepacked_call(
    x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None, precision: str
) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """What computes such a call: by the copy, if the plan reads it, else as ``launch.linear``."""

    def plain(x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        return launch.linear(x, weight, bias, None, "none", precision)

    arch = launch.arch_of(x)
    if arch is None or 0 in (*x.shape, *weight.shape):
        return plain
    a, b = contract.fold(x, weight.mT)
    epilogue = Epilogue(bias=bias is not None)
    problem = replace(launch.describe(a, b, precision, arch, epilogue), prepacked=True)
    plan = launch.plan_for(problem, x.get_device())
    if not reads_copy(problem, plan):
        return plain
    expected = keep(problem).kept_bytes
    torch._check(
        packed.dtype is torch.uint8 and packed.shape == (expected,) and packed.is_contiguous(),
        lambda: (
            f"fastmm.linear_prepacked: packed must be {expected} contiguous bytes for this weight "
            f"and precision, got {packed.dtype}, shape {tuple(packed.shape)}"
        ),
    )
    torch._check(
        packed.device == weight.device,
        lambda: f"fastmm.linear_prepacked: packed is on {packed.device}, weight on {weight.device}",
    )
    if x.is_cuda:
        # Kernels that a CUDA graph may have to record are compiled by the call that warms it up.
        plain(x, weight, packed, bias)
    call = launch.Call(x, weight, precision, arch, epilogue, plan, of_weight=True)

    def by_copy(x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        return call(x, weight, launch.dense(bias), None, packed)

    return by_copy
