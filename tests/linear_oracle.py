"""What a result of ``linear`` is judged against: float64, and what PyTorch's operations lose."""

import torch
from torch import Tensor
from torch.nn import functional as F

from oracle import ACCUMULATION, assert_close, is_interpreted, tf32

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def eager(x, weight, bias=None, activation="none", residual=None) -> Tensor:
    """The same by PyTorch's separate operations."""
    y = ACTIVATIONS[activation](F.linear(x, weight, bias))
    return y if residual is None else y + residual


def steps(x, weight, bias, activation, residual, dtype=torch.float64) -> list[Tensor]:
    """Biased, activated and final values in float64, each rounded to ``dtype`` on the way."""
    x, weight = x.double(), weight.double()
    biased = x @ weight.mT if bias is None else x @ weight.mT + bias.double()
    biased = biased.to(dtype).double()
    activated = ACTIVATIONS[activation](biased).to(dtype).double()
    if residual is None:
        return [biased, activated, activated]
    return [biased, activated, (activated + residual.double()).to(dtype).double()]


def assert_linear(
    got: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    precision: str = "tf32",
    what: str = "",
) -> None:
    """Demand of a linear's result what the contract promises: of its product, and of the rest.

    Roundings are those of PyTorch's separate operations, done exactly; fp32 sums and activations
    may add a few units of 2**-24 of what they add up.
    """
    assert got.dtype is x.dtype, f"{what} dtype {got.dtype}"
    assert got.is_contiguous(), f"{what} strides {got.stride()}"
    x, weight, bias, residual = (
        None if t is None else t.detach().cpu() for t in (x, weight, bias, residual)
    )
    rest = (bias, activation, residual)
    biased, activated, want = steps(x, weight, *rest)
    if x.dtype is torch.float64:
        magnitudes = x.abs() @ weight.abs().mT + biased.abs() + want.abs()
        assert_close(got, want, [1e-14 * magnitudes], what)
        return
    magnitudes = x.double().abs() @ weight.double().abs().mT + biased.abs() + want.abs()
    if x.dtype is torch.bfloat16 and is_interpreted():
        # The interpreter truncates fp32 -> bf16: a whole unit instead of half, at every step.
        rounding = 2.0**-7 * (1.2 * biased.abs() + activated.abs() + want.abs())
    elif x.dtype is not torch.float32:
        rounding = 1.1 * (steps(x, weight, *rest, dtype=x.dtype)[-1] - want)
    elif precision == "tf32":
        rounding = 1.1 * (steps(tf32(x), tf32(weight), *rest)[-1] - want)
    else:
        rounding = 2 * (eager(x, weight, *rest).double() - want)
    assert_close(got, want, [rounding, ACCUMULATION * magnitudes], what)
