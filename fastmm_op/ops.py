"""Everything PyTorch is told about ``fastmm::matmul``, on one page.

Schema, CUDA, CPU, rejected layouts, fake, autograd, vmap, autocast, FLOP count. The op is opaque
(``Library.define`` and ``impl``): a compiled graph calls it as it is.
"""

import importlib.util
import os
from functools import cache, partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastmm_op import aten, contract
from fastmm_op.derivative import gradients

_lib = torch.library.Library("fastmm", "DEF")
_lib.define(
    'matmul(Tensor a, Tensor b, *, str precision="tf32") -> Tensor',
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_matmul = torch.ops.fastmm.matmul.default

HAVE_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAVE_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


# Implementations. Kernels are imported by the first call that needs them, not by importing this.


@cache  # an import statement in each call takes ten times as long
def _launch():
    from fastmm_op import launch

    return launch


def _triton_impl(a: Tensor, b: Tensor, *, precision: str = "tf32") -> Tensor:
    return _launch().matmul(a, b, precision)


def _aten_impl(a: Tensor, b: Tensor, *, precision: str = "tf32") -> Tensor:
    return aten.matmul(a, b, precision)


def _reject(a: Tensor, b: Tensor, *, precision: str = "tf32") -> Tensor:
    contract.check_inputs(a, b, precision)
    raise TypeError("fastmm.matmul: a and b must be dense strided tensors")


_lib.impl("matmul", _triton_impl if HAVE_TRITON else _aten_impl, "CUDA")
_lib.impl("matmul", _triton_impl if INTERPRETED else _aten_impl, "CPU")
REJECTED = [
    kind + device
    for kind in ("Sparse", "SparseCsr", "Quantized", "NestedTensor")
    for device in ("CPU", "CUDA")
]
for _key in REJECTED:
    _lib.impl("matmul", _reject, _key)


@torch.library.register_fake("fastmm::matmul", lib=_lib)
def _fake(a: Tensor, b: Tensor, *, precision: str = "tf32") -> Tensor:
    contract.check_inputs(a, b, precision)
    return a.new_empty(contract.result_shape(a, b))


# Autograd: the op itself on transposed views, so that it can be differentiated again.


def _setup_context(ctx, inputs, keyword_only_inputs, output) -> None:
    a, b = inputs
    ctx.save_for_backward(
        a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None
    )
    ctx.shapes = a.shape, b.shape
    ctx.precision = keyword_only_inputs["precision"]


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    product = partial(_matmul, precision=ctx.precision)
    return gradients(product, grad, *ctx.saved_tensors, *ctx.shapes)


torch.library.register_autograd("fastmm::matmul", _backward, setup_context=_setup_context, lib=_lib)


@torch.library.register_vmap("fastmm::matmul", lib=_lib)
def _vmap(info, in_dims, a: Tensor, b: Tensor, *, precision: str = "tf32"):
    def front(x: Tensor, dim: int | None, missing: int) -> tuple[Tensor, bool]:
        """The mapped dimension first, then the item as a matrix."""
        if dim is not None:
            x = x.movedim(dim, 0)
        item_dims = x.dim() - (dim is not None)
        vector = item_dims == 1
        return (x.unsqueeze(missing) if vector else x), vector

    a, a_is_vector = front(a, in_dims[0], -2)
    b, b_is_vector = front(b, in_dims[1], -1)
    rank = max(a.dim() - (in_dims[0] is not None), b.dim() - (in_dims[1] is not None))

    def align(x: Tensor, dim: int | None) -> Tensor:
        """Ones between the mapped dimension and the item's own, for items of fewer dimensions."""
        if dim is None:
            return x
        return x.reshape(x.shape[0], *[1] * (rank + 1 - x.dim()), *x.shape[1:])

    out = _matmul(align(a, in_dims[0]), align(b, in_dims[1]), precision=precision)
    if b_is_vector:
        out = out.squeeze(-1)
    if a_is_vector:
        out = out.squeeze(-1 if b_is_vector else -2)
    return out, 0


# Autocast: to the dtype that is active, as torch.matmul; float64 stays.


def autocast_operand(x: Tensor, device_type: str) -> Tensor:
    """x in the dtype that is active on this kind of device, if autocast is to change it."""
    eligible = x.is_floating_point() and x.dtype is not torch.float64
    eligible = eligible and x.device.type == device_type
    return x.to(torch.get_autocast_dtype(device_type)) if eligible else x


def _autocast(device_type: str):
    cast = partial(autocast_operand, device_type=device_type)

    def impl(a: Tensor, b: Tensor, *, precision: str = "tf32") -> Tensor:
        with torch.autocast(device_type, enabled=False):
            return _matmul(cast(a), cast(b), precision=precision)

    return impl


_lib.impl("matmul", _autocast("cuda"), "AutocastCUDA")
_lib.impl("matmul", _autocast("cpu"), "AutocastCPU")


@register_flop_formula(torch.ops.fastmm.matmul)
def _flops(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    """2 * K for every element of the result."""
    return 2 * a_shape[-1] * torch.Size(out_shape).numel()
