"""Small Triton helpers that more than one kernel uses."""

import triton
import triton.language as tl

# Whether kernels of this process run in Triton's interpreter (TRITON_INTERPRET=1).
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
INF = tl.constexpr(float("inf"))
# Stands for the exponent of what has none; below every other one, also after sums with a few.
NO_EXPONENT = tl.constexpr(-10000)


@triton.jit
def tile_coordinates(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Grouped tile order: GROUP_M rows of tiles are walked column by column, for L2's sake."""
    group_size = GROUP_M * tiles_n
    group = tile // group_size
    first_m = group * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    within = tile % group_size
    return first_m + within % rows, within // rows


@triton.jit
def item_k(K, K_total, item):
    """The K of a batch item: less than K for the last of items that are slabs of one K_total."""
    return tl.minimum(K, K_total - item * K).to(tl.int32)


@triton.jit
def count_blocks(size, BLOCK: tl.constexpr):
    """As tl.cdiv, for sizes from one on: up to the largest that 32 bits hold."""
    return (size - 1) // BLOCK + 1


@triton.jit
def class_size(total, item, classes):
    """How many of so many rows are in class ``item``: that one, and every classes-th after it."""
    return tl.cdiv(total - item, classes).to(tl.int32)


@triton.jit
def finite_magnitude(x):
    """|x| of fp32 as int32 bits, which compare as the numbers do; 0 for Inf and NaN."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(bits < 0x7F800000, bits, 0)


@triton.jit
def exponent_of(magnitude):
    """floor(log2) of what finite_magnitude returned, as int32; NO_EXPONENT for zero.

    Subnormals count as 2**-126: scaled as if they were, they are still normal numbers of fp16.
    """
    return tl.where(magnitude == 0, NO_EXPONENT, tl.maximum(magnitude >> 23, 1) - 127)


@triton.jit
def power_of_two(exponent):
    """2**exponent as fp32, for integers in [-126, 127]; built from the exponent bits, so exact."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_by_exponents(acc, row_exp, col_exp):
    """acc * 2**(row_exp[:, None] + col_exp[None, :]), for exponents in [-163, 113].

    An intermediate overflows or underflows only where the result does. Exponents within +-60 are
    applied one after the other; where one exceeds that (rare, a uniform branch), the sum is, by
    halves, and bounded where the result is zero or Inf for every acc in [2**-48, 2**50].
    """
    largest = tl.maximum(tl.max(tl.abs(row_exp), 0), tl.max(tl.abs(col_exp), 0))
    if largest > 60:
        total = row_exp[:, None] + col_exp[None, :]
        total = tl.minimum(tl.maximum(total, -252), 252)
        half = total >> 1
        acc = acc * power_of_two(half) * power_of_two(total - half)
        # No else: a second version of acc would not fit the registers beside the first.
        row_exp = tl.zeros_like(row_exp)
        col_exp = tl.zeros_like(col_exp)
    return acc * power_of_two(row_exp)[:, None] * power_of_two(col_exp)[None, :]
