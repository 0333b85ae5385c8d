"""Runs a Plan: workspace, kernels, device guard, and the memory of what was planned and compiled.

A call is remembered under its shapes, strides, alignment, dtype, precision and device; the next one
like it allocates its output and workspace and starts the compiled kernels with new addresses.
Nothing here synchronises with the host.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from fastmm_op import aten, contract
from fastmm_op.arch import ARCHES, Arch, arch_for
from fastmm_op.compat import current_raw_stream
from fastmm_op.kernels import gemm, gemv, pack
from fastmm_op.kernels.common import INTERPRETED
from fastmm_op.launches import Descriptor, Launch, Plan, Pointer
from fastmm_op.plan import make_plan
from fastmm_op.problem import COPY_BYTES, Operand, Problem

KERNELS = {
    "pack_rows": pack.pack_rows_kernel,
    "row_max": pack.row_max_kernel,
    "pack_tiles": pack.pack_tiles_kernel,
    "gemm": gemm.gemm_kernel,
    "reduce": gemm.reduce_kernel,
    "gemv": gemv.gemv_kernel,
}
try:
    from fastmm_op.kernels import gemm_hopper

    KERNELS["gemm_hopper"] = gemm_hopper.gemm_hopper_kernel
except ImportError:
    gemm_hopper = None  # this Triton's Gluon lacks something: Hopper gets plans of plain Triton

TORCH_DTYPES = {name: dtype for dtype, name in contract.DTYPES.items()} | {"int32": torch.int32}
# Interpreted kernels run on CPU tensors, by the plan of this card.
INTERPRETED_ARCH = ARCHES["sm_89"]
MAX_REMEMBERED_CALLS = 4096


@lru_cache
def device_arch(index: int) -> Arch | None:
    """The planner's entry for CUDA device ``index``; None if nothing here runs on it."""
    if INTERPRETED:
        return INTERPRETED_ARCH
    sms = torch.cuda.get_device_properties(index).multi_processor_count
    arch = arch_for(torch.cuda.get_device_capability(index), sms)
    return arch and replace(arch, tma=arch.tma and "gemm_hopper" in KERNELS)


def pointer_alignment(x: Tensor) -> int:
    """The largest power of two, up to 16, that divides the address of x's first element."""
    address = x.data_ptr() % COPY_BYTES
    return address & -address if address else COPY_BYTES


def describe(a: Tensor, b: Tensor, precision: str, arch: Arch) -> Problem:
    """The Problem of a folded product, a (batch, M, K) and b (batch, K, N)."""
    # The stride of a dimension of size one is never used, and torch lets it be anything.
    strides_a = [0 if size == 1 else s for size, s in zip(a.shape, a.stride(), strict=True)]
    strides_b = [0 if size == 1 else s for size, s in zip(b.shape, b.stride(), strict=True)]
    batch, m, k = a.shape
    return Problem(
        batch,
        m,
        b.shape[2],
        k,
        contract.DTYPES[a.dtype],
        precision,
        Operand(strides_a[0], strides_a[1], strides_a[2], pointer_alignment(a)),
        Operand(strides_b[0], strides_b[2], strides_b[1], pointer_alignment(b)),
        arch,
    )


def run_plan(plan: Plan, a: Tensor, b: Tensor, out: Tensor) -> list["CompiledLaunch | None"]:
    """Run a plan's kernels through Triton's own launcher, compiling what is not compiled yet.

    Args:
        a, b: the folded operands that the plan was made for.
        out: contiguous, of a's dtype, batch * M * N elements; written.

    Returns:
        What starts the same kernels again faster (Nones when interpreted).
    """
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=a.device)
    buffers = {"a": a, "b": b, "c": out}

    def resolve(arg):
        if isinstance(arg, Descriptor):
            return gemm_hopper.tensor_descriptor(
                resolve(arg.pointer), arg.shape, arg.strides, arg.box, arg.pointer.dtype
            )
        if isinstance(arg, Pointer):
            if arg.buffer == "workspace":
                return workspace[arg.offset :].view(TORCH_DTYPES[arg.dtype])
            return buffers[arg.buffer]
        return arg

    started = []
    for step in plan.launches:
        grid = (step.grid, 1, 1)
        args = [resolve(arg) for arg in step.args]
        compiled = KERNELS[step.kernel][grid](
            *args, **step.constexprs, num_warps=step.num_warps, num_stages=step.num_stages
        )
        started.append(CompiledLaunch(compiled[grid], step, args) if compiled else None)
    return started


