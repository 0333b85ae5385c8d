"""A weight packed once and kept: how the copy lies in memory, the launches that make and use it.

One copy serves every plan for the weight, whatever the other operand's rows, so it has what any of
them needs: a pitch that every tile's K blocks divide, the first rows once more after the last for
Hopper's row classes, and slack to the end of the widest tile. In the buffer ``"packed_b"`` follow
each other: the packed rows and, of float32, their exponents, before these what balances K.

K is balanced by the weight alone, once (kept_weight.py), where kernels/balance.py asks both
operands at each call. A is packed by the same exponents.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from fastmm_op.launches import Launch, Workspace, chained
from fastmm_op.packing import (
    BALANCE_BLOCK,
    Balance,
    GemmOperand,
    count_maxima,
    forget_launch,
    pack_operand,
)
from fastmm_op.problem import COPY_BYTES, ITEMSIZE, Problem, cdiv, round_up
from fastmm_op.tiles import TILES, operand_kind

# The widest K block of any tile.
KEPT_ALIGNMENT = 128


@dataclass(frozen=True)
class Keeping:
    """A packed weight, and how it is made.

    Attributes:
        operand: what a GEMM reads, in the buffer ``"packed_b"``.
        balance: of float32: the exponents to be there before the launches run; None for 16 bits.
        launches: pack ``"b"``.
        kept_bytes: of the buffer ``"packed_b"``.
        workspace_bytes: scratch memory that the launches take.
    """

    operand: GemmOperand
    balance: Balance | None
    launches: tuple[Launch, ...]
    kept_bytes: int
    workspace_bytes: int


@lru_cache(maxsize=4096)
def keep(problem: Problem) -> Keeping:
    """The copy of a problem's B. The same for all M but 1, A and epilogues.

    Args:
        problem: of one batch item and more than one row and column; ``parts`` is not 0.
    """
    kept, workspace = Workspace("packed_b"), Workspace()
    balance, launches = None, []
    if problem.dtype == "fp32":
        k_exp = {buffer: kept.take(problem.K, "int32") for buffer in ("a", "b")}
        moved = kept.take(cdiv(problem.K, BALANCE_BLOCK), "int32")
        maxima = {"a": None, "b": None}
        if counts := count_maxima(problem, "b"):
            maxima["b"] = workspace.take(sum(counts), "int32")
            launches.append(forget_launch(maxima["b"], *counts))
        balance = Balance(k_exp, moved, 0, 0, maxima)
    elements = COPY_BYTES // ITEMSIZE[problem.dtype]
    wrap = elements - 1 if elements <= problem.N else 0  # as partition.row_classes wants it
    tiles = TILES[problem.arch.name, operand_kind(problem, True, True)]
    widest = max(round_up(problem.N, tile.block_n) for tile in tiles) - problem.N
    slack = max(0, widest - wrap)
    operand, launch = pack_operand(
        problem, "b", balance, slack, wrap, KEPT_ALIGNMENT, problem.K, kept
    )
    launches = chained([*launches, launch], problem.arch.overlaps)
    return Keeping(operand, balance, launches, kept.size, workspace.size)


def kept_balance(
    problem: Problem, k_total: int, workspace: Workspace
) -> tuple[Balance, Launch | None]:
    """By what A is packed beside a kept B, and the launch that prepares its maxima, if it has any.

    As ``packing.balance_operands``, whose exponents are made at each call. k_total is K: a kept B
    is of one batch item.
    """
    balance = keep(problem).balance
    counts = count_maxima(problem, "a")
    if counts is None:
        return balance, None
    maxima = workspace.take(sum(counts), "int32")
    return replace(balance, maxima={"a": maxima, "b": None}), forget_launch(maxima, *counts)
