"""fp32 operands split in registers: three TF32 products, or IEEE's where those are no numbers."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.families import FAMILIES
from cases import specials
from fastmm_op import running
from fastmm_op.arch import ARCHES
from fastmm_op.choices import choices
from fastmm_op.kernels import tf32
from fastmm_op.launches import Plan
from fastmm_op.plan import make_plan, reasons, write_plan
from fastmm_op.problem import Problem, problem_of
from fastmm_op.tiles import TILES, Choice, operand_kind
from oracle import assert_accurate, assert_same_specials, exact, norm

M, K, N = 12, 132, 36
# Where three products of TF32 are faster than the ordinary fp32 units, by the planner's rates.
SPLIT_ARCHES = ("sm_80", "sm_90")
kernels = pytest.mark.kernels


@pytest.fixture
def arch(device) -> str:
    """The card at hand; interpreted kernels take any plan of plain Triton's."""
    return "sm_90" if device == "cuda" else "sm_80"


def problem(arch: str, layout="NN", precision="fp32", m=M, k=K, n=N) -> Problem:
    how = {"batch": 1, "dtype": "fp32", "layout": layout, "precision": precision}
    return problem_of(m, k, n, **how, arch=ARCHES[arch])


def dots(plan: Plan) -> list[str]:
    return [step.constexprs["DOT"] for step in plan.launches if step.kernel == "gemm"]


def split_choices(p: Problem) -> list[Choice]:
    """One choice of each tile and kind, without a split of K and with one."""
    found = {}
    for choice in choices(p):
        if dots(write_plan(p, choice)) == ["tf32x3"]:
            found.setdefault((choice.tile, choice.split > 1, choice.b_classes > 1), choice)
    assert found
    return list(found.values())


def laid_out(x: Tensor, order: str) -> Tensor:
    return x.contiguous() if order == "N" else x.mT.contiguous().mT


def run(p: Problem, choice: Choice, a: Tensor, b: Tensor) -> Tensor:
    out = a.new_full((1, p.M, p.N), torch.nan)
    running.run_plan(write_plan(p, choice), a[None], b[None], out)
    return out[0]


@kernels
@pytest.mark.parametrize("layout", ["NN", "NT", "TN"])
@pytest.mark.parametrize("family", FAMILIES)
def test_number_families(family, layout, arch, device, guarded_memory) -> None:
    p = problem(arch, layout)
    a, b = FAMILIES[family](M, K, N, torch.Generator(device).manual_seed(0))
    a, b = laid_out(a, layout[0]), laid_out(b, layout[1])
    for choice in split_choices(p):
        got = run(p, choice, a, b)
        want = exact(a, b)
        assert_same_specials(got, want, str(choice))
        rows, columns = want.isfinite().all(1), want.isfinite().all(0)
        if "Inf" in family:
            rows, columns = a.isfinite().all(1).cpu(), b.isfinite().all(0).cpu()
        at = rows.to(device)
        assert_accurate(got[at][:, columns], a[at], b[:, columns], "fp32", str(choice))


@kernels
@pytest.mark.parametrize("layout", ["NN", "NT"])
def test_misaligned_b_by_classes(layout, arch, device, guarded_memory) -> None:
    p = problem(arch, layout, k=K + 1, n=N + 1)
    a = torch.randn(M, K + 1, device=device)
    b = laid_out(torch.randn(K + 1, N + 1, device=device), layout[1])
    found = split_choices(p)
    assert {choice.b_classes > 1 for choice in found} == {True}
    for choice in found:
        assert_accurate(run(p, choice, a, b), a, b, "fp32", str(choice))


@kernels
def test_closer_than_promised(arch, device) -> None:
    """22 bits and a rounding: a compiler that contracts the splitting would lose ten of them."""
    p = problem(arch, m=32, k=512, n=64)
    a, b = torch.randn(32, 512, device=device), torch.randn(512, 64, device=device)
    want = exact(a, b)
    for choice in split_choices(p):
        error = norm(run(p, choice, a, b).cpu().double() - want) / norm(want)
        assert error < 2.0**-22, (choice, error)


@kernels
def test_numbers_too_large_to_split(arch, device) -> None:
    """IEEE's bits, of those programs alone whose numbers ask for it."""
    p, ieee = problem(arch), problem(arch, precision="ieee")
    a, b = torch.randn(M, K, device=device), torch.randn(K, N, device=device)
    for choice in split_choices(p):
        if choice.split > 1:
            continue
        ordinary = run(p, choice, a, b)
        large = a.clone()
        large[3, 5] = 1e35
        got = run(p, choice, large, b)
        assert torch.equal(got, run(ieee, choice, large, b))
        assert not torch.equal(ordinary, run(ieee, choice, a, b)), "ordinary numbers are split"
        columns = torch.arange(N, device=device) // choice.tile.block_n > 0
        large_b = b.clone()
        large_b[0, 0] = 1e35
        got = run(p, choice, a, large_b)
        assert torch.equal(got[:, columns], ordinary[:, columns])


