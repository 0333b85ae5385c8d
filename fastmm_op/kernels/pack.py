"""Packing: any strides in, an aligned K-major 16-bit copy out.

Both operands are seen as (rows, K): A by its rows m, B by its columns n. A packed operand is a
(batch * R, PARTS * pitch) buffer whose rows are K-contiguous, whose pitch is a multiple of 64
elements, and whose K tail is zero, so that the GEMM needs neither masks nor alignment cases.

fp32 rows are multiplied by a power of two (exact) that puts their largest finite magnitude into
[2**14, 2**15), and then rounded to fp16, which has the significand of TF32. The exponent that
undoes it is stored per row. Before that, kernels/balance.py may have moved powers of two from A's
column k to B's row k. So packed = x * 2**(k_exp[k] - row_exp[r]).

PARTS is 1, or 2: then a row holds the rounded values (hi), and after these, from pitch on, what
they lack, rounded (lo); together 22 bits. The product is hi*hi + hi*lo + lo*hi. Inf and NaN stand
in lo, and hi is +-1 there: each then meets the other operand's hi only, which is zero where that
operand is, and has its sign, so that the sum is what IEEE arithmetic makes it.

16-bit inputs are copied as they are.

``wrap`` more rows than there are repeat the first ones, for kernels/gemm_hopper.py reads across the
end; only a single batch item may have them.
"""

import triton
import triton.language as tl

from fastmm_op.kernels.common import NO_EXPONENT, exponent_of, power_of_two

INF = tl.constexpr(float("inf"))
FP16_TINY = tl.constexpr(2.0**-24)


