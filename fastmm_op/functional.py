"""The public function: ``fastmm_op.matmul``."""

from functools import partial

import torch
from torch import Tensor

from fastmm_op import contract, ops
from fastmm_op.compat import inside_forward_ad, inside_torch_func, takes_short_path
from fastmm_op.derivative import gradients


def matmul(a: Tensor, b: Tensor, *, precision: str = "tf32") -> Tensor:
    """Matrix product of two tensors, with the shapes and broadcasting of ``torch.matmul``.

    Args:
        a: (K,), (M, K) or (..., M, K); float32, float16, bfloat16 or float64; any strides.
        b: (K,), (K, N) or (..., K, N); same dtype and device as a.
        precision: what float32 inputs are computed in (other dtypes ignore it).
            ``"tf32"``: operands rounded to a 10-bit significand, float32 accumulation; normwise
            error against float64 at most 1.1 times that of torch's TF32 or, where torch happens to
            compute in float32 under that setting, of TF32 rounded correctly; unless a's columns and
            b's rows are scaled against each other by more than some 1e4 either way (README,
            Precision). A factor below 2**-137 may count as zero, so that Inf times it is NaN.
            ``"fp32"``: normwise error at most twice that of torch's float32.
            ``"ieee"``: every product and sum in IEEE float32.

    Returns:
        A new contiguous tensor of the inputs' dtype. float16 and bfloat16 are accumulated in
        float32 and rounded once. float64 is ATen's own product.

    Raises:
        TypeError: not a tensor, an unsupported dtype, or a sparse, nested or quantized tensor.
        ValueError: unknown precision.
        RuntimeError: dtypes, devices or sizes do not match.
    """
    if torch.compiler.is_compiling():
        return torch.ops.fastmm.matmul.default(a, b, precision=precision)
    if ops.HAVE_TRITON and takes_short_path(a, b):
        return ops._triton_impl(a, b, precision=precision)
    contract.check_layouts(a, b)
    if inside_torch_func() or inside_forward_ad():
        return _Transformable.apply(a, b, precision)
    return torch.ops.fastmm.matmul.default(a, b, precision=precision)


class _Transformable(torch.autograd.Function):
    """The op where ``torch.library.register_autograd`` does not reach.

    ``torch.func`` transforms refuse its formula, and forward-mode AD has none.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, precision: str) -> Tensor:
        return torch.ops.fastmm.matmul.default(a, b, precision=precision)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        a, b, ctx.precision = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)

    @staticmethod
    def jvp(ctx, tangent_a: Tensor | None, tangent_b: Tensor | None, _) -> Tensor:
        a, b = ctx.saved_tensors
        product = partial(matmul, precision=ctx.precision)
        if tangent_a is None:
            return product(a, tangent_b)
        if tangent_b is None:
            return product(tangent_a, b)
        return product(tangent_a, b) + product(a, tangent_b)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b = ctx.saved_tensors
        shapes = a.shape, b.shape
        a = a if ctx.needs_input_grad[1] else None
        b = b if ctx.needs_input_grad[0] else None
        return *gradients(partial(matmul, precision=ctx.precision), grad, a, b, *shapes), None
