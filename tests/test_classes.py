"""A misaligned A that the Hopper kernel reads as it is, by classes of its rows.

TMA reads whole 16-byte granules, so it reads more than the rows have: a model of its copies shows
that nothing outside of A is among it and that what remains is the product, to the last bit.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import pytest
import torch

from fastmm_op.arch import ARCHES
from fastmm_op.choices import choices
from fastmm_op.estimate import estimate
from fastmm_op.launches import Descriptor, Launch
from fastmm_op.partition import a_classes, count_tiles, row_classes
from fastmm_op.plan import make_plan, reasons, write_plan
from fastmm_op.problem import Operand, Problem, cdiv, problem_of
from fastmm_op.search import label, shortlist
from fastmm_op.tiles import Choice
from hopper_items import BLOCK_K, Item, arguments, as_python, work_items

VOCABULARY = (8192, 50257, 768)
HOPPER = ARCHES["sm_90"]


def problem(m: int, k: int, n: int, dtype="bf16", pitch: int | None = None, arch=HOPPER) -> Problem:
    """A (m, k) with rows ``pitch`` apart, B (k, n) row-major."""
    how = {"batch": 1, "dtype": dtype, "layout": "NN", "precision": "tf32", "arch": arch}
    p = problem_of(m, k, n, **how)
    return replace(p, a=Operand(0, pitch, 1)) if pitch else p


def by_classes(p: Problem) -> list[Choice]:
    return [choice for choice in choices(p) if a_classes(p, choice) > 1]


def hopper_steps(p: Problem, choice: Choice) -> list[Launch]:
    return [s for s in write_plan(p, choice).launches if s.kernel == "gemm_hopper"]


# M, K, N, A's pitch, its classes: K below, at and above a multiple of 64, rows of a whole number of
# tiles of every class, and some more.
SIZES = {
    "one block": ((1024, 57, 8), 57, 8),
    "a block and the lead": ((1029, 61, 8), 61, 8),
    "a row more than tiles": ((1025, 319, 16), 319, 8),
    "all but one class": ((1031, 257, 8), 257, 8),
    "short rows far apart": ((1030, 3, 8), 1001, 8),
    "4 classes": ((515, 322, 8), 322, 4),
    "4 classes, a gap between rows": ((512, 128, 72), 134, 4),
    "2 classes": ((257, 260, 136), 260, 2),
    "2 classes, K of whole blocks": ((256, 192, 8), 196, 2),
}


class Memory:
    """An operand of small integers in memory, with NaN where the product has no element."""

    def __init__(self, rows: int, columns: int, pitch: int) -> None:
        self.elements = (rows - 1) * pitch + columns
        self.memory = torch.full((rows * pitch,), torch.nan)
        self.matrix = self.memory.view(rows, pitch)[:, :columns]
        self.matrix.copy_(torch.randint(-3, 4, (rows, columns)))
        self.read = torch.zeros(self.elements, dtype=torch.bool)

    def box(self, descriptor: Descriptor, at: list[int]) -> torch.Tensor:
        """What TMA copies: zeros outside of the descriptor's tensor, which must not leave A."""
        assert all(n > 0 for n in descriptor.shape)
        assert all(stride % 8 == 0 for stride in descriptor.strides[:-1])
        assert at[-1] % 8 == 0, "TMA starts on 16-byte boundaries"
        inside, address = torch.tensor(True), torch.tensor(0)
        for i, (start, size) in enumerate(zip(at, descriptor.box, strict=True)):
            index = start + torch.arange(size)
            index = index.view([-1 if j == i else 1 for j in range(3)])
            inside = inside & (index >= 0) & (index < descriptor.shape[i])
            address = address + index * descriptor.strides[i]
        found = torch.zeros(inside.shape)
        addresses = address[inside]
        self.read[addresses] = True  # raises where that is not A
        found[inside] = self.memory[addresses]
        return found[0]


