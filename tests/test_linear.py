"""Are linear's numbers right? Every activation, dtype, layout and shape, by every plan there is."""

import pytest
import torch
from torch import Tensor

import fastmm_op
from cases import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    at_offset,
    every_other,
    expanded,
    interpreted_as,
    negated_view,
    surrounded,
)
from fastmm_op.arch import ARCHES
from fastmm_op.choices import choices
from fastmm_op.launches import Plan
from fastmm_op.plan import write_plan
from fastmm_op.problem import Epilogue
from fastmm_op.tiles import Choice
from linear_oracle import ACTIVATIONS, assert_linear, eager, steps
from oracle import assert_same_specials

pytestmark = pytest.mark.usefixtures("guarded_memory")

KINDS = [*((dtype, "tf32") for dtype in DTYPES), ("fp32", "fp32"), ("fp32", "ieee")]


def ids(x) -> str:
    return "x".join(map(str, x)) if isinstance(x, tuple) else str(x)


def make(m, k, n, dtype="fp32", device="cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and residual; the product's elements are of order one."""
    like = {"device": device, "dtype": DTYPES[dtype]}
    weight = torch.randn(n, k, **like) / max(1, k) ** 0.5
    return torch.randn(m, k, **like), weight, torch.randn(n, **like), torch.randn(m, n, **like)


def check(
    x, weight, bias=None, activation="none", residual=None, precision="tf32", what=""
) -> None:
    how = {"activation": activation, "residual": residual, "precision": precision}
    got = fastmm_op.linear(x, weight, bias, **how)
    assert_linear(got, x, weight, bias, activation, residual, precision, what)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "precision"), KINDS)
def test_activations(dtype, precision, activation, device) -> None:
    x, weight, bias, residual = make(33, 70, 45, dtype, device)
    for b in (None, bias):
        for r in (None, residual):
            check(x, weight, b, activation, r, precision)


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(shape, dtype, device) -> None:
    x, weight, bias, residual = make(*shape, dtype, device)
    check(x, weight, bias, "gelu", residual)
    check(x, weight, bias)


@pytest.mark.parametrize(
    "shape", [(7,), (0,), (2, 5, 7), (3, 1, 2, 7), (2, 0, 7), (0, 7), (4, 0), (0, 0)], ids=ids
)
@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_ranks_and_sizes_of_zero(dtype, n, shape, device) -> None:
    """Without a K the product is zero, but its bias, activation and residual are not."""
    like = {"device": device, "dtype": DTYPES[dtype]}
    x, weight = torch.randn(shape, **like), torch.randn(n, shape[-1], **like)
    bias, residual = torch.randn(n, **like), torch.randn(*shape[:-1], n, **like)
    check(x, weight, bias, "silu", residual)
    check(x, weight)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_operand_layouts(dtype, layout, device) -> None:
    x, weight, bias, residual = make(19, 45, 21, dtype, device)
    check(LAYOUTS[layout](x), LAYOUTS[layout](weight), bias, "relu", residual)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_residual_layouts(dtype, layout, device) -> None:
    x, weight, _, residual = make(19, 45, 21, dtype, device)
    check(x, weight, None, "none", LAYOUTS[layout](residual))


@pytest.mark.parametrize(
    "layout",
    [
        every_other,
        lambda x: at_offset(x, 1),
        lambda x: surrounded(x, 3, 2),
        expanded(-1),
        negated_view,
    ],
    ids=["every other", "offset 1", "offset 3", "expanded", "negated"],
)
def test_bias_layouts(layout, device) -> None:
    x, weight, bias, _ = make(19, 45, 21, "fp32", device)
    check(x, weight, layout(bias), "gelu")


def test_batches_that_no_view_can_fold(device) -> None:
    x, weight, bias, _ = make(24, 17, 5, "fp32", device)
    x = x.view(4, 6, 17).transpose(0, 1)
    check(x, weight, bias, "gelu", torch.randn(4, 6, 5, device=device).transpose(0, 1))


# 16-bit results are rounded after every step, as PyTorch's separate operations round.


