"""GEMM for every card from sm_80 up: cp.async and mma.sync (wgmma on Hopper) through plain Triton.

One kernel serves both roads to the tensor cores:

- *packed* operands (kernels/pack.py): K-major, aligned, padded. EVEN_K and SCALED; no mask in the
  main loop, 16-byte copies only.
- *direct* operands: the caller's own tensors with any strides. fp32 is rounded to TF32 in registers
  (the tensor core itself would truncate), the K tail is masked in a step of its own, because a mask
  in the main loop would turn 16-byte copies into 4-byte ones.

Both operands are seen as (rows, K); B's rows are the columns of the product.
"""

import triton
import triton.language as tl

from fastmm_op.kernels.common import INTERPRETED, scale_by_exponents, tile_coordinates

INF = tl.constexpr(float("inf"))


@triton.jit
def round_to_tf32(x):
    """fp32 rounded to a 10-bit significand, ties away from zero; finite values stay finite."""
    if INTERPRETED:
        # The interpreter has no inline assembly: integers do what the instruction does.
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x1000) & ~0x1FFF).to(tl.float32, bitcast=True)
        rounded = tl.where(tl.abs(x) < INF, rounded, x)
    else:
        rounded = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    # The topmost finite values would round up to Inf; the tensor core truncates them instead.
    return tl.where(tl.abs(rounded) == INF, x, rounded)


@triton.jit
def multiply(a, b, acc, ROUND: tl.constexpr, DOT: tl.constexpr):
    """acc + a @ b.T for a (BLOCK_M, BLOCK_K) and b (BLOCK_N, BLOCK_K)."""
    if ROUND:
        a = round_to_tf32(a)
        b = round_to_tf32(b)
    if INTERPRETED:
        # The interpreter multiplies the bit patterns of bf16; fp32 holds every 16-bit value.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, tl.trans(b), acc, input_precision=DOT)


@triton.jit
def gemm_kernel(
    a_ptr,  # (batch, M, K)
    b_ptr,  # (batch, N, K)
    c_ptr,  # (batch, M, N), or (SPLIT_K, batch, M, N) fp32 partial sums
    row_exp_ptr, col_exp_ptr,  # (batch, M) and (batch, N) int32, read if SCALED
    M, N, K, batch,
    stride_ab, stride_am, stride_ak,
    stride_bb, stride_bn, stride_bk,
    stride_row_exp, stride_col_exp,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr, EVEN_K: tl.constexpr, CLAMP: tl.constexpr, SCALED: tl.constexpr,
    ROUND: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """c = a @ b.T, one (BLOCK_M, BLOCK_N) tile of one batch item and one K range a program.

    EVEN_K: K is a multiple of BLOCK_K. CLAMP: rows past the end may not be read; without it, the
    operands' buffers reach that far.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    split = tl.program_id(0) // tiles % SPLIT_K
    item = (tl.program_id(0) // tiles // SPLIT_K).to(tl.int64)
    tile_m, tile_n = tile_coordinates(tl.program_id(0) % tiles, tiles_m, tiles_n, GROUP_M)

    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    rows_m, rows_n = offs_m, offs_n
    if CLAMP:
        rows_m = tl.where(offs_m < M, offs_m, 0)
        rows_n = tl.where(offs_n < N, offs_n, 0)

    blocks_k = K // BLOCK_K
    steps = tl.cdiv(blocks_k, SPLIT_K)
    first = tl.minimum(split * steps, blocks_k)
    last = tl.minimum(first + steps, blocks_k)
    offs_k += first.to(tl.int64) * BLOCK_K
    a_ptrs = a_ptr + item * stride_ab + rows_m[:, None] * stride_am + offs_k[None, :] * stride_ak
    b_ptrs = b_ptr + item * stride_bb + rows_n[:, None] * stride_bn + offs_k[None, :] * stride_bk
    step_a = tl.cast(stride_ak, tl.int64) * BLOCK_K
    step_b = tl.cast(stride_bk, tl.int64) * BLOCK_K

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(first, last):
        a = tl.load(a_ptrs)
        b = tl.load(b_ptrs)
        acc = multiply(a, b, acc, ROUND, DOT)
        a_ptrs += step_a
        b_ptrs += step_b
    if not EVEN_K:
        if split == SPLIT_K - 1:
            mask_k = tl.cast(blocks_k, tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K) < K
            a = tl.load(a_ptrs, mask=mask_k[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_k[None, :], other=0.0)
            acc = multiply(a, b, acc, ROUND, DOT)

    mask_m = offs_m < M
    mask_n = offs_n < N
    if SCALED and SPLIT_K == 1:
        row_exp = tl.load(row_exp_ptr + item * stride_row_exp + offs_m, mask=mask_m, other=0)
        col_exp = tl.load(col_exp_ptr + item * stride_col_exp + offs_n, mask=mask_n, other=0)
        acc = scale_by_exponents(acc, row_exp, col_exp)
    c_row = (split.to(tl.int64) * batch + item) * M + offs_m
    c_ptrs = c_ptr + c_row[:, None] * N + offs_n[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def reduce_kernel(
    partial_ptr,  # (SPLIT_K, batch, M, N) fp32
    c_ptr,  # (batch, M, N)
    row_exp_ptr, col_exp_ptr,  # as in gemm_kernel
    M, N, batch,
    stride_row_exp, stride_col_exp,
    SPLIT_K: tl.constexpr, SCALED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum the partial products of split-K in a fixed order, scale, and round once."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    item = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    offs_m = (tile // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tile % tiles_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    offsets = (item * M + offs_m)[:, None] * N + offs_n[None, :]
    stride_split = tl.cast(batch, tl.int64) * M * N

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    partial_ptrs = partial_ptr + offsets
    for _ in range(SPLIT_K):
        acc += tl.load(partial_ptrs, mask=mask, other=0.0)
        partial_ptrs += stride_split
    if SCALED:
        row_exp = tl.load(row_exp_ptr + item * stride_row_exp + offs_m, mask=mask_m, other=0)
        col_exp = tl.load(col_exp_ptr + item * stride_col_exp + offs_n, mask=mask_n, other=0)
        acc = scale_by_exponents(acc, row_exp, col_exp)
    tl.store(c_ptr + offsets, acc.to(c_ptr.dtype.element_ty), mask=mask)