def tile_product(item: Item, arg: dict, a: Memory, b: Memory) -> torch.Tensor:
    """(128, BLOCK_N), or EDGE_N more: what producer and consumers make of a work item."""
    k, classes = arg["K"], arg["A_CLASSES"]
    lead = as_python("lead_of")(item.row0, arg["stride_am"], classes)
    row, col, has_more = as_python("find_class")(item.row0, arg["M"], arg["stride_am"], classes)
    assert 0 <= lead < 8
    desc = arg["a_desc"] if has_more or arg["a_class_desc"] is None else arg["a_class_desc"]
    acc = torch.zeros(128, len(item.columns))
    for step in range(item.first_step, item.last_step):
        first = step * BLOCK_K
        halves = [a.box(desc, [0, row + 64 * i, col + first]) for i in range(2)]
        a_block = torch.cat(halves)
        offs_k = first - lead + torch.arange(BLOCK_K)
        if offs_k[0] < 0 or offs_k[-1] >= k:  # clear_outside
            a_block[:, (offs_k < 0) | (offs_k >= k)] = 0
        b_block = b.box(arg["b_desc"], [0, first - lead, item.col0])
        if len(item.columns) > arg["BLOCK_N"]:
            edge = b.box(arg["edge_desc"], [0, first - lead, item.col0 + arg["BLOCK_N"]])
            b_block = torch.cat([b_block, edge], 1)
        acc += a_block @ b_block
    return acc


def product(p: Problem, choice: Choice, a: Memory, b: Memory) -> torch.Tensor:
    """C, from all work items; every element's shares of K are summed, wherever they were left."""
    c = torch.zeros(p.M, p.N)
    for step in hopper_steps(p, choice):
        for item in work_items(step):
            rows, columns = item.rows >= 0, item.columns >= 0
            found = tile_product(item, arguments(step), a, b)[rows][:, columns]
            c[item.rows[rows][:, None], item.columns[columns]] += found
    return c


def one_of_each(found: list[Choice]) -> Iterator[Choice]:
    """Every tile width and edge, and the ways to share K, of the widest tile."""
    ways = {
        (c.tile.block_n, c.edge_n, c.split, c.tail_split): c
        for c in found
        if c.tile.block_n == 256 or c.split == c.tail_split == 1
    }
    return iter(ways.values())


@pytest.mark.parametrize("name", SIZES)
def test_the_product_is_exact(name) -> None:
    """Of small integers; one NaN that is not cleared, or read as if it were A's, would show."""
    pytest.importorskip("triton")
    (m, k, n), pitch, classes = SIZES[name]
    p = problem(m, k, n, pitch=pitch)
    found = by_classes(p)
    assert {a_classes(p, choice) for choice in found} == {classes}
    assert {choice.tile.block_n for choice in found} == {64, 128, 256}
    assert any(choice.split > 1 for choice in found) == (k >= 255)
    a, b = Memory(m, k, pitch), Memory(k, n, n)
    for choice in one_of_each(found):
        a.read.zero_()
        assert torch.equal(product(p, choice, a, b), a.matrix @ b.matrix), label(choice)
        assert a.read[torch.arange(m)[:, None] * pitch + torch.arange(k)].all()


def test_inf_and_nan_stay_in_their_rows() -> None:
    """Also where they are what TMA reads of the neighbouring rows, above and below."""
    pytest.importorskip("triton")
    p = problem(1025, 71, 8)
    a, b = Memory(1025, 71, 71), Memory(71, 8, 8)
    special = torch.zeros(1025, dtype=torch.bool)
    for row in (0, 7, 8, 100, 1024):
        a.matrix[row, 0] = torch.inf
        a.matrix[row, -1] = torch.nan
        special[row] = True
    b.matrix[:] = b.matrix.abs() + 1
    for choice in one_of_each(by_classes(p)):
        c = product(p, choice, a, b)
        assert c[special].isnan().all()
        assert torch.equal(c[~special], a.matrix[~special] @ b.matrix)


