"""TMA stores of a C whose rows are misaligned: tiles of rows that are misaligned alike.

A model of TMA's copies shows that they write what the kernel computed to where it belongs.
"""

import pytest
import torch

from fastmm_op.arch import ARCHES
from fastmm_op.choices import choices
from fastmm_op.launches import Launch
from fastmm_op.partition import row_classes
from fastmm_op.plan import write_plan
from fastmm_op.problem import problem_of
from gluon_on_tensors import Number, box_places
from hopper_items import arguments, as_python, work_items

# Whole tiles of each class, and rows that are left.
SIZES = [(1030, 70, 515), (1024, 64, 257), (2100, 130, 1030)]


def class_steps(m: int, k: int, n: int, dtype: str = "fp32") -> list[Launch]:
    """GEMMs of C's row classes, one a tile and a way to share the last ones."""
    how = {"batch": 1, "dtype": dtype, "layout": "NN", "precision": "tf32"}
    p = problem_of(m, k, n, **how, arch=ARCHES["sm_90"])
    plans = (write_plan(p, c) for c in choices(p) if row_classes(p, c) > 1)
    return [s for plan in plans for s in plan.launches if s.kernel == "gemm_hopper"]


def test_consumers_store_16_bit_rows_of_a_class() -> None:
    steps = class_steps(1030, 70, 515, "bf16")
    assert steps
    assert all(arguments(step)["c_desc"] is None for step in steps)


@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_tma_writes_where_rows_and_columns_say(m, k, n) -> None:
    by_tma = 0
    for step in class_steps(m, k, n):
        arg = arguments(step)
        assert arg["c_desc"] is not None
        classes, block_n, slice_n = arg["CLASSES"], arg["BLOCK_N"], arg["SLICE_N"]
        half = arg["BLOCK_M"] // 2
        for item in work_items(step):
            row_step = int(item.rows[1] - item.rows[0])
            in_class = row_step == classes
            if item.slot is not None or not as_python("is_whole")(in_class, item.col0, n, block_n):
                continue
            by_tma += 1
            for index in range(2):
                row0 = item.row0 + row_step * (index * half)
                for col in range(item.col0, item.col0 + block_n, slice_n):
                    place = as_python("in_long_rows")(Number(row0), col, n, classes)
                    rows = item.rows[index * half :][:half]
                    columns = item.columns[col - item.col0 :][:slice_n]
                    want = rows[:, None] * n + columns
                    places, there = box_places(arg["c_desc"], (item.z, *place))
                    assert there.all(), "nothing is left out"
                    assert torch.equal(places[0], want)
    assert by_tma
