"""linear on a real GPU: Hopper's kernel by each way of storing, remembered calls, graphs, training.

The activations, layouts and shapes of test_linear.py run on the GPU too; here is what only it has.
"""

import pytest
import torch

import fastmm_op
from cases import DTYPES, at_offset
from fastmm_op.choices import choices
from fastmm_op.partition import row_classes, stores_are_aligned
from fastmm_op.plan import write_plan
from fastmm_op.problem import Epilogue
from fastmm_op.timing import torch_tf32
from linear_oracle import ACTIVATIONS, assert_linear, eager
from oracle import assert_same_specials

pytestmark = pytest.mark.gpu

SIZES = [(64, 64, 64), (1021, 1031, 1033), (2048, 768, 3072), (1, 4097, 1009), (129, 40001, 67)]


def make(m, k, n, dtype="fp32") -> tuple[torch.Tensor, ...]:
    """x, weight, bias and residual; the product's elements are of order one."""
    like = {"device": "cuda", "dtype": DTYPES[dtype]}
    weight = torch.randn(n, k, **like) / k**0.5
    return torch.randn(m, k, **like), weight, torch.randn(n, **like), torch.randn(m, n, **like)


# Name -> (M, K, N), and what the plans among those of the sizes have that the name speaks of.
STORES = {
    "aligned": ((1100, 200, 264), lambda p, c: stores_are_aligned(p, c) and row_classes(p, c) == 1),
    "row classes": ((1100, 200, 265), lambda p, c: row_classes(p, c) > 1),
    "row classes, N a multiple of 2": ((1100, 200, 266), lambda p, c: row_classes(p, c) > 1),
    "unaligned": ((120, 200, 265), lambda p, c: not stores_are_aligned(p, c)),
    "few columns": ((1100, 200, 17), lambda p, c: row_classes(p, c) > 1),
}


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("has_bias", "activation", "has_residual"),
    [
        *((True, activation, True) for activation in ACTIVATIONS),
        *((True, "none", False), (False, "gelu", False), (False, "none", True)),
    ],
)
def test_hopper_kernel(hopper, has_bias, activation, has_residual, dtype, store) -> None:
    from fastmm_op import launch, running

    sizes, meant = STORES[store]
    x, weight, bias, residual = make(*sizes, dtype)
    bias = bias if has_bias else None
    residual = residual if has_residual else None
    epilogue = Epilogue(has_bias, activation, has_residual)
    problem = launch.describe(x[None], weight.mT[None], "tf32", hopper, epilogue)
    hopper = [c for c in choices(problem) if c.tile.kernel == "gemm_hopper" and c.split <= 2]
    assert any(meant(problem, choice) for choice in hopper)
    for choice in hopper:
        out = torch.full((sizes[0], sizes[2]), torch.nan, device="cuda", dtype=x.dtype)
        plan = write_plan(problem, choice)
        running.run_plan(plan, x[None], weight.mT[None], out, bias, residual)
        assert_linear(out, x, weight, bias, activation, residual, what=str(choice))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_hopper_tiles_shared_by_programs(hopper, dtype) -> None:
    """A wave of whole tiles on 132 SMs, finished by one kernel, and shared ones by the other."""
    from fastmm_op import launch, running

    x, weight, bias, residual = make(2048, 520, 2313, dtype)
    epilogue = Epilogue(True, "gelu", True)
    problem = launch.describe(x[None], weight.mT[None], "tf32", hopper, epilogue)
    shared = {c.tile: c for c in choices(problem) if c.tail_split == 2}
    assert shared
    for choice in shared.values():
        out = torch.full_like(residual, torch.nan)
        plan = write_plan(problem, choice)
        running.run_plan(plan, x[None], weight.mT[None], out, bias, residual)
        assert_linear(out, x, weight, bias, "gelu", residual, what=str(choice))


