"""Hopper's Gluon kernels against float64 on a machine without a GPU (gluon_on_tensors.py)."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import gluon_on_tensors
from cases import DTYPES, LAYOUTS
from fastmm_op import launch
from fastmm_op.arch import ARCHES, resized
from fastmm_op.choices import choices
from fastmm_op.launches import Plan, Pointer
from fastmm_op.partition import a_classes, row_classes
from fastmm_op.plan import write_plan
from fastmm_op.problem import ITEMSIZE, Epilogue, Problem
from fastmm_op.tiles import HOPPER_KERNELS, Choice
from linear_oracle import assert_linear
from oracle import assert_accurate

pytestmark = pytest.mark.interpreted

# A Hopper card of few SMs: small products have waves of tiles, and programs several.
FEW_SMS = resized(ARCHES["sm_90"], 3)
NONE = Epilogue()
KINDS = [("fp32", "tf32"), ("fp32", "fp32"), ("fp16", "tf32")]


def run(plan: Plan, **buffers: Tensor | None) -> None:
    """A plan's launches: Hopper's on tensors, the others interpreted."""
    from fastmm_op import running

    workspace = torch.full((plan.workspace_bytes,), 0xFF, dtype=torch.uint8)  # NaN

    def memory(pointer: Pointer) -> Tensor:
        dtype = running.TORCH_DTYPES[pointer.dtype]
        if pointer.buffer == "workspace":
            size = pointer.elements * ITEMSIZE[pointer.dtype]
            return workspace[pointer.offset :][:size].view(dtype)
        buffer = buffers[pointer.buffer]
        assert pointer.offset == 0
        whole = torch.empty(0, dtype=dtype).set_(buffer.untyped_storage())
        return whole[buffer.storage_offset() :]

    for step in plan.launches:
        if step.kernel in HOPPER_KERNELS:
            gluon_on_tensors.run(step, running.KERNELS[step.kernel], memory)
        else:
            running.compile_and_launch(step, *running.for_triton(step, buffers, workspace))


def ways(problem: Problem, packed: bool) -> Iterator[Choice]:
    """A choice of each way that Hopper's kernels can go; without packing only if so asked."""
    seen = set()
    for choice in choices(problem):
        tile = choice.tile
        shared = choice.split > 1, choice.tail_split > 1, choice.edge_n > 0
        # Of one width, where interpreted kernels pack before or add after: they take long here.
        width = 0 if any(shared) or choice.pack_a else tile.block_n
        way = (
            tile.kernel,
            tile.block_m,
            width,
            tile.num_stages == 2,
            choice.pack_a,
            choice.pack_b,
            shared,
        )
        if choice.slabs > 1 or (choice.pack_a or choice.pack_b) > packed:
            continue
        if tile.kernel in HOPPER_KERNELS and way not in seen:
            seen.add(way)
            yield choice


def check(
    a: Tensor, b: Tensor, precision: str, arch=FEW_SMS, epilogue=NONE, packed=True
) -> list[Choice]:
    """All ways of a product (batch, M, K) @ (batch, K, N); with an epilogue of one item."""
    problem = launch.describe(a, b, precision, arch, epilogue)
    shape = torch.Size((a.shape[0], a.shape[1], b.shape[2]))
    bias = torch.randn(shape[2]).to(a.dtype) if epilogue.bias else None
    residual = torch.randn(shape).to(a.dtype) if epilogue.residual else None
    found = list(ways(problem, packed))
    assert found
    for choice in found:
        # Between guards, at an address that is as aligned as PyTorch's are.
        memory = torch.full((64 + shape.numel() + 64,), torch.nan, dtype=a.dtype)
        out = memory[64:-64].view(shape)
        run(write_plan(problem, choice), a=a, b=b, c=out, bias=bias, residual=residual)
        assert memory[:64].isnan().all(), choice
        assert memory[-64:].isnan().all(), choice
        if epilogue == NONE:
            assert_accurate(out, a, b, precision, what=str(choice))
            continue
        rest = bias, epilogue.activation, None if residual is None else residual[0]
        assert_linear(out[0], a[0], b[0].mT, *rest, precision, what=str(choice))
    return found


