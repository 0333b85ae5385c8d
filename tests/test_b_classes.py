"""A misaligned B, or matrix times a vector, read 16 bytes at a time by classes of its rows."""

from dataclasses import replace

import pytest
import torch

from cases import DTYPES, LAYOUTS, interpreted_as, surrounded
from fastmm_op.arch import ARCHES
from fastmm_op.choices import choices, classes_as_batch, count_b_classes
from fastmm_op.estimate import estimate
from fastmm_op.launches import Pointer
from fastmm_op.plan import make_plan, write_plan
from fastmm_op.problem import Epilogue, Operand, Problem, is_aligned, problem_of
from fastmm_op.search import STAGES, other_stages
from oracle import assert_accurate

KINDS = [("fp32", "tf32"), ("fp32", "fp32"), ("bf16", "tf32"), ("fp16", "tf32")]


def problem(m, k, n, dtype="bf16", arch="sm_89", layout="NN", **options) -> Problem:
    options = {"batch": 1, "precision": "tf32"} | options
    return problem_of(m, k, n, dtype=dtype, layout=layout, arch=ARCHES[arch], **options)


def by_classes(p: Problem) -> list:
    return [choice for choice in choices(p) if choice.b_classes > 1]


@pytest.mark.parametrize(
    ("p", "classes"),
    [
        (problem(8, 100, 37), 8),
        (problem(8, 100, 38), 4),
        (problem(8, 100, 36), 2),
        (problem(8, 100, 37, "fp32"), 4),
        (problem(8, 100, 38, "fp32"), 2),
        (problem(1, 100, 37), 8),
        (problem(37, 100, 1, layout="TN"), 8),
        (problem(8, 16, 37), 8),
        (problem(8, 15, 37), 1),  # not two rows a class
        (problem(32, 100, 37), 8),
        (problem(33, 100, 37), 1),  # not few rows
        (problem(8, 100, 40), 1),  # aligned
        (problem(8, 101, 37, layout="NT"), 8),  # columns of B along K
        (problem(8, 102, 37, "fp32", layout="NT"), 2),
        (problem(8, 101, 15, layout="NT"), 1),
        (problem(8, 104, 37, layout="NT"), 1),
        (problem(37, 100, 1), 1),  # A's rows along K
        (problem(8, 100, 37, batch=2), 1),
        (replace(problem(8, 100, 37), prepacked=True), 1),
        (replace(problem(8, 65, 58), b=Operand(0, 1, 2)), 1),  # rows that overlap
        (replace(problem(8, 129, 3, layout="NT"), b=Operand(0, 1, 1)), 1),
        (replace(problem(1, 65, 58), b=Operand(0, 1, 2)), 1),
    ],
)
def test_which_products_have_classes(p, classes) -> None:
    assert count_b_classes(p) == classes
    deep = p
    if p.b.k_major:
        # A step of K more than the shifted one; what is added to the pitch leaves it as misaligned.
        b = replace(p.b, row_stride=40 * p.K + p.b.row_stride)
        deep = replace(p, K=40 * p.K, b=b)
    assert {c.b_classes for c in by_classes(deep)} == ({classes} if classes > 1 else set())


def test_an_address_that_is_not_known_has_no_classes() -> None:
    p = problem(8, 100, 37)
    assert count_b_classes(replace(p, b=replace(p.b, pointer_alignment=8))) == 1


def test_items_are_columns_where_b_is_k_major() -> None:
    product = classes_as_batch(problem(8, 101, 37, layout="NT"), 8)
    assert (product.batch, product.K, product.N) == (8, 101, 5)
    assert (product.a.batch_stride, product.a.row_stride, product.a.k_stride) == (0, 101, 1)
    assert (product.b.batch_stride, product.b.row_stride, product.b.k_stride) == (101, 808, 1)
    assert is_aligned(product.b, "bf16")