@pytest.mark.parametrize("m", [1, 24], ids=["vector", "matrix"])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_rounding_points(activation, m, device) -> None:
    """Bit for bit: sums of small integers are exact, so the roundings are all there is."""
    like = {"device": device, "dtype": torch.float16}
    x = torch.randint(-8, 9, (m, 40), **like)
    weight = torch.randint(-8, 9, (17, 40), **like)
    bias = torch.randn(17, **like)
    residual = 100 * torch.randn(m, 17, **like)
    got = fastmm_op.linear(x, weight, bias, activation=activation, residual=residual)
    args = [t.cpu() for t in (x, weight, bias)] + [activation, residual.cpu()]
    assert torch.equal(got.cpu(), steps(*args, dtype=torch.float16)[-1].half())
    once = steps(*args)[-1].half()
    assert not torch.equal(got.cpu(), once), "these numbers cannot tell the two apart"


@pytest.mark.kernels
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_rounding_points_of_smooth_activations(activation, device) -> None:
    """As above; but an activation itself may be off by so little that few roundings differ."""
    x = torch.randint(-4, 5, (64, 40), device=device).half() / 8
    weight = torch.randint(-4, 5, (32, 40), device=device).half() / 8
    bias, residual = torch.randn(32).half().to(device), torch.randn(64, 32).half().to(device)
    got = fastmm_op.linear(x, weight, bias, activation=activation, residual=residual).cpu()
    args = [t.cpu() for t in (x, weight, bias)] + [activation, residual.cpu()]
    want = steps(*args, dtype=torch.float16)[-1].half()
    once = steps(*args)[-1].half()
    assert (got != want).float().mean() < 0.01
    assert (once != want).float().mean() > 0.05, "these numbers cannot tell the two apart"


# The activations by themselves: of x, as the product of x and 1.

EXTREMES = [
    *(
        0.0,
        -0.0,
        float("inf"),
        float("-inf"),
        float("nan"),
        3e38,
        -3e38,
        1e20,
        -1e20,
        1e-40,
        -1e-40,
    ),
    *(88.0, -88.0, 104.0, -104.0, 1e-20, -1e-20, 5.0, -5.0, 9.0, -9.0, 13.5, -13.5),
]


