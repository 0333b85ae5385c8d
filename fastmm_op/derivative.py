"""The derivatives of products: products with transposed views, for operands of any rank."""

from collections.abc import Callable

import torch
from torch import Tensor


def gradients(
    product: Callable[[Tensor, Tensor], Tensor],
    grad: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    shape_a: torch.Size,
    shape_b: torch.Size,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a and b, given that of ``torch.matmul(a, b)``.

    Args:
        product: what multiplies; differentiable, so that these gradients are too.
        grad: of the product's shape.
        a: (K,), (M, K) or (..., M, K); None if b's gradient is not asked for.
        b: (K,), (K, N) or (..., K, N); None if a's gradient is not asked for.
        shape_a, shape_b: the operands' shapes, also where the operand is None.

    Returns:
        Tensors of shape_a and shape_b; None for a gradient that is not asked for.
    """
    if len(shape_b) == 1:
        grad = grad.unsqueeze(-1)
    if len(shape_a) == 1:
        grad = grad.unsqueeze(-2)
    grad_a = grad_b = None
    if b is not None:
        columns = b.unsqueeze(-1) if len(shape_b) == 1 else b
        matrix = (1, *shape_a) if len(shape_a) == 1 else shape_a
        grad_a = product(grad, columns.mT).sum_to_size(matrix).reshape(shape_a)
    if a is not None:
        rows = a.unsqueeze(0) if len(shape_a) == 1 else a
        matrix = (*shape_b, 1) if len(shape_b) == 1 else shape_b
        if len(shape_b) <= 2 and rows.dim() > 2:
            # One b for all items of a: its gradient is one product, not a sum of many.
            rows, grad = rows.flatten(0, -2), grad.flatten(0, -2)
        grad_b = product(rows.mT, grad).sum_to_size(matrix).reshape(shape_b)
    return grad_a, grad_b


def linear_gradients(
    product: Callable[[Tensor, Tensor], Tensor],
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and weight, given that of ``x @ weight.mT``.

    Args:
        product: as in ``gradients``.
        grad: (..., N).
        x: (..., K); None if weight's gradient is not asked for.
        weight: (N, K); None if x's gradient is not asked for.

    Returns:
        Tensors of the shapes of x and weight, both row-major; None for what is not asked for.
    """
    grad_x = grad_weight = None
    if weight is not None:
        grad_x = product(grad, weight)
    if x is not None:
        grad_weight = product(as_rows(grad).mT, as_rows(x))
    return grad_x, grad_weight


def as_rows(x: Tensor) -> Tensor:
    """(..., n) as a matrix of n columns."""
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