class Address:
    """Stands for a tensor in a TMA descriptor, of which Triton's launcher asks only this."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class CompiledLaunch:
    """A compiled kernel with all its arguments but the addresses.

    Calling it skips what Triton's launcher does to find the kernel again: about half its time.
    """

    def __init__(self, start: Callable, step: Launch, args: list) -> None:
        self.start = start
        self.template = [*args, *step.constexprs.values()]
        self.pointers = []
        self.descriptors = []
        for i, arg in enumerate(step.args):
            if isinstance(arg, Pointer):
                self.template[i] = None
                self.pointers.append((i, arg.buffer, arg.offset))
            elif isinstance(arg, Descriptor):
                self.template[i].base = None
                self.descriptors.append((i, arg.pointer.buffer, arg.pointer.offset))

    def __call__(self, addresses: dict[str, int], stream: int) -> None:
        args = self.template.copy()
        for i, buffer, offset in self.pointers:
            args[i] = addresses[buffer] + offset
        for i, buffer, offset in self.descriptors:
            args[i] = copy.copy(args[i])
            args[i].base = Address(addresses[buffer] + offset)
        self.start(*args, stream=stream)


class Call:
    """Everything about one kind of call that the next one like it need not work out again."""

    def __init__(self, a: Tensor, b: Tensor, precision: str, arch: Arch) -> None:
        self.out_shape = contract.result_shape(a, b)
        self.dtype = a.dtype
        self.device = a.device
        self.precision = precision
        self.arch = arch
        self.is_matrix_product = a.dim() == 2 and b.dim() == 2
        self.plan: Plan | None = None
        self.kernels: list[CompiledLaunch] | None = None

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        if self.device.type != "cuda" or self.device.index == torch.cuda.current_device():
            return self.run(a, b)
        with torch.cuda.device(self.device):
            return self.run(a, b)

    def run(self, a: Tensor, b: Tensor) -> Tensor:
        if not self.is_matrix_product:
            a, b = contract.fold(a, b)
        out = torch.empty(self.out_shape, dtype=self.dtype, device=self.device)
        if self.kernels is None:
            self.first_run(a, b, out)
            return out
        addresses = {"a": a.data_ptr(), "b": b.data_ptr(), "c": out.data_ptr()}
        if self.plan.workspace_bytes:
            workspace = torch.empty(
                self.plan.workspace_bytes, dtype=torch.uint8, device=self.device
            )
            addresses["workspace"] = workspace.data_ptr()
        stream = current_raw_stream(self.device.index)
        for kernel in self.kernels:
            kernel(addresses, stream)
        return out

    def first_run(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        if self.is_matrix_product:
            a, b = a.unsqueeze(0), b.unsqueeze(0)
        self.plan = make_plan(describe(a, b, self.precision, self.arch))
        if self.plan.strategy == "zero":
            out.zero_()
            return
        started = run_plan(self.plan, a, b, out)
        if None not in started:
            self.kernels = started


_calls: dict[tuple, Call] = {}


def matmul(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """The Triton implementation of ``fastmm::matmul`` for CUDA tensors (CPU ones if interpreted).

    Args, result and errors: as ``fastmm_op.matmul``; float64 and cards before sm_80 use ATen.
    """
    key = (
        a.shape, a.stride(), a.dtype, a.get_device(), a.data_ptr() % COPY_BYTES,
        b.shape, b.stride(), b.dtype, b.get_device(), b.data_ptr() % COPY_BYTES,
        precision,
    )  # fmt: skip
    call = _calls.get(key)
    if call is None:
        call = remember(key, a, b, precision)
    return call(a, b)


def remember(key: tuple, a: Tensor, b: Tensor, precision: str) -> Callable:
    contract.check_inputs(a, b, precision)
    arch = device_arch(a.get_device()) if a.is_cuda else INTERPRETED_ARCH
    if a.dtype is torch.float64 or arch is None:
        call = partial(aten.matmul, precision=precision)
    else:
        call = Call(a, b, precision, arch)
    if len(_calls) >= MAX_REMEMBERED_CALLS:
        _calls.clear()
    _calls[key] = call
    return call
