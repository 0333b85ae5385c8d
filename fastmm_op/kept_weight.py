"""What is asked of a weight that is packed once: its exponents along K, and whether it has changed.

K is balanced by the weight W (N, K) alone: column k of it is multiplied by 2**-e[k], and that of x
by 2**e[k] at each call, which leaves x @ W.T as it is. A packed factor errs, beside its rounding,
by at most 2**-38 of the largest in its row. With W's columns made alike, such an error of x's meets
no larger a factor of W than x's largest does: it is small beside the largest product. So nothing
need be known of x: whatever its columns are scaled by, inversely to W's or not, W's are made alike.

A column counts as small by what it is in every row beside that row's own largest, so rows of very
different size, or one row of a shape of its own, move nothing. Exponents are never positive: no
factor of x grows, and none of W beyond its row's largest.

kernels/balance.py, which asks 32 rows of both operands, does better in one case: where part of W's
rows are scaled against x's columns and others are not. It then shares the range out between the
two; here W keeps all of its own.
"""

import torch
from torch import Tensor

# Columns within this many powers of two of the largest are left alone: ordinary weights move
# nothing, which packing is faster for. It costs so many of the 38 bits above.
DEADBAND = 4
LARGEST_SHIFT = 120
# Elements that are looked at together: bounds the memory this takes.
CHUNK = 2**24
# The exponent of zero, far below all others; sums with a few of them do not overflow.
NOTHING = -(2**16)


def column_exponents(weight: Tensor) -> Tensor:
    """e, (K,) int32 in [-120, 0], of a float32 weight (N, K); any strides.

    Columns that hold no finite number but zero get -120: whatever x has there, of its finite
    numbers, is no part of the result, and should not set the scale of its row.
    """
    profile = torch.full((weight.shape[1],), NOTHING, dtype=torch.int32, device=weight.device)
    for rows in weight.split(max(1, CHUNK // weight.shape[1])):
        magnitude = torch.where(rows.isfinite(), rows.abs(), 0)
        # Subnormals count as 2**-126, as in the kernels.
        exponent = torch.frexp(magnitude).exponent.clamp_(min=-125)
        exponent = torch.where(magnitude > 0, exponent, NOTHING)
        largest = exponent.amax(1, keepdim=True)
        beside = torch.where(exponent > NOTHING, exponent - largest, NOTHING)
        profile = torch.maximum(profile, beside.amax(0))
    return torch.where(profile < -DEADBAND, profile, 0).clamp_(min=-LARGEST_SHIFT).int()


def is_current(weight: Tensor, source: Tensor, version: int) -> bool:
    """Whether a weight is still what was packed.

    Args:
        source: an alias of what was packed. It keeps that memory, so that no other weight can come
            to lie at its address.
        version: the weight's version, which PyTorch counts up with every change in place, then.
    """
    return (
        not weight.is_inference()  # whose changes are not counted
        and weight._version == version
        and weight.data_ptr() == source.data_ptr()
        and weight.dtype is source.dtype
        and weight.device == source.device
        and weight.shape == source.shape
        and weight.stride() == source.stride()
    )