@triton.jit
def row_exponent(largest):
    """The row_exp of rows whose largest exponent is given; 0 for rows without one."""
    return tl.where(largest < NO_EXPONENT // 2, 0, largest - 14)


@triton.jit
def multiply_by_power(x, exponent):
    """x * 2**exponent, for results below 2**15; those below 2**-124 may become zero."""
    exponent = tl.minimum(tl.maximum(exponent, -252), 252)
    half = exponent >> 1  # 2**exponent itself may be no fp32
    return x * power_of_two(half) * power_of_two(exponent - half)


@triton.jit
def to_fp16(scaled, x):
    """scaled, a multiple of x, rounded to fp16; non-zero values never become zero.

    Inf times a non-zero factor is Inf in IEEE arithmetic, but Inf times zero is NaN: a value too
    small for fp16 becomes +-2**-24 instead, at most 2**-38 of its row's largest.
    """
    underflow = (tl.abs(scaled) < FP16_TINY) & (x != 0.0)
    return tl.where(underflow, tl.where(x > 0.0, FP16_TINY, -FP16_TINY), scaled).to(tl.float16)


@triton.jit
def store_parts(packed_ptrs, x, exponent, mask, pitch, PARTS: tl.constexpr):
    """Store x * 2**exponent as hi, or as hi and, pitch elements further, lo."""
    scaled = multiply_by_power(x, exponent)
    hi = to_fp16(scaled, x)
    if PARTS == 2:
        finite = tl.abs(x) < INF
        lo = tl.where(finite, scaled - hi.to(tl.float32), scaled).to(tl.float16)
        hi = tl.where(finite, hi, tl.where(x < 0.0, -1.0, 1.0).to(tl.float16))
        tl.store(packed_ptrs + pitch, lo, mask=mask)
    tl.store(packed_ptrs, hi, mask=mask)


@triton.jit
def source_rows(offs_r, R):
    """Which row to read for a packed row: rows from R on repeat the first ones."""
    return tl.where(offs_r < R, offs_r, offs_r - R)


@triton.jit
def pack_rows_kernel(
    x_ptr,  # (batch, R, K), any strides
    packed_ptr,  # (batch * R + wrap, PARTS * pitch)
    exp_ptr,  # (batch * R,) int32
    k_exp_ptr,  # (batch or 1, K) int32
    R, K, wrap,
    stride_xb, stride_xr, stride_xk,
    pitch, stride_k_exp,
    PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, K_MAJOR: tl.constexpr,
):  # fmt: skip
    """Scale and pack in one read: a program holds BLOCK_R whole rows, BLOCK_K >= pitch."""
    blocks_r = tl.cdiv(R + wrap, BLOCK_R)
    batch = (tl.program_id(0) // blocks_r).to(tl.int64)
    offs_r = (tl.program_id(0) % blocks_r) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    rows = source_rows(offs_r, R)
    x_ptr += batch * stride_xb
    if K_MAJOR:
        mask = (offs_r < R + wrap)[:, None] & (offs_k < K)[None, :]
        x_ptrs = x_ptr + rows[:, None] * stride_xr + offs_k[None, :] * stride_xk
        x = tl.load(x_ptrs, mask=mask, other=0.0)
    else:
        mask = (offs_k < K)[:, None] & (offs_r < R + wrap)[None, :]
        x_ptrs = x_ptr + offs_k[:, None] * stride_xk + rows[None, :] * stride_xr
        x = tl.trans(tl.load(x_ptrs, mask=mask, other=0.0))
    k_exp = tl.load(k_exp_ptr + batch * stride_k_exp + offs_k, mask=offs_k < K, other=0)
    row_exp = row_exponent(tl.max(exponent_of(x) + k_exp[None, :], 1))
    packed_rows = batch * R + offs_r
    packed_ptrs = packed_ptr + packed_rows[:, None] * (pitch * PARTS) + offs_k[None, :]
    mask = (offs_r < R + wrap)[:, None] & (offs_k < pitch)[None, :]
    store_parts(packed_ptrs, x, k_exp[None, :] - row_exp[:, None], mask, pitch, PARTS)
    tl.store(exp_ptr + packed_rows, row_exp, mask=offs_r < R)


@triton.jit
def row_max_kernel(
    x_ptr,  # (batch, R, K), any strides
    max_ptr,  # (chunks, max_pitch) int32, batch * R in use
    k_exp_ptr,  # (batch or 1, K) int32
    R, K, max_pitch,
    stride_xb, stride_xr, stride_xk,
    stride_k_exp,
    CHUNKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The largest exponent of each row, balanced, in each of CHUNKS parts of K."""
    blocks_r = tl.cdiv(R, BLOCK_R)
    chunk = tl.program_id(0) % CHUNKS
    batch = (tl.program_id(0) // CHUNKS // blocks_r).to(tl.int64)
    offs_r = (tl.program_id(0) // CHUNKS % blocks_r) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    mask_r = offs_r < R
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), CHUNKS)
    largest = tl.full((BLOCK_R, BLOCK_K), NO_EXPONENT, tl.int32)
    x_ptrs = x_ptr + batch * stride_xb + offs_r[:, None] * stride_xr
    k_exp_ptr += batch * stride_k_exp
    for step in range(chunk * steps, (chunk + 1) * steps):
        offs_k = tl.cast(step, tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = mask_r[:, None] & (offs_k[None, :] < K)
        x = tl.load(x_ptrs + offs_k[None, :] * stride_xk, mask=mask, other=0.0)
        k_exp = tl.load(k_exp_ptr + offs_k, mask=offs_k < K, other=0)
        largest = tl.maximum(largest, exponent_of(x) + k_exp[None, :])
    row = batch * R + offs_r
    max_ptrs = max_ptr + chunk.to(tl.int64) * max_pitch + row
    tl.store(max_ptrs, tl.max(largest, 1), mask=mask_r)


@triton.jit
def pack_tiles_kernel(
    x_ptr,  # (batch, R, K), any strides
    packed_ptr,  # (batch * R + wrap, PARTS * pitch)
    max_ptr,  # (chunks, max_pitch) int32, batch * R in use, read if SCALED
    exp_ptr,  # (batch * R,) int32, written if SCALED
    k_exp_ptr,  # (batch or 1, K) int32, read if SCALED
    R, K, wrap, max_pitch,
    stride_xb, stride_xr, stride_xk,
    pitch, stride_k_exp,
    SCALED: tl.constexpr, PARTS: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pack one (BLOCK_R, BLOCK_K) tile, scaled by the maxima of row_max_kernel or copied as it is.

    Tiles are walked in the reverse of row_max_kernel's order: what it read last is still in L2.
    """
    blocks_k = tl.cdiv(pitch, BLOCK_K)
    blocks_r = tl.cdiv(R + wrap, BLOCK_R)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    block_k = tile % blocks_k
    batch = (tile // blocks_k // blocks_r).to(tl.int64)
    offs_r = (tile // blocks_k % blocks_r) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    offs_k = block_k * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
    rows = source_rows(offs_r, R)
    inside = offs_r < R + wrap
    x_ptrs = x_ptr + batch * stride_xb + rows[:, None] * stride_xr + offs_k[None, :] * stride_xk
    x = tl.load(x_ptrs, mask=inside[:, None] & (offs_k < K)[None, :], other=0.0)
    packed_rows = batch * R + offs_r
    packed_ptrs = packed_ptr + packed_rows[:, None] * (pitch * PARTS) + offs_k[None, :]
    mask = inside[:, None] & (offs_k < pitch)[None, :]
    if SCALED:
        offs_c = tl.arange(0, CHUNKS).to(tl.int64)
        max_ptrs = max_ptr + offs_c[:, None] * max_pitch + (batch * R + rows)[None, :]
        row_exp = row_exponent(tl.max(tl.load(max_ptrs, mask=inside[None, :], other=0), 0))
        k_exp = tl.load(k_exp_ptr + batch * stride_k_exp + offs_k, mask=offs_k < K, other=0)
        store_parts(packed_ptrs, x, k_exp[None, :] - row_exp[:, None], mask, pitch, PARTS)
        if block_k == 0:
            tl.store(exp_ptr + packed_rows, row_exp, mask=offs_r < R)
    else:
        tl.store(packed_ptrs, x, mask=mask)
