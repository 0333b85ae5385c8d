"""fp32 as numbers of TF32, in registers: rounded to one, or split into two."""

import triton
import triton.language as tl

from fastmm_op.kernels.common import INTERPRETED

# Halfway between the largest number of TF32 and Inf.
LARGEST_ROUNDED = tl.constexpr(2.0**128 - 2.0**116)
# By so much numbers are multiplied before they are split: the last bit of fp32's smallest one is
# then a number of TF32, whose smallest is 2**-136.
SPLIT_SCALE = tl.constexpr(2.0**13)


@triton.jit
def add_half_of_tf32(x):
    """fp32 that is x rounded to TF32, ties away from zero, once the 13 lowest bits are dropped.

    The tensor core drops them. What would round up to Inf is left as it is, and so finite. An fma
    that rounds towards zero returns every number as it was, and every NaN as one that survives.
    TF32's smallest number is 2**-136: what is below half of that becomes zero.
    """
    return tl.inline_asm_elementwise(
        """
        {
            .reg .f32 magnitude;
            .reg .pred rounds;
            fma.rz.f32 $0, $1, 0f33000000, $1;
            abs.f32 magnitude, $0;
            setp.lt.f32 rounds, magnitude, 0f7F7FF000;
            @rounds add.s32 $0, $0, 0x1000;
        }
        """,
        "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def round_to_tf32(x):
    """The same rounding where no tensor core drops the bits, and without assembly: in integers."""
    bits = x.to(tl.int32, bitcast=True)
    rounds = tl.abs(x) < LARGEST_ROUNDED
    bits = tl.where(rounds, bits + 0x1000, bits) & ~0x1FFF
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def split_in_tf32(x):
    """hi + lo = x * SPLIT_SCALE to 23 bits, once the 13 lowest bits of lo are dropped.

    Veltkamp's splitting: hi is rounded to nearest, so that the product of two lo, which nobody
    adds, has either sign. Where 2**26 * x is no finite fp32, hi is not finite either; lo may then
    be anything. In assembly, for a compiler that contracts the differences would undo it.
    """
    if INTERPRETED:
        scaled = x * SPLIT_SCALE
        large = scaled * (2.0**13 + 1)
        hi = large - (large - scaled)
        bits = (scaled - hi).to(tl.int32, bitcast=True) + 0x1000
        lo = (bits & ~0x1FFF).to(tl.float32, bitcast=True)
    else:
        hi, lo = tl.inline_asm_elementwise(
            """
            {
                .reg .f32 large, rest, negative;
                mul.rn.f32 large, $2, 0f4C800400;
                fma.rn.f32 rest, $2, 0fC6000000, large;
                sub.rn.f32 $0, large, rest;
                neg.f32 negative, $0;
                fma.rn.f32 $1, $2, 0f46000000, negative;
                add.s32 $1, $1, 0x1000;
            }
            """,
            "=r,=r,r", [x], dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    return hi, lo
