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

from fastmm_op.kernels.common import NO_EXPONENT, exponent_of

# Rows of each operand that are looked at, in runs of neighbours that share memory sectors.
SAMPLES = tl.constexpr(32)
RUN = tl.constexpr(8)
DEADBAND = tl.constexpr(16)
LARGEST_SHIFT = tl.constexpr(120)


@triton.jit
def sampled_exponents(
    x_ptr, item, items, R, offs_k, mask_k, stride_xb, stride_xr, stride_xk,
):  # fmt: skip
    """The largest exponent at each k among sampled rows of items [item, item + items)."""
    sample = tl.arange(0, SAMPLES).to(tl.int64)
    rows = tl.cast(R, tl.int64) * items
    row = tl.minimum(sample // RUN * rows // (SAMPLES // RUN) + sample % RUN, rows - 1)
    starts = x_ptr + (item + row // R) * stride_xb + row % R * stride_xr
    x_ptrs = starts[:, None] + offs_k[None, :] * stride_xk
    x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
    return tl.max(exponent_of(x), 0)


@triton.jit
def balance_kernel(
    a_ptr,  # (batch, M, K), any strides
    b_ptr,  # (batch, N, K), any strides
    a_exp_ptr,  # (batch / items, K) int32: e
    b_exp_ptr,  # (batch / items, K) int32: -e
    M, N, K, items,
    stride_ab, stride_am, stride_ak,
    stride_bb, stride_bn, stride_bk,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """e for BLOCK_K of K, the same for ``items`` batch items in a row.

    What counts is the difference to how the whole of A compares to the whole of B, which every
    program judges by the same BLOCK_K elements of the sampled rows, spread over K.
    """
    blocks_k = tl.cdiv(K, BLOCK_K)
    group = (tl.program_id(0) // blocks_k).to(tl.int64)
    item = group * items
    offs = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_k = tl.program_id(0) % blocks_k * BLOCK_K + offs
    spread_k = offs * K // BLOCK_K
    mask_k = offs_k < K
    everywhere = offs >= 0
    a_exp = sampled_exponents(
        a_ptr, item, items, M, offs_k, mask_k, stride_ab, stride_am, stride_ak
    )
    b_exp = sampled_exponents(
        b_ptr, item, items, N, offs_k, mask_k, stride_bb, stride_bn, stride_bk
    )
    a_all = sampled_exponents(
        a_ptr, item, items, M, spread_k, everywhere, stride_ab, stride_am, stride_ak
    )
    b_all = sampled_exponents(
        b_ptr, item, items, N, spread_k, everywhere, stride_bb, stride_bn, stride_bk
    )
    usual = tl.max(b_all, 0) - tl.max(a_all, 0)
    difference = b_exp - a_exp - usual
    known = (tl.minimum(a_exp, b_exp) > NO_EXPONENT) & (tl.abs(usual) < -NO_EXPONENT // 2)
    moved = known & (tl.abs(difference) > DEADBAND)
    shift = tl.minimum(tl.maximum(difference >> 1, -LARGEST_SHIFT), LARGEST_SHIFT)
    shift = tl.where(moved, shift, 0)
    tl.store(a_exp_ptr + group * K + offs_k, shift, mask=mask_k)
    tl.store(b_exp_ptr + group * K + offs_k, -shift, mask=mask_k)