def test_nothing_past_the_descriptors_end() -> None:
    """Their tensors end with A, whatever the number of rows and the gap between them."""
    for m in range(1024, 1040):
        for pitch in (57, 63):
            p = problem(m, 57, 8, pitch=pitch)
            (step,) = hopper_steps(p, by_classes(p)[0])
            arg = dict(zip(("a", "others"), step.args, strict=False))
            ends = set()
            for desc in arg.values():
                if desc is not None:
                    last = zip(desc.shape, desc.strides, strict=True)
                    ends.add(sum((size - 1) * stride for size, stride in last) + 1)
                    assert prod(desc.box) == 64 * 64
            rows = {m, m // 8 * 8}
            assert ends == {(r - 1) * pitch + 57 for r in rows}


# When it may be done.


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_only_misaligned_rows_are_read_by_classes(dtype) -> None:
    for k, classes in ((1023, 8), (1022, 4), (1020, 2)):
        p = problem(4096, k, 512, dtype)
        found = by_classes(p)
        assert {a_classes(p, c) for c in found} == {classes}
        for choice in found:
            assert choice.tile.kernel == "gemm_hopper"
            assert not choice.pack_a
            assert not choice.pack_b
            assert row_classes(p, choice) == 1
            assert not choice.edge_n
            tiles = classes * cdiv(4096, 128 * classes) * cdiv(512, choice.tile.block_n)
            assert count_tiles(p, choice) == tiles
    assert not by_classes(problem(4096, 1024, 512, dtype))


CANNOT = {
    "another card": problem(4096, 1023, 512, arch=ARCHES["sm_89"]),
    "a Triton without Gluon": problem(4096, 1023, 512, arch=replace(HOPPER, tma=False)),
    "fp32": problem(4096, 1023, 512, "fp32"),
    "rows of C are misaligned": problem(4096, 1023, 513),
    "fewer rows than a tile of each class": problem(1023, 1023, 512),
    "rows overlap": problem(4096, 1023, 512, pitch=511),
    "A's address": replace(problem(4096, 1023, 512), a=Operand(0, 1023, 1, pointer_alignment=8)),
    "every other element": replace(problem(4096, 1023, 512), a=Operand(0, 2046, 2)),
    "A is M-major": replace(problem(4097, 1023, 512), a=Operand(0, 1, 4097)),
    "B is K-major": replace(problem(4096, 1023, 512), b=Operand(0, 1023, 1)),
    "B is K-major and aligned": replace(problem(4096, 1023, 512), b=Operand(0, 1024, 1)),
    "B is misaligned": replace(problem(4096, 1023, 512), b=Operand(0, 1, 513)),
    "a batch": replace(problem(4096, 1023, 512), batch=2, a=Operand(4096 * 1023, 1023, 1)),
    "rows that 32 bits do not reach": problem(4096, 1023, 512, pitch=2**28 + 1),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_read_by_classes(name) -> None:
    found = list(choices(CANNOT[name]))
    assert found
    assert all(a_classes(CANNOT[name], choice) == 1 for choice in found)


def test_few_tiles_are_estimated_as_they_are() -> None:
    """Classes of 1025 rows take nine tiles each, of which the last ones are nearly empty."""
    full, more = problem(8192, 4095, 3072), problem(8200, 4095, 3072)
    choice = next(c for c in by_classes(full) if c.split == c.tail_split == 1)
    assert choice in by_classes(more)
    assert count_tiles(full, choice) == 8 * 8 * 12
    assert count_tiles(more, choice) == 8 * 9 * 12
    assert estimate(more, choice) > 1.05 * estimate(full, choice)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_vocabularys_gradient_is_not_packed(dtype) -> None:
    p = problem(*VOCABULARY, dtype)
    plan = make_plan(p)
    assert plan.strategy == "direct+tail"
    assert [step.kernel for step in plan.launches] == ["gemm_hopper", "reduce_tail"]
    assert reasons(p, plan.choice)[0] == (
        "a is misaligned: read as it is, its rows in 8 classes of equal alignment"
    )


def test_tune_tries_it_and_packing() -> None:
    p = problem(*VOCABULARY)
    tried = [(a_classes(p, c) > 1, c.pack_a, c.tail_split > 1) for c in shortlist(p, 12)]
    assert {(True, False, False), (True, False, True), (False, True, True)} <= set(tried)


def test_no_n_is_so_long_that_it_pays_for_a_copy() -> None:
    """On the H200 4096x4097x4096 took 186 us by classes, 201 us with A packed."""
    for n in (768, 4096, 16384):
        assert not make_plan(problem(4096, 4097, n)).choice.pack_a
