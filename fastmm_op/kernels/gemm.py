"""GEMM for every card from sm_80 up: cp.async and mma.sync (wgmma on Hopper) through plain Triton.

One kernel serves both roads to the tensor cores:

- *packed* operands (kernels/pack.py), both of them: K-major, aligned, padded. EVEN_K and SCALED; no
  mask in the main loop, 16-byte copies only. Of two PARTS, three products are summed.
- *direct* operands: the caller's own tensors with any strides. fp32 is rounded to TF32 in registers
  (the tensor core itself would truncate), or split there into two numbers of TF32, of whose
  products three are summed (DOT "tf32x3"). The K tail is masked in a step of its own, because a
  mask in the main loop would turn 16-byte copies into 4-byte ones.

A misaligned B can be read 16 bytes at a time too: rows that start equally far behind 16-byte
addresses are a batch item of their own (B_SHIFTED), which is read from there. If B's rows lie along
K, tiles of C are shifted by that distance, and the sum over the items is the product. If B is
K-major, K is shifted, A's too, and each item is some columns of the product.

Both operands are seen as (rows, K); B's rows are the columns of the product.
"""

import triton
import triton.language as tl

from fastmm_op.kernels.chain import let_next_start, wait_for_previous
from fastmm_op.kernels.common import (
    INF,
    INTERPRETED,
    class_size,
    count_blocks,
    scale_by_exponents,
    tile_coordinates,
)
from fastmm_op.kernels.epilogue import activated, add_bias, add_residual, store_finished
from fastmm_op.kernels.tf32 import SPLIT_SCALE, add_half_of_tf32, round_to_tf32, split_in_tf32


@triton.jit
def tile_offsets(rows, offs_k, stride_row, stride_k, K_MAJOR: tl.constexpr):
    """Offsets of an operand's tile in the order of its memory: (rows, K), or (K, rows)."""
    if K_MAJOR:
        offsets = rows[:, None] * stride_row + offs_k[None, :] * stride_k
    else:
        offsets = offs_k[:, None] * stride_k + rows[None, :] * stride_row
    return offsets


@triton.jit
def readable_rows(offs, inside, first, count, BLOCK: tl.constexpr):
    """A tile's rows along K; for those outside of the operand, others that are inside.

    Their products are not stored. They are the tile's before, or the first ones again: where all
    tiles read one and the same row, they wait for each other (benchmarks/results/
    NVIDIA_H100_80GB_HBM3/skinny_2026-11-28.txt).
    """
    rows = tl.minimum(count, BLOCK).to(tl.int32)
    back = tl.where(first > 0, BLOCK, rows)
    return tl.where(inside, offs, tl.minimum(offs - back, rows - 1))


@triton.jit
def load_tail(ptrs, mask_k, K_MAJOR: tl.constexpr):
    """The last tile of K, with zeros past the end."""
    mask = mask_k[None, :] if K_MAJOR else mask_k[:, None]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def multiply_split(a, b, acc, A_K_MAJOR: tl.constexpr, B_K_MAJOR: tl.constexpr):
    """acc + A @ B^T * SPLIT_SCALE**2 of fp32 tiles, as multiply_parts has it of packed ones."""
    if not A_K_MAJOR:
        a = tl.trans(a)
    if B_K_MAJOR:
        b = tl.trans(b)
    a_hi, a_lo = split_in_tf32(a)
    b_hi, b_lo = split_in_tf32(b)
    products = tl.dot(a_lo, b_hi, input_precision="tf32")
    products = tl.dot(a_hi, b_lo, products, input_precision="tf32")
    products = tl.dot(a_hi, b_hi, products, input_precision="tf32")
    return acc + products


