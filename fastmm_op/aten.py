"""ATen's products, held to the contract: for float64, and where no card or Triton is supported."""

from collections.abc import Callable
from functools import partial, wraps

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmm_op import contract

_ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}

# On CPUs with AMX, oneDNN takes K of 16-bit matrices by blocks of so many, and multiplies what lies
# behind the end of a row by zeros: NaN or Inf there, or in the next row, reaches the result (oneDNN
# issue 5717, present in torch 2.13).
_BLOCK_K = 32


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward.default(grad, x)
    # ATen's has no derivative of its own.
    sigmoid = x.sigmoid()
    return grad * sigmoid * (1 + x * (1 - sigmoid))


_BACKWARDS = {
    "relu": partial(torch.ops.aten.threshold_backward.default, threshold=0),
    "gelu": torch.ops.aten.gelu_backward.default,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward.default, approximate="tanh"),
    "silu": _silu_backward,
}


def _without_autocast(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The product in its inputs' dtype also where autocast is active, as it is around some graphs.

    Autocast's part in the ops is done before they come here.
    """

    @wraps(product)
    def uncast(first: Tensor, *args, **kwargs) -> Tensor:
        device_type = first.device.type
        if not torch.is_autocast_enabled(device_type):
            return product(first, *args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return product(first, *args, **kwargs)

    return uncast


@_without_autocast
def matmul(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """``torch.matmul``, contiguous; arguments and errors as ``fastmm_op.matmul``.

    Where the user lets PyTorch compute float32 products in less, ``"fp32"`` and ``"ieee"`` are
    computed in float64 and rounded: the setting is not ours to change.
    """
    contract.check_inputs(a, b, precision)
    if needs_float64(a, precision):
        return torch.matmul(a.double(), b.double()).float().contiguous()
    missing = missing_k(a)
    if missing:
        a = F.pad(a, (0, missing))
        b = F.pad(b, (0, missing) if b.dim() == 1 else (0, 0, 0, missing))
    return torch.matmul(a, b).contiguous()


@_without_autocast
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    precision: str,
) -> Tensor:
    """``torch.nn.functional.linear``, its activation, plus the residual; else as ``matmul``."""
    contract.check_linear(x, weight, bias, residual, activation, precision)
    if needs_float64(x, precision):
        wide_bias = None if bias is None else bias.double()
        y = F.linear(x.double(), weight.double(), wide_bias).float()
    elif missing := missing_k(x):
        y = F.linear(F.pad(x, (0, missing)), F.pad(weight, (0, missing)), bias)
    else:
        y = F.linear(x, weight, bias)
    y = activate(y, activation)
    return (y if residual is None else y + residual).contiguous()


def missing_k(a: Tensor) -> int:
    """Zeros to add to K for ATen's product on this device not to read behind a's rows."""
    exposed = a.device.type == "cpu" and a.dtype in (torch.float16, torch.bfloat16)
    return -a.shape[-1] % _BLOCK_K if exposed else 0


def needs_float64(a: Tensor, precision: str) -> bool:
    """Whether ATen's own float32 product may be less exact than ``precision`` asks for."""
    exact = a.dtype is torch.float32 and precision != "tf32"
    # Where PyTorch's ways to say it meet; torch.get_float32_matmul_precision() refuses to answer
    # after the newer of them was used.
    backend = torch.backends.cuda if a.is_cuda else torch.backends.mkldnn
    return exact and backend.matmul.fp32_precision in ("tf32", "bf16")


def activate(x: Tensor, activation: str) -> Tensor:
    """One of ``problem.ACTIVATIONS`` of x."""
    return x if activation == "none" else _ACTIVATIONS[activation](x)


def activation_gradient(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """The gradient of x, given that of ``activate(x, activation)``; differentiable."""
    return grad if activation == "none" else _BACKWARDS[activation](grad, x)
