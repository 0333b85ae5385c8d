"""What becomes of a product before it is stored: activation(product + bias) + residual.

A 16-bit result is rounded where eager PyTorch would have stored it: after the bias, after the
activation, after the residual. In between everything is fp32. The activations are PyTorch's own
formulas, and send Inf and NaN where it does.

Used by every kernel that writes C. The functions take no layouts, so Gluon can call them too.
"""

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
# Of the tanh approximation: 2 sqrt(2 / pi), and the cubic term's factor.
TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of fp32 values."""
    if ACTIVATION == "none":
        y = x
    elif ACTIVATION == "relu":
        y = tl.where(x < 0.0, 0.0, x)  # not a maximum: NaN stays NaN
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)); without tanh, and without its cancellation.
        two_u = TWO_SQRT_2_OVER_PI * (x + CUBIC * x * x * x)
        y = x / (1.0 + tl.exp(-two_u))
    else:
        tl.static_assert(ACTIVATION == "silu")
        y = x / (1.0 + tl.exp(-x))
    return y


@triton.jit
def activated(x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """fp32 x, rounded to DTYPE, and its activation, rounded to DTYPE."""
    y = x.to(DTYPE)
    if ACTIVATION != "none":
        y = activate(y.to(tl.float32), ACTIVATION).to(DTYPE)
    return y


@triton.jit
def add_bias(acc, bias_ptrs, mask):
    """fp32 acc plus a bias along its last dimension."""
    return acc + tl.load(bias_ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def add_residual(y, residual):
    """y + residual for values of one dtype, rounded to it."""
    return (y.to(tl.float32) + residual.to(tl.float32)).to(y.dtype)


@triton.jit
def split_columns(x, PARTS: tl.constexpr):
    """x (rows, columns) as PARTS tensors of neighbouring columns."""
    if PARTS == 1:
        return (x,)
    else:
        halves = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
        x0, x1 = tl.split(tl.permute(halves, (0, 2, 1)))
        return split_columns(x0, PARTS // 2) + split_columns(x1, PARTS // 2)


@triton.jit
def store_finished(
    acc, c_ptr, bias_ptr, residual_ptr, c_row, first_n, offs_m, mask_m, N,
    ACTIVATION: tl.constexpr, SLICE_N: tl.constexpr,
):  # fmt: skip
    """Finishes and stores a tile of C, SLICE_N columns at a time.

    The tile starts in row c_row and column first_n; offs_m are its rows, of which C has mask_m. Its
    residual, addresses and activation beside a whole accumulator would not fit the registers.
    """
    offs_n = tl.arange(0, SLICE_N)
    offs = offs_m[:, None] * N + offs_n[None, :]
    parts = split_columns(acc, acc.shape[1] // SLICE_N)
    for i in tl.static_range(acc.shape[1] // SLICE_N):
        first = first_n + i * SLICE_N
        mask_n = offs_n < N - first
        mask = mask_m[:, None] & mask_n[None, :]
        x = parts[i]
        if bias_ptr is not None:
            x = add_bias(x, bias_ptr + first + offs_n, mask_n)
        c = activated(x, ACTIVATION, c_ptr.dtype.element_ty)
        if residual_ptr is not None:
            residual_ptrs = residual_ptr + (c_row * N + first) + offs
            c = add_residual(c, tl.load(residual_ptrs, mask=mask, other=0.0))
        tl.store(c_ptr + (c_row * N + first) + offs, c, mask=mask)
