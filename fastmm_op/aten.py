"""ATen's product, held to the contract: where there is no Triton, no supported card, or float64."""

import torch
from torch import Tensor

from fastmm_op import contract


def matmul(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """``torch.matmul``, contiguous; arguments and errors as ``fastmm_op.matmul``.

    Where the user lets PyTorch compute float32 products in less, ``"fp32"`` and ``"ieee"`` are
    computed in float64 and rounded: the setting is not ours to change.
    """
    contract.check_inputs(a, b, precision)
    exact = a.dtype is torch.float32 and precision != "tf32"
    if exact and torch.get_float32_matmul_precision() != "highest":
        return torch.matmul(a.double(), b.double()).float().contiguous()
    return torch.matmul(a, b).contiguous()