@pytest.mark.parametrize("store", STORES)
def test_hopper_kernel_sends_inf_and_nan_where_they_belong(hopper, store) -> None:
    from fastmm_op import launch, running

    sizes, _ = STORES[store]
    x, weight, bias, residual = make(*sizes)
    bias[0], bias[-1], bias[5] = torch.inf, torch.nan, -torch.inf
    residual[3, 3], residual[-1, 7], residual[0, -2] = torch.nan, -torch.inf, torch.inf
    # In float64: what gelu makes of -Inf in fp32 depends on the CPU.
    wide = [t.cpu().double() for t in (x, weight, bias)]
    want = eager(*wide, "gelu", residual.cpu().double())
    problem = launch.describe(
        x[None], weight.mT[None], "tf32", hopper, Epilogue(True, "gelu", True)
    )
    for choice in choices(problem):
        if choice.tile.kernel == "gemm_hopper" and choice.split <= 2:
            out = torch.zeros_like(residual)
            plan = write_plan(problem, choice)
            running.run_plan(plan, x[None], weight.mT[None], out, bias, residual)
            assert_same_specials(out, want, what=str(choice))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_first_and_remembered_calls(dtype, sizes) -> None:
    """The second call starts what the first compiled, with new addresses and new values."""
    for _ in range(3):
        x, weight, bias, residual = make(*sizes, dtype)
        for b in (bias, at_offset(bias, 1)):
            how = {"activation": "gelu", "residual": residual}
            got = fastmm_op.linear(x, weight, b, **how)
            assert_linear(got, x, weight, b, "gelu", residual)
            assert torch.equal(torch.ops.fastmm.linear(x, weight, b, **how), got)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_error_beside_torchs(dtype, sizes) -> None:
    """Of the whole layer, against float64: what the separate operations lose."""
    x, weight, bias, residual = make(*sizes, dtype)
    wide = [t.double() for t in (x, weight, bias)]
    want = eager(*wide, "gelu", residual.double())

    def error(got: torch.Tensor) -> float:
        return ((got.double() - want).norm() / want.norm()).item()

    with torch_tf32(False):
        theirs = error(eager(x, weight, bias, "gelu", residual))
    ours = error(fastmm_op.linear(x, weight, bias, activation="gelu", residual=residual))
    assert ours <= 1.1 * theirs, f"ours {ours:.3e}, torch's {theirs:.3e}"


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_neither_waits_nor_repeats_differently(sizes) -> None:
    x, weight, bias, residual = make(*sizes)
    how = {"activation": "silu", "residual": residual}
    first = fastmm_op.linear(x, weight, bias, **how)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [fastmm_op.linear(x, weight, bias, **how) for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first, y) for y in again)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_cuda_graph(sizes) -> None:
    x, weight, bias, residual = make(*sizes)
    how = {"activation": "gelu", "residual": residual}
    fastmm_op.linear(x, weight, bias, **how)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = fastmm_op.linear(x, weight, bias, **how)
    for _ in range(3):
        x.normal_()
        bias.normal_()
        residual.normal_()
        graph.replay()
        assert torch.equal(got, fastmm_op.linear(x, weight, bias, **how))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inductor"])
def test_training_step(compiled) -> None:
    """Forward and backward against float64, beside torch's own loss in TF32."""

    def step(linear, *tensors) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        x, weight, bias, residual = leaves
        linear(x, weight, bias, activation="gelu", residual=residual).square().sum().backward()
        return [t.grad for t in leaves]

    def theirs(x, weight, bias, *, activation, residual):
        return eager(x, weight, bias, activation, residual)

    tensors = make(333, 517, 259)
    ours = torch.compile(fastmm_op.linear, fullgraph=True) if compiled else fastmm_op.linear
    want = step(theirs, *(t.double() for t in tensors))
    with torch_tf32(True):
        torchs = step(theirs, *tensors)
    for got, other, exact in zip(step(ours, *tensors), torchs, want, strict=True):
        error = (got.double() - exact).norm() / exact.norm()
        allowed = (other.double() - exact).norm() / exact.norm()
        assert error <= 1.2 * allowed + 1e-6
