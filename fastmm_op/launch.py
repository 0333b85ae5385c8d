"""Computes products: device guard, and the memory of what was planned and compiled.

The first call of a kind is planned: as the user's cache of measured choices has it, else by the
planner. It is remembered under its shapes, strides, alignment, dtype, precision and device; the
next one like it allocates its output and workspace and starts the compiled kernels with new
addresses.
Nothing here synchronises with the host.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from fastmm_op import aten, cache, contract
from fastmm_op.arch import ARCHES, Arch
from fastmm_op.card import card_of
from fastmm_op.compat import current_device, current_raw_stream, empty_strided_cuda
from fastmm_op.kernels.common import INTERPRETED
from fastmm_op.launches import Plan
from fastmm_op.plan import make_plan, write_plan
from fastmm_op.planned import planned_arch
from fastmm_op.problem import COPY_BYTES, Epilogue, Operand, Problem
from fastmm_op.running import KERNELS, run_plan
from fastmm_op.starting import CompiledLaunch
from fastmm_op.triton_compat import hooks_installed, tma_can_round

# Interpreted kernels run on CPU tensors, by the plan of this card.
INTERPRETED_ARCH = ARCHES["sm_89"]
MAX_REMEMBERED_CALLS = 4096
NO_EPILOGUE = Epilogue()


@lru_cache
def device_arch(index: int) -> Arch | None:
    """The planner's entry for CUDA device ``index``; None if nothing here runs on it."""
    if INTERPRETED:
        return INTERPRETED_ARCH
    arch = planned_arch(card_of(index))
    tma = arch and arch.tma and "gemm_hopper" in KERNELS
    return arch and replace(arch, tma=tma, tma_rounds=tma and tma_can_round())


@lru_cache
def card_name(index: int) -> str:
    """The name under which choices measured on CUDA device ``index`` are kept."""
    return "interpreter" if INTERPRETED else torch.cuda.get_device_name(index)


def plan_for(problem: Problem, index: int) -> Plan:
    """How CUDA device ``index`` computes a problem: as tuned there, else by ``make_plan``."""
    entry = cache.lookup(problem, card_name(index))
    return write_plan(problem, entry.choice) if entry else make_plan(problem)


def pointer_alignment(x: Tensor) -> int:
    """The largest power of two, up to 16, that divides the address of x's first element."""
    address = x.data_ptr() % COPY_BYTES
    return address & -address if address else COPY_BYTES


def describe(
    a: Tensor, b: Tensor, precision: str, arch: Arch, epilogue: Epilogue = NO_EPILOGUE
) -> Problem:
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
        epilogue,
    )


