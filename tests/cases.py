"""The inputs that tests share: memory layouts and the number families of the accuracy contract."""

import torch
from torch import Tensor

from fastmm_op.launches import Plan

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}
PRECISIONS = ("tf32", "fp32", "ieee")

# Odd, ragged, one-wide and aligned sizes (M, K, N); tiles have 16 to 256 of each.
SHAPES = [
    (1, 1, 1),
    (1, 7, 1),
    (5, 1, 3),
    (17, 33, 9),
    (33, 130, 65),
    (32, 64, 48),
    (1, 300, 37),
    (37, 300, 1),
    (130, 20, 3),
]
ZERO_SHAPES = [(0, 5, 3), (5, 0, 3), (5, 3, 0), (0, 0, 0), (0, 0, 2)]


def surrounded(x: Tensor, before: int, after: int) -> Tensor:
    """x as a slice of wider rows, whose other elements are NaN: reading one shows in the result."""
    wide = x.new_full((*x.shape[:-1], before + x.shape[-1] + after), torch.nan)
    view = wide[..., before : before + x.shape[-1]]
    return view.copy_(x)


def at_offset(x: Tensor, elements: int) -> Tensor:
    """A contiguous copy that starts so many elements after an aligned address."""
    memory = x.new_full((elements + x.numel(),), torch.nan)
    return memory[elements:].view(x.shape).copy_(x)


