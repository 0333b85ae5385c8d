"""Small Triton helpers that more than one kernel uses."""

import triton
import triton.language as tl

# Whether kernels of this process run in Triton's interpreter (TRITON_INTERPRET=1).
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def tile_coordinates(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Grouped tile order: GROUP_M rows of tiles are walked column by column, so that L2 keeps them."""
    group_size = GROUP_M * tiles_n
    group = tile // group_size
    first_m = group * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    within = tile % group_size
    return first_m + within % rows, within // rows


@triton.jit
def power_of_two(exponent):
    """2**exponent as fp32, for integers in [-126, 127]; built from the exponent bits, so exact."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_by_exponents(acc, row_exp, col_exp):
    """acc * 2**(row_exp[:, None] + col_exp[None, :]), for exponents in [-163, 113].

    An intermediate overflows or underflows only where the result does: the exponents within +-60
    are applied one after the other, what exceeds them (rare, a uniform branch) first and together.
    """
    row_near = tl.minimum(tl.maximum(row_exp, -60), 60)
    col_near = tl.minimum(tl.maximum(col_exp, -60), 60)
    row_far = row_exp - row_near
    col_far = col_exp - col_near
    if (tl.max(tl.abs(row_far), 0) > 0) | (tl.max(tl.abs(col_far), 0) > 0):
        acc = acc * power_of_two(row_far)[:, None] * power_of_two(col_far)[None, :]
    return acc * power_of_two(row_near)[:, None] * power_of_two(col_near)[None, :]
