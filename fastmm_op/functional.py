"""The public functions: ``fastmm_op.matmul`` and ``fastmm_op.linear``."""

from functools import partial

import torch
from torch import Tensor

from fastmm_op import aten, contract, ops, ops_linear
from fastmm_op.compat import inside_forward_ad, inside_torch_func, takes_short_path
from fastmm_op.derivative import gradients, linear_gradients
from fastmm_op.problem import ACTIVATIONS


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
            Precision). A factor below 2**-137 may count as zero, so that Inf times it is NaN, and
            one of 2**128 - 2**116 or more as Inf, to which it rounds.
            ``"fp32"``: normwise error at most twice that of torch's float32, or 2**-22 where that
                is more.
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
    contract.check_layouts("matmul", a=a, b=b)
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


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    precision: str = "tf32",
) -> Tensor:
    """activation(x @ weight.T + bias) + residual, in the kernel that multiplies.

    Args:
        x: (..., K); float32, float16, bfloat16 or float64; any strides.
        weight: (N, K), as ``torch.nn.Linear`` keeps it; any strides.
        bias: (N,). Copied first if it is not contiguous or not 16-byte aligned.
        activation: ``"none"``, ``"relu"``, ``"gelu"`` (by erf), ``"gelu_tanh"`` or ``"silu"``.
        residual: (..., N), the shape of the result: it is not broadcast. Copied first if it is not
            contiguous or not 16-byte aligned.
        precision: what float32 inputs are multiplied in, as ``matmul``; the rest is float32.

    All tensors are of one dtype, on one device.

    Returns:
        A new contiguous tensor (..., N). float16 and bfloat16 are accumulated in float32 and
        rounded where PyTorch's separate operations round: after the bias, the activation and the
        residual.

    Where autograd records, an activation is a separate operation, because its derivative needs what
    was activated; in ``torch.func`` transforms and forward-mode AD so is the residual.

    Raises:
        TypeError: not a tensor, an unsupported dtype, or a sparse, nested or quantized tensor.
        ValueError: unknown activation or precision.
        RuntimeError: dtypes, devices or sizes do not match.
    """
    product = torch.ops.fastmm.linear.default
    if not torch.compiler.is_compiling():
        how = {"activation": activation, "precision": precision}
        if ops.HAVE_TRITON and takes_short_path(x, weight, bias, residual):
            return ops_linear._triton_impl(x, weight, bias, residual, **how)
        optional = {"bias": bias, "residual": residual}
        given = {name: tensor for name, tensor in optional.items() if tensor is not None}
        contract.check_layouts("linear", x=x, weight=weight, **given)
        if inside_torch_func() or inside_forward_ad():
            y = _TransformableLinear.apply(x, weight, bias, precision)
            return _finish(y, activation, residual)
    if activation != "none" and _records(x, weight, bias):
        return _finish(product(x, weight, bias, precision=precision), activation, residual)
    return product(x, weight, bias, residual, activation=activation, precision=precision)


def _records(*tensors: Tensor | None) -> bool:
    """Whether autograd would differentiate for one of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _finish(y: Tensor, activation: str, residual: Tensor | None) -> Tensor:
    """What the kernels' epilogue does, of a y that has its bias, in ATen."""
    # Dynamo cannot trace the contract's checks: they are called only where they will raise.
    if activation not in ACTIVATIONS:
        contract.check_choice("linear", "activation", activation, ACTIVATIONS)
    if residual is None:
        return aten.activate(y, activation)
    if torch.is_autocast_enabled(y.device.type):
        residual = ops.autocast_operand(residual, y.device.type)
    if (residual.dtype, residual.device, residual.shape) != (y.dtype, y.device, y.shape):
        contract.check_operands("linear", x=y, residual=residual)
        contract.check_shape("residual", residual, y.shape)
    return aten.activate(y, activation) + residual


class _TransformableLinear(torch.autograd.Function):
    """x @ weight.T + bias where ``torch.library.register_autograd`` does not reach."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, precision: str) -> Tensor:
        return torch.ops.fastmm.linear.default(x, weight, bias, precision=precision)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, bias, ctx.precision = inputs
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def jvp(ctx, tangent_x, tangent_weight, tangent_bias, _) -> Tensor:
        x, weight = ctx.saved_tensors
        product = partial(linear, precision=ctx.precision)
        tangents = []
        if tangent_x is not None:
            tangents.append(product(tangent_x, weight))
        if tangent_weight is not None:
            tangents.append(product(x, tangent_weight))
        if tangent_bias is not None:
            tangents.append(tangent_bias.expand(*x.shape[:-1], weight.shape[0]))
        return sum(tangents[1:], tangents[0])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        product = partial(matmul, precision=ctx.precision)
        grad_x, grad_weight = linear_gradients(
            product, grad, x if needs_weight else None, weight if needs_x else None
        )
        grad_bias = grad.sum_to_size(ctx.bias_shape) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None