def test_items_are_the_rows_of_a_class() -> None:
    product = classes_as_batch(problem(8, 101, 37), 8)
    assert (product.batch, product.K) == (8, 13)
    assert (product.a.batch_stride, product.a.row_stride, product.a.k_stride) == (1, 101, 8)
    assert (product.b.batch_stride, product.b.row_stride, product.b.k_stride) == (37, 1, 296)
    assert is_aligned(product.b, "bf16")
    assert not is_aligned(product.a, "bf16")


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("dtype", "precision"), KINDS)
@pytest.mark.parametrize(
    ("m", "layout"),
    [(1, "NN"), (8, "NN"), (17, "NN"), (32, "NN"), (8, "NT"), (17, "NT"), (32, "NT")],
)
def test_skinny_misaligned_products_take_them(m, layout, dtype, precision, arch) -> None:
    """Few rows times a large matrix with odd rows: bound by how fast B can be read."""
    p = problem(m, 4097, 11009, dtype, arch, layout=layout, precision=precision)
    plan = make_plan(p)
    assert plan.choice.b_classes == (4 if dtype == "fp32" else 8)
    may_pack = m > 1 and layout == "NN"
    assert may_pack or not plan.choice.pack_a
    if may_pack and (dtype != "fp32" or arch == "sm_90"):
        assert plan.strategy.startswith("mixed+classes")
    others = [estimate(p, c) for c in choices(p) if c.b_classes == 1]
    assert plan.seconds < min(others)


def test_launches() -> None:
    """One product of all classes, and one sum, which applies the epilogue."""
    p = replace(problem(8, 100, 37), epilogue=Epilogue(bias=True, activation="relu"))
    for choice in by_classes(p):
        pack, gemm, reduce = write_plan(p, choice).launches
        assert (pack.kernel, gemm.kernel, reduce.kernel) == ("copy_tiles", "gemm", "reduce")
        assert pack.constexprs["INTERLEAVED"]
        assert (gemm.constexprs["B_SHIFTED"], gemm.constexprs["B_ALIGN"]) == (True, 8)
        assert gemm.constexprs["ACTIVATION"] == "none"
        assert reduce.constexprs["ACTIVATION"] == "relu"
        assert Pointer("bias", "bf16") in reduce.args
        tile = choice.tile
        tiles = -(-8 // tile.block_m) * -(-(37 + 7) // tile.block_n)
        assert gemm.grid == 8 * choice.split * tiles


def test_other_stages_fit_what_is_launched() -> None:
    """Where shared memory is scarce: a fourth stage would be too much of it."""
    p = problem(32, 4097, 11009, "fp32", "sm_89")
    p = replace(p, arch=replace(p.arch, shared_memory=26000))
    found = [other for choice in by_classes(p) for other in other_stages(p, choice, STAGES)]
    assert {c.tile.num_stages for c in found} == {1, 2}
    for choice in found:
        gemm = write_plan(p, choice).launches[-2]
        assert 0 < gemm.shared_memory <= p.arch.shared_memory


@pytest.mark.interpreted
@pytest.mark.parametrize(("dtype", "precision"), [*KINDS, ("fp32", "ieee")])
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(3, 300, 66), (32, 129, 37), (2, 16, 1), (1, 150, 261), (261, 150, 1)],
)
def test_numbers_along_k(m, k, n, dtype, precision, guarded_memory) -> None:
    """Every tile and split; B's rows lie in NaN, of which no element reaches the product."""
    a = torch.randn(1, m, k, dtype=DTYPES[dtype])
    b = torch.randn(1, k, n, dtype=DTYPES[dtype])
    # Rows along K, and an odd distance between them.
    if n == 1:
        a = surrounded(a.mT, 0, 5 + m % 2).mT
    else:
        b = surrounded(b, 0, 5 + n % 2)
    check_all_plans(a, b, precision, guarded_memory)


@pytest.mark.interpreted
@pytest.mark.parametrize(("dtype", "precision"), [*KINDS, ("fp32", "ieee")])
@pytest.mark.parametrize(
    ("m", "k", "n", "layout"), [(3, 301, 37, "T"), (17, 290, 66, "N"), (2, 259, 21, "offset 1")]
)
def test_numbers_along_n(m, k, n, layout, dtype, precision, guarded_memory) -> None:
    """The same for a K-major B, before whose rows NaN is read; A's neighbours are not."""
    a = LAYOUTS[layout](surrounded(torch.randn(1, m, k, dtype=DTYPES[dtype]), 16, 16))
    b = surrounded(torch.randn(1, n, k, dtype=DTYPES[dtype]), 8, 5 + k % 2).mT
    check_all_plans(a, b, precision, guarded_memory)


def check_all_plans(a: torch.Tensor, b: torch.Tensor, precision: str, memory) -> None:
    from fastmm_op import running

    plans = different_plans(a, b, precision)
    assert plans
    for choice, plan in plans:
        out = memory.empty((1, a.shape[1], b.shape[2]), dtype=a.dtype, device=a.device)
        running.run_plan(plan, a, b, out)
        assert_accurate(out, a, b, precision, what=str(choice))


