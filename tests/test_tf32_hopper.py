"""fp32 operands read as they lie by TMA: kernels/gemm_tf32_hopper.py, its plans and its numbers."""

import tempfile
from dataclasses import replace
from types import FunctionType, SimpleNamespace

import pytest
import torch

from cases import FAMILIES, specials, surrounded
from fastmm_op.arch import ARCHES
from fastmm_op.choices import choices
from fastmm_op.launches import Descriptor, Pointer
from fastmm_op.partition import count_tiles
from fastmm_op.plan import make_plan, reasons, write_plan
from fastmm_op.problem import Epilogue, Operand, Problem, problem_of
from fastmm_op.timing import torch_tf32
from linear_oracle import assert_linear
from oracle import assert_accurate, assert_same_specials, exact

KERNEL = "gemm_tf32_hopper"
DEEP = (256, 524288, 256)
NO_EPILOGUE = Epilogue()


def problem(m, k, n, *, layout="NN", precision="fp32", arch="sm_90", **options) -> Problem:
    options = {"batch": 1, "dtype": "fp32"} | options
    return problem_of(m, k, n, layout=layout, precision=precision, arch=ARCHES[arch], **options)


def by_tma(p: Problem) -> list:
    return [choice for choice in choices(p) if choice.tile.kernel == KERNEL]


@pytest.mark.parametrize(
    ("p", "legal"),
    [
        (problem(300, 512, 260), True),
        (problem(300, 512, 260, precision="tf32"), True),
        (problem(300, 512, 260, batch=3), True),
        (problem(300, 512, 261, layout="NT"), True),  # C's rows are not aligned
        (problem(301, 512, 260), True),
        (problem(300, 513, 260), False),  # A's rows are misaligned
        (problem(300, 512, 261), False),  # B's are
        (problem(300, 512, 260, precision="ieee"), False),
        (problem(300, 512, 260, dtype="bf16", precision="tf32"), False),
        (problem(300, 8, 260), False),  # too short a sum for two parts
        (problem(1, 512, 260), False),
        (problem(300, 512, 260, arch="sm_89"), False),
        (replace(problem(300, 512, 260), arch=replace(ARCHES["sm_90"], tma=False)), False),
        (replace(problem(300, 512, 260), a=Operand(0, 0, 1)), False),  # one row stands for all
    ],
)
def test_which_products_it_can_compute(p, legal) -> None:
    assert bool(by_tma(p)) == legal


@pytest.mark.parametrize("precision", ["tf32", "fp32"])
def test_a_deep_product_of_few_tiles_takes_it(precision) -> None:
    """Each operand is read once: packing would write and read them again."""
    p = problem(*DEEP, precision=precision)
    plan = make_plan(p)
    assert [step.kernel for step in plan.launches] == [KERNEL, "reduce"]
    assert plan.strategy == "direct+split"
    said = " ".join(reasons(p, plan.choice))
    assert ("two numbers of TF32" in said) == (precision == "fp32")
    assert ("a warpgroup converts b" in said) == (precision == "fp32")
    assert ("TMA rounds both" in said) == (precision == "tf32")


def test_sums_are_short() -> None:
    """Of a long K what each program sums is bounded, and more so beside few rows."""
    assert max(524288 / c.split for c in by_tma(problem(*DEEP))) == 8192
    assert max(524288 / c.split for c in by_tma(problem(32, 524288, 256))) == 1024


@pytest.fixture
def share_of() -> FunctionType:
    """kernels/hopper.share_of, run by Python."""
    pytest.importorskip("triton")
    hopper = pytest.importorskip("fastmm_op.kernels.hopper")
    names = {"gl": SimpleNamespace(where=lambda c, x, y: x if c else y)}
    return FunctionType(hopper.share_of.fn.__code__, names)


