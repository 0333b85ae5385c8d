"""How many rows of tiles are walked together, held against what L2 holds."""

import pytest

from fastmm_op.arch import ARCHES
from fastmm_op.bench.cases import Case
from fastmm_op.plan import make_plan
from fastmm_op.tile_order import group_m
from fastmm_op.tiles import Choice, Tile


def launched(arch: str, *sizes: int, dtype: str = "fp32", batch: int = 1) -> list:
    case = Case("t", *sizes, dtype, "tf32" if dtype == "fp32" else dtype, batch=batch)
    return list(make_plan(case.problem(ARCHES[arch])).launches)


@pytest.mark.parametrize(
    ("sizes", "group"),
    [
        ((8205, 2949, 5921), 4),  # 35 MB of B, 4 MB a row of tiles
        ((4096, 4096, 2048), 8),  # 17 MB, 2 MB
        ((8192, 8192, 8192), 16),  # B alone is more than L2
        ((4096, 768, 50257), 16),
        ((16384, 64, 65536), 2),  # 8 MB of B, 34 MB of C a row of tiles
    ],
    ids=str,
)
def test_as_many_rows_as_leave_b_in_l2(sizes, group) -> None:
    assert launched("sm_89", *sizes)[-1].constexprs["GROUP_M"] == group


def test_a_split_needs_its_part_of_b_only() -> None:
    p = Case("t", 4096, 65536, 512, "fp16", "fp16").problem(ARCHES["sm_89"])
    tile = Tile("gemm", 128, 128, 32, 4, 4, 1.0)
    assert group_m(p, Choice(False, False, tile, 1)) == 16
    assert group_m(p, Choice(False, False, tile, 8)) == 8


@pytest.mark.parametrize(
    ("sizes", "group"),
    [
        ((4096, 4096, 2113), 4),  # 18 MB of B
        ((8192, 8192, 8192), 16),  # 134 MB
    ],
    ids=str,
)
def test_hoppers_kernel_and_its_sum_agree(sizes, group) -> None:
    launches = launched("sm_90", *sizes)
    assert [step.kernel for step in launches[-2:]] == ["gemm_hopper", "reduce_tail"]
    assert {step.constexprs["GROUP_M"] for step in launches[-2:]} == {group}
