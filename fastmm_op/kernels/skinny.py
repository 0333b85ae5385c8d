"""Products a few rows or columns wide: the matrix is read once, at memory bandwidth.

The matrix is seen as (rows, K), as the GEMM sees its operands, and multiplied by a few vectors at
once. Products and sums are IEEE fp32: the arithmetic hides under the reads, the tensor core's
rounding would buy nothing.
"""

import triton
import triton.language as tl


@triton.jit
def skinny_kernel(
    w_ptr,  # (batch, R, K), any strides
    x_ptr,  # (batch, S, K): the few vectors
    y_ptr,  # (split_k, batch, S, R) or, by its strides, (split_k, batch, R, S)
    R, S, K, batch, split_k,
    stride_wb, stride_wr, stride_wk,
    stride_xb, stride_xs, stride_xk,
    stride_ys, stride_yr,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, K_MAJOR: tl.constexpr,
):  # fmt: skip
    """y[s, r] = sum over k of w[r, k] * x[s, k], for BLOCK_R rows and one range of K a program."""
    blocks_r = tl.cdiv(R, BLOCK_R)
    split = tl.program_id(0) // blocks_r % split_k
    item = (tl.program_id(0) // blocks_r // split_k).to(tl.int64)
    offs_r = (tl.program_id(0) % blocks_r) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    offs_s = tl.arange(0, BLOCK_S)
    mask_r = offs_r < R
    mask_s = offs_s < S
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), split_k)
    w_ptr += item * stride_wb
    x_ptrs = x_ptr + item * stride_xb + offs_s.to(tl.int64)[:, None] * stride_xs
    if K_MAJOR:
        acc = tl.zeros((BLOCK_S, BLOCK_R, BLOCK_K), tl.float32)
    else:
        acc = tl.zeros((BLOCK_S, BLOCK_K, BLOCK_R), tl.float32)
    for step in range(split * steps, (split + 1) * steps):
        offs_k = tl.cast(step, tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        mask_x = mask_s[:, None] & mask_k[None, :]
        x = tl.load(x_ptrs + offs_k[None, :] * stride_xk, mask=mask_x, other=0.0).to(tl.float32)
        if K_MAJOR:
            w_ptrs = w_ptr + offs_r[:, None] * stride_wr + offs_k[None, :] * stride_wk
            w = tl.load(w_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
            acc += w.to(tl.float32)[None, :, :] * x[:, None, :]
        else:
            w_ptrs = w_ptr + offs_k[:, None] * stride_wk + offs_r[None, :] * stride_wr
            w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
            acc += w.to(tl.float32)[None, :, :] * x[:, :, None]
    y = tl.sum(acc, 2 if K_MAJOR else 1)  # (BLOCK_S, BLOCK_R)
    y_ptrs = y_ptr + (split.to(tl.int64) * batch + item) * R * S
    y_ptrs += offs_s.to(tl.int64)[:, None] * stride_ys + offs_r[None, :] * stride_yr
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_s[:, None] & mask_r[None, :])
