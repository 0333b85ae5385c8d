"""Are the numbers right? Every dtype, layout, shape and number family, by every plan there is."""

from dataclasses import replace

import pytest
import torch

import fastmm_op
from cases import (
    DTYPES,
    FAMILIES,
    LAYOUTS,
    NARROW_FAMILIES,
    PRECISIONS,
    SHAPES,
    ZERO_SHAPES,
    interpreted_as,
    specials,
)
from fastmm_op.arch import ARCHES
from fastmm_op.choices import choices
from fastmm_op.launches import Plan, Pointer
from fastmm_op.plan import write_plan
from fastmm_op.tiles import Choice
from oracle import assert_accurate, assert_same_specials, exact

pytestmark = pytest.mark.usefixtures("guarded_memory")

# What is computed differently: the dtypes, and the precisions of fp32.
KINDS = [*((dtype, "tf32") for dtype in DTYPES), ("fp32", "fp32"), ("fp32", "ieee")]
FP32_KINDS = [("fp32", "tf32"), ("fp32", "fp32")]


def ids(x) -> str:
    return "x".join(map(str, x)) if isinstance(x, tuple) else str(x)


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize(("dtype", "precision"), KINDS)
def test_shapes(shape, dtype, precision, device) -> None:
    m, k, n = shape
    a = torch.randn(m, k, device=device, dtype=DTYPES[dtype])
    b = torch.randn(k, n, device=device, dtype=DTYPES[dtype])
    assert_accurate(fastmm_op.matmul(a, b, precision=precision), a, b, precision)