def different_plans(a: torch.Tensor, b: torch.Tensor, precision: str, arches=ARCHES) -> list:
    """(choice, plan) of every tile with classes, K whole or shared, each kind of launches once."""
    from fastmm_op import launch

    found = {}
    for arch in arches:
        p = launch.describe(a, b, precision, ARCHES[arch])
        whole_or_shared = {
            (choice.tile, choice.pack_a, choice.split > 1): choice for choice in by_classes(p)
        }
        for choice in whole_or_shared.values():
            plan = write_plan(p, choice)
            found.setdefault(interpreted_as(plan), (choice, plan))
    return list(found.values())


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("m", "k", "n", "layout"),
    [
        (3, 301, 57, "NN"),
        (2, 40, 3, "NN"),
        (1, 150, 261, "NN"),
        (261, 150, 1, "TN"),
        (3, 301, 57, "NT"),
        (3, 301, 257, "NT"),  # whose last tile has a row of one class only
    ],
)
def test_nothing_outside_the_matrix_is_read(m, k, n, layout, dtype, monkeypatch) -> None:
    """Sixteen bytes at once, from where 16 divides the address, and none outside the matrix."""
    from triton.runtime.interpreter import InterpreterBuilder

    from fastmm_op import running

    a = torch.randn(1, m, k, dtype=DTYPES[dtype])
    along_n = layout == "NT"
    matrix = torch.randn(1, n, k) if along_n else torch.randn(1, k, max(m, n))
    memory = torch.full((2048 + matrix.numel() + 2048,), torch.nan, dtype=a.dtype)
    matrix = memory[2048:-2048].view(matrix.shape).copy_(matrix)
    b = matrix.mT if along_n else matrix
    if n == 1:
        a, b = matrix.mT, torch.randn(1, k, 1, dtype=a.dtype)
    size = matrix.element_size()
    outside = [memory.data_ptr() + size * (memory.numel() if end else 0) for end in (0, 1)]
    inside = [matrix.data_ptr() + size * (matrix.numel() if end else 0) for end in (0, 1)]
    load = InterpreterBuilder.create_masked_load
    seen = set()

    def see(addresses, length: int) -> None:
        here = addresses[(addresses >= outside[0]) & (addresses < outside[1])]
        if here.size:
            seen.update((int(here.min()), int(here.max()) + length))

    def watched(self, ptrs, mask, *rest):
        addresses, wanted = ptrs.data, mask.data
        if addresses.ndim == 2:  # a tile: runs of 16 bytes, if no mask divides them
            runs, wanted = addresses.reshape(-1, 16 // size), wanted.reshape(-1, 16 // size)
            whole = wanted.all(axis=1)
            firsts = runs[whole, 0]
            here = (firsts >= outside[0]) & (firsts < outside[1])
            assert (firsts[here] % 16 == 0).all()
            see(firsts, 16)
            addresses, wanted = runs[~whole], wanted[~whole]
        see(addresses[wanted], size)
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched)
    for _, plan in different_plans(a, b, "tf32"):
        running.run_plan(plan, a, b, torch.empty(1, m, n, dtype=a.dtype))
    assert (min(seen), max(seen)) == tuple(inside)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "precision"), [*KINDS, ("fp32", "ieee")])
@pytest.mark.parametrize("pitch", [11009, 11010, 11012])
@pytest.mark.parametrize(("m", "layout"), [(1, "N"), (3, "N"), (32, "N"), (3, "T"), (32, "T")])
def test_on_a_gpu(m, layout, pitch, dtype, precision) -> None:
    """By every tile and split of this card; what lies between B's rows, and C before, is NaN."""
    from fastmm_op import launch, running

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(1, rows, columns, device="cuda", dtype=DTYPES[dtype])

    k, n = (4097, 10995) if layout == "N" else (10995, 4097)
    a, b = normal(m, k), normal(4097, 10995)
    b = surrounded(b, 0, pitch - 10995)
    b = b if layout == "N" else b.mT
    p = launch.describe(a, b, precision, launch.device_arch(torch.cuda.current_device()))
    found = by_classes(p)
    assert bool(found) == (dtype != "fp32" or pitch != 11012)
    for choice in found:
        out = torch.full((1, m, n), torch.nan, device="cuda", dtype=a.dtype)
        running.run_plan(write_plan(p, choice), a, b, out)
        assert_accurate(out, a, b, precision, what=str(choice))
