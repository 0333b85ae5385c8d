"""The op's form in compiled graphs: the op, but that autocast leaves it alone."""

import expecttest
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastmm_op

op = torch.ops.fastmm.matmul_in_graph.default


def inputs(device, dtype=torch.float32, requires_grad=False) -> list[torch.Tensor]:
    return [
        torch.randn(shape, device=device, dtype=dtype, requires_grad=requires_grad)
        for shape in ((3, 5, 7), (7, 9))
    ]


def test_schema() -> None:
    expecttest.assert_expected_inline(
        f"{op._schema}",
        """fastmm::matmul_in_graph(Tensor a, Tensor b, *, str precision) -> Tensor""",
    )


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_opcheck(dtype, requires_grad, device) -> None:
    args = inputs(device, dtype, requires_grad)
    torch.library.opcheck(op, args, {"precision": "fp32"})


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
