"""The launches of plain kernels that multiply operands, and of those that sum all kernels' parts.

A function a kernel; plan.py says which of them a choice takes.
"""

from fastmm_op.epilogue import epilogue_pointers, product_epilogue, slice_columns
from fastmm_op.launches import Launch, Pointer
from fastmm_op.packing import GemmOperand
from fastmm_op.partition import (
    a_classes,
    count_tiles,
    edge_columns,
    row_classes,
    tail_tiles,
    whole_tiles,
    wider_tiles,
)
from fastmm_op.problem import (
    COPY_BYTES,
    ITEMSIZE,
    Problem,
    cdiv,
    is_aligned,
    next_power_of_two,
    round_up,
    spare_elements,
)
from fastmm_op.shared_memory import shared_memory
from fastmm_op.tile_order import group_m
from fastmm_op.tiles import Choice, Tile, gemv_matrix, operand_kind

# The sum over splits: partial sums of one element that a program reads at once, and all it reads.
REDUCE_DEPTH = 256
REDUCE_ELEMENTS = 4096
# Elements of C that a program sums of the tail: 4 to 16 rows, so that a few tiles occupy all SMs.
TAIL_ELEMENTS = 1024


def gemm_launch(
    problem: Problem,
    choice: Choice,
    a: GemmOperand,
    b: GemmOperand,
    target: Pointer,
    rows_total: int | None,
) -> Launch:
    """kernels/gemm.py: cp.async and mma.sync, any strides.

    rows_total: of all classes of rows of B, if the batch items are such.
    """
    tile = choice.tile
    both_packed = choice.pack_a and choice.pack_b
    k = round_up(problem.K, tile.block_k) if both_packed else problem.K
    scaled = a.row_exp is not None
    kind = operand_kind(problem, choice.pack_a, choice.pack_b)
    a_align = copy_elements(a, problem.M, choice.pack_a or is_aligned_in(problem, "a"))
    b_align = copy_elements(b, problem.N, choice.pack_b or is_aligned_in(problem, "b"))
    if problem.b.shifted:  # its runs may reach over C's columns on both sides
        b_align = COPY_BYTES // ITEMSIZE[problem.dtype]
    epilogue = product_epilogue(problem, choice)
    return Launch(
        "gemm",
        count_tiles(problem, choice) * choice.split,
        (a.pointer, b.pointer, target, a.row_exp, b.row_exp)
        + epilogue_pointers(problem, epilogue)
        + (problem.M, problem.N, k, problem.batch, choice.split, rows_total)
        + (a.batch_stride, a.row_stride, a.k_stride)
        + (b.batch_stride, b.row_stride, b.k_stride)
        + (a.row_exp_stride, b.row_exp_stride, a.lo_offset),
        {
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "GROUP_M": group_m(problem, choice),
            "EVEN_K": k % tile.block_k == 0 and not problem.b.shifted,
            "CLAMP": not both_packed,
            "SCALED": scaled,
            "PARTS": 2 if a.lo_offset else 1,
            "PARTIAL": choice.split > 1,
            "A_K_MAJOR": a.k_major,
            "B_K_MAJOR": b.k_major,
            "A_ALIGN": a_align,
            "B_ALIGN": b_align,
            "TAIL_RUN": tail_run(problem, k, (a, a_align), (b, b_align)),
            "B_SHIFTED": problem.b.shifted,
            "ROUND": problem.tf32 and not scaled,
            "DOT": kind if kind in ("tf32x3", "ieee") else "tf32",
            "WIDE": is_wide(problem, tile, a, b),
            "ACTIVATION": epilogue.activation,
            "SLICE_N": slice_columns(problem, epilogue, tile),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        shared_memory=shared_memory(problem, choice),
    )


def gemv_launch(
    problem: Problem,
    choice: Choice,
    a: GemmOperand,
    b: GemmOperand,
    target: Pointer,
    rows_total: int | None,
) -> Launch:
    """kernels/gemv.py: a product one row or one column wide. rows_total: as gemm_launch."""
    tile, batch, split = choice.tile, problem.batch, choice.split
    matrix, vector, rows = (b, a, problem.N) if problem.M == 1 else (a, b, problem.M)
    stride_bias = 1 if problem.M == 1 else 0
    read_as = gemv_matrix(problem)
    epilogue = product_epilogue(problem, choice)
    return Launch(
        "gemv",
        batch * split * cdiv(rows + spare_elements(read_as, problem.dtype), tile.block_n),
        (matrix.pointer, vector.pointer, target)
        + epilogue_pointers(problem, epilogue)
        + (rows, problem.K, batch, split, rows_total)
        + (matrix.batch_stride, matrix.row_stride, matrix.k_stride)
        + (vector.batch_stride, vector.k_stride)
        + (stride_bias,),
        {
            "BLOCK_R": tile.block_n,
            "BLOCK_K": tile.block_k,
            "K_MAJOR": matrix.k_major,
            "SHIFTED": read_as.shifted,
            "ACTIVATION": epilogue.activation,
        },
        num_warps=tile.num_warps,
        shared_memory=shared_memory(problem, choice),
    )


def reduce_launch(
    problem: Problem,
    splits: int,
    a: GemmOperand | None,
    b: GemmOperand | None,
    partial: Pointer,
    c: Pointer,
) -> Launch:
    """The sum of split-K's partial products, in a fixed order.

    a, b: the operands whose exponents the sum applies; None if they have been applied.
    """
    scaled = a is not None and a.row_exp is not None
    exponents = (a.row_exp, b.row_exp) if scaled else (None, None)
    exponent_strides = (a.row_exp_stride, b.row_exp_stride) if scaled else (0, 0)
    epilogue = problem.epilogue
    # Without exponents or bias a row is nothing special: all of C is one long row.
    by_rows = scaled or epilogue.bias
    rows, columns = (problem.batch * problem.M, problem.N)
    if not by_rows:
        rows, columns = 1, rows * columns
    block_s = min(REDUCE_DEPTH, next_power_of_two(splits))
    block_n = max(32, min(256, REDUCE_ELEMENTS // block_s, next_power_of_two(columns)))
    return Launch(
        "reduce",
        rows * cdiv(columns, block_n),
        (partial, c, *exponents)
        + epilogue_pointers(problem, epilogue)
        + ((problem.M, problem.N, problem.batch) if by_rows else (1, columns, 1))
        + (splits,)
        + exponent_strides,
        {
            "SCALED": scaled,
            "BLOCK_S": block_s,
            "BLOCK_N": block_n,
            "ACTIVATION": epilogue.activation,
        },
        num_warps=8 if block_s * block_n > REDUCE_ELEMENTS else 4,
    )


def reduce_tail_launch(
    problem: Problem, choice: Choice, a: GemmOperand, b: GemmOperand, tail: Pointer, c: Pointer
) -> Launch:
    """The sum of the partial products of the last tiles, in a fixed order."""
    tile = choice.tile
    columns = problem.N - edge_columns(problem, choice)
    tiles_n = cdiv(columns, tile.block_n) - (1 if choice.edge_n else 0)
    whole = whole_tiles(problem, choice) - wider_tiles(problem, choice)
    shared_tiles = tail_tiles(problem, choice)
    epilogue = problem.epilogue
    block_r = TAIL_ELEMENTS // tile.block_n
    return Launch(
        "reduce_tail",
        shared_tiles * (tile.block_m // block_r),
        (tail, c, a.row_exp, b.row_exp)
        + epilogue_pointers(problem, epilogue)
        + (problem.M, problem.N, tiles_n, whole, shared_tiles)
        + (a.row_exp_stride, b.row_exp_stride),
        {
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_R": block_r,
            "GROUP_M": group_m(problem, choice),
            "SPLITS": choice.tail_split,
            "A_CLASSES": a_classes(problem, choice),
            "CLASSES": row_classes(problem, choice),
            "SCALED": a.row_exp is not None,
            "ACTIVATION": epilogue.activation,
        },
    )


def is_aligned_in(problem: Problem, buffer: str) -> bool:
    return is_aligned(problem.a if buffer == "a" else problem.b, problem.dtype)


def copy_elements(operand: GemmOperand, rows: int, aligned: bool) -> int:
    """Elements that one 16-byte copy may take, inside the operand's bounds; 1 if misaligned."""
    elements = COPY_BYTES // ITEMSIZE[operand.pointer.dtype]
    whole_runs = operand.k_stride == 1 or (operand.row_stride == 1 and rows % elements == 0)
    return elements if aligned and whole_runs else 1


def tail_run(problem: Problem, k: int, *copied: tuple[GemmOperand, int]) -> int:
    """Elements of K that are inside of an operand, or outside, together: one copy's, or 1.

    copied: the operands, and how many elements one copy of each takes.
    """
    runs = [elements for operand, elements in copied if operand.k_major]
    run = max(runs, default=1)
    return run if k % run == 0 and not problem.b.shifted else 1


def is_wide(problem: Problem, tile: Tile, a: GemmOperand, b: GemmOperand) -> bool:
    """Whether an offset between two elements of one tile of A, B or C exceeds 32 bits."""
    largest = max(
        tile.block_m * a.row_stride + tile.block_k * a.k_stride,
        tile.block_n * b.row_stride + tile.block_k * b.k_stride,
        tile.block_m * problem.N,
    )
    return largest >= 2**31
