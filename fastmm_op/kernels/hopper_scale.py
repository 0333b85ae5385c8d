"""How consumers of gemm_hopper_kernel scale their part of a tile of C (gemm_hopper.py)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

NARROW = gl.constexpr(60)  # exponents within +-60: two products neither overflow nor underflow


@gluon.jit
def power_of_two(e):
    return ((e + 127) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def apply_exponents(x, row_e, col_e, wide):
    """x * 2^(row_e + col_e), every product but the last exact for 2^-48 <= |x| <= 2^50."""
    row_e = gl.expand_dims(row_e, 1)
    col_e = gl.expand_dims(col_e, 0)
    if wide:  # rare; summed first, for a huge and a tiny factor must not meet x in turn
        e = gl.minimum(gl.maximum(row_e + col_e, -200), 176)  # beyond: 0 and Inf for all such x
        first = gl.minimum(gl.maximum(e, -76), 76)
        y = x * power_of_two(first) * power_of_two(e - first)
    else:
        y = x * power_of_two(row_e) * power_of_two(col_e)
    return y


@gluon.jit
def scale_edge(x, row_e, col_exp_ptr, col0, shift, N):
    """x (WARPGROUP_M, EDGE_N), which starts at col0, by its rows' and columns' exponents."""
    layout: gl.constexpr = x.type.layout
    cols = col0 + gl.arange(0, x.shape[1], gl.SliceLayout(0, layout))
    inside = cols < N + shift
    cols = gl.where(cols < N, cols, cols - N)
    col_e = gl.load(col_exp_ptr + cols, mask=inside, other=0)
    row_e = gl.convert_layout(row_e, gl.SliceLayout(1, layout), assert_trivial=True)
    return apply_exponents(x, row_e, col_e, True)
