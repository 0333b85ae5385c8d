"""What a result is judged against: float64, and what correct rounding alone loses.

Tolerances are relative to that. A tf32 product may lose 1.1 times what exact sums of correctly
rounded operands lose; a 16-bit product 1.1 times what rounding the exact result once loses; an
fp32 product twice what torch's own loses. What fp32 sums add is bounded by ACCUMULATION.
"""

import torch
from torch import Tensor

from fastmm_op.oracle import round_to_tf32

# fp32 sums in blocks: a few units of 2**-24 of the sum of magnitudes, |a| @ |b|.
ACCUMULATION = 8 * 2.0**-24
# Sums of subnormal fp32 are rounded to a multiple of this, each of K times by half of it at most.
SUBNORMAL_STEP = 2.0**-149


def exact(a: Tensor, b: Tensor) -> Tensor:
    """The product in float64, computed where the operands are, on the CPU."""
    return torch.matmul(a.detach().double(), b.detach().double()).cpu()


def tf32(x: Tensor) -> Tensor:
    """float32 rounded to TF32, as float64."""
    return round_to_tf32(x.detach()).double()


def norm(x: Tensor) -> float:
    """Frobenius norm, of any float64 values: scaled, so that squares do not overflow."""
    largest = x.abs().max().item() if x.numel() else 0.0
    return largest * (x / largest).norm().item() if largest else 0.0


def assert_close(got: Tensor, want: Tensor, allowed: list[Tensor], what: str = "") -> None:
    """Demand ||got - want|| <= the sum of the norms of the allowed errors."""
    assert got.shape == want.shape, f"{what} shape {tuple(got.shape)}, not {tuple(want.shape)}"
    difference = got.detach().cpu().double() - want
    error = norm(difference)
    limit = sum(norm(x) for x in allowed)
    if not error <= limit:
        worst = difference.abs().nan_to_num(torch.inf)
        at = tuple(i.item() for i in torch.unravel_index(worst.argmax(), worst.shape))
        raise AssertionError(
            f"{what} error norm {error:.3e} > {limit:.3e} (product's norm {norm(want):.3e}); "
            f"worst at {at}: got {got[at].item()!r}, exact {want[at].item()!r}"
        )


def assert_accurate(got: Tensor, a: Tensor, b: Tensor, precision: str = "tf32", what="") -> None:
    """Demand of ``got = matmul(a, b, precision=precision)`` what the contract promises.

    Inputs and product are finite. The error is judged twice: as it is, and with every row of a and
    column of b brought to norm 1, so that a small row is not hidden behind a large one.
    """
    want = exact(a, b)
    assert got.shape == want.shape, f"{what} shape {tuple(got.shape)}, not {tuple(want.shape)}"
    assert got.dtype is a.dtype, f"{what} dtype {got.dtype}"
    assert got.is_contiguous(), f"{what} strides {got.stride()}"
    sums = exact(a.abs(), b.abs())
    if a.dtype is torch.float64:
        # ATen's own product, whatever the order of its sums.
        rounding, accumulation = 0 * want, 1e-15 * a.shape[-1] * sums
    else:
        rounding, accumulation = rounding_error(a, b, precision, want), ACCUMULATION * sums
        accumulation += a.shape[-1] / 2 * SUBNORMAL_STEP
    assert_close(got, want, [rounding, accumulation], what)
    balance = balancing_weights(a, b)
    allowed = [balance * rounding, balance * accumulation]
    assert_close(balance * got.cpu().double(), balance * want, allowed, f"{what} (balanced)")


def rounding_error(a: Tensor, b: Tensor, precision: str, want: Tensor) -> Tensor:
    """The errors that the contract grants beside those of accumulation, elementwise."""
    if a.dtype is torch.bfloat16 and is_interpreted():
        # The interpreter truncates fp32 -> bf16 (triton 3.6 to 3.9): up to one whole unit in the
        # last place, which is at most 2**-7 of each element, instead of half of one.
        return 2.0**-7 * want
    if a.dtype is not torch.float32:
        return 1.1 * (want.to(a.dtype).double() - want)
    if precision == "tf32":
        return 1.1 * (exact(tf32(a), tf32(b)) - want)
    return 2 * (torch.matmul(a.detach().cpu(), b.detach().cpu()).double() - want)


def balancing_weights(a: Tensor, b: Tensor) -> Tensor:
    """1 / (norm of a's row * norm of b's column), for every element of the product."""
    rows = a.detach().cpu().double().norm(dim=-1)
    columns = b.detach().cpu().double().norm(dim=-2 if b.dim() > 1 else -1)
    rows = rows.unsqueeze(-1) if a.dim() > 1 and b.dim() > 1 else rows
    columns = columns.unsqueeze(-2) if a.dim() > 1 and b.dim() > 1 else columns
    if a.dim() > 1 and b.dim() == 1:
        columns = columns.reshape(())
    return 1 / (rows.where(rows > 0, 1) * columns.where(columns > 0, 1))


def assert_same_specials(got: Tensor, want: Tensor, what: str = "") -> None:
    """Demand Inf, -Inf, NaN and finite values in the same places."""
    got, want = got.detach().cpu(), want.to(got.dtype).cpu()
    for name, where in (
        ("NaN", torch.isnan),
        ("+Inf", torch.isposinf),
        ("-Inf", torch.isneginf),
    ):
        wrong = where(got) != where(want)
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            raise AssertionError(
                f"{what} {name} differs at {wrong.sum()} places, first {at}: "
                f"got {got[at].item()}, IEEE arithmetic gives {want[at].item()}"
            )


def is_interpreted() -> bool:
    from fastmm_op import ops

    return ops.INTERPRETED