def every_other(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
    return wide[..., ::2].copy_(x)


def negated_view(x: Tensor) -> Tensor:
    """x as the imaginary part of a conjugate: a view whose negation is still to be done."""
    if x.dtype not in (torch.float32, torch.float64):
        return torch._neg_view(x.neg())
    view = torch.complex(torch.zeros_like(x), x.neg()).conj().imag
    assert view.is_neg()
    return view


def expanded(dim: int):
    """Stride 0: the first row (dim -2) or column (dim -1) stands for all of them."""
    return lambda x: x.narrow(dim, 0, min(1, x.shape[dim])).expand_as(x)


# Ways for a matrix to lie in memory. All but the expanded ones keep its values.
LAYOUTS = {
    "N": lambda x: x.contiguous(),
    "T": lambda x: x.mT.contiguous().mT,
    "wide rows": lambda x: surrounded(x, 0, 3),
    "wide columns": lambda x: surrounded(x.mT, 2, 3).mT,
    "offset 1": lambda x: at_offset(x, 1),
    "offset 2": lambda x: at_offset(x, 2),
    "offset 4": lambda x: at_offset(x, 4),
    "every other": every_other,
    "negated": negated_view,
    "expanded rows": expanded(-2),
    "expanded columns": expanded(-1),
}


def spread(n: int, largest: float) -> Tensor:
    """n powers of ten from 10**-largest to 10**largest."""
    return 10 ** torch.linspace(-largest, largest, n, dtype=torch.float64)


def scaled(x: Tensor, factors: Tensor | float) -> Tensor:
    return (x.double() * factors).float()


def cancelling(m: int, k: int, n: int) -> tuple[Tensor, Tensor]:
    half = k // 2
    x, y = torch.randn(m, half), torch.randn(half, n)
    a = torch.cat([x, -x + 1e-4 * torch.randn(m, half), torch.zeros(m, k - 2 * half)], 1)
    return a, torch.cat([y, y, torch.randn(k - 2 * half, n)], 0)


def with_zero_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a[::3] = 0
    b[:, 1::4] = 0
    return a, b


# Name -> (M, K, N) -> fp32 inputs with a finite product.
FAMILIES = {
    "rand": lambda m, k, n: (torch.rand(m, k), torch.rand(k, n)),
    "randn": lambda m, k, n: (torch.randn(m, k), torch.randn(k, n)),
    "rows of 1e-30 to 1e30": lambda m, k, n: (
        scaled(torch.randn(m, k), spread(m, 30)[:, None]),
        torch.randn(k, n),
    ),
    "columns of 1e-30 to 1e30": lambda m, k, n: (
        torch.randn(m, k),
        scaled(torch.randn(k, n), spread(n, 30)),
    ),
    "both 1e-17 to 1e17": lambda m, k, n: (
        scaled(torch.randn(m, k), spread(m, 17)[:, None]),
        scaled(torch.randn(k, n), spread(n, 17)),
    ),
    "1e-30 to 1e30 along K": lambda m, k, n: (
        scaled(torch.randn(m, k), spread(k, 30)),
        torch.randn(k, n),
    ),
    "badly scaled rows": lambda m, k, n: (
        scaled(torch.randn(m, k), 2.0 ** torch.randint(-60, 60, (m, 1)).double()),
        scaled(torch.randn(k, n), 2.0 ** torch.randint(-60, 60, (n,)).double()),
    ),
    "cancellation": cancelling,
    "zero rows": lambda m, k, n: with_zero_rows(torch.randn(m, k), torch.randn(k, n)),
    "subnormal a": lambda m, k, n: (
        scaled(torch.randn(m, k), 2.0**-135),
        scaled(torch.randn(k, n), 2.0**100),
    ),
    "tiny a, subnormal product": lambda m, k, n: (
        scaled(torch.randn(m, k), 2.0**-120),
        scaled(torch.randn(k, n), 2.0**-20),
    ),
    "near overflow": lambda m, k, n: (
        scaled(torch.rand(m, k) - 0.5, 2.0**127.99),
        scaled(torch.randn(k, n), 2.0**-20),
    ),
    "near overflow times subnormal": lambda m, k, n: (
        scaled(torch.rand(m, k) - 0.5, 2.0**127.99),
        scaled(torch.randn(k, n), 2.0**-135),
    ),
    "subnormal times near overflow": lambda m, k, n: (
        scaled(torch.randn(m, k), 2.0**-135),
        scaled(torch.rand(k, n) - 0.5, 2.0**127.99),
    ),
}
# Those whose numbers bf16 and fp16 can hold.
NARROW_FAMILIES = ("rand", "randn", "cancellation", "zero rows")


def put(x: Tensor, values: dict[tuple[int, int], float]) -> Tensor:
    for at, value in values.items():
        x[at] = value
    return x


INF, NAN = float("inf"), float("nan")


def specials(m: int, k: int, n: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> fp32 inputs with Inf or NaN; every size is at least 5."""
    a, b = torch.randn(m, k), torch.randn(k, n)
    zeros = put(b.clone(), {(2, 0): 0.0, (2, 3): -0.0, (k - 1, 1): 0.0})
    infs = put(a.clone(), {(0, 2): INF, (1, 2): -INF, (m - 1, k - 1): INF})
    return {
        "Inf in a": (infs, b),
        "Inf in b": (a, put(b.clone(), {(0, 0): INF, (k - 1, n - 1): -INF})),
        "NaN in a": (put(a.clone(), {(0, 0): NAN, (m - 1, k - 1): NAN}), b),
        "NaN in b": (a, put(b.clone(), {(1, 1): NAN, (k - 1, n - 1): NAN})),
        "Inf and -Inf in a row": (put(a.clone(), {(1, 0): INF, (1, k - 1): -INF}), b),
        "Inf times zero": (infs, zeros),
        "Inf in both": (infs, put(b.clone(), {(2, 1): INF, (2, 2): -INF})),
        "rows of Inf only": (put(a.clone(), {(3, i): INF for i in range(k)}), b.abs()),
        # fp16 beside 1e30 cannot hold 1e-30, and must not make a zero of it: Inf * 0 is NaN.
        "Inf times tiny": (infs, put(b.clone(), {(2, 0): 1e-30, (0, 0): 1e30, (2, 1): -1e-30})),
        "tiny times Inf": (
            put(a.clone(), {(0, 2): 1e-30, (0, 0): 1e30}),
            put(b * 1, {(2, 0): INF}),
        ),
        # The smallest number of TF32; test_inf_times_what_tf32_cannot_hold has what is below it.
        "Inf times subnormal": (infs, put(b.clone(), {(2, 0): 2.0**-136, (2, 1): -(2.0**-136)})),
        "finite overflow": (put(a * 1, {(0, 0): 3e38}), put(b * 1, {(0, 0): 3e38, (0, 1): -3e38})),
    }


def interpreted_as(plan: Plan) -> str:
    """What the interpreter makes of a plan: the same text for plans that are the same to it.

    Warps, stages and when kernels start, all that often differs between cards, mean nothing to it.
    """
    nothing = ("WAITS", "LETS_NEXT")
    return str(
        [
            (s.kernel, s.grid, s.args, {n: c for n, c in s.constexprs.items() if n not in nothing})
            for s in plan.launches
        ]
    )
