"""Families of numbers by which accuracy is judged: name -> (M, K, N, generator) -> fp32 A and B.

Every product is finite in fp32 unless the family's name says otherwise. All on the generator's
device.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

Family = Callable[[int, int, int, Generator], tuple[Tensor, Tensor]]


def normal(*shape: int, generator: Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device)


def uniform(*shape: int, generator: Generator) -> Tensor:
    return torch.rand(*shape, generator=generator, device=generator.device)


def decades(n: int, largest: float, generator: Generator) -> Tensor:
    """n powers of ten, spread evenly over 10**-largest to 10**largest, shuffled; float64."""
    powers = torch.linspace(-largest, largest, n, dtype=torch.float64, device=generator.device)
    order = torch.randperm(n, generator=generator, device=generator.device)
    return 10 ** powers[order]


def by_rows(a: Tensor, factors: Tensor | float) -> Tensor:
    return (a.double() * torch.as_tensor(factors, device=a.device).reshape(-1, 1)).float()


def by_columns(a: Tensor, factors: Tensor | float) -> Tensor:
    return (a.double() * torch.as_tensor(factors, device=a.device).reshape(1, -1)).float()


def scaled_rows(largest_a: float, largest_b: float) -> Family:
    """Rows of A, columns of B, times powers of ten."""

    def family(m: int, k: int, n: int, g: Generator) -> tuple[Tensor, Tensor]:
        a = by_rows(normal(m, k, generator=g), decades(m, largest_a, g))
        return a, by_columns(normal(k, n, generator=g), decades(n, largest_b, g))

    return family


def within_rows(largest: float) -> Family:
    """Every element times a power of ten of its own."""

    def family(m: int, k: int, n: int, g: Generator) -> tuple[Tensor, Tensor]:
        a = normal(m, k, generator=g) * decades(m * k, largest, g).view(m, k).float()
        return a, normal(k, n, generator=g) * decades(k * n, largest, g).view(k, n).float()

    return family


def inverse_along_k(largest: float) -> Family:
    """Columns of A grow as rows of B shrink: every product matters."""

    def family(m: int, k: int, n: int, g: Generator) -> tuple[Tensor, Tensor]:
        factors = decades(k, largest, g)
        a = by_columns(normal(m, k, generator=g), factors)
        return a, by_rows(normal(k, n, generator=g), 1 / factors)

    return family


def near_cancellation(m: int, k: int, n: int, g: Generator) -> tuple[Tensor, Tensor]:
    """The second half of K takes back what the first half gives, but for 1e-4 of it."""
    half = k // 2
    x, y = normal(m, half, generator=g), normal(half, n, generator=g)
    rest = k - 2 * half
    a = [x, -x + 1e-4 * normal(m, half, generator=g), normal(m, rest, generator=g)]
    return torch.cat(a, 1), torch.cat([y, y, normal(rest, n, generator=g)])


def with_zero_rows(m: int, k: int, n: int, g: Generator) -> tuple[Tensor, Tensor]:
    a, b = normal(m, k, generator=g), normal(k, n, generator=g)
    a[::3] = 0
    b[:, 1::4] = 0
    return a, b


def with_specials(m: int, k: int, n: int, g: Generator) -> tuple[Tensor, Tensor]:
    """Inf and NaN in a few rows of A and columns of B; the rest of the product is finite."""
    a, b = normal(m, k, generator=g), normal(k, n, generator=g)
    a[0, 0], a[m // 2, k // 2], b[k - 1, 0] = torch.inf, torch.nan, -torch.inf
    return a, b


def magnitude(of_a: float, of_b: float) -> Family:
    def family(m: int, k: int, n: int, g: Generator) -> tuple[Tensor, Tensor]:
        a = (uniform(m, k, generator=g).double() - 0.5) * of_a
        return a.float(), (normal(k, n, generator=g).double() * of_b).float()

    return family


FAMILIES: dict[str, Family] = {
    "rand": lambda m, k, n, g: (uniform(m, k, generator=g), uniform(k, n, generator=g)),
    "randn": lambda m, k, n, g: (normal(m, k, generator=g), normal(k, n, generator=g)),
    "rows of A 1e-30 to 1e30": scaled_rows(30, 0),
    "columns of B 1e-30 to 1e30": scaled_rows(0, 30),
    "both 1e-15 to 1e15": scaled_rows(15, 15),
    "within rows 1e-8 to 1e8": within_rows(8),
    "inverse along K, 1e+-4": inverse_along_k(4),
    "inverse along K, 1e+-8": inverse_along_k(8),
    "inverse along K, 1e+-12": inverse_along_k(12),
    "near cancellation": near_cancellation,
    "subnormal A": magnitude(2.0**-134, 2.0**100),
    "A near overflow": magnitude(2.0**127.99, 2.0**-30),
    "zero rows": with_zero_rows,
    "Inf and NaN": with_specials,
}
