"""Balancing K: powers of two moved from the columns of A to the rows of B, or back.

The product does not change if column k of A is multiplied by 2**e[k] and row k of B by 2**-e[k].
Where the columns of A grow as the rows of B shrink (features of very different units, and weights
that make up for it), every product matters, yet a row's small factors fall below what fp16 can
hold beside its large ones. Half the difference of the two exponents makes both factors alike.

Exponents are judged by a sample of A's rows and B's columns; a wrong guess costs range, never
correctness. Differences within 2**+-DEADBAND are left alone: fp16 has range for them, and ordinary
data then gives the same bits whatever was sampled.
"""

import triton
import triton.language as tl

from fastmm_op.kernels.chain import let_next_start, wait_for_previous
from fastmm_op.kernels.common import NO_EXPONENT, exponent_of, finite_magnitude, item_k

# Rows of each operand that are looked at, in runs of neighbours that share memory sectors.
SAMPLES = tl.constexpr(32)
RUN = tl.constexpr(8)
DEADBAND = tl.constexpr(16)
LARGEST_SHIFT = tl.constexpr(120)
# Elements of K, spread over all of it, by which the whole of A is compared to the whole of B.
SPREAD = tl.constexpr(16)


@triton.jit
def load_samples(
    x_ptr, item, items, R, offs_k, mask_k, stride_xb, stride_xr, stride_xk,
):  # fmt: skip
    """Sampled rows of items [item, item + items) at each k."""
    sample = tl.arange(0, SAMPLES)
    rows = tl.cast(R, tl.int64) * items
    row = tl.minimum(sample // RUN * (rows // (SAMPLES // RUN)) + sample % RUN, rows - 1)
    if items > 1:
        starts = row // R * stride_xb + row % R * stride_xr
    else:
        starts = row * stride_xr
    x_ptrs = x_ptr + item * stride_xb + (starts[:, None] + offs_k[None, :] * stride_xk)
    return tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)


@triton.jit
def largest_exponents(samples):
    """The largest exponent at each k."""
    return exponent_of(tl.max(finite_magnitude(samples), 0))


@triton.jit
def forget_maxima(largest_ptr, rows, strips):
    """NO_EXPONENT for each row, then zero for each strip, shared out among all programs."""
    BLOCK: tl.constexpr = 1024
    count = tl.cast(rows, tl.int64) + strips
    program = tl.cast(tl.program_id(0), tl.int64)
    programs = tl.cast(tl.num_programs(0), tl.int64)
    for first in range(program * BLOCK, count, programs * BLOCK):
        offs = first + tl.arange(0, BLOCK)
        tl.store(largest_ptr + offs, tl.where(offs < rows, NO_EXPONENT, 0), mask=offs < count)


@triton.jit
def forget_kernel(
    largest_ptr,  # (rows + strips,) int32
    rows, strips,
    WAITS: tl.constexpr, LETS_NEXT: tl.constexpr,
):  # fmt: skip
    """What pack_strips_kernel needs where balance_kernel, which does it on the way, is not run."""
    let_next_start(LETS_NEXT)
    wait_for_previous(WAITS)
    forget_maxima(largest_ptr, rows, strips)


@triton.jit
def balance_kernel(
    a_ptr,  # (batch, M, K), any strides
    b_ptr,  # (batch, N, K), any strides
    a_exp_ptr,  # (batch / items, K) int32: e
    b_exp_ptr,  # (batch / items, K) int32: -e
    moved_ptr,  # (batch / items, cdiv(K, BLOCK_K)) int32: whether any e there is not zero
    a_largest_ptr, b_largest_ptr,  # (rows + strips,) int32 for pack_strips_kernel, or None
    M, N, K, K_total, items,
    a_rows, a_strips, b_rows, b_strips,
    stride_ab, stride_am, stride_ak,
    stride_bb, stride_bn, stride_bk,
    BLOCK_K: tl.constexpr, WAITS: tl.constexpr, LETS_NEXT: tl.constexpr,
):  # fmt: skip
    """e for BLOCK_K of K, the same for ``items`` batch items in a row; K_total as for packing.

    What counts is the difference to how the whole of A compares to the whole of B, which every
    program judges by the same SPREAD elements of the sampled rows.
    """
    let_next_start(LETS_NEXT)
    wait_for_previous(WAITS)
    if a_largest_ptr is not None:
        forget_maxima(a_largest_ptr, a_rows, a_strips)
    if b_largest_ptr is not None:
        forget_maxima(b_largest_ptr, b_rows, b_strips)
    blocks_k = tl.cdiv(K, BLOCK_K)
    group = (tl.program_id(0) // blocks_k).to(tl.int64)
    item = group * items
    item_K = item_k(K, K_total, item)
    offs = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_k = tl.program_id(0) % blocks_k * BLOCK_K + offs
    mask_k = offs_k < item_K
    spread_k = tl.arange(0, SPREAD).to(tl.int64) * item_K // SPREAD
    everywhere = spread_k >= 0
    # All loads are on their way before the first of them is waited for.
    a = load_samples(a_ptr, item, items, M, offs_k, mask_k, stride_ab, stride_am, stride_ak)
    b = load_samples(b_ptr, item, items, N, offs_k, mask_k, stride_bb, stride_bn, stride_bk)
    a_all = load_samples(
        a_ptr, item, items, M, spread_k, everywhere, stride_ab, stride_am, stride_ak
    )
    b_all = load_samples(
        b_ptr, item, items, N, spread_k, everywhere, stride_bb, stride_bn, stride_bk
    )
    a_exp, b_exp = largest_exponents(a), largest_exponents(b)
    usual = tl.max(largest_exponents(b_all), 0) - tl.max(largest_exponents(a_all), 0)
    difference = b_exp - a_exp - usual
    known = (tl.minimum(a_exp, b_exp) > NO_EXPONENT) & (tl.abs(usual) < -NO_EXPONENT // 2)
    moved = known & (tl.abs(difference) > DEADBAND)
    shift = tl.minimum(tl.maximum(difference >> 1, -LARGEST_SHIFT), LARGEST_SHIFT)
    shift = tl.where(moved, shift, 0)
    tl.store(a_exp_ptr + group * K + offs_k, shift, mask=mask_k)
    tl.store(b_exp_ptr + group * K + offs_k, -shift, mask=mask_k)
    tl.store(moved_ptr + tl.program_id(0), tl.max(tl.abs(shift), 0))
