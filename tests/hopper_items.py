"""What every program of gemm_hopper_kernel does, in Python.

The interpreter cannot run Gluon, but the functions by which the kernel finds its work are plain
arithmetic: here they run as Python.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import FunctionType

import torch

from fastmm_op.launches import Launch
from gluon_on_tensors import Number, Program

BLOCK_K = 64


@cache
def as_python(name: str) -> FunctionType:
    """A scalar function that kernels/gemm_hopper.py uses, for Python to run."""
    from fastmm_op.kernels import gemm_hopper

    return Program(0, 1).port(getattr(gemm_hopper, name))


def arguments(step: Launch) -> dict:
    """All arguments of a launch of gemm_hopper_kernel by name."""
    from fastmm_op.running import KERNELS

    names = KERNELS["gemm_hopper"].arg_names
    return dict(zip(names, step.args, strict=False)) | step.constexprs


@dataclass(frozen=True)
class Item:
    """What a program of gemm_hopper_kernel does at a time.

    Attributes:
        z: batch item (times splits, without a tail).
        row0, col0: of C, where its tile starts.
        rows, columns: of C, (BLOCK_M,) and (BLOCK_N,), or EDGE_N more; -1 for those that C does not
            have.
        first_step, last_step: the range of blocks of K, the first of which starts at -lead.
        first_k, last_k: the range of K.
        slot: which (BLOCK_M, BLOCK_N) matrix of partial sums it writes; None for a tile of C.
    """

    z: int
    row0: int
    col0: int
    rows: torch.Tensor
    columns: torch.Tensor
    first_step: int
    last_step: int
    first_k: int
    last_k: int
    slot: int | None


def work_items(step: Launch) -> Iterator[Item]:
    """Everything that a launch of gemm_hopper_kernel does, program by program."""
    arg = arguments(step)
    m, n, edge_n = arg["M"], arg["N"], arg["EDGE_N"]
    block_m, block_n = arg["BLOCK_M"], arg["BLOCK_N"]
    vector = {"fp32": 4, "fp16": 8, "bf16": 8}[arg["c_ptr"].dtype]
    tiles_m = as_python("count_row_tiles")(m, block_m, arg["A_CLASSES"])
    tiles_n = as_python("count_column_tiles")(n, block_n, edge_n)
    whole, split_k, tail = arg["whole"], arg["split_k"], arg["partial_ptr"] is not None
    batch = arg["batch"]
    edge_items = tiles_m * batch if edge_n else 0
    items = as_python("count_work")(tiles_m * tiles_n * batch, whole, split_k, tail)
    item_of_width, next_program = as_python("item_of_width"), as_python("next_program")

    def item(work: int, edge_n: int, tail: bool) -> Item:
        pid_m, pid_n, z, part, parts = item_of_width(
            work, tiles_m, tiles_n, batch, whole, split_k, edge_n, arg["GROUP_M"], tail
        )
        row0, row_step, _, shift = as_python("tile_rows")(
            pid_m, m, Number(arg["stride_cm"]), block_m, arg["A_CLASSES"], arg["CLASSES"], vector
        )
        lead = as_python("lead_of")(row0, arg["stride_am"], arg["A_CLASSES"])
        first, last = as_python("k_range")(part, arg["K"] + lead, parts)
        rows = row0 + row_step * torch.arange(block_m)
        col0 = pid_n * block_n + shift
        columns = col0 + torch.arange(block_n + edge_n)
        outside = columns >= n + shift
        columns = columns.where(columns < n, columns - n)
        return Item(
            z,
            row0,
            col0,
            rows.where(rows < m, -1),
            columns.where(~outside, -1),
            first,
            last,
            max(first * BLOCK_K - lead, 0),
            min(last * BLOCK_K - lead, arg["K"]),
            work - whole if tail and work >= whole else None,
        )

    for program in range(step.grid):
        for work in range(program, edge_items, step.grid):
            yield item(work, edge_n, False)
        for work in range(next_program(program, step.grid, edge_items), items, step.grid):
            yield item(work, 0, tail)