@pytest.mark.parametrize("shape", ZERO_SHAPES, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_size_of_zero(shape, dtype, device) -> None:
    m, k, n = shape
    a = torch.randn(m, k, device=device, dtype=DTYPES[dtype])
    b = torch.randn(k, n, device=device, dtype=DTYPES[dtype])
    got = fastmm_op.matmul(a, b)
    assert got.shape == (m, n)
    assert got.dtype is a.dtype
    assert (got == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layout_a", "layout_b"), ["NN", "NT", "TN", "TT"])
def test_operand_orders(layout_a, layout_b, dtype, device) -> None:
    a = LAYOUTS[layout_a](torch.randn(40, 72, device=device, dtype=DTYPES[dtype]))
    b = LAYOUTS[layout_b](torch.randn(72, 24, device=device, dtype=DTYPES[dtype]))
    assert_accurate(fastmm_op.matmul(a, b), a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, device) -> None:
    a = LAYOUTS[layout](torch.randn(19, 45, device=device, dtype=DTYPES[dtype]))
    b = LAYOUTS[layout](torch.randn(45, 21, device=device, dtype=DTYPES[dtype]))
    plain_a, plain_b = torch.randn_like(a.contiguous()), torch.randn_like(b.contiguous())
    assert_accurate(fastmm_op.matmul(a, plain_b), a, plain_b, what=f"a {layout}")
    assert_accurate(fastmm_op.matmul(plain_a, b), plain_a, b, what=f"b {layout}")
    assert_accurate(fastmm_op.matmul(a, b), a, b, what=f"both {layout}")


@pytest.mark.parametrize(
    ("shape_a", "shape_b"),
    [
        ((7,), (7,)),
        ((7,), (7, 3)),
        ((5, 7), (7,)),
        ((7,), (2, 7, 3)),
        ((2, 5, 7), (7,)),
        ((2, 5, 7), (7, 3)),
        ((5, 7), (2, 7, 3)),
        ((2, 5, 7), (2, 7, 3)),
        ((1, 5, 7), (2, 7, 3)),
        ((2, 5, 7), (1, 7, 3)),
        ((3, 1, 5, 7), (2, 7, 3)),
        ((3, 2, 5, 7), (7, 3)),
        ((2, 0, 7), (7, 3)),
        ((0, 5, 7), (0, 7, 3)),
        ((2, 5, 0), (2, 0, 3)),
        ((0,), (0,)),
        ((0,), (0, 3)),
        ((3, 1, 5, 7), (0, 7, 3)),
    ],
    ids=ids,
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_broadcasting(shape_a, shape_b, dtype, device) -> None:
    a = torch.randn(shape_a, device=device, dtype=DTYPES[dtype])
    b = torch.randn(shape_b, device=device, dtype=DTYPES[dtype])
    assert_accurate(fastmm_op.matmul(a, b), a, b)


def test_batches_with_strides_of_their_own(device) -> None:
    a = torch.randn(4, 9, 3, 17, device=device).permute(2, 0, 1, 3)  # (3, 4, 9, 17)
    b = torch.randn(4, 17, 5, device=device).expand(3, 4, 17, 5)
    assert_accurate(fastmm_op.matmul(a, b), a, b, what="4-D")
    assert_accurate(fastmm_op.matmul(a[0, ::2], b[0, 1::2]), a[0, ::2], b[0, 1::2], what="3-D")


@pytest.mark.kernels
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_number_families(family, precision, device) -> None:
    a, b = (x.to(device) for x in FAMILIES[family](33, 150, 27))
    assert_accurate(fastmm_op.matmul(a, b, precision=precision), a, b, precision)


@pytest.mark.kernels
@pytest.mark.parametrize("family", NARROW_FAMILIES)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_number_families_of_16_bits(family, dtype, device) -> None:
    a, b = (x.to(device, DTYPES[dtype]) for x in FAMILIES[family](33, 150, 27))
    assert_accurate(fastmm_op.matmul(a, b), a, b)


@pytest.mark.kernels
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", specials(5, 5, 5))
def test_inf_and_nan(case, precision, device) -> None:
    a, b = (x.to(device) for x in specials(21, 70, 19)[case])
    got = fastmm_op.matmul(a, b, precision=precision)
    assert_same_specials(got, exact(a, b).float())


class Forced:
    """Runs folded problems by plans of the test's choosing instead of the planner's best one."""

    def __init__(self, guarded_memory) -> None:
        self.memory = guarded_memory

    def plans(self, a, b, precision: str, arches=ARCHES) -> list[tuple[Choice, Plan]]:
        """Every plan with K split at most once that the interpreter can run, each once."""
        from triton.runtime.interpreter import InterpretedFunction

        from fastmm_op import launch, running

        found = {}
        for arch in arches:
            problem = launch.describe(a, b, precision, ARCHES[arch])
            for choice in choices(problem):
                plan = write_plan(problem, choice)
                kernels = [running.KERNELS[step.kernel] for step in plan.launches]
                if choice.split <= 2 and all(isinstance(k, InterpretedFunction) for k in kernels):
                    found.setdefault(interpreted_as(plan), (choice, plan))
        return list(found.values())

    def roads(self, a, b, precision: str = "tf32") -> dict[tuple, tuple[Choice, Plan]]:
        """For each kernel and way of packing, K cut or not: the plan with a small tile."""
        small = [x for x in self.plans(a, b, precision, ["sm_89"]) if is_small(x[0])]
        found = {}
        for choice, plan in sorted(small, key=lambda x: x[0].tile.block_m):
            cuts = (choice.split, choice.slabs, choice.b_classes)
            found.setdefault(
                (choice.tile.kernel, choice.pack_a, choice.pack_b, *cuts), (choice, plan)
            )
        assert found
        return found

    def run(self, a, b, plan: Plan) -> torch.Tensor:
        from fastmm_op import running

        shape = (a.shape[0], a.shape[1], b.shape[2])
        out = self.memory.empty(shape, dtype=a.dtype, device=a.device)
        running.run_plan(plan, a, b, out)
        return out


def is_small(choice: Choice) -> bool:
    tile = choice.tile
    return tile.kernel == "gemv" or choice.b_classes > 1 or tile.block_n == 64


@pytest.fixture
def forced(guarded_memory) -> Forced:
    return Forced(guarded_memory)


@pytest.mark.interpreted
@pytest.mark.parametrize(("dtype", "precision"), [k for k in KINDS if k[0] != "fp64"])
def test_every_plan(dtype, precision, forced) -> None:
    """Every tile and way of packing of every card, whether or not the planner would take it."""
    batch = 1 if dtype == "fp16" else 2  # fp16 and bf16 have the same plans
    a = LAYOUTS["wide rows"](torch.randn(batch, 19, 265, dtype=DTYPES[dtype]))
    b = LAYOUTS["T"](torch.randn(1, 265, 37, dtype=DTYPES[dtype])).expand(batch, 265, 37)
    seen = set()
    for choice, plan in forced.plans(a, b, precision):
        assert_accurate(forced.run(a, b, plan), a, b, precision, what=str(choice))
        seen.add((choice.pack_a, choice.pack_b, choice.split))
    packings = {(False, False)}
    if dtype == "fp32" and precision != "ieee":
        packings |= {(True, True)}
    if dtype != "fp32":
        packings |= {(True, False), (False, True), (True, True)}
    assert seen >= {(*packing, split) for packing in packings for split in (1, 2)}


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("layout_a", "layout_b", "k"),
    # 2100: three slabs of K, the last one shorter.
    [("N", "N", 256), ("T", "T", 256), ("offset 1", "N", 256), ("T", "N", 1100), ("N", "N", 2100)],
)
@pytest.mark.parametrize(("dtype", "precision"), [*FP32_KINDS, ("bf16", "tf32")])
def test_every_road_by_layout(layout_a, layout_b, k, dtype, precision, forced) -> None:
    """All packing kernels: K contiguous or not, read once or (long K) twice, with a rest or not."""
    a = LAYOUTS[layout_a](torch.randn(1, 24, k, dtype=DTYPES[dtype]))
    b = LAYOUTS[layout_b](torch.randn(1, k, 40, dtype=DTYPES[dtype]))
    for choice, plan in forced.roads(a, b, precision).values():
        assert_accurate(forced.run(a, b, plan), a, b, precision, what=str(choice))


@pytest.mark.interpreted
@pytest.mark.parametrize(("dtype", "precision"), FP32_KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_number_families_by_every_road(family, dtype, precision, forced) -> None:
    a, b = (x.unsqueeze(0).to(DTYPES[dtype]) for x in FAMILIES[family](33, 300, 27))
    roads = forced.roads(a, b, precision)
    assert len(roads) >= 4, "direct and packed, split and not"
    for choice, plan in roads.values():
        assert_accurate(forced.run(a, b, plan), a, b, precision, what=str(choice))


@pytest.mark.interpreted
@pytest.mark.parametrize(("dtype", "precision"), FP32_KINDS)
@pytest.mark.parametrize("case", specials(5, 5, 5))
def test_inf_and_nan_by_every_road(case, dtype, precision, forced) -> None:
    a, b = (x.unsqueeze(0).to(DTYPES[dtype]) for x in specials(9, 300, 7)[case])
    for choice, plan in forced.roads(a, b, precision).values():
        got = forced.run(a, b, plan)
        assert_same_specials(got, exact(a, b).float(), what=str(choice))


@pytest.mark.interpreted
@pytest.mark.parametrize("precision", ["tf32", "fp32"])
@pytest.mark.parametrize("decades", [4, 8, 12])
def test_inverse_scaling_along_k(decades, precision, forced) -> None:
    """Columns of A grow as rows of B shrink, so every product matters: balancing K keeps them."""
    k = 128 if decades < 12 else 1100  # more than one slab
    scale = 10.0 ** torch.linspace(-decades, decades, k)[torch.randperm(k)]
    a, b = (torch.randn(9, k) * scale)[None], (torch.randn(k, 7) / scale[:, None])[None]
    for choice, plan in forced.roads(a, b, precision).values():
        assert_accurate(forced.run(a, b, plan), a, b, precision, what=str(choice))


@pytest.mark.interpreted
@pytest.mark.parametrize("batch_b", [1, 3])
def test_inverse_scaling_in_batches(batch_b, forced) -> None:
    """Items with a scaling of their own are balanced each; items that share B, together."""
    k = 96
    scale = 10.0 ** torch.linspace(-8, 8, k)[torch.stack([torch.randperm(k) for _ in range(3)])]
    scale = scale[:batch_b]
    a = torch.randn(3, 9, k) * scale[:, None, :]
    b = (torch.randn(batch_b, k, 7) / scale[:, :, None]).expand(3, k, 7)
    for choice, plan in forced.roads(a, b, "fp32").values():
        assert_accurate(forced.run(a, b, plan), a, b, "fp32", what=str(choice))


@pytest.mark.interpreted
@pytest.mark.parametrize("precision", ["tf32", "fp32"])
def test_what_a_packed_factor_may_lose(precision, forced) -> None:
    """Pins a statement of the documentation: factors far below their row's largest.

    Scalings that no powers of two along K undo: those of the second half of A's rows (B's columns)
    are the inverse of the first half's. A packed factor then errs, beside its rounding, by at most
    2**-38 of the largest in its row of A or column of B, where IEEE arithmetic keeps it.
    """
    k = 128
    scale = 10.0 ** torch.linspace(-12, 12, k)[torch.randperm(k)]
    a = torch.randn(1, 8, k) * torch.cat([scale.expand(4, k), (1 / scale).expand(4, k)])
    b = torch.randn(1, k, 6) / torch.cat([scale.expand(3, k), (1 / scale).expand(3, k)]).T
    products = a.double().abs() @ b.double().abs()
    largest = a.double().abs().amax(2, keepdim=True) * b.double().abs().amax(1, keepdim=True)
    for choice, plan in forced.roads(a, b, precision).values():
        difference = (forced.run(a, b, plan).double() - exact(a, b)).abs()
        rounding = {"tf32": 2.0**-10, "fp32": 2.0**-20}[precision] * products
        lost = 2 * k * 2.0**-38 * largest
        scaled = choice.pack_a and choice.pack_b
        assert (difference <= rounding + (lost if scaled else 0)).all(), choice
        # The diagonal quarters are what is lost, so the statement is no stricter than the truth.
        if scaled:
            assert (difference[:, :4, :3] > 0.1 * products[:, :4, :3]).any(), choice


@pytest.mark.interpreted
def test_inf_times_what_tf32_cannot_hold(forced) -> None:
    """Pins a statement of the documentation: below 2**-137, "tf32" may take a factor for zero."""
    a = torch.ones(1, 9, 8)
    a[0, 0, 2] = torch.inf
    b = torch.ones(1, 8, 7)
    b[0, 2, 0] = 2.0**-149
    for choice, plan in forced.roads(a, b).values():
        got = forced.run(a, b, plan)[0, 0, 0]
        exact_range = choice.pack_b or choice.tile.kernel == "gemv"
        assert got.isposinf() if exact_range else got.isnan(), choice


@pytest.mark.interpreted
@pytest.mark.parametrize(("dtype", "precision"), [*FP32_KINDS, ("bf16", "tf32")])
@pytest.mark.parametrize("layout", ["N", "T"])
@pytest.mark.parametrize("k", [70, 1100])
def test_packed_rows_that_wrap_around(k, layout, dtype, precision, guarded_memory) -> None:
    """Hopper's row classes read B's first columns again past its last: packing repeats them."""
    from fastmm_op import launch, running

    a = torch.randn(1, 5000, k, dtype=DTYPES[dtype])
    b = LAYOUTS[layout](torch.randn(1, k, 37, dtype=DTYPES[dtype]))
    problem = launch.describe(a, b, precision, ARCHES["sm_90"])
    plans = (write_plan(problem, c) for c in choices(problem) if c.pack_b and c.split == 1)
    hopper = (plan for plan in plans if plan.launches[-1].kernel == "gemm_hopper")
    plan = next(hopper)
    names = {s.kernel: running.KERNELS[s.kernel].arg_names for s in plan.launches}
    of_b = [s for s in plan.launches if s.args[0] == Pointer("b", dtype)]
    balance = [s for s in plan.launches if s.kernel == "balance"]
    arguments = dict(zip(names[of_b[-1].kernel], of_b[-1].args, strict=False))
    wrap, pitch, parts = arguments["wrap"], arguments["pitch"], problem.parts
    assert wrap > 0
    running.run_plan(replace(plan, launches=(*balance, *of_b)), a, b, a)
    workspace = guarded_memory.allocations[-1][guarded_memory.GUARD :]
    packed = workspace[arguments["packed_ptr"].offset :][: (37 + wrap) * parts * pitch * 2]
    packed = packed.view(torch.float16 if dtype == "fp32" else torch.bfloat16)
    packed = packed.view(37 + wrap, parts, pitch).double()
    rows = torch.arange(37 + wrap) % 37
    scale = 1.0
    if dtype == "fp32":
        exponents = workspace[arguments["exp_ptr"].offset :][: 37 * 4].view(torch.int32)
        scale = 2.0 ** exponents[rows, None].double()
    # A 10-bit significand, rounded, or twice 11 bits; bf16 is copied as it is.
    rtol = {("fp32", "tf32"): 2.0**-11, ("fp32", "fp32"): 2.0**-22}.get((dtype, precision), 0)
    got = packed[:, :, :k].sum(1) * scale
    torch.testing.assert_close(got, b[0].T[rows].double(), rtol=rtol, atol=2.0**-24 * rtol)
    assert (packed[:, :, k:] == 0).all()


@pytest.mark.interpreted
def test_poison_reaches_the_result(guarded_memory, monkeypatch) -> None:
    """The fixture these tests rest on: a plan that computes nothing returns NaN."""
    from fastmm_op import launch

    monkeypatch.setattr(launch, "_calls", {})
    monkeypatch.setattr(launch, "make_plan", lambda problem: Plan("none", (), 8, 0.0, None))
    assert fastmm_op.matmul(torch.ones(3, 4), torch.ones(4, 5)).isnan().all()
    guarded_memory.allocations[0][-1] = 0
    with pytest.raises(AssertionError, match="wrote after a buffer"):
        guarded_memory.check_guards()
    guarded_memory.allocations.clear()
