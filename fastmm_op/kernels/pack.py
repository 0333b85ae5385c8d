"""Packing: any strides in, an aligned K-major copy out, of 16 bits but for one case.

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

16-bit inputs are copied as they are, and so are A's few rows of fp32 beside a B that is read by
classes (kernels/gemm.py).

Batch items may be slabs of one K, each scaled by itself. K_total, batch * K otherwise, then says
where the last of them ends. Or they share one K_total by turns (INTERLEAVED), to be multiplied with
the classes of kernels/gemm.py.

``wrap`` more rows than there are repeat the first ones, for kernels/gemm_hopper.py reads across the
end; only a single batch item may have them. They are blocks of their own, so that the rows of a
block are neighbours in memory.
"""

import triton
import triton.language as tl

from fastmm_op.kernels.chain import let_next_start, wait_for_previous
from fastmm_op.kernels.common import (
    INF,
    NO_EXPONENT,
    class_size,
    exponent_of,
    finite_magnitude,
    item_k,
    power_of_two,
)

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
def anything_moved(moved_ptr, first_k, last_k, BALANCE_BLOCK: tl.constexpr):
    """Whether balancing moved a power of two anywhere in [first_k, last_k); rarely so."""
    offs = tl.arange(0, 64)
    last = tl.cdiv(last_k, BALANCE_BLOCK)
    largest = tl.zeros((64,), tl.int32)
    for block in range(first_k // BALANCE_BLOCK, last, 64):
        moved = tl.load(moved_ptr + block + offs, mask=block + offs < last, other=0)
        largest = tl.maximum(largest, moved)
    return tl.max(largest, 0) > 0


@triton.jit
def block_rows(block, R, wrap, BLOCK_R: tl.constexpr):
    """First row to read, first packed row, number of rows; blocks past R repeat the first rows."""
    blocks = tl.cdiv(R, BLOCK_R)
    wraps = block >= blocks
    source = tl.where(wraps, block - blocks, block).to(tl.int64) * BLOCK_R
    count = tl.minimum(tl.where(wraps, wrap, R) - source, BLOCK_R).to(tl.int32)
    return source, source + tl.where(wraps, R, 0), count


@triton.jit
def pack_rows_kernel(
    x_ptr,  # (batch, R, K), any strides
    packed_ptr,  # (batch * R + wrap, PARTS * pitch)
    exp_ptr,  # (batch * R,) int32
    k_exp_ptr, moved_ptr,  # as balance_kernel leaves them
    R, K, K_total, wrap,
    stride_xb, stride_xr, stride_xk,
    pitch, stride_k_exp, stride_moved,
    PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, K_MAJOR: tl.constexpr,
    BALANCE_BLOCK: tl.constexpr, WIDE: tl.constexpr, LAST_READ: tl.constexpr,
    WAITS: tl.constexpr, LETS_NEXT: tl.constexpr,
):  # fmt: skip
    """Scale and pack in one read: a program holds BLOCK_R whole rows, BLOCK_K >= pitch.

    WIDE (here and below): an offset between elements of one block exceeds 32 bits. LAST_READ: what
    L2 is told of operands that are not read again; "evict_first" leaves it to the packed ones.
    """
    let_next_start(LETS_NEXT)
    blocks_r = tl.cdiv(R, BLOCK_R) + tl.cdiv(wrap, BLOCK_R)
    batch = (tl.program_id(0) // blocks_r).to(tl.int64)
    K = item_k(K, K_total, batch)
    source, target, count = block_rows(tl.program_id(0) % blocks_r, R, wrap, BLOCK_R)
    offs_r = tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask_r = offs_r < count
    at_r, at_k = offs_r, offs_k
    if WIDE:
        at_r, at_k = offs_r.to(tl.int64), offs_k.to(tl.int64)
    x_ptr += batch * stride_xb + source * stride_xr
    if K_MAJOR:
        x_ptrs = x_ptr + (at_r[:, None] * stride_xr + at_k[None, :] * stride_xk)
        mask = mask_r[:, None] & (offs_k < K)[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0, eviction_policy=LAST_READ)
    else:
        x_ptrs = x_ptr + (at_k[:, None] * stride_xk + at_r[None, :] * stride_xr)
        mask = (offs_k < K)[:, None] & mask_r[None, :]
        x = tl.trans(tl.load(x_ptrs, mask=mask, other=0.0, eviction_policy=LAST_READ))
    wait_for_previous(WAITS)
    packed_row = batch * R + target
    packed_ptrs = packed_ptr + packed_row * (pitch * PARTS)
    packed_ptrs += at_r[:, None] * (pitch * PARTS) + offs_k[None, :]
    mask = mask_r[:, None] & (offs_k < pitch)[None, :]
    if anything_moved(moved_ptr + batch * stride_moved, 0, K, BALANCE_BLOCK):
        k_exp = tl.load(k_exp_ptr + batch * stride_k_exp + offs_k, mask=offs_k < K, other=0)
        exponents = exponent_of(finite_magnitude(x)) + k_exp[None, :]
        row_exp = row_exponent(tl.max(exponents, 1))
        store_parts(packed_ptrs, x, k_exp[None, :] - row_exp[:, None], mask, pitch, PARTS)
    else:
        row_exp = row_exponent(exponent_of(tl.max(finite_magnitude(x), 1)))
        store_parts(packed_ptrs, x, -row_exp[:, None], mask, pitch, PARTS)
    tl.store(exp_ptr + packed_row + offs_r, row_exp, mask=target + offs_r < R)


@triton.jit
def load_tile(
    x_ptr, source, first_k, count, K, stride_xr, stride_xk,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """The (BLOCK_R, BLOCK_K) tile at row ``source`` and ``first_k``; zero past count rows and K."""
    offs_r = tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    at_r, at_k = offs_r, offs_k
    if WIDE:
        at_r, at_k = offs_r.to(tl.int64), offs_k.to(tl.int64)
    x_ptr += source * stride_xr + first_k.to(tl.int64) * stride_xk
    x_ptrs = x_ptr + (at_r[:, None] * stride_xr + at_k[None, :] * stride_xk)
    mask = (offs_r < count)[:, None] & (offs_k < K - first_k)[None, :]
    return tl.load(x_ptrs, mask=mask, other=0.0, eviction_policy=EVICTION)


@triton.jit
def pack_strips_kernel(
    x_ptr,  # (batch, R, K), any strides
    packed_ptr,  # (batch * R + wrap, PARTS * pitch)
    largest_ptr,  # (batch * R + batch * strips,) int32: NO_EXPONENT for each row, then zeros
    exp_ptr,  # (batch * R,) int32
    k_exp_ptr, moved_ptr,  # as balance_kernel leaves them
    R, K, K_total, wrap,
    stride_xb, stride_xr, stride_xk,
    pitch, stride_k_exp, stride_moved,
    PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
    BALANCE_BLOCK: tl.constexpr, WIDE: tl.constexpr, WAITS: tl.constexpr, LETS_NEXT: tl.constexpr,
):  # fmt: skip
    """Scale and pack rows that no program can hold, in two reads, of which L2 serves the second.

    A program takes one (BLOCK_R, BLOCK_K) tile of a strip of BLOCK_R rows. It measures the tile: it
    raises the largest exponents of its rows, and counts the tile for its strip. Or it packs it, as
    soon as all tiles of the strip are counted. The two kinds take turns, and measuring is a strip
    and AHEAD tiles ahead: few enough that L2 still holds them, enough that packing seldom waits.

    No program waits for ever. Those that measure wait for none, and programs start in the order of
    their ids, so whatever one that packs waits for has started before it. (CUDA's manual does not
    say so, but the scans of NVIDIA's own CUB library rest on it.)
    """
    let_next_start(LETS_NEXT)
    strips = tl.cdiv(R, BLOCK_R)
    strips_packed = strips + tl.cdiv(wrap, BLOCK_R)
    tiles, tiles_packed = tl.cdiv(K, BLOCK_K), tl.cdiv(pitch, BLOCK_K)
    items = tl.num_programs(0) // (strips * tiles + strips_packed * tiles_packed)
    measured = items * strips * tiles
    ahead = tl.minimum(tiles + AHEAD, measured)
    turn = tl.program_id(0) - ahead
    turns = 2 * (measured - ahead)
    measures = (turn < 0) | ((turn < turns) & (turn % 2 == 1))
    to_measure = ahead + tl.where(turn < 0, turn, turn // 2)
    to_pack = tl.where(turn < turns, turn // 2, turn - turns // 2)
    task = tl.where(measures, to_measure, to_pack)
    tiles_here = tl.where(measures, tiles, tiles_packed)
    strips_here = tl.where(measures, strips, strips_packed)
    first_k = task % tiles_here * BLOCK_K
    strip = task // tiles_here % strips_here
    batch = (task // tiles_here // strips_here).to(tl.int64)
    K = item_k(K, K_total, batch)
    source, target, count = block_rows(strip, R, wrap, BLOCK_R)
    x_ptr += batch * stride_xb
    if measures:
        x = load_tile(
            x_ptr, source, first_k, count, K, stride_xr, stride_xk,
            BLOCK_R, BLOCK_K, WIDE, "evict_last",
        )  # fmt: skip
    else:
        x = load_tile(
            x_ptr, source, first_k, count, K, stride_xr, stride_xk,
            BLOCK_R, BLOCK_K, WIDE, "evict_first",
        )  # fmt: skip
    wait_for_previous(WAITS)
    offs_r = tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    largest_ptrs = largest_ptr + (batch * R + source) + offs_r
    counted_ptr = largest_ptr + items.to(tl.int64) * R + batch * strips + strip % strips
    k_exp_ptrs = k_exp_ptr + batch * stride_k_exp + first_k + offs_k
    mask_k = offs_k < K - first_k
    last_k = tl.minimum(first_k + BLOCK_K, K)
    moved = anything_moved(moved_ptr + batch * stride_moved, first_k, last_k, BALANCE_BLOCK)
    if measures:
        if moved:
            k_exp = tl.load(k_exp_ptrs, mask=mask_k, other=0)
            largest = tl.max(exponent_of(finite_magnitude(x)) + k_exp[None, :], 1)
        else:
            largest = exponent_of(tl.max(finite_magnitude(x), 1))
        # Whichever program comes first, the largest is the same.
        tl.atomic_max(largest_ptrs, largest, mask=offs_r < count, sem="relaxed")
        tl.debug_barrier()  # the whole program's, before its tile counts
        tl.atomic_add(counted_ptr, 1, sem="release")
    else:
        counted = tl.atomic_add(counted_ptr, 0, sem="acquire")
        while counted < tiles:
            counted = tl.atomic_add(counted_ptr, 0, sem="acquire")
        row_exp = row_exponent(tl.load(largest_ptrs, mask=offs_r < count, other=0))
        packed_row = batch * R + target
        packed_ptrs = packed_ptr + packed_row * (pitch * PARTS) + first_k
        at_r = offs_r
        if WIDE:
            at_r = offs_r.to(tl.int64)
        packed_ptrs += at_r[:, None] * (pitch * PARTS) + offs_k[None, :]
        mask = (offs_r < count)[:, None] & (offs_k < pitch - first_k)[None, :]
        if moved:
            k_exp = tl.load(k_exp_ptrs, mask=mask_k, other=0)
            store_parts(packed_ptrs, x, k_exp[None, :] - row_exp[:, None], mask, pitch, PARTS)
        else:
            store_parts(packed_ptrs, x, -row_exp[:, None], mask, pitch, PARTS)
        if first_k == 0:
            tl.store(exp_ptr + packed_row + offs_r, row_exp, mask=target + offs_r < R)


@triton.jit
def copy_tiles_kernel(
    x_ptr,  # (batch, R, K), any strides
    packed_ptr,  # (batch * R + wrap, pitch)
    R, K, K_total, wrap,
    stride_xb, stride_xr, stride_xk,
    pitch,
    INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr, LAST_READ: tl.constexpr, WAITS: tl.constexpr, LETS_NEXT: tl.constexpr,
):  # fmt: skip
    """Copy one (BLOCK_R, BLOCK_K) tile as it is."""
    let_next_start(LETS_NEXT)
    blocks_k = tl.cdiv(pitch, BLOCK_K)
    blocks_r = tl.cdiv(R, BLOCK_R) + tl.cdiv(wrap, BLOCK_R)
    first_k = tl.program_id(0) % blocks_k * BLOCK_K
    batch = (tl.program_id(0) // blocks_k // blocks_r).to(tl.int64)
    if INTERLEAVED:
        K = class_size(K_total, batch, tl.num_programs(0) // blocks_k // blocks_r)
    else:
        K = item_k(K, K_total, batch)
    source, target, count = block_rows(tl.program_id(0) // blocks_k % blocks_r, R, wrap, BLOCK_R)
    x_ptr += batch * stride_xb
    x = load_tile(
        x_ptr, source, first_k, count, K, stride_xr, stride_xk,
        BLOCK_R, BLOCK_K, WIDE, LAST_READ,
    )  # fmt: skip
    wait_for_previous(WAITS)
    offs_r = tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    at_r = offs_r
    if WIDE:
        at_r = offs_r.to(tl.int64)
    packed_ptrs = packed_ptr + (batch * R + target) * pitch + first_k
    packed_ptrs += at_r[:, None] * pitch + offs_k[None, :]
    mask = (offs_r < count)[:, None] & (offs_k < pitch - first_k)[None, :]
    tl.store(packed_ptrs, x, mask=mask)
