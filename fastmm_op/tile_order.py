"""How many rows of C's tiles a GEMM walks together: what L2 holds for its programs meanwhile."""

from fastmm_op.problem import ITEMSIZE, Problem, cdiv
from fastmm_op.tiles import HOPPER_KERNELS, OPERAND_BYTES, Choice, operand_kind

# Where L2 does not hold B: few groups, each of which reads it again.
LARGE_GROUP = 16
# Of Hopper's persistent kernels, where L2 does (benchmarks/results/NVIDIA_H100_80GB_HBM3/
# groups_2026-11-27.txt).
HOPPER_GROUP = 4
# The part of L2 that holds what is used again; the rest is on its way to or from memory.
L2_SHARE = 0.75


def group_m(problem: Problem, choice: Choice) -> int:
    """Rows of tiles that are walked together, column by column.

    B is read once a group. If L2 can hold all of it beside a group's rows of A and C, only the
    first group reads it from memory, so groups are small enough for that; else few and large.
    """
    tile = choice.tile
    size = OPERAND_BYTES[operand_kind(problem, choice.pack_a, choice.pack_b)]
    k_bytes = cdiv(problem.K, choice.split) * size
    room = L2_SHARE * problem.arch.l2_bytes - problem.N * k_bytes
    if room < 0:
        return LARGE_GROUP
    if tile.kernel in HOPPER_KERNELS:
        return HOPPER_GROUP
    rows = tile.block_m * (k_bytes + problem.N * ITEMSIZE[problem.dtype])
    return next((group for group in (8, 4) if group * rows <= room), 2)