@triton.jit
def multiply(
    a, b, acc,
    A_K_MAJOR: tl.constexpr, B_K_MAJOR: tl.constexpr, ROUND: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """acc + A @ B^T for tiles of A and B as tile_offsets lays them out.

    DOT "tf32x3": acc is the sum times SPLIT_SCALE**2.
    """
    if DOT == "tf32x3":
        return multiply_split(a, b, acc, A_K_MAJOR, B_K_MAJOR)
    if ROUND and INTERPRETED:
        a = round_to_tf32(a)
        b = round_to_tf32(b)
    elif ROUND:
        a = add_half_of_tf32(a)
        b = add_half_of_tf32(b)
    if INTERPRETED:
        # The interpreter multiplies the bit patterns of bf16; fp32 holds every 16-bit value.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if not A_K_MAJOR:
        a = tl.trans(a)
    if B_K_MAJOR:
        b = tl.trans(b)
    return tl.dot(a, b, acc, input_precision=DOT)


@triton.jit
def multiply_parts(a_ptrs, b_ptrs, lo_offset, acc):
    """acc + A @ B^T for tiles of packed hi and lo, without the product of the two lo.

    The tensor core truncates its sums. The chain of three products ends here, small terms first,
    and is added to acc by an ordinary fp32 addition, which rounds.
    """
    a_hi = tl.load(a_ptrs)
    b_hi = tl.trans(tl.load(b_ptrs))
    a_lo = tl.load(a_ptrs + lo_offset)
    b_lo = tl.trans(tl.load(b_ptrs + lo_offset))
    products = tl.dot(a_lo, b_hi)
    products = tl.dot(a_hi, b_lo, products)
    products = tl.dot(a_hi, b_hi, products)
    return acc + products


@triton.jit
def add_row(a_ptrs, b_ptrs, mask_n, acc, ROUND: tl.constexpr):
    """acc + a * b^T for a column of A and a row of B, element by element."""
    a = tl.load(a_ptrs).to(tl.float32)
    b = tl.load(b_ptrs, mask=mask_n, other=0.0).to(tl.float32)
    if ROUND:
        a = round_to_tf32(a)
        b = round_to_tf32(b)
    return acc + a[:, None] * b[None, :]


@triton.jit
def sum_products(
    a_ptr, b_ptr,  # where the tile's first rows begin
    rows_m, rows_n, offs_k, K, split, split_k, distance, lo_offset,
    stride_am, stride_ak, stride_bn, stride_bk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PARTS: tl.constexpr, A_K_MAJOR: tl.constexpr, B_K_MAJOR: tl.constexpr,
    A_ALIGN: tl.constexpr, B_ALIGN: tl.constexpr, TAIL_RUN: tl.constexpr,
    SHIFTED_K: tl.constexpr, ROUND: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A @ B^T of one tile over one of split_k ranges of K; as gemm_kernel has its arguments.

    SHIFTED_K: the first ``distance`` of K lie before B's rows and count as zero.
    """
    blocks_k = K // BLOCK_K
    steps = tl.cdiv(blocks_k, split_k)
    first = tl.minimum(split * steps, blocks_k)
    last = tl.minimum(first + steps, blocks_k)
    first_k = first.to(tl.int64) * BLOCK_K
    a_ptrs = a_ptr + tl.multiple_of(first_k * stride_ak, A_ALIGN)
    b_ptrs = b_ptr + tl.multiple_of(first_k * stride_bk, B_ALIGN)
    a_ptrs += tile_offsets(rows_m, offs_k, stride_am, stride_ak, A_K_MAJOR)
    b_ptrs += tile_offsets(rows_n, offs_k, stride_bn, stride_bk, B_K_MAJOR)
    step_a = tl.multiple_of(tl.cast(stride_ak, tl.int64) * BLOCK_K, A_ALIGN)
    step_b = tl.multiple_of(tl.cast(stride_bk, tl.int64) * BLOCK_K, B_ALIGN)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SHIFTED_K:
        if split == 0:  # what was read before B's rows may be NaN
            mask_k = offs_k >= distance
            a = load_tail(a_ptrs, mask_k, A_K_MAJOR)
            b = tl.load(b_ptrs)
            b = tl.where(mask_k[None, :], b, tl.zeros_like(b))
            acc = multiply(a, b, acc, A_K_MAJOR, B_K_MAJOR, ROUND, DOT)
            a_ptrs += step_a
            b_ptrs += step_b
            first += 1
    for _ in range(first, last):
        if PARTS == 2:
            acc = multiply_parts(a_ptrs, b_ptrs, lo_offset, acc)
        else:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
            acc = multiply(a, b, acc, A_K_MAJOR, B_K_MAJOR, ROUND, DOT)
        a_ptrs += step_a
        b_ptrs += step_b
    if not EVEN_K:
        if split == split_k - 1:
            mask_k = offs_k // TAIL_RUN * TAIL_RUN < K - blocks_k * BLOCK_K
            a = load_tail(a_ptrs, mask_k, A_K_MAJOR)
            b = load_tail(b_ptrs, mask_k, B_K_MAJOR)
            acc = multiply(a, b, acc, A_K_MAJOR, B_K_MAJOR, ROUND, DOT)
    return acc


@triton.jit
def gemm_kernel(
    a_ptr,  # (batch, M, K)
    b_ptr,  # (batch, N, K)
    # (batch, M, N); if PARTIAL, (split_k, batch, M, N) fp32 sums, unscaled; of a B that is shifted
    # along K, (split_k, M, rows_total)
    c_ptr,
    row_exp_ptr, col_exp_ptr,  # (batch, M) and (batch, N) int32, read if SCALED
    bias_ptr, residual_ptr,  # (N,) and (batch, M, N), or None
    M, N, K, batch, split_k, rows_total,
    stride_ab, stride_am, stride_ak,
    stride_bb, stride_bn, stride_bk,
    stride_row_exp, stride_col_exp, lo_offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, CLAMP: tl.constexpr, SCALED: tl.constexpr, PARTS: tl.constexpr,
    PARTIAL: tl.constexpr,
    A_K_MAJOR: tl.constexpr, B_K_MAJOR: tl.constexpr, A_ALIGN: tl.constexpr, B_ALIGN: tl.constexpr,
    TAIL_RUN: tl.constexpr, B_SHIFTED: tl.constexpr, ROUND: tl.constexpr, DOT: tl.constexpr,
    WIDE: tl.constexpr, ACTIVATION: tl.constexpr, SLICE_N: tl.constexpr,
    WAITS: tl.constexpr, LETS_NEXT: tl.constexpr,
):  # fmt: skip
    """c = a @ b.T, one (BLOCK_M, BLOCK_N) tile of one batch item and one K range a program.

    EVEN_K: K is a multiple of BLOCK_K. TAIL_RUN: it is one of so many elements. CLAMP: rows past
    the end may not be read; without it, the operands' buffers reach that far.
    PARTS: 2 if packed rows hold hi and, lo_offset further, lo.
    ROUND: fp32 is rounded to TF32. DOT: "tf32" for the tensor core, of 16-bit operands too; "ieee";
    or "tf32x3", fp32 split into two numbers of TF32, with IEEE's products for tiles whose sums are
    not finite. WIDE: some offset inside a tile exceeds 32 bits. A_ALIGN and B_ALIGN: runs of so
    many elements may be copied at once; Triton itself learns of an integer only whether 16 divides
    it.
    B_SHIFTED: batch items are classes of the rows of one B, of rows_total in all, and start less
    than B_ALIGN elements behind addresses that B_ALIGN divides. Where B's rows lie along K, a tile
    then has columns before C's first or after its last, of which nothing is stored.
    """
    let_next_start(LETS_NEXT)
    SHIFTED_K: tl.constexpr = B_SHIFTED and B_K_MAJOR
    SHIFTED_N: tl.constexpr = B_SHIFTED and not B_K_MAJOR
    SPARE_COLUMNS: tl.constexpr = B_ALIGN - 1 if SHIFTED_N else 0
    tiles_m = count_blocks(M, BLOCK_M)
    tiles_n = count_blocks(N + SPARE_COLUMNS, BLOCK_N)
    tiles = tiles_m * tiles_n
    split = tl.program_id(0) // tiles % split_k
    item = (tl.program_id(0) // tiles // split_k).to(tl.int64)
    tile_m, tile_n = tile_coordinates(tl.program_id(0) % tiles, tiles_m, tiles_n, GROUP_M)

    # Offsets inside a tile are 32-bit unless WIDE; the tile's base address takes the rest.
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    if WIDE:
        offs_m, offs_n, offs_k = offs_m.to(tl.int64), offs_n.to(tl.int64), offs_k.to(tl.int64)
    first_m = tile_m.to(tl.int64) * BLOCK_M
    first_n = tile_n.to(tl.int64) * BLOCK_N
    first_a = item * stride_ab + first_m * stride_am
    first_b = item * stride_bb + first_n * stride_bn
    shift = 0
    distance = 0
    runs_n = offs_n
    if B_SHIFTED:
        distance = (item * stride_bb % B_ALIGN).to(tl.int32)
        first_b -= distance
        if B_K_MAJOR:
            first_a -= distance.to(tl.int64) * stride_ak
            K += distance
            N = class_size(rows_total, item, batch)
            # Of a class with a row less, the last tile may have none: it reads the row before.
            first_b -= tl.maximum(first_n - (N - 1), 0) * stride_bn
        else:
            shift = distance
            runs_n = offs_n // B_ALIGN * B_ALIGN
            # What is read at once of the last row may end after B: it has a step of its own.
            K = class_size(rows_total, item, batch) - 1
    mask_m = offs_m < M - first_m
    mask_n = offs_n < N + shift - first_n
    rows_m, rows_n = offs_m, offs_n
    if CLAMP:
        if A_K_MAJOR:
            rows_m = readable_rows(offs_m, mask_m, first_m, M, BLOCK_M)
        else:
            rows_m = tl.where(mask_m, offs_m, 0)
        if B_K_MAJOR and not B_SHIFTED:
            rows_n = readable_rows(offs_n, mask_n, first_n, N, BLOCK_N)
        else:
            rows_n = tl.where(runs_n < N + shift - first_n, offs_n, 0)
    # By division: Triton ignores multiple_of on a kernel's own arguments.
    if A_ALIGN > 1:
        if A_K_MAJOR:
            stride_am = stride_am // A_ALIGN * A_ALIGN
        else:
            stride_ak = stride_ak // A_ALIGN * A_ALIGN
            rows_m = tl.max_contiguous(tl.multiple_of(rows_m, A_ALIGN), A_ALIGN)
    if B_ALIGN > 1:
        if B_K_MAJOR:
            stride_bn = stride_bn // B_ALIGN * B_ALIGN
        else:
            stride_bk = stride_bk // B_ALIGN * B_ALIGN
            rows_n = tl.max_contiguous(tl.multiple_of(rows_n, B_ALIGN), B_ALIGN)

    a_ptr += tl.multiple_of(first_a, A_ALIGN)
    b_ptr += tl.multiple_of(first_b, B_ALIGN)
    wait_for_previous(WAITS)
    acc = sum_products(
        a_ptr, b_ptr, rows_m, rows_n, offs_k, K, split, split_k, distance, lo_offset,
        stride_am, stride_ak, stride_bn, stride_bk,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PARTS, A_K_MAJOR, B_K_MAJOR, A_ALIGN, B_ALIGN,
        TAIL_RUN, SHIFTED_K, ROUND, DOT,
    )  # fmt: skip
    if DOT == "tf32x3":
        # What lies beside B's rows is no reason, and rows of other tiles are none.
        counts = mask_n & (offs_n >= shift - first_n) if SHIFTED_N else mask_n
        finite = (tl.abs(acc) < INF) | ~counts[None, :] | ~mask_m[:, None]
        acc *= 1 / (SPLIT_SCALE * SPLIT_SCALE)
        if tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0:
            acc = sum_products(
                a_ptr, b_ptr, rows_m, rows_n, offs_k, K, split, split_k, distance, lo_offset,
                stride_am, stride_ak, stride_bn, stride_bk,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PARTS, A_K_MAJOR, B_K_MAJOR, A_ALIGN, B_ALIGN,
                TAIL_RUN, SHIFTED_K, ROUND, "ieee",
            )  # fmt: skip
    if SHIFTED_N:
        if split == split_k - 1:
            last_k = tl.cast(K, tl.int64)
            a_last = a_ptr + last_k * stride_ak + rows_m * stride_am
            b_last = b_ptr + last_k * stride_bk + offs_n
            acc = add_row(a_last, b_last, mask_n, acc, ROUND)
        first_n -= shift
        mask_n = (offs_n >= -first_n) & (offs_n < N - first_n)

    if SCALED and not PARTIAL:
        row_exp_ptrs = row_exp_ptr + (item * stride_row_exp + first_m) + offs_m
        col_exp_ptrs = col_exp_ptr + (item * stride_col_exp + first_n) + offs_n
        row_exp = tl.load(row_exp_ptrs, mask=mask_m, other=0)
        col_exp = tl.load(col_exp_ptrs, mask=mask_n, other=0)
        acc = scale_by_exponents(acc, row_exp, col_exp)
    c_row = (split.to(tl.int64) * batch + item) * M + first_m
    if SHIFTED_K:
        c_ptrs = c_ptr + (split.to(tl.int64) * M + first_m + offs_m)[:, None] * rows_total
        c_ptrs += (item + (first_n + offs_n) * batch)[None, :]
        tl.store(c_ptrs, acc, mask=mask_m[:, None] & mask_n[None, :])
    elif SLICE_N > 0:
        store_finished(
            acc, c_ptr, bias_ptr, residual_ptr, c_row, first_n, offs_m, mask_m, N,
            ACTIVATION, SLICE_N,
        )  # fmt: skip
    else:
        c_ptrs = c_ptr + (c_row * N + first_n) + (offs_m[:, None] * N + offs_n[None, :])
        tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def reduce_kernel(
    partial_ptr,  # (split_k, batch, M, N) fp32
    c_ptr,  # (batch, M, N)
    row_exp_ptr, col_exp_ptr,  # as in gemm_kernel
    bias_ptr, residual_ptr,
    M, N, batch, split_k,
    stride_row_exp, stride_col_exp,
    SCALED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr,
    WAITS: tl.constexpr, LETS_NEXT: tl.constexpr,
):  # fmt: skip
    """Sum split-K's partial products, scale, round once; BLOCK_N elements of a row a program.

    BLOCK_S partial sums are read at once and added as a tree: a fixed order, and few trips to
    memory however many there are.
    """
    let_next_start(LETS_NEXT)
    blocks_n = count_blocks(N, BLOCK_N)
    row = (tl.program_id(0) // blocks_n).to(tl.int64)  # item * M + m
    offs_n = (tl.program_id(0) % blocks_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_s = tl.arange(0, BLOCK_S).to(tl.int64)
    mask_n = offs_n < N
    stride_split = tl.cast(batch, tl.int64) * M * N
    partial_ptrs = partial_ptr + offs_s[:, None] * stride_split + (row * N + offs_n)[None, :]
    acc = tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
    wait_for_previous(WAITS)
    for first in range(0, split_k, BLOCK_S):
        mask = (first + offs_s < split_k)[:, None] & mask_n[None, :]
        acc += tl.load(partial_ptrs, mask=mask, other=0.0)
        partial_ptrs += BLOCK_S * stride_split
    c = tl.sum(acc, 0)
    if SCALED:
        item = row // M
        row_exp = tl.load(row_exp_ptr + item * stride_row_exp + row % M + tl.arange(0, 1))
        col_exp = tl.load(col_exp_ptr + item * stride_col_exp + offs_n, mask=mask_n, other=0)
        c = tl.reshape(scale_by_exponents(c[None, :], row_exp, col_exp), (BLOCK_N,))
    c_ptrs = c_ptr + row * N + offs_n
    if bias_ptr is not None:
        c = add_bias(c, bias_ptr + offs_n, mask_n)
    c = activated(c, ACTIVATION, c_ptr.dtype.element_ty)
    if residual_ptr is not None:
        c = add_residual(c, tl.load(residual_ptr + row * N + offs_n, mask=mask_n, other=0.0))
    tl.store(c_ptrs, c, mask=mask_n)