def product(m: int, k: int, n: int, dtype: str, layout: str, batch: int = 1):
    a = LAYOUTS[layout[0]](torch.randn(batch, m, k).to(DTYPES[dtype]))
    return a, LAYOUTS[layout[1]](torch.randn(batch, k, n).to(DTYPES[dtype]))


@pytest.mark.parametrize("layout", ["NN", "NT", "TN", "TT"])
@pytest.mark.parametrize(("dtype", "precision"), KINDS)
def test_aligned(dtype, precision, layout) -> None:
    check(*product(144, 136, 264, dtype, layout), precision, packed=layout == "NN")


@pytest.mark.parametrize(("dtype", "precision"), KINDS)
def test_batch(dtype, precision) -> None:
    found = check(
        *product(40, 264 if dtype == "fp16" else 136, 72, dtype, "NT", batch=2), precision
    )
    assert any(choice.split > 1 for choice in found)


@pytest.mark.parametrize("epilogue", [NONE, Epilogue(residual=True)], ids=str)
def test_rows_of_c_are_misaligned_and_those_of_b_are_not(epilogue) -> None:
    a, b = product(140, 40, 264, "fp32", "NN")
    found = check(a, b[..., :262], "tf32", epilogue=epilogue)
    assert any(choice.tile.kernel == "gemm_tf32_hopper" for choice in found)


@pytest.mark.parametrize("n", [136, 137])
@pytest.mark.parametrize("precision", ["tf32", "fp32"])
def test_last_tiles_are_shared(precision, n) -> None:
    """Whose sums are scaled after they are added."""
    a, b = product(140 if n == 136 else 520, 264, n, "fp32", "NT")
    problem = launch.describe(a, b, precision, FEW_SMS)
    choice = next(c for c in choices(problem) if c.tail_split > 1)
    out = torch.full((1, a.shape[1], n), torch.nan)
    run(write_plan(problem, choice), a=a, b=b, c=out)
    assert_accurate(out, a, b, precision, what=str(choice))


@pytest.mark.parametrize(("dtype", "precision"), KINDS)
def test_row_classes(dtype, precision) -> None:
    """Tiles of every class of C's rows, wrapped columns, and rows that are left."""
    a, b = product(1060 if dtype == "fp16" else 560, 40, 265, dtype, "NN")
    found = check(a, b, precision)
    problem = launch.describe(a, b, precision, FEW_SMS)
    assert any(row_classes(problem, choice) > 1 for choice in found)


def test_a_by_classes() -> None:
    a, b = product(1060, 79, 72, "fp16", "NN")
    found = check(a, b, "tf32")
    problem = launch.describe(a, b, "tf32", FEW_SMS)
    assert any(a_classes(problem, choice) > 1 for choice in found)


@pytest.mark.parametrize("n", [264, 265])
@pytest.mark.parametrize(("dtype", "precision"), KINDS)
@pytest.mark.parametrize("epilogue", [Epilogue(True, "relu"), Epilogue(residual=True)], ids=str)
def test_epilogues(epilogue, dtype, precision, n) -> None:
    check(
        *product(140 if n == 264 else 560, 40, n, dtype, "NN"),
        precision,
        epilogue=epilogue,
        packed=n == 265,
    )


@pytest.mark.parametrize("k", [24, 72])
@pytest.mark.parametrize(("dtype", "precision"), KINDS)
def test_stores_past_l2(dtype, precision, k) -> None:
    small_l2 = replace(FEW_SMS, l2_bytes=1e4)
    a, b = product(140, k, 264, dtype, "NT")
    found = check(a, b, precision, small_l2)
    plans = [write_plan(launch.describe(a, b, precision, small_l2), choice) for choice in found]
    assert any(step.constexprs.get("STREAMS") for plan in plans for step in plan.launches)


@pytest.mark.parametrize("precision", ["tf32", "fp32"])
def test_huge_rows_and_tiny_columns(precision) -> None:
    """Packed, whose exponents are too large to be applied one after the other."""
    a, b = product(140, 72, 264, "fp32", "NN")
    a *= 10.0 ** torch.linspace(35, 37, 140)[:, None]
    b *= 10.0 ** torch.linspace(-34, -32, 264)
    check(a, b, precision)
