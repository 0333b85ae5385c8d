"""Products of few rows: tiles no taller than need be, as many programs as memory wants, no more."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from cases import DTYPES, interpreted_as
from fastmm_op.arch import ARCHES
from fastmm_op.choices import choices
from fastmm_op.kernels.gemm import readable_rows
from fastmm_op.plan import make_plan, write_plan
from fastmm_op.problem import Problem, problem_of

kernels = pytest.mark.kernels


def problem(m: int, k: int, n: int, dtype: str, layout="NN", arch="sm_90") -> Problem:
    how = {"batch": 1, "dtype": dtype, "layout": layout, "precision": "tf32"}
    return problem_of(m, k, n, **how, arch=ARCHES[arch])


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("m", [2, 16, 17, 33, 100])
def test_half_a_tile_would_not_do(m, dtype, arch) -> None:
    for k in (4096, 4097):
        plain = [c for c in choices(problem(m, k, 1000, dtype, arch=arch)) if c.b_classes == 1]
        heights = {c.tile.block_m for c in plain if c.tile.kernel == "gemm"}
        assert heights
        assert max(heights) < 2 * max(m, 16)


@pytest.mark.parametrize("layout", ["NN", "NT"])
@pytest.mark.parametrize("m", [8, 17, 32])
def test_programs_that_keep_memory_busy_share_no_k(m, layout) -> None:
    """172 tiles of 64 columns with 48 KB in flight each; of 4096 columns 64, so two share each."""
    plan = make_plan(problem(m, 4096, 11008, "bf16", layout))
    assert [step.kernel for step in plan.launches] == ["gemm"]
    shared = make_plan(problem(m, 11008, 4096, "bf16", layout))
    assert [step.kernel for step in shared.launches] == ["gemm", "reduce"]
    assert (shared.launches[0].grid, shared.choice.split) == (128, 2)


@triton.jit
def rows_of_tiles(out_ptr, count, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    rows = readable_rows(offs, offs < count - first, first, count, BLOCK)
    tl.store(out_ptr + first + offs, first + rows)


@kernels
@pytest.mark.parametrize("block", [16, 64])
def test_rows_that_a_tile_reads(block, device) -> None:
    """Its own where there are any, in their order; in place of others, some of the operand's."""
    for count in (1, 3, 8, 15, 16, 17, 40, 63, 64, 65, 127, 150):
        tiles = triton.cdiv(count, block)
        read = torch.full((tiles * block,), -1, device=device)
        rows_of_tiles[(tiles,)](read, count, block)
        assert read[:count].tolist() == list(range(count))
        assert read.min() >= 0
        assert read.max() < count
        if 2 * count >= block:  # no row is read by all of a tile
            assert all(tile.unique().numel() > 1 for tile in read.view(tiles, block) if count > 1)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("m", "dtype", "precision"),
    [
        *((m, *kind) for m in (3, 17, 33) for kind in (("fp32", "tf32"), ("bf16", "tf32"))),
        (33, "fp32", "fp32"),  # of which NaN in a tile's own rows changes how it is computed
    ],
)
def test_neighbours_of_the_last_rows_do_not_show(m, dtype, precision) -> None:
    """Rows that are read in place of others may be anything, by every tile."""
    from fastmm_op import launch, running

    a = torch.randn(1, m, 96).to(DTYPES[dtype])
    b = torch.randn(1, 96, 48).to(DTYPES[dtype])
    spoilt = a.clone()
    spoilt[:, : m - 1] = torch.nan
    plans = {}
    for arch in (replace(ARCHES["sm_90"], tma=False), ARCHES["sm_89"]):
        p = launch.describe(a, b, precision, arch)
        for choice in choices(p):
            if choice.tile.kernel == "gemm" and choice.split == 1 and not choice.pack_a:
                plan = write_plan(p, choice)
                plans.setdefault(interpreted_as(plan), plan)
    assert plans
    for plan in plans.values():
        clean, mixed = torch.empty(1, m, 48, dtype=a.dtype), torch.empty(1, m, 48, dtype=a.dtype)
        running.run_plan(plan, a, b, clean)
        running.run_plan(plan, spoilt, b, mixed)
        assert mixed[0, : m - 1].isnan().all()
        assert torch.equal(mixed[0, m - 1], clean[0, m - 1])
