"""What matmul and linear accept: checks, result shapes, the fold into one batched product.

The checks are written with ``torch._check*``, so that eager calls, fake tensors and compiled graphs
raise the same errors, also on symbolic sizes.
"""

import torch
from torch import Tensor

from fastmm_op.problem import ACTIVATIONS, PRECISIONS

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
SUPPORTED = (*DTYPES, torch.float64)


def check_inputs(a: Tensor, b: Tensor, precision: str) -> None:
    """Raise unless ``matmul(a, b, precision=precision)`` is defined.

    Raises:
        TypeError: an input is not a dense strided tensor, or of an unsupported dtype.
        ValueError: unknown precision.
        RuntimeError: dtypes or devices differ, a 0-dimensional input, or sizes do not match.
    """
    check_choice("matmul", "precision", precision, PRECISIONS)
    check_operands("matmul", a=a, b=b)
    inner_b = b.shape[-2] if b.dim() > 1 else b.shape[0]
    torch._check(
        a.shape[-1] == inner_b,
        lambda: (
            f"fastmm.matmul: inner sizes differ: a is {tuple(a.shape)}, b is {tuple(b.shape)}; "
            f"a's last size {a.shape[-1]} must equal b's size {inner_b}"
        ),
    )
    for i, (size_a, size_b) in enumerate(zip(a.shape[-3::-1], b.shape[-3::-1], strict=False)):
        torch._check(
            size_a == size_b or size_a == 1 or size_b == 1,
            lambda i=i, size_a=size_a, size_b=size_b: (
                f"fastmm.matmul: batch sizes cannot be broadcast: a is {tuple(a.shape)}, b is "
                f"{tuple(b.shape)}; at dimension {-3 - i} {size_a} meets {size_b}"
            ),
        )


def check_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    precision: str,
) -> None:
    """Raise unless ``linear`` of these arguments is defined.

    Raises:
        TypeError: an input is not a dense strided tensor, or of an unsupported dtype.
        ValueError: unknown activation or precision.
        RuntimeError: dtypes, devices, ranks or sizes do not match.
    """
    check_choice("linear", "precision", precision, PRECISIONS)
    check_choice("linear", "activation", activation, ACTIVATIONS)
    optional = {"bias": bias, "residual": residual}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    check_operands("linear", x=x, weight=weight, **given)
    torch._check(
        weight.dim() == 2,
        lambda: f"fastmm.linear: weight must be (N, K), got shape {tuple(weight.shape)}",
    )
    torch._check(
        x.shape[-1] == weight.shape[1],
        lambda: (
            f"fastmm.linear: x is {tuple(x.shape)}, weight is {tuple(weight.shape)}; x's last size "
            f"{x.shape[-1]} must equal weight's {weight.shape[1]}"
        ),
    )
    shapes = {"bias": (weight.shape[0],), "residual": (*x.shape[:-1], weight.shape[0])}
    for name, tensor in given.items():
        check_shape(name, tensor, shapes[name])


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise RuntimeError unless linear's bias or residual has this shape."""

    def message() -> str:
        why = "(N,)" if name == "bias" else "the result's shape; it is not broadcast"
        return f"fastmm.linear: {name} is {tuple(tensor.shape)}; it must be {tuple(shape)}: {why}"

    torch._check(tensor.dim() == len(shape), message)
    for size, wanted in zip(tensor.shape, shape, strict=True):
        torch._check(size == wanted, message)


def check_choice(op: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    torch._check_value(
        value in allowed, lambda: f"fastmm.{op}: {name} must be one of {allowed}, got {value!r}"
    )


def check_operands(op: str, **tensors: Tensor) -> None:
    """Raise unless all are dense, at least 1-dimensional, and of one supported dtype and device.

    Args:
        op: the name in error messages.
        tensors: the arguments by name; the others are held against the first.
    """
    check_layouts(op, **tensors)
    for name, x in tensors.items():
        torch._check_type(
            x.dtype in SUPPORTED,
            lambda name=name, x=x: (
                f"fastmm.{op}: {name} has dtype {x.dtype}; supported are float32, float16, "
                "bfloat16 and float64"
            ),
        )
        torch._check(
            x.dim() >= 1,
            lambda name=name: f"fastmm.{op}: {name} is 0-dimensional; 1 or more are needed",
        )
    (first, a), *others = tensors.items()
    for name, b in others:
        torch._check(
            a.dtype == b.dtype,
            lambda name=name, b=b: (
                f"fastmm.{op}: {first} and {name} must have one dtype, got {a.dtype} and {b.dtype}"
            ),
        )
        torch._check(
            a.device == b.device,
            lambda name=name, b=b: (
                f"fastmm.{op}: {first} and {name} must be on one device, got {a.device} and "
                f"{b.device}"
            ),
        )


def check_layouts(op: str, **tensors: Tensor) -> None:
    """Raise TypeError unless all are dense strided tensors.

    ``check_operands`` does this too. It is separate for callers that have to ask before PyTorch's
    dispatcher sees the tensors, which has no words for a layout it knows no kernel for.
    """
    for name, x in tensors.items():
        torch._check_type(
            isinstance(x, Tensor),
            lambda name=name, x=x: (
                f"fastmm.{op}: {name} must be a torch.Tensor, got {type(x).__name__}"
            ),
        )
        torch._check_type(
            x.layout is torch.strided and not x.is_nested and not x.is_quantized,
            lambda name=name, x=x: (
                f"fastmm.{op}: {name} must be a dense strided tensor, got {describe_layout(x)}"
            ),
        )


def describe_layout(x: Tensor) -> str:
    if x.is_nested:
        return "a nested tensor"
    if x.is_quantized:
        return f"a quantized tensor ({x.dtype})"
    return f"layout {x.layout}"


def result_shape(a: Tensor, b: Tensor) -> list[int]:
    """The shape of ``torch.matmul(a, b)``, for inputs that ``check_inputs`` accepts."""
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    rows = [a.shape[-2]] if a.dim() > 1 else []
    columns = [b.shape[-1]] if b.dim() > 1 else []
    return [*batch, *rows, *columns]


def fold(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a and b as (batch, M, K) and (batch, K, N); broadcast batches get stride 0.

    Views wherever the strides allow it: always, for operands of one to three dimensions each of its
    own batch; else (several batch dimensions, or a transposed batch against one matrix) the operand
    is copied, as torch.matmul does.
    """
    a = a.unsqueeze(0) if a.dim() == 1 else a
    b = b.unsqueeze(1) if b.dim() == 1 else b
    if b.dim() == 2 and a.dim() > 2:
        # One matrix for all items: their rows are the rows of a single product.
        return a.reshape(1, a.shape[:-1].numel(), a.shape[-1]), b.unsqueeze(0)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a = a.expand(*batch, *a.shape[-2:])
    b = b.expand(*batch, *b.shape[-2:])
    count = batch.numel()
    if len(batch) == 1:
        return a, b
    return a.reshape(count, *a.shape[-2:]), b.reshape(count, *b.shape[-2:])
