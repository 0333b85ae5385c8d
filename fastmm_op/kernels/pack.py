"""Packing: any strides in, an aligned K-major 16-bit copy out.

Both operands are seen as (rows, K): A by its rows m, B by its columns n. A packed operand is a
(batch * R, pitch) buffer whose rows are K-contiguous, whose pitch is a multiple of 64 elements, and
whose K tail is zero, so that the GEMM needs neither masks nor alignment cases.

fp32 rows are multiplied by a power of two (exact) that puts their largest finite magnitude into
[2**14, 2**15) and then rounded to fp16, which has the significand of TF32. The exponent that undoes
it is stored per row: x ~ packed * 2**row_exp. 16-bit inputs are copied as they are.

``wrap`` more rows than there are repeat the first ones, for kernels/gemm_hopper.py reads across the
end; only a single batch item may have them.
"""

import triton
import triton.language as tl

from fastmm_op.kernels.common import power_of_two

INF = tl.constexpr(float("inf"))
FP16_TINY = tl.constexpr(2.0**-24)


@triton.jit
def finite_magnitude(x):
    """|x|, with Inf and NaN as zero: they must not choose a row's scale."""
    magnitude = tl.abs(x)
    return tl.where(magnitude < INF, magnitude, 0.0)


@triton.jit
def exponent_of(magnitude):
    """The row_exp of rows whose largest finite magnitude is given; 0 for all-zero rows."""
    # Subnormals have no exponent of their own; 2**64 makes every one of them normal.
    tiny = magnitude < 2.0**-64
    normal = tl.where(tiny, magnitude * 2.0**64, magnitude)
    floor_log2 = ((normal.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127 - tl.where(tiny, 64, 0)
    return tl.where(magnitude == 0.0, 0, floor_log2 - 14)


@triton.jit
def scale_to_fp16(x, row_exp):
    """x * 2**-row_exp rounded to fp16; non-zero values never become zero.

    Inf times a non-zero factor is Inf in IEEE arithmetic, but Inf times zero is NaN: a value too
    small for fp16 becomes +-2**-24 instead, at most 2**-38 of its row's largest.
    """
    # 2**163 is no fp32: the shift of a subnormal row takes two exact steps.
    shift = tl.minimum(-row_exp, 100)
    scaled = x * power_of_two(shift) * power_of_two(-row_exp - shift)
    underflow = (tl.abs(scaled) < FP16_TINY) & (x != 0.0)
    scaled = tl.where(underflow, tl.where(x > 0.0, FP16_TINY, -FP16_TINY), scaled)
    return scaled.to(tl.float16)


@triton.jit
def source_rows(offs_r, R):
    """Which row to read for a packed row: rows from R on repeat the first ones."""
    return tl.where(offs_r < R, offs_r, offs_r - R)


@triton.jit
def pack_rows_kernel(
    x_ptr,  # (batch, R, K), any strides
    packed_ptr,  # (batch * R + wrap, pitch)
    exp_ptr,  # (batch * R,) int32
    R, K, wrap,
    stride_xb, stride_xr, stride_xk,
    pitch,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, K_MAJOR: tl.constexpr,
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
    row_exp = exponent_of(tl.max(finite_magnitude(x), 1))
    packed_rows = batch * R + offs_r
    packed_ptrs = packed_ptr + packed_rows[:, None] * pitch + offs_k[None, :]
    mask = (offs_r < R + wrap)[:, None] & (offs_k < pitch)[None, :]
    tl.store(packed_ptrs, scale_to_fp16(x, row_exp[:, None]), mask=mask)
    tl.store(exp_ptr + packed_rows, row_exp, mask=offs_r < R)


@triton.jit
def row_max_kernel(
    x_ptr,  # (batch, R, K), any strides
    max_ptr,  # (chunks, max_pitch) fp32, batch * R in use
    R, K, max_pitch,
    stride_xb, stride_xr, stride_xk,
    CHUNKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The largest finite magnitude of each row in each of CHUNKS parts of K."""
    blocks_r = tl.cdiv(R, BLOCK_R)
    chunk = tl.program_id(0) % CHUNKS
    batch = tl.program_id(0) // CHUNKS // blocks_r
    offs_r = (tl.program_id(0) // CHUNKS % blocks_r) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    mask_r = offs_r < R
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), CHUNKS)
    largest = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    x_ptrs = x_ptr + batch.to(tl.int64) * stride_xb + offs_r[:, None] * stride_xr
    for step in range(chunk * steps, (chunk + 1) * steps):
        offs_k = tl.cast(step, tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = mask_r[:, None] & (offs_k[None, :] < K)
        x = tl.load(x_ptrs + offs_k[None, :] * stride_xk, mask=mask, other=0.0)
        largest = tl.maximum(largest, finite_magnitude(x))
    row = batch.to(tl.int64) * R + offs_r
    max_ptrs = max_ptr + chunk.to(tl.int64) * max_pitch + row
    tl.store(max_ptrs, tl.max(largest, 1), mask=mask_r)


@triton.jit
def pack_tiles_kernel(
    x_ptr,  # (batch, R, K), any strides
    packed_ptr,  # (batch * R + wrap, pitch)
    max_ptr,  # (chunks, max_pitch) fp32, batch * R in use, read if SCALED
    exp_ptr,  # (batch * R,) int32, written if SCALED
    R, K, wrap, max_pitch,
    stride_xb, stride_xr, stride_xk,
    pitch,
    SCALED: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
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
    if SCALED:
        offs_c = tl.arange(0, CHUNKS).to(tl.int64)
        max_ptrs = max_ptr + offs_c[:, None] * max_pitch + (batch * R + rows)[None, :]
        largest = tl.max(tl.load(max_ptrs, mask=inside[None, :], other=0.0), 0)
        row_exp = exponent_of(largest)
        x = scale_to_fp16(x, row_exp[:, None])
        if block_k == 0:
            tl.store(exp_ptr + packed_rows, row_exp, mask=offs_r < R)
    packed_ptrs = packed_ptr + packed_rows[:, None] * pitch + offs_k[None, :]
    tl.store(packed_ptrs, x, mask=inside[:, None] & (offs_k < pitch)[None, :])