@pytest.mark.parametrize(("steps", "splits"), [(1, 1), (7, 2), (5, 8), (33, 8), (2**22 + 5, 512)])
def test_shares_of_k_meet_and_are_alike(steps, splits, share_of) -> None:
    shares = [share_of(steps, split, splits) for split in range(splits)]
    assert shares[0][0] == 0
    assert [last for _, last in shares] == [*(first for first, _ in shares[1:]), steps]
    assert {last - first for first, last in shares} <= {steps // splits, -(-steps // splits)}


def test_the_last_share_of_a_huge_k(share_of) -> None:
    """32 bits hold all numbers on the way; they would not hold splits * steps."""
    int32 = pytest.importorskip("numpy").int32
    first, last = share_of(int32(2**22 + 5), int32(511), int32(512))
    assert (int(first), int(last)) == (2**22 + 5 - 2**13, 2**22 + 5)


@pytest.mark.parametrize("layout", ["NN", "NT", "TN", "TT"])
def test_launch(layout) -> None:
    """What TMA is told lies inside the operands, and every tile and share of K has a program."""
    p = replace(
        problem(300, 512, 260, layout=layout, batch=2), epilogue=Epilogue(True, "relu", True)
    )
    found = by_tma(p)
    assert {1, 2} <= {choice.split for choice in found}
    for choice in found:
        step, *after = write_plan(p, choice).launches
        assert [s.kernel for s in after] == (["reduce"] if choice.split > 1 else [])
        a, b, *rest = step.args
        for operand, layout_of in ((a, p.a), (b, p.b)):
            assert isinstance(operand, Descriptor)
            batch, outer, inner = operand.shape
            pitch = max(layout_of.row_stride, layout_of.k_stride)
            assert operand.strides == (layout_of.batch_stride, pitch, 1)
            elements = 2 * 512 * (300 if operand is a else 260)
            assert (batch - 1) * operand.strides[0] + (outer - 1) * pitch + inner == elements
            assert all(stride * 4 % 16 == 0 for stride in operand.strides[:2])
        assert a.box == ((1, 64, 32) if layout[0] == "N" else (1, 32, 64))
        columns = choice.tile.block_n
        assert b.box == ((1, columns, 32) if layout[1] == "T" else (1, 32, columns))
        has_epilogue = Pointer("bias", "fp32") in rest
        assert has_epilogue == (choice.split == 1) == (step.constexprs["ACTIVATION"] == "relu")
        assert step.grid == min(132, count_tiles(p, choice) * choice.split)


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("layout", "precision", "columns", "n", "epilogue"),
    [
        ("NN", "tf32", 128, 1024, Epilogue()),
        ("NN", "tf32", 256, 1024, Epilogue(True, "gelu", True)),
        ("NT", "tf32", 256, 1021, Epilogue(True, "gelu")),  # C's rows are not aligned
        ("TT", "tf32", 64, 1021, Epilogue(True, "gelu", True)),
        ("NT", "fp32", 128, 1021, Epilogue()),
        ("TN", "fp32", 64, 1024, Epilogue(True, "gelu", True)),
        ("TT", "fp32", 128, 1024, Epilogue(True, "gelu", True)),
    ],
)
def test_machine_code(layout, precision, columns, n, epilogue) -> None:
    """TMA and wgmma on TF32; main loops keep their numbers in registers; shared memory fits."""
    from fastmm_op import codegen

    p = replace(problem(1024, 1024, n, layout=layout, precision=precision), epilogue=epilogue)
    (choice,) = (c for c in by_tma(p) if c.split == 1 and c.tile.block_n == columns)
    (step,) = write_plan(p, choice).launches
    kernel = codegen.compile_launch(p, step)
    found = codegen.resources(kernel)
    assert found.count("UTMALDG") > 0
    # Blocks of 32 are four instructions for each product, in two consumers.
    products = 3 if precision == "fp32" else 1
    assert found.opcodes[f"HGMMA.64x{columns}x8.F32.TF32"] == 2 * 4 * products
    assert found.shared_memory <= step.shared_memory <= p.arch.shared_memory
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        program, loops, _ = codegen.read_assembly(codegen.run_tool("nvdisasm", "-c", file.name))
    multiplying = [[program[i] for i in loop] for loop in loops]
    multiplying = [loop for loop in multiplying if any(x.startswith("HGMMA") for x in loop)]
    for loop in sorted(multiplying, key=len)[:2]:  # the inner ones, of either consumer
        assert not [name for name in loop if name.startswith(("LDL", "STL"))]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "fp32"])
@pytest.mark.parametrize("case", [*specials(5, 5, 5), *FAMILIES])
def test_numbers_on_a_gpu(case, precision) -> None:
    """Every split; a wave of programs and more."""
    sizes = (1100, 200, 2308)
    special = specials(*sizes).get(case)
    a, b = (x.cuda()[None] for x in special or FAMILIES[case](*sizes))
    for choice, out in computed(a, b, precision):
        if special:
            assert_same_specials(out, exact(a, b).float(), what=str(choice))
        else:
            assert_accurate(out, a, b, precision, what=str(choice))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "fp32"])
@pytest.mark.parametrize("layout", ["NN", "NT", "TN", "TT"])
def test_surroundings_on_a_gpu(layout, precision) -> None:
    """Beside the operands lies NaN: before them, after them and between their rows."""
    a, b = torch.randn(3, 300, 516, device="cuda"), torch.randn(3, 516, 260, device="cuda")
    a = surrounded(a, 4, 8) if layout[0] == "N" else surrounded(a.mT, 4, 8).mT
    b = surrounded(b, 4, 8) if layout[1] == "N" else surrounded(b.mT, 4, 8).mT
    for choice, out in computed(a, b, precision):
        assert_accurate(out, a, b, precision, what=str(choice))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["NN", "NT", "TT"])