@pytest.mark.kernels
@pytest.mark.parametrize("n", [1, 3], ids=["one-wide", "matrix"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inf_and_nan_go_where_torchs_go(activation, n, device) -> None:
    """In float64: PyTorch's vectorised float32 gelu makes NaN of Inf on some CPUs."""
    x = torch.tensor(EXTREMES, device=device)[:, None]
    weight = torch.ones(n, 1, device=device)
    got = fastmm_op.linear(x, weight, activation=activation, precision="ieee")
    want = ACTIVATIONS[activation](x.double()).float().expand(-1, n)
    assert_same_specials(got, want)
    finite = torch.isfinite(want)
    torch.testing.assert_close(got[finite], want[finite], rtol=1e-5, atol=1e-6)


@pytest.mark.kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_as_accurate_as_torchs(activation, device) -> None:
    """Element by element, by the distance from float64 in units of 2**-24 of the argument."""
    x = torch.linspace(-20, 20, 4001)[:, None]
    got = fastmm_op.linear(
        x.to(device), torch.ones(1, 1, device=device), activation=activation, precision="ieee"
    )
    want = ACTIVATIONS[activation](x.double())
    unit = 2.0**-24 * x.double().abs().clamp(min=2.0**-24)
    ours = ((got.cpu().double() - want).abs() / unit).max().item()
    theirs = ((ACTIVATIONS[activation](x).double() - want).abs() / unit).max().item()
    assert ours <= 2 * theirs + 2, f"ours {ours:.2f} units, torch's {theirs:.2f}"


@pytest.mark.kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf_in_bias_and_residual(activation, device) -> None:
    x, weight, bias, residual = make(8, 9, 7, "fp32", device)
    bias[0], bias[1], bias[2] = torch.inf, -torch.inf, torch.nan
    residual[3, 3], residual[4, 0], residual[5, 1] = torch.nan, -torch.inf, torch.inf
    got = fastmm_op.linear(x, weight, bias, activation=activation, residual=residual)
    operands = (t.double() for t in (x, weight, bias))
    assert_same_specials(got, eager(*operands, activation, residual.double()))


# Every plan, whether or not the planner would take it.


def forced_plans(x, weight, precision, epilogue, arches=ARCHES) -> list[tuple[Choice, Plan]]:
    """Every plan with K split at most once that the interpreter can run, each once."""
    from triton.runtime.interpreter import InterpretedFunction

    from fastmm_op import launch, running

    found = {}
    for arch in arches:
        problem = launch.describe(x[None], weight.mT[None], precision, ARCHES[arch], epilogue)
        for choice in choices(problem):
            plan = write_plan(problem, choice)
            kernels = [running.KERNELS[step.kernel] for step in plan.launches]
            if choice.split <= 2 and all(isinstance(k, InterpretedFunction) for k in kernels):
                found.setdefault(interpreted_as(plan), (choice, plan))
    return list(found.values())


def run_forced(plan, x, weight, bias, residual, memory) -> Tensor:
    from fastmm_op import launch, running

    out = memory.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    running.run_plan(
        plan, x[None], weight.mT[None], out, launch.dense(bias), launch.dense(residual)
    )
    return out


def check_plans(found, x, weight, bias, activation, residual, precision, memory) -> None:
    for choice, plan in found:
        got = run_forced(plan, x, weight, bias, residual, memory)
        assert_linear(got, x, weight, bias, activation, residual, precision, str(choice))


@pytest.mark.interpreted
@pytest.mark.parametrize(("dtype", "precision"), [k for k in KINDS if k[0] not in ("fp64", "bf16")])
def test_every_plan(dtype, precision, guarded_memory) -> None:
    x, weight, bias, residual = make(19, 265, 21, dtype)
    epilogue = Epilogue(bias=True, activation="gelu", residual=True)
    found = forced_plans(x, weight, precision, epilogue)
    assert {choice.split for choice, _ in found} == {1, 2}
    check_plans(found, x, weight, bias, "gelu", residual, precision, guarded_memory)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "shape", [(24, 256, 48), (21, 256, 37), (1, 2100, 37), (37, 2100, 1)], ids=ids
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("has_bias", "activation", "has_residual"),
    [(True, "none", False), (False, "silu", False), (False, "none", True), (True, "relu", True)],
)
def test_every_road(has_bias, activation, has_residual, dtype, shape, guarded_memory) -> None:
    """Each kernel, way of packing and split with each part of the epilogue alone, then together."""
    x, weight, bias, residual = make(*shape, dtype)
    bias = bias if has_bias else None
    residual = residual if has_residual else None
    epilogue = Epilogue(has_bias, activation, has_residual)
    small = [
        (choice, plan)
        for choice, plan in forced_plans(x, weight, "tf32", epilogue, ["sm_89"])
        if choice.tile.kernel == "gemv" or (choice.tile.block_m, choice.tile.block_n) == (32, 64)
    ]
    kernels = {step.kernel for _, plan in small for step in plan.launches}
    assert kernels >= ({"gemv", "reduce"} if 1 in shape else {"gemm", "reduce"})
    check_plans(small, x, weight, bias, activation, residual, "tf32", guarded_memory)


def test_the_epilogue_follows_the_scales(device) -> None:
    """Packed fp32: rows and columns of 10^-15 to 10^15, whose products the bias must not see."""
    m, k, n = 40, 300, 24
    powers = 10.0 ** torch.linspace(-15, 15, n)
    x = (torch.randn(m, k) * 10.0 ** torch.linspace(-15, 15, m)[:, None]).to(device)
    weight = (torch.randn(n, k) * powers[:, None]).to(device)
    bias, residual = (1 + torch.rand(n)).to(device), torch.randn(m, n).to(device)
    got = fastmm_op.linear(x, weight, bias, activation="relu", residual=residual)
    want = steps(x.cpu(), weight.cpu(), bias.cpu(), "relu", residual.cpu())[-1]
    scale = (x.double().abs() @ weight.double().abs().mT).cpu() + want.abs() + 2
    assert ((got.cpu().double() - want).abs() <= 2.0**-9 * scale).all()


# Calls that are remembered.


@pytest.mark.kernels
def test_calls_that_differ_in_the_epilogue_only(device) -> None:
    """The second call of a kind runs what the first one planned: each kind its own."""
    x, weight, bias, residual = make(20, 33, 18, "fp32", device)
    for _ in range(2):
        for activation in ("none", "gelu"):
            for b in (None, bias, at_offset(bias, 1)):
                for r in (None, residual, residual.mT.contiguous().mT):
                    check(x, weight, b, activation, r)


def test_inputs_stay_as_they_are(device) -> None:
    inputs = make(20, 33, 18, "fp32", device)
    before = [x.clone() for x in inputs]
    x, weight, bias, residual = inputs
    out = fastmm_op.linear(x, weight, bias, activation="gelu", residual=residual)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert out.untyped_storage().data_ptr() not in {x.untyped_storage().data_ptr() for x in inputs}