class Call:
    """Everything about one kind of call that the next one like it need not work out again.

    Args:
        b: (..., K, N); or (N, K), a linear's weight.
        plan: how to compute it; None for what ``plan_for`` says on the first run.
        of_weight: whether b is a weight, here and in calls. Its transposed view lies at the same
            address, so most calls need not make one.
    """

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        precision: str,
        arch: Arch,
        epilogue: Epilogue = NO_EPILOGUE,
        plan: Plan | None = None,
        of_weight: bool = False,
    ) -> None:
        self.of_weight = of_weight
        b = self.factor(b)
        self.out_shape = tuple(contract.result_shape(a, b))
        self.out_strides = contiguous_strides(self.out_shape)
        self.dtype = a.dtype
        self.device = a.device
        self.device_index = a.get_device()  # -1: a CPU's, where kernels are interpreted
        self.precision = precision
        self.arch = arch
        self.epilogue = epilogue
        self.is_matrix_product = a.dim() == 2 and b.dim() == 2
        self.fold_copies = False  # kernels are given addresses: a fold into views changes none
        self.plan = plan
        self.kernels: list[CompiledLaunch] | None = None
        self.fastest: list[Callable] = []

    def factor(self, b: Tensor) -> Tensor:
        """The second factor, (..., K, N), of what calls are given for b."""
        return b.mT if self.of_weight else b

    def __call__(
        self,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        packed_b: Tensor | None = None,
    ) -> Tensor:
        if self.device_index < 0 or self.device_index == current_device():
            return self.run(a, b, bias, residual, packed_b)
        with torch.cuda.device(self.device):
            return self.run(a, b, bias, residual, packed_b)

    def run(
        self,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        packed_b: Tensor | None,
    ) -> Tensor:
        if self.kernels is None:
            out = torch.empty(self.out_shape, dtype=self.dtype, device=self.device)
            self.first_run(a, self.factor(b), out, bias, residual, packed_b)
            return out
        if self.fold_copies:
            a, b = contract.fold(a, self.factor(b))
        out = empty_strided_cuda(self.out_shape, self.out_strides, self.dtype)
        addresses = {"a": a.data_ptr(), "b": b.data_ptr(), "c": out.data_ptr()}
        if bias is not None:
            addresses["bias"] = bias.data_ptr()
        if residual is not None:
            addresses["residual"] = residual.data_ptr()
        if packed_b is not None:
            addresses["packed_b"] = packed_b.data_ptr()
        if self.plan.workspace_bytes:
            workspace = empty_strided_cuda((self.plan.workspace_bytes,), (1,), torch.uint8)
            addresses["workspace"] = workspace.data_ptr()
        stream = current_raw_stream(self.device_index)
        for start in self.kernels if hooks_installed() else self.fastest:
            start(addresses, stream)
        return out

    def first_run(
        self,
        a: Tensor,
        b: Tensor,
        out: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        packed_b: Tensor | None,
    ) -> None:
        before = a.data_ptr(), b.data_ptr()
        if self.is_matrix_product:
            a, b = a.unsqueeze(0), b.unsqueeze(0)
        else:
            a, b = contract.fold(a, b)
        self.fold_copies = (a.data_ptr(), b.data_ptr()) != before
        if self.plan is None:
            problem = describe(a, b, self.precision, self.arch, self.epilogue)
            self.plan = plan_for(problem, a.get_device())
        if self.plan.strategy == "zero":
            out.zero_()
            return
        started = run_plan(self.plan, a, b, out, bias, residual, packed_b)
        if None not in started:
            self.fastest = [kernel.fastest for kernel in started]
            self.kernels = started


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """In elements, of a contiguous tensor that is not empty."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


_calls: dict[tuple, Callable] = {}


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
        contract.check_inputs(a, b, precision)
        arch = arch_of(a)
        if arch is None:
            call = partial(aten.matmul, precision=precision)
        else:
            call = Call(a, b, precision, arch)
        remember(key, call)
    return call(a, b)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    precision: str,
) -> Tensor:
    """The Triton implementation of ``fastmm::linear``, as ``matmul`` is that of its op."""
    key = (
        x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() % COPY_BYTES,
        weight.shape, weight.stride(), weight.dtype, weight.get_device(),
        weight.data_ptr() % COPY_BYTES,
        bias is None or (bias.shape, bias.dtype, bias.get_device()),
        residual is None or (residual.shape, residual.dtype, residual.get_device()),
        activation, precision,
    )  # fmt: skip
    call = _calls.get(key)
    if call is None:
        contract.check_linear(x, weight, bias, residual, activation, precision)
        call = linear_call(x, weight, bias, residual, activation, precision)
        remember(key, call)
    return call(x, weight, dense(bias), dense(residual))


def linear_call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    precision: str,
) -> Callable:
    """What computes such a linear of x, weight, bias and residual."""
    arch = arch_of(x)
    # Without a K the kernels have no product to finish.
    if arch is None or x.shape[-1] == 0:
        return partial(aten.linear, activation=activation, precision=precision)
    epilogue = Epilogue(bias is not None, activation, residual is not None)
    return Call(x, weight, precision, arch, epilogue, of_weight=True)


def dense(x: Tensor | None) -> Tensor | None:
    """x as the kernels read a bias or residual: contiguous and aligned; a copy if it is not."""
    if x is None or (x.is_contiguous() and x.data_ptr() % COPY_BYTES == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def arch_of(x: Tensor) -> Arch | None:
    """The planner's entry for the card that x is on; None if ATen is to compute with it."""
    if x.dtype is torch.float64:
        return None
    return device_arch(x.get_device()) if x.is_cuda else INTERPRETED_ARCH


def remember(key: tuple, call: Callable) -> None:
    if len(_calls) >= MAX_REMEMBERED_CALLS:
        _calls.clear()
    _calls[key] = call
