"""Everything PyTorch is told about ``fastmm::linear_prepacked``, on one page, as in ops_linear.py.

It is ``linear`` beside whose weight lies a packed copy of it; ``fastmm_op.prepack`` makes both, and
the modules that call this. The copy may be old: each call looks, and if it is (or if no plan for
this x reads it) computes from the weight, as ``linear`` does. The result is ``linear``'s either
way, within the promises of the precision. A CUDA graph records ``linear``.

Autocast leaves the op alone, as it does those of ops_graph.py: modules do not call it there.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastmm_op import aten, contract, ops_linear
from fastmm_op.derivative import linear_gradients
from fastmm_op.ops import HAVE_TRITON, INTERPRETED, _lib, _matmul

# weight: (N, K). source: an alias of it, made with the copy. version: the weight's, then.
_lib.define(
    "linear_prepacked(Tensor x, Tensor weight, Tensor source, Tensor packed, Tensor? bias=None, *, "
    "int version, str precision) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_linear_prepacked = torch.ops.fastmm.linear_prepacked.default


def _triton_impl(
    x: Tensor,
    weight: Tensor,
    source: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    version: int,
    precision: str,
) -> Tensor:
    from fastmm_op import launch_kept

    return launch_kept.linear_prepacked(x, weight, source, packed, bias, version, precision)


def _aten_impl(
    x: Tensor,
    weight: Tensor,
    source: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    version: int,
    precision: str,
) -> Tensor:
    return aten.linear(x, weight, bias, None, "none", precision)


_lib.impl("linear_prepacked", _triton_impl if HAVE_TRITON else _aten_impl, "CUDA")
_lib.impl("linear_prepacked", _triton_impl if INTERPRETED else _aten_impl, "CPU")


@torch.library.register_fake("fastmm::linear_prepacked", lib=_lib)
def _fake(
    x: Tensor,
    weight: Tensor,
    source: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    version: int,
    precision: str,
) -> Tensor:
    contract.check_linear(x, weight, bias, None, "none", precision)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


# Autograd: modules call the op where none is recorded. Whoever else does gets linear's formula.


def _setup_context(ctx, inputs, keyword_only_inputs, output) -> None:
    x, weight, _, _, *bias = inputs
    bias = bias[0] if bias else None
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.precision = keyword_only_inputs["precision"]
    ctx.bias_shape = None if bias is None else bias.shape
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_bias = len(ctx.needs_input_grad) > 4 and ctx.needs_input_grad[4]
    product = partial(_matmul, precision=ctx.precision)
    grad_x, grad_weight = linear_gradients(product, grad, *ctx.saved_tensors)
    grad_bias = grad.sum_to_size(ctx.bias_shape) if needs_bias else None
    return grad_x, grad_weight, None, None, grad_bias


torch.library.register_autograd(
    "fastmm::linear_prepacked", _backward, setup_context=_setup_context, lib=_lib
)


@torch.library.register_vmap("fastmm::linear_prepacked", lib=_lib)
def _vmap(
    info,
    in_dims,
    x: Tensor,
    weight: Tensor,
    source: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    version: int,
    precision: str,
):
    """More rows of the same product; ``linear``'s rule where anything but x is mapped."""
    dim_x, dim_weight, dim_source, dim_packed, *rest = in_dims
    dim_bias = rest[0] if rest else None
    if any(dim is not None for dim in (dim_weight, dim_source, dim_packed, dim_bias)):
        dims = (dim_x, dim_weight, dim_bias)
        return ops_linear._vmap(info, dims, x, weight, bias, precision=precision)
    x = x.movedim(dim_x, 0)
    y = _linear_prepacked(x, weight, source, packed, bias, version=version, precision=precision)
    return y, 0


@register_flop_formula(torch.ops.fastmm.linear_prepacked)
def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """2 * K for every element of the result."""
    return 2 * x_shape[-1] * torch.Size(out_shape).numel()