@kernels
def test_what_lies_beside_b_is_no_reason(arch, device) -> None:
    """A class is read from before its rows; what is there must not decide how C is computed."""
    a, wide = torch.randn(M, K + 1, device=device), torch.zeros(K + 1, N + 3, device=device)
    b = wide[:, : N + 1]
    b.copy_(torch.randn(K + 1, N + 1))
    p = problem(arch, k=K + 1, n=N + 1)
    p = replace(p, b=replace(p.b, k_stride=N + 3))
    for choice in split_choices(p):
        expected = run(p, choice, a, b)
        wide[:, N + 1 :] = torch.nan
        assert torch.equal(run(p, choice, a, b), expected), choice
        wide[:, N + 1 :] = 0
        assert_accurate(expected, a, b, "fp32", str(choice))


@kernels
@pytest.mark.parametrize("name", specials(5, 5, 5))
def test_inf_and_nan(name, arch, device) -> None:
    p = problem(arch)
    a, b = (x.to(device) for x in specials(M, K, N)[name])
    for choice in split_choices(p):
        assert_same_specials(run(p, choice, a, b), exact(a, b), f"{name}: {choice}")


@kernels
@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-140, 2.0**-126, 2.0**-100, 1.0, 2.0**90])
def test_every_bit_of_both_operands_counts(scale, arch, device) -> None:
    """Products with one, where sums are exact: 22 bits of every number, subnormal ones too."""
    p = problem(arch, k=64)
    bits = torch.randint(1, 2**23, (M, 1), device=device).double()
    a = torch.zeros(M, 64, device=device)
    a[:, :1] = (bits * scale).float()
    b = torch.zeros(64, N, device=device)
    b[0] = 1.0
    want = exact(a, b)
    for choice in split_choices(p):
        got = run(p, choice, a, b).cpu().double()
        assert ((got - want).abs() <= want.abs() * 2.0**-22 + 2.0**-150).all()


@pytest.mark.parametrize("arch", ARCHES)
def test_where_operands_are_split(arch) -> None:
    few_rows = problem(arch, m=8, k=4096, n=11008)
    expected = arch in SPLIT_ARCHES
    assert (dots(make_plan(few_rows)) == ["tf32x3"]) == expected
    said = " ".join(reasons(few_rows, make_plan(few_rows).choice))
    assert ("split in registers" in said) == expected
    for other in ("tf32", "ieee"):
        assert "tf32x3" not in dots(make_plan(problem(arch, precision=other)))
    misaligned = problem(arch, k=K + 1, n=N + 1)
    kinds = {operand_kind(misaligned, c.pack_a, c.pack_b) for c in choices(misaligned)}
    assert "tf32x3" not in kinds, "unless by classes: element by element they would spill"


@pytest.mark.compiled
@pytest.mark.parametrize("arch", SPLIT_ARCHES)
@pytest.mark.parametrize("layout", ["NN", "NT", "TN", "TT"])
def test_code(layout, arch) -> None:
    """On the tensor core, by wide copies, not contracted; and IEEE's products beside it."""
    from fastmm_op.codegen import compile_launch, resources

    p = problem(arch, layout, m=32, k=4096, n=11008)
    for tile in (tile for tile in TILES[arch, "tf32x3"] if tile.kernel == "gemm"):
        (step,) = (
            s for s in write_plan(p, Choice(False, False, tile, 1)).launches if s.kernel == "gemm"
        )
        kernel = compile_launch(p, step)
        found = resources(kernel)
        assert found.spills == 0, (tile, found.spills)
        assert found.shared_memory <= step.shared_memory
        assert found.main_loop
        assert sum(n for name, n in found.main_loop.items() if name.startswith("HMMA")) > 0
        assert not any(name.startswith("LDG.") for name in found.main_loop)
        assert kernel.asm["ptx"].count("sub.rn.f32") > 0
        assert found.count("FFMA") > found.main_loop.get("FFMA", 0), "IEEE's products"


def test_blocks_of_the_largest_sizes() -> None:
    """tl.cdiv would exceed 32 bits; numpy's integers are such, and wrap around."""
    pytest.importorskip("triton")
    int32 = pytest.importorskip("numpy").int32
    from fastmm_op.kernels.common import count_blocks

    for size in (1, 127, 128, 129, 2**31 - 1):
        assert int(count_blocks.fn(int32(size), int32(128))) == -(-size // 128)


@kernels
def test_the_splitting_itself(device, arch) -> None:
    """hi has 11 bits, and hi + lo is the number, but for lo's 12th bit."""
    import triton
    import triton.language as tl

    @triton.jit
    def split(x_ptr, hi_ptr, lo_ptr, N: tl.constexpr):
        at = tl.arange(0, N)
        hi, lo = tf32.split_in_tf32(tl.load(x_ptr + at))
        tl.store(hi_ptr + at, hi)
        tl.store(lo_ptr + at, lo)

    x = torch.randn(1024, device=device) * 2.0 ** torch.randint(-120, 90, (1024,), device=device)
    hi, lo = torch.empty_like(x), torch.empty_like(x)
    split[(1,)](x, hi, lo, 1024)
    lo = (lo.view(torch.int32) & ~0x1FFF).view(torch.float32)
    assert (hi.view(torch.int32) & 0x1FFF == 0).all()
    scaled = x.double() * tf32.SPLIT_SCALE.value
    assert ((hi.double() + lo.double() - scaled).abs() <= scaled.abs() * 2.0**-23).all()
    assert ((hi.double() - scaled).abs() <= scaled.abs() * 2.0**-11).all()
