"""Everything PyTorch is told about ``fastmm::linear``, on one page, in the order of ops.py."""

from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastmm_op import aten, contract
from fastmm_op.derivative import linear_gradients
from fastmm_op.ops import (
    HAVE_TRITON,
    INTERPRETED,
    REJECTED,
    _launch,
    _lib,
    _matmul,
    autocast_operand,
)

# The residual is not keyword-only, as it is in Python: PyTorch derives no autograd or vmap for
# tensors that are.
_lib.define(
    "linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, *, "
    'str activation="none", str precision="tf32") -> Tensor',
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_linear = torch.ops.fastmm.linear.default


def _triton_impl(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "none",
    precision: str = "tf32",
) -> Tensor:
    return _launch().linear(x, weight, bias, residual, activation, precision)


def _aten_impl(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "none",
    precision: str = "tf32",
) -> Tensor:
    return aten.linear(x, weight, bias, residual, activation, precision)


def _reject(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "none",
    precision: str = "tf32",
) -> Tensor:
    contract.check_linear(x, weight, bias, residual, activation, precision)
    raise TypeError("fastmm.linear: all inputs must be dense strided tensors")


_lib.impl("linear", _triton_impl if HAVE_TRITON else _aten_impl, "CUDA")
_lib.impl("linear", _triton_impl if INTERPRETED else _aten_impl, "CPU")
for _key in REJECTED:
    _lib.impl("linear", _reject, _key)


@torch.library.register_fake("fastmm::linear", lib=_lib)
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "none",
    precision: str = "tf32",
) -> Tensor:
    contract.check_linear(x, weight, bias, residual, activation, precision)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


# Autograd. The op returns the activated values only, so backward computes what was activated once
# more; fastmm_op.linear spends memory instead of time, and keeps it.


def _needs_grad(ctx) -> tuple[bool, ...]:
    """Of x, weight, bias and residual; PyTorch leaves out trailing ones that were not given."""
    return (*ctx.needs_input_grad, False, False)[:4]


def _setup_context(ctx, inputs, keyword_only_inputs, output) -> None:
    x, weight, bias, _ = inputs
    needs_x, needs_weight, needs_bias, _ = _needs_grad(ctx)
    ctx.activation = keyword_only_inputs["activation"]
    ctx.precision = keyword_only_inputs["precision"]
    ctx.again = ctx.activation != "none" and (needs_x or needs_weight or needs_bias)
    ctx.bias_shape = None if bias is None else bias.shape
    ctx.save_for_backward(
        x if needs_weight or ctx.again else None,
        weight if needs_x or ctx.again else None,
        bias if ctx.again else None,
    )


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_residual = _needs_grad(ctx)
    inner = grad
    if ctx.again:
        preactivation = _linear(x, weight, bias, precision=ctx.precision)
        inner = aten.activation_gradient(grad, preactivation, ctx.activation)
    product = partial(_matmul, precision=ctx.precision)
    grad_x, grad_weight = linear_gradients(
        product, inner, x if needs_weight else None, weight if needs_x else None
    )
    grad_bias = inner.sum_to_size(ctx.bias_shape) if needs_bias else None
    return grad_x, grad_weight, grad_bias, grad if needs_residual else None


torch.library.register_autograd("fastmm::linear", _backward, setup_context=_setup_context, lib=_lib)


def _vmap(
    info,
    in_dims,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "none",
    precision: str = "tf32",
):
    def front(tensor: Tensor | None, dim: int | None) -> Tensor | None:
        """The mapped dimension first; a new one of size one if none is mapped."""
        if tensor is None:
            return None
        return tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)

    dim_x, dim_weight, dim_bias, dim_residual = (*in_dims, None, None)[:4]
    x, residual = front(x, dim_x), front(residual, dim_residual)
    if dim_weight is None and dim_bias is None:
        # More rows of the same product.
        x = x.expand(info.batch_size, *x.shape[1:])
        if residual is not None:
            residual = residual.expand(info.batch_size, *residual.shape[1:])
        how = {"activation": activation, "precision": precision}
        return _linear(x, weight, bias, residual, **how), 0
    # Many products: as torch's linear under vmap, rounded to 16 bits before the bias is added.
    rows = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
    y = _matmul(rows, front(weight, dim_weight).mT, precision=precision)
    y = y.reshape(y.shape[0], *x.shape[1:-1], y.shape[-1])
    if bias is not None:
        bias = front(bias, dim_bias)
        y = y + bias.reshape(bias.shape[0], *[1] * (x.dim() - 2), bias.shape[-1])
    y = aten.activate(y, activation)
    return (y if residual is None else y + residual), 0


torch.library.register_vmap("fastmm::linear", _vmap, lib=_lib)


def _autocast(device_type: str):
    def impl(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        activation: str = "none",
        precision: str = "tf32",
    ) -> Tensor:
        tensors = (x, weight, bias, residual)
        cast = [t if t is None else autocast_operand(t, device_type) for t in tensors]
        with torch.autocast(device_type, enabled=False):
            return _linear(*cast, activation=activation, precision=precision)

    return impl


_lib.impl("linear", _autocast("cuda"), "AutocastCUDA")
_lib.impl("linear", _autocast("cpu"), "AutocastCPU")


@register_flop_formula(torch.ops.fastmm.linear)
def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """2 * K for every element of the result, as torch counts addmm."""
    return 2 * x_shape[-1] * torch.Size(out_shape).numel()
