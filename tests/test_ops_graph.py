"""The ops' forms in compiled graphs: the ops, but that autocast leaves them alone."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastmm_op
from fastmm_op import ops_graph

op = torch.ops.fastmm.matmul_in_graph.default
linear = torch.ops.fastmm.linear_in_graph.default
HOW = {"activation": "gelu", "precision": "fp32"}


def inputs(device, dtype=torch.float32, requires_grad=False) -> list[torch.Tensor]:
    return [
        torch.randn(shape, device=device, dtype=dtype, requires_grad=requires_grad)
        for shape in ((3, 5, 7), (7, 9))
    ]


def linear_inputs(device, dtype=torch.float32, requires_grad=False) -> list[torch.Tensor]:
    """x, weight, bias and residual."""
    return [
        torch.randn(shape, device=device, dtype=dtype, requires_grad=requires_grad)
        for shape in ((3, 5, 7), (9, 7), (9,), (3, 5, 9))
    ]


def test_schemas() -> None:
    assert str(op._schema) == (
        'fastmm::matmul_in_graph(Tensor a, Tensor b, *, str precision="tf32") -> Tensor'
    )
    assert str(linear._schema) == (
        "fastmm::linear_in_graph(Tensor x, Tensor weight, Tensor? bias=None, "
        'Tensor? residual=None, *, str activation="none", str precision="tf32") -> Tensor'
    )


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_opcheck(dtype, requires_grad, device) -> None:
    args = inputs(device, dtype, requires_grad)
    torch.library.opcheck(op, args, {"precision": "fp32"})


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_opcheck_linear(dtype, requires_grad, device) -> None:
    x, weight, bias, residual = linear_inputs(device, dtype, requires_grad)
    for rest in ((bias, residual), (bias, None), (None, residual)):
        torch.library.opcheck(linear, (x, weight, *rest), HOW)


@pytest.mark.parametrize("precision", ["tf32", "fp32", "ieee"])
def test_is_the_op(precision, device) -> None:
    a, b = inputs(device, requires_grad=True)
    got, want = op(a, b, precision=precision), fastmm_op.matmul(a, b, precision=precision)
    assert torch.equal(got, want)
    weight = torch.randn_like(got)
    for one, other in zip(
        torch.autograd.grad(got, (a, b), weight),
        torch.autograd.grad(want, (a, b), weight),
        strict=True,
    ):
        assert torch.equal(one, other)
    with FlopCounterMode(display=False) as counter:
        op(a, b, precision=precision)
    assert counter.get_total_flops() == 2 * 3 * 5 * 7 * 9
    with pytest.raises(RuntimeError, match="inner sizes differ"):
        op(a, b.mT, precision=precision)


def test_autocast_leaves_it_alone(device) -> None:
    a, b = inputs(device)
    want = op(a, b, precision="fp32")
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(op(a, b, precision="fp32"), want)
        assert torch.ops.fastmm.matmul(a, b).dtype is torch.bfloat16, "unlike the op itself"


def test_linear_is_the_op(device) -> None:
    for activation in ("none", "silu"):
        args = linear_inputs(device, requires_grad=True)
        how = {"activation": activation, "precision": "fp32"}
        got, want = linear(*args, **how), torch.ops.fastmm.linear(*args, **how)
        assert torch.equal(got, want)
        weight = torch.randn_like(got)
        for one, other in zip(
            torch.autograd.grad(got, args, weight),
            torch.autograd.grad(want, args, weight),
            strict=True,
        ):
            assert torch.equal(one, other)
    with FlopCounterMode(display=False) as counter:
        linear(*args, **how)
    assert counter.get_total_flops() == 2 * 3 * 5 * 7 * 9
    with pytest.raises(RuntimeError, match="it is not broadcast"):
        linear(*args[:3], args[3][0], **how)


def test_autocast_leaves_linear_alone(device) -> None:
    args = linear_inputs(device)
    want = linear(*args, **HOW)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(linear(*args, **HOW), want)
        assert torch.ops.fastmm.linear(*args).dtype is torch.bfloat16, "unlike the op itself"


@pytest.mark.parametrize("listens", [False, True])
def test_a_call_that_nobody_listens_to_goes_straight_to_the_kernels(monkeypatch, listens) -> None:
    monkeypatch.setattr(ops_graph, "only_autocast_listens", lambda *tensors: not listens)
    called = []

    def record(name: str):
        return lambda *args, **kwargs: called.append(
            (name, args, kwargs, torch.is_autocast_enabled("cpu"))
        )

    straight = ops_graph.straight_to_kernels(record("kernels"), record("op"))
    a, b = inputs("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        straight(a, b, precision="fp32")
    want = ("op", False) if listens else ("kernels", True)
    ((name, args, kwargs, autocast),) = called
    assert (name, autocast) == want
    assert args == (a, b)
    assert kwargs == {"precision": "fp32"}