def test_tma_rounds_to_nearest_even_on_a_gpu(layout) -> None:
    """x times the identity is x rounded, to the bit; what rounds past the largest is Inf."""
    from fastmm_op import launch

    if not launch.device_arch(torch.cuda.current_device()).tma_rounds:
        pytest.skip("needs a Hopper GPU and a Triton that has TMA round")
    x = torch.randn(256, 256, device="cuda")
    ties = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-11 + 2.0**-23], device="cuda")
    x[0, :3] = ties
    x[1, 1] = 2.0**-126 / 3
    x[2:5] = 0.0
    x[2, 2] = 2.0**128 * (1 - 2.0**-24)
    bits = x.view(torch.int32)
    want = ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)
    want[2, :2] = want[2, 3:] = torch.nan  # Inf times the identity's zeros
    bits[3, 3], bits[4, 4] = 0x7F800001, -1  # NaN of the lowest bit alone, and of all bits
    want[3:5] = torch.nan
    a = x if layout[0] == "N" else x.mT.contiguous().mT
    eye = torch.eye(256, device="cuda")
    b = eye if layout[1] == "N" else eye.mT
    for _, out in computed(a[None], b[None], "tf32"):
        torch.testing.assert_close(out[0], want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "fp32"])
@pytest.mark.parametrize(
    ("layout", "n"), [("NT", 260), ("NT", 261), ("TT", 260), ("TT", 261), ("NN", 260), ("TN", 260)]
)
def test_epilogues_on_a_gpu(layout, n, precision) -> None:
    """Bias, activation and residual; rows of C that are aligned, and others."""
    x, weight = torch.randn(300, 516, device="cuda"), torch.randn(n, 516, device="cuda")
    weight = weight if layout[1] == "T" else weight.mT.contiguous().mT
    x = x if layout[0] == "N" else x.mT.contiguous().mT
    bias, residual = torch.randn(n, device="cuda"), torch.randn(300, n, device="cuda")
    for epilogue in (Epilogue(), Epilogue(True, "gelu", True)):
        rest = (bias, residual) if epilogue.bias else (None, None)
        for choice, out in computed(x[None], weight.mT[None], precision, epilogue, *rest):
            how = rest[0], epilogue.activation, rest[1], precision, str(choice)
            assert_linear(out[0], x, weight, *how)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "fp32"])
@pytest.mark.parametrize("case", ["Inf in a", "NaN in b", "finite overflow", "Inf times zero"])
@pytest.mark.parametrize("layout", ["NN", "NT", "TN", "TT"])
def test_specials_of_a_batch_on_a_gpu(layout, case, precision) -> None:
    """What is computed again in IEEE fp32 is that item's tile, also of a B that all items share."""
    a, b = (x.cuda() for x in specials(300, 516, 260)[case])
    a = torch.stack([torch.randn_like(a), a, torch.randn_like(a)])
    shared = b.expand(3, -1, -1) if layout[1] == "N" else b.mT.contiguous().mT.expand(3, -1, -1)
    a = a if layout[0] == "N" else a.mT.contiguous().mT
    for choice, out in computed(a, shared, precision):
        assert_same_specials(out, exact(a, shared).float(), what=str(choice))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "fp32"])
@pytest.mark.parametrize("layout", ["NN", "NT", "TN"])
def test_repeats_on_a_gpu(layout, precision) -> None:
    """Bit for bit, of three waves of programs with few blocks of K: a race would show."""
    a, b = torch.randn(1, 2560, 160, device="cuda"), torch.randn(1, 160, 2560, device="cuda")
    a = a if layout[0] == "N" else a.mT.contiguous().mT
    b = b if layout[1] == "N" else b.mT.contiguous().mT
    first = [out for _, out in computed(a, b, precision)]
    for _ in range(20):
        again = [out for _, out in computed(a, b, precision)]
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("make", [torch.rand, torch.randn])
@pytest.mark.parametrize(("precision", "factor"), [("tf32", 1.1), ("fp32", 2.0)])
def test_deep_sums_beside_torchs_on_a_gpu(precision, factor, make) -> None:
    """The tensor core truncates its sums, ours and cuBLAS's: of numbers of one sign that shows."""
    a, b = make(1, 256, 65536, device="cuda"), make(1, 65536, 256, device="cuda")
    want = a.double() @ b.double()
    with torch_tf32(precision == "tf32"):
        theirs = (a @ b - want).norm()
    for choice, out in computed(a, b, precision):
        ours = (out - want).norm()
        allowed = factor * theirs + 2.0**-23 * want.norm()
        assert ours <= allowed, f"{choice}: ours {ours:.3e}, torch's {theirs:.3e}"


def computed(a, b, precision: str, epilogue=NO_EPILOGUE, bias=None, residual=None):
    """(choice, product) by every choice with the kernel; into memory that held NaN."""
    from fastmm_op import launch, running

    arch = launch.device_arch(torch.cuda.current_device())
    if not arch.tma:
        pytest.skip("needs a Hopper GPU and a Triton whose Gluon drives it")
    p = launch.describe(a, b, precision, arch, epilogue)
    found = by_tma(p)
    assert found
    for choice in found:
        out = torch.full((p.batch, p.M, p.N), torch.nan, device="cuda")
        running.run_plan(write_plan(p, choice), a, b, out, bias, residual)
        yield choice, out
