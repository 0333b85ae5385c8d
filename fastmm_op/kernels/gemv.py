"""Products that are one row or one column wide: the matrix is read once, at memory bandwidth.

The matrix is seen as (rows, K), as the GEMM sees its operands. Products and sums are IEEE fp32: the
arithmetic hides under the reads, and the tensor core's rounding would buy nothing.

Rows of a misaligned matrix along K may be read by classes, as gemm_kernel reads those of its B.
"""

import triton
import triton.language as tl

from fastmm_op.kernels.chain import let_next_start, wait_for_previous
from fastmm_op.kernels.common import class_size, count_blocks
from fastmm_op.kernels.epilogue import activated, add_bias, add_residual


@triton.jit
def gemv_kernel(
    w_ptr,  # (batch, R, K), any strides
    x_ptr,  # (batch, K)
    y_ptr,  # (batch, R); if split_k > 1, (split_k, batch, R) fp32 sums
    bias_ptr, residual_ptr,  # one element a row, stride_bias apart, and (batch, R); or None
    R, K, batch, split_k, rows_total,
    stride_wb, stride_wr, stride_wk,
    stride_xb, stride_xk,
    stride_bias,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, K_MAJOR: tl.constexpr, SHIFTED: tl.constexpr,
    ACTIVATION: tl.constexpr, WAITS: tl.constexpr, LETS_NEXT: tl.constexpr,
):  # fmt: skip
    """y[r] = sum over k of w[r, k] * x[k], for BLOCK_R rows and one range of K a program.

    SHIFTED: batch items are classes of one matrix's rows along K, of rows_total in all, and start
    less than 16 bytes behind addresses that 16 divides.
    """
    let_next_start(LETS_NEXT)
    ALIGN: tl.constexpr = 128 // w_ptr.dtype.element_ty.primitive_bitwidth if SHIFTED else 1
    blocks_r = count_blocks(R + ALIGN - 1, BLOCK_R)
    split = tl.program_id(0) // blocks_r % split_k
    item = (tl.program_id(0) // blocks_r // split_k).to(tl.int64)
    offs_r = (tl.program_id(0) % blocks_r) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    first_w = item * stride_wb
    shift = 0
    if SHIFTED:
        tl.static_assert(not K_MAJOR)
        shift = first_w % ALIGN
        first_w = tl.multiple_of(first_w - shift, ALIGN)
        stride_wk = stride_wk // ALIGN * ALIGN
        # What is read at once of the last row may end after the matrix: it is added by itself.
        K = class_size(rows_total, item, batch) - 1
    mask_r = offs_r // ALIGN * ALIGN < R + shift
    steps = tl.cdiv(count_blocks(K, BLOCK_K), split_k)
    w_ptr += first_w
    x_ptr += item * stride_xb
    wait_for_previous(WAITS)
    if K_MAJOR:
        acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    else:
        acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for step in range(split * steps, (split + 1) * steps):
        offs_k = tl.cast(step, tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(x_ptr + offs_k * stride_xk, mask=mask_k, other=0.0).to(tl.float32)
        if K_MAJOR:
            w_ptrs = w_ptr + offs_r[:, None] * stride_wr + offs_k[None, :] * stride_wk
            w = tl.load(w_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
            acc += w.to(tl.float32) * x[None, :]
        else:
            w_ptrs = w_ptr + offs_k[:, None] * stride_wk + offs_r[None, :] * stride_wr
            w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
            acc += w.to(tl.float32) * x[:, None]
    y = tl.sum(acc, 1 if K_MAJOR else 0)
    if SHIFTED:
        mask_r = (offs_r >= shift) & (offs_r < R + shift)
        if split == split_k - 1:
            last_k = tl.cast(K, tl.int64)
            w = tl.load(w_ptr + last_k * stride_wk + offs_r, mask=mask_r, other=0.0)
            y += w.to(tl.float32) * tl.load(x_ptr + last_k * stride_xk).to(tl.float32)
        offs_r -= shift
    y_first = (split.to(tl.int64) * batch + item) * R
    y_ptrs = y_ptr + y_first + offs_r
    if bias_ptr is not None:
        y = add_bias(y, bias_ptr + offs_r * stride_bias, mask_r)
    y = activated(y, ACTIVATION, y_ptr.dtype.element_ty)
    if residual_ptr is not None:
        y = add_residual(y, tl.load(residual_ptr + y_first + offs_r, mask=mask_r, other=0.0))
    tl.store(y_ptrs, y, mask=mask_r)
