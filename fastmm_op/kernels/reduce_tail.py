"""Sums and finishes the tiles of C that several programs of gemm_hopper_kernel share."""

import triton
import triton.language as tl

from fastmm_op.kernels.chain import let_next_start, wait_for_previous
from fastmm_op.kernels.common import scale_by_exponents, tile_coordinates
from fastmm_op.kernels.epilogue import activated, add_bias, add_residual


@triton.jit
def tile_of_c(
    tile_m, tile_n, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    A_CLASSES: tl.constexpr, CLASSES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Where gemm_hopper_kernel's tile lies in C: its first row, distance of rows, and columns.

    Columns from N on are the wrapped first ones, as many as `shift`. VECTOR: elements in 16 bytes.
    """
    first_row = tile_m * BLOCK_M
    row_step = 1
    shift = 0
    if A_CLASSES > 1:
        first_row = tile_m // A_CLASSES * (BLOCK_M * A_CLASSES) + tile_m % A_CLASSES
        row_step = A_CLASSES
    elif CLASSES > 1:
        if tile_m < M // (BLOCK_M * CLASSES) * CLASSES:
            row_class = tile_m % CLASSES
            first_row = tile_m // CLASSES * (BLOCK_M * CLASSES) + row_class
            row_step = CLASSES
            shift = (VECTOR - row_class * (N % VECTOR) % VECTOR) % VECTOR
    return first_row, row_step, tile_n * BLOCK_N + shift, shift


@triton.jit
def reduce_tail_kernel(
    partial_ptr,  # (SPLITS, tail tiles, BLOCK_M, BLOCK_N) fp32
    c_ptr,  # (batch, M, N); the tail's tiles are written
    row_exp_ptr, col_exp_ptr,  # (batch, M) and (batch, N) int32, read if SCALED
    bias_ptr, residual_ptr,  # (N,) and C's shape, or None
    M, N, tiles_n, whole, tail_tiles,
    stride_row_exp, stride_col_exp,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr, A_CLASSES: tl.constexpr, CLASSES: tl.constexpr,
    SCALED: tl.constexpr, ACTIVATION: tl.constexpr, WAITS: tl.constexpr, LETS_NEXT: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows of a tile a program: summed in order, scaled, finished, rounded once.

    whole: tiles before the tail, in the order of gemm_hopper_kernel, in tiles_n columns of them.
    """
    let_next_start(LETS_NEXT)
    VECTOR: tl.constexpr = 128 // c_ptr.dtype.element_ty.primitive_bitwidth
    chunks: tl.constexpr = BLOCK_M // BLOCK_R
    tail_tile = tl.program_id(0) // chunks
    tiles_m = tl.cdiv(M, BLOCK_M * A_CLASSES) * A_CLASSES
    tile = whole + tail_tile
    item = (tile // (tiles_m * tiles_n)).to(tl.int64)
    tile_m, tile_n = tile_coordinates(tile % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    first_row, row_step, first_column, shift = tile_of_c(
        tile_m, tile_n, M, N, BLOCK_M, BLOCK_N, A_CLASSES, CLASSES, VECTOR
    )

    offs_r = tl.program_id(0) % chunks * BLOCK_R + tl.arange(0, BLOCK_R)  # in the tile
    offs_n = tl.arange(0, BLOCK_N)
    partial_ptrs = partial_ptr + tail_tile.to(tl.int64) * (BLOCK_M * BLOCK_N)
    partial_ptrs += offs_r[:, None] * BLOCK_N + offs_n[None, :]
    stride_split = tl.cast(tail_tiles, tl.int64) * (BLOCK_M * BLOCK_N)
    wait_for_previous(WAITS)
    acc = tl.load(partial_ptrs)
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(partial_ptrs + split * stride_split)

    rows = first_row + row_step * offs_r
    columns = first_column + offs_n
    mask_m = rows < M
    mask_n = columns < N + shift
    columns = tl.where(columns < N, columns, columns - N)
    if SCALED:
        row_exp_ptrs = row_exp_ptr + item * stride_row_exp + rows
        col_exp_ptrs = col_exp_ptr + item * stride_col_exp + columns
        row_exp = tl.load(row_exp_ptrs, mask=mask_m, other=0)
        col_exp = tl.load(col_exp_ptrs, mask=mask_n, other=0)
        acc = scale_by_exponents(acc, row_exp, col_exp)
    if bias_ptr is not None:
        acc = add_bias(acc, bias_ptr + columns, mask_n)
    c = activated(acc, ACTIVATION, c_ptr.dtype.element_ty)
    offs = (item * M + rows)[:, None] * N + columns[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if residual_ptr is not None:
        c = add_residual(c, tl.load(residual_ptr + offs, mask=mask, other=0.0))
    tl.store(c_ptr + offs, c, mask=mask)
