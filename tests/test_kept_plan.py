"""Plans for a weight of which a packed copy is at hand."""

from dataclasses import replace

import expecttest
import pytest

import test_plan
from fastmm_op.arch import ARCHES, Card, arch_for
from fastmm_op.choices import choices
from fastmm_op.estimate import estimate
from fastmm_op.kept import keep
from fastmm_op.launches import Descriptor
from fastmm_op.plan import make_plan, reasons, write_plan
from fastmm_op.problem import Epilogue, Operand, Problem
from test_plan import argument_names, check_buffer, check_plan, outline

__all__ = ["argument_names"]  # a fixture

KINDS = [("fp32", "tf32"), ("fp32", "fp32"), ("bf16", "tf32")]


def problem(arch: str, m: int, k: int, n: int, dtype="fp32", precision="tf32", layout="NT"):
    """x (m, k) times a weight (n, k) that is kept by its rows (T) or as Conv1D keeps it (N)."""
    p = test_plan.problem(m, k, n, dtype=dtype, precision=precision, layout=layout, arch=arch)
    return replace(p, epilogue=Epilogue(bias=True), prepacked=True)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("dtype", "precision"), KINDS)
@pytest.mark.parametrize("layout", ["NT", "NN", "TT"])
@pytest.mark.parametrize("sizes", [(2000, 130, 261), (65, 9001, 40), (3, 33, 300)])
def test_every_choice_is_legal(sizes, layout, dtype, precision, arch, argument_names) -> None:
    """What is read of the copy has been written there, by the launches that make it."""
    p = problem(arch, *sizes, dtype, precision, layout)
    kept = keep(p)
    check_buffer(kept.launches, argument_names, "packed_b", kept.kept_bytes)
    check_buffer(kept.launches, argument_names, "workspace", kept.workspace_bytes)
    some = 0
    for choice in choices(p):
        plan = write_plan(p, choice)
        check_plan(p, plan, argument_names)
        check_buffer(plan.launches, argument_names, "packed_b", kept.kept_bytes)
        buffers = {
            (arg.pointer if isinstance(arg, Descriptor) else arg).buffer
            for step in plan.launches
            for arg in step.args
            if arg is not None and not isinstance(arg, int)
        }
        assert ("packed_b" in buffers) is choice.pack_b
        assert ("b" in buffers) is not choice.pack_b
        assert choice.slabs == 1, "a copy has whole rows"
        some += choice.pack_b
    assert some


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("dtype", "precision"), KINDS)
def test_the_copy_is_one_for_all(dtype, precision, arch) -> None:
    """However many rows x has, whatever its strides, whatever is done to the product."""
    first = keep(problem(arch, 2, 1100, 261, dtype, precision))
    for m in (7, 64, 5000):
        p = problem(arch, m, 1100, 261, dtype, precision)
        for other in (p, replace(p, a=Operand(0, 1, m), epilogue=Epilogue())):
            assert keep(other) == first


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("dtype", "precision"), KINDS)
def test_estimates_charge_no_packing_of_it(dtype, precision, arch) -> None:
    p = problem(arch, 700, 1025, 3001, dtype, precision)
    without = replace(p, prepacked=False)
    for choice in choices(without):
        if choice.pack_b:
            assert estimate(p, choice) < estimate(without, choice)
        else:
            assert estimate(p, choice) == estimate(without, choice)
    assert make_plan(p).seconds <= make_plan(without).seconds


@pytest.mark.parametrize("arch", ARCHES)
def test_one_row_is_read_from_the_weight(arch) -> None:
    for dtype, precision in KINDS:
        p = problem(arch, 1, 4097, 4099, dtype, precision)
        plan, without = make_plan(p), make_plan(replace(p, prepacked=False))
        assert plan == without
        assert not plan.choice.pack_b


def test_reasons() -> None:
    p = problem("sm_89", 2000, 2049, 3001)
    assert "b is misaligned: packed as scaled fp16 before, and kept" in reasons(
        p, make_plan(p).choice
    )


@pytest.mark.parametrize(
    ("precision", "k", "n"), [("tf32", 768, 3072), ("fp32", 768, 3072), ("fp32", 3072, 768)]
)
def test_few_rows_are_computed_from_the_weight_and_more_from_its_copy(precision, k, n) -> None:
    """An H100 took 17 us for 2 and 8 rows in TF32 by the copy, 12 by the weight (prepack.txt)."""
    h100 = arch_for(Card((9, 0), 132, 3.352e12))
    for rows in (2, 8, 17, 1023, 4096):
        p = replace(problem("sm_90", rows, k, n, precision=precision), arch=h100)
        assert make_plan(p).choice.pack_b == (rows > 17)


@pytest.mark.parametrize(("dtype", "precision"), KINDS)
@pytest.mark.parametrize("n", range(2, 10))
def test_rows_that_are_repeated_are_there(n, dtype, precision, argument_names) -> None:
    """Of a weight with few columns, none are repeated after the last for classes of C's rows."""
    pack = keep(problem("sm_90", 33, 256, n, dtype, precision)).launches[-1]
    arg = dict(zip(argument_names[pack.kernel], pack.args, strict=False))
    elements = 4 if dtype == "fp32" else 8
    assert arg["wrap"] == (elements - 1 if n >= elements else 0)


def test_outlines() -> None:
    problems: dict[str, Problem] = {
        "seed": problem("sm_89", 8205, 2949, 5921),
        "seed in full, Hopper": problem("sm_90", 8205, 2949, 5921, precision="fp32"),
        "a long K": problem("sm_89", 2000, 9001, 3001),
        "bf16": problem("sm_89", 8205, 2949, 5921, "bf16"),
        "aligned bf16": problem("sm_89", 8208, 2944, 5920, "bf16"),
    }
    text = "\n".join(f"{name}: {outline(make_plan(p))}" for name, p in problems.items())
    expecttest.assert_expected_inline(
        text,
        """\
seed: packed: pack_rows gemm
seed in full, Hopper: packed+tail: pack_rows gemm_hopper reduce_tail
a long K: packed: forget pack_strips gemm
bf16: packed: copy_tiles gemm
aligned bf16: direct: gemm""",
    )
