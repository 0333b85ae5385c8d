"""Runs the launches of a Plan by Triton's own launcher, which compiles what is not compiled yet."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastmm_op import contract
from fastmm_op.kernels import balance, gemm, gemv, pack, reduce_tail
from fastmm_op.kernels.common import INTERPRETED
from fastmm_op.launches import Descriptor, Launch, Plan, Pointer
from fastmm_op.problem import COPY_BYTES, Problem
from fastmm_op.starting import CompiledLaunch
from fastmm_op.triton_compat import compile_together, round_as_copied

KERNELS = {
    "balance": balance.balance_kernel,
    "forget": balance.forget_kernel,
    "pack_rows": pack.pack_rows_kernel,
    "pack_strips": pack.pack_strips_kernel,
    "copy_tiles": pack.copy_tiles_kernel,
    "gemm": gemm.gemm_kernel,
    "reduce": gemm.reduce_kernel,
    "gemv": gemv.gemv_kernel,
    "reduce_tail": reduce_tail.reduce_tail_kernel,
}
try:
    from fastmm_op.kernels import gemm_hopper, gemm_tf32_hopper, hopper

    KERNELS["gemm_hopper"] = gemm_hopper.gemm_hopper_kernel
    KERNELS["gemm_tf32_hopper"] = gemm_tf32_hopper.gemm_tf32_hopper_kernel
except ImportError:
    hopper = None  # this Triton's Gluon lacks something: Hopper gets plans of plain Triton

TORCH_DTYPES = {name: dtype for dtype, name in contract.DTYPES.items()} | {"int32": torch.int32}


def run_plan(
    plan: Plan,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    packed_b: Tensor | None = None,
) -> list[CompiledLaunch | None]:
    """Run a plan's kernels through Triton's own launcher, compiling what is not compiled yet.

    Args:
        a, b: the folded operands that the plan was made for.
        out: contiguous, of a's dtype, batch * M * N elements; written.
        bias, residual: what the problem's epilogue has of them: (N,), and as out; contiguous and
            16-byte aligned.
        packed_b: of a plan for a ``prepacked`` problem: b's packed copy, uint8.

    Returns:
        What starts the same kernels again faster (Nones when interpreted).
    """
    buffers = {"a": a, "b": b, "c": out, "bias": bias, "residual": residual, "packed_b": packed_b}
    return run_launches(plan.launches, plan.workspace_bytes, buffers, a.device)


def run_launches(
    launches: tuple[Launch, ...],
    workspace_bytes: int,
    buffers: dict[str, Tensor | None],
    device: torch.device,
) -> list[CompiledLaunch | None]:
    """As ``run_plan``, with all buffers but the workspace by their names in ``Pointer``."""
    workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=device)
    kernels = [for_triton(step, buffers, workspace) for step in launches]
    if not INTERPRETED:
        compile_together(kernels)
    started = []
    for step, (kernel, grid, args, options) in zip(launches, kernels, strict=True):
        compiled = compile_and_launch(step, kernel, grid, args, options)
        started.append(CompiledLaunch(compiled, step, args) if compiled else None)
    return started


def compile_plan(problem: Problem, plan: Plan) -> None:
    """Compile a plan's kernels for the current CUDA device, into Triton's cache on disk; run none.

    Needs no memory of the device.

    Args:
        problem: what the plan is for; no ``prepacked`` one.
    """
    # What Triton asks of a tensor is its dtype, and whether 16 divides its address.
    memory = torch.empty(2 * COPY_BYTES, dtype=torch.uint8)
    offsets = {"a": problem.a.pointer_alignment, "b": problem.b.pointer_alignment}
    dtype = TORCH_DTYPES[problem.dtype]
    buffers = {
        name: memory[offsets.get(name, COPY_BYTES) :].view(dtype)
        for name in ("a", "b", "c", "bias", "residual")
    }
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device="meta")
    for step in plan.launches:
        kernel, grid, args, options = for_triton(step, buffers, workspace)
        kernel.warmup(*args, grid=grid, **options)


def for_triton(
    step: Launch, buffers: dict[str, Tensor | None], workspace: Tensor
) -> tuple[Callable, tuple[int, int, int], list, dict]:
    """The kernel, grid, arguments, and compile-time arguments and options of a launch."""
    in_bytes = {"workspace": workspace, "packed_b": buffers.get("packed_b")}
    args = [resolve(arg, buffers, in_bytes) for arg in step.args]
    return KERNELS[step.kernel], (step.grid, 1, 1), args, step.constexprs | launch_options(step)


def compile_and_launch(
    step: Launch, kernel, grid: tuple[int, int, int], args: list, options: dict
) -> object:
    """One launch by Triton, and the compiled kernel (None when interpreted)."""
    rounds = [arg.rounds for arg in step.args if isinstance(arg, Descriptor)]
    if not any(rounds) or hopper.ROUNDS_BY_FIELD:
        return kernel[grid](*args, **options)
    # The very object that is told to round is launched: another thread may compile it once more.
    compiled = round_as_copied(kernel.warmup(*args, grid=grid, **options), rounds)
    compiled[grid](*args, *step.constexprs.values())
    return compiled


def launch_options(step: Launch) -> dict[str, int | bool]:
    """Triton's options of a launch."""
    options = {"num_warps": step.num_warps, "num_stages": step.num_stages}
    if INTERPRETED:  # it does not know the others
        return options
    if step.max_registers:
        options["maxnreg"] = step.max_registers
    if step.dependent:
        options["launch_pdl"] = True
    return options


def resolve(
    arg: Pointer | Descriptor | int | None,
    buffers: dict[str, Tensor | None],
    in_bytes: dict[str, Tensor | None],
) -> object:
    """A launch's argument as Triton's launcher takes it: tensors for what has an address.

    Not a function inside of run_launches: one that calls itself would keep all its tensors alive
    until Python collects cycles, which on a first training step added up to gigabytes.

    Args:
        buffers: tensors that pointers start at.
        in_bytes: others, uint8, that pointers lie inside of.
    """
    if isinstance(arg, Descriptor):
        pointer = resolve(arg.pointer, buffers, in_bytes)
        return hopper.tensor_descriptor(
            pointer, arg.shape, arg.strides, arg.box, arg.pointer.dtype, arg.rounds
        )
    if isinstance(arg, Pointer):
        if arg.buffer in in_bytes:
            return in_bytes[arg.buffer][arg.offset :].view(TORCH_DTYPES[arg.dtype])
        return buffers[arg.buffer]
    return arg
