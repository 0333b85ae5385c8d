"""The Hopper kernel's shared last tiles, and wider ones: who computes what, and who sums it up.

hopper_items.py says what the kernel does; the interpreted reduce_tail_kernel finishes the partial
sums of that.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
import torch

from cases import DTYPES
from fastmm_op.arch import ARCHES
from fastmm_op.choices import choices
from fastmm_op.launches import Launch
from fastmm_op.partition import (
    a_classes,
    count_tiles,
    row_classes,
    tail_tiles,
    whole_tiles,
    wider_tiles,
)
from fastmm_op.plan import make_plan, reasons, write_plan
from fastmm_op.problem import Epilogue, Problem, cdiv, problem_of
from fastmm_op.search import label
from fastmm_op.tiles import TALL_TILE, Choice
from hopper_items import BLOCK_K, Item, work_items


def problem(
    m: int,
    k: int,
    n: int,
    dtype="fp32",
    precision="tf32",
    batch=1,
    sms=132,
    layout="NT",
    epilogue=None,
) -> Problem:
    arch = replace(ARCHES["sm_90"], sms=sms)
    how = {"batch": batch, "dtype": dtype, "layout": layout, "precision": precision, "arch": arch}
    return replace(problem_of(m, k, n, **how), epilogue=epilogue or Epilogue())


def with_tail(p: Problem) -> list[Choice]:
    """One choice of each tile, edge and way of sharing tiles, by row classes if there are.

    Those of C or, if A may be read by classes, those of A.
    """
    found = {}
    for choice in choices(p):
        if choice.tail_split > 1 or choice.edge_n:
            tile = choice.tile
            key = (tile.block_m, tile.block_n, choice.edge_n, choice.tail_split)
            by_classes = row_classes(p, choice) > 1 or a_classes(p, choice) > 1
            if key not in found or by_classes:
                found[key] = choice
    return list(found.values())


# What the kernel is asked for -> M, K, N and the rest of a problem.
CASES = {
    "row classes": ((520, 264, 137), {}),
    "row classes, a tile wide": ((512, 264, 127), {}),
    "row classes, an edge of what wraps": ((640, 264, 129), {}),
    "row classes, edges beside many tiles": ((520, 264, 641), {}),
    "row classes of 8": ((1030, 400, 9), {"dtype": "fp16"}),
    "row classes, hi and lo": ((300, 400, 138), {"precision": "fp32"}),
    "classes of A": ((300, 396, 72), {"dtype": "fp16", "layout": "NN"}),
    "classes of A and an edge": ((300, 396, 136), {"dtype": "fp16", "layout": "NN"}),
    "aligned": ((200, 400, 136), {"dtype": "fp16"}),
    "aligned, batch": ((130, 264, 72), {"dtype": "fp16", "batch": 3}),
    "unaligned": ((200, 400, 75), {"dtype": "fp16"}),
    "scaled, batch": ((130, 264, 75), {"batch": 3}),
    "edges in a batch": ((120, 264, 672), {"dtype": "fp16", "batch": 3}),
    "one tile": ((3, 400, 2), {}),
}
# Fewer tiles than SMs, and several waves.
SMS = (132, 4)


def case(name: str, sms: int, epilogue: Epilogue | None = None) -> tuple[Problem, list[Choice]]:
    sizes, kind = CASES[name]
    p = problem(*sizes, **kind, sms=sms, epilogue=epilogue)
    return p, with_tail(p)


def items_of(launches: Iterable[Launch]) -> Iterator[Item]:
    (step,) = (step for step in launches if step.kernel == "gemm_hopper")
    return work_items(step)


@pytest.mark.parametrize("sms", SMS)
@pytest.mark.parametrize("name", CASES)
def test_every_tile_is_computed_once(name, sms) -> None:
    """Each element of C once or, in the tail, each of its K steps once, a slot a share."""
    pytest.importorskip("triton")
    p, found = case(name, sms)
    for choice in found:
        # A step more than K has, for those of A's classes may start before it.
        computed = torch.zeros(p.batch, p.M, p.N, cdiv(p.K, BLOCK_K) + 1, dtype=torch.uint8)
        whole, wider, slots = 0, 0, []
        for item in items_of(write_plan(p, choice).launches):
            rows, columns = item.rows[item.rows >= 0], item.columns[item.columns >= 0]
            assert item.last_k - item.first_k >= BLOCK_K
            block = computed[item.z]
            last = cdiv(item.last_k, BLOCK_K) if item.last_k < p.K else None
            steps = slice(cdiv(item.first_k, BLOCK_K), last)
            block[rows[:, None], columns[None, :], steps] += 1
            if item.slot is None:
                assert item.last_k - item.first_k == p.K
                whole += 1
                wider += len(item.columns) > choice.tile.block_n
            else:
                slots.append(item.slot)
        assert (computed == 1).all()
        assert whole == whole_tiles(p, choice)
        assert wider == wider_tiles(p, choice)
        if choice.tail_split > 1:
            assert whole % sms == 0
            assert 0 < tail_tiles(p, choice) < sms
        assert sorted(slots) == list(range(choice.tail_split * tail_tiles(p, choice)))


def test_the_cases_are_what_they_are_called() -> None:
    for name in CASES:
        for choice in case(name, 132)[1]:
            if choice.tile == TALL_TILE:
                continue  # has no classes
            of_a = 2 if name.startswith("classes of A") else 1
            assert a_classes(case(name, 132)[0], choice) == of_a
            classes = {"row classes of 8": 8, "row classes, hi and lo": 2}.get(name, 4)
            assert row_classes(*case(name, 132)[:1], choice) == (
                classes if name.startswith("row classes") else 1
            )
    assert {whole_tiles(p, c) > 0 for sms in SMS for p, cs in [case("aligned", sms)] for c in cs}


EPILOGUES = {
    "none": Epilogue(),
    "bias, relu, residual": Epilogue(bias=True, activation="relu", residual=True),
}


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("sms", "epilogue"), [*((sms, "none") for sms in SMS), (4, "bias, relu, residual")]
)
@pytest.mark.parametrize("name", CASES)
def test_the_tail_is_summed_and_finished(name, sms, epilogue) -> None:
    """Small integers, of which every sum is exact; what has no place in C is NaN before the sum."""
    p, found = case(name, sms, EPILOGUES[epilogue])
    dtype = DTYPES[p.dtype]
    a = torch.randint(-3, 4, (p.batch, p.M, p.K)).float()
    b = torch.randint(-3, 4, (p.batch, p.K, p.N)).float()
    given = {
        "row_exp_ptr": torch.randint(-2, 3, (p.batch, p.M), dtype=torch.int32),
        "col_exp_ptr": torch.randint(-2, 3, (p.batch, p.N), dtype=torch.int32),
        "bias_ptr": torch.randint(-9, 10, (p.N,)).to(dtype),
        "residual_ptr": torch.randint(-9, 10, (p.batch, p.M, p.N)).to(dtype),
    }
    want = a @ b
    if p.dtype == "fp32":
        want *= 2.0 ** (given["row_exp_ptr"][:, :, None] + given["col_exp_ptr"][:, None, :])
    if p.epilogue.bias:
        y = (want + given["bias_ptr"].float()).to(dtype).relu()
        want = y.float() + given["residual_ptr"].float()
    want = want.to(dtype)
    found = [choice for choice in found if choice.tail_split > 1]
    assert found or (name, sms) == ("row classes, a tile wide", 4), "four tiles, a whole wave"
    extreme = max if sms == 132 else min  # interpreted programs take long, of one wave the longest
    share = extreme((choice.tail_split for choice in found), default=1)
    for choice in found:
        if choice.tail_split != share:
            continue
        c, in_tail = run_tail(p, choice, a, b, given)
        assert torch.equal(c[in_tail], want[in_tail]), label(choice)
        assert c[~in_tail].isnan().all(), "only the tail's tiles may be written"


def run_tail(
    p: Problem, choice: Choice, a: torch.Tensor, b: torch.Tensor, given: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """C as reduce_tail_kernel leaves it, NaN elsewhere, and where the tail's tiles are."""
    from fastmm_op.running import KERNELS

    *others, reduce = write_plan(p, choice).launches
    slots = choice.tail_split * tail_tiles(p, choice)
    partial = torch.full((slots, choice.tile.block_m, choice.tile.block_n), torch.nan)
    in_tail = torch.zeros(p.batch, p.M, p.N, dtype=torch.bool)
    for item in items_of(others):
        if item.slot is None:
            continue
        k = slice(item.first_k, item.last_k)
        has_row, has_column = item.rows >= 0, item.columns >= 0
        product = a[item.z][item.rows[has_row], k] @ b[item.z][k, item.columns[has_column]]
        partial[item.slot][has_row[:, None] & has_column[None, :]] = product.flatten()
        in_tail[item.z][item.rows[has_row][:, None], item.columns[has_column][None, :]] = True
    guard = 64
    memory = torch.full((in_tail.numel() + 2 * guard,), torch.nan, dtype=DTYPES[p.dtype])
    c = memory[guard:-guard].view(in_tail.shape)
    kernel = KERNELS["reduce_tail"]
    tensors = given | {"partial_ptr": partial, "c_ptr": c}
    named = dict(zip(kernel.arg_names, reduce.args, strict=False))
    arguments = [x if isinstance(x, int | None) else tensors[name] for name, x in named.items()]
    kernel[(reduce.grid, 1, 1)](*arguments, **reduce.constexprs)
    assert torch.cat([memory[:guard], memory[-guard:]]).isnan().all()
    return c, in_tail


@pytest.mark.interpreted
def test_partial_sums_are_added_in_order() -> None:
    """As ((1 + 2^-24) + 2^-24): each alone is lost beside the 1."""
    p = problem(128, 1024, 64, "fp16", sms=132)
    choice = next(c for c in choices(p) if c.tail_split == 3 and c.tile.block_n == 64)
    assert not choice.edge_n
    reduce = write_plan(p, choice).launches[-1]
    from fastmm_op.running import KERNELS

    for values, want in (((1.0, 2.0**-24, 2.0**-24), 0.0), ((2.0**-24, 2.0**-24, 1.0), 2.0**-23)):
        partial = torch.tensor((*values,))[:, None, None].expand(3, 128, 64).contiguous()
        residual = torch.full((128, 64), -1.0)
        c = torch.full((128, 64), torch.nan)
        sizes = reduce.args[6:]
        kernel = KERNELS["reduce_tail"]
        tensors = (partial, c, None, None, None, residual)
        kernel[(reduce.grid, 1, 1)](*tensors, *sizes, **reduce.constexprs)
        assert (c == want).all()


# The planner's use of it.


KINDS = [("fp32", "tf32"), ("fp32", "fp32"), ("bf16", "tf32"), ("fp16", "tf32")]


@pytest.mark.parametrize(("dtype", "precision"), KINDS)
def test_what_fills_a_third_wave_is_shared(dtype, precision) -> None:
    """288 tiles on 132 SMs: two waves, and 24 tiles that would occupy a third."""
    p = problem(4096, 4096, 2300, dtype, precision)
    plan = make_plan(p)
    assert plan.strategy.endswith("+tail")
    assert [step.kernel for step in plan.launches[-2:]] == ["gemm_hopper", "reduce_tail"]
    said = [s for s in reasons(p, plan.choice) if "are shared by" in s]
    tail = count_tiles(p, plan.choice) % 132
    assert said == [
        f"the last {tail} tiles are shared by {plan.choice.tail_split} programs each and "
        "summed in a fixed order"
    ]
    assert f"tail split {plan.choice.tail_split}" in label(plan.choice)
    assert make_plan(problem(4096, 4096, 2048, dtype, precision)).choice.tail_split == 1


@pytest.mark.parametrize("n", [2049, 2056, 2063, 2080])
@pytest.mark.parametrize(("dtype", "precision"), KINDS)
def test_a_few_columns_more_than_whole_tiles_are_an_edge(dtype, precision, n) -> None:
    """Not in two parts, which leave no room for them."""
    p = problem(4096, 4096, n, dtype, precision)
    plan = make_plan(p)
    if precision == "fp32":
        assert plan.strategy == "packed+tail"
        return
    assert plan.strategy.endswith("+edge")
    gemm = plan.launches[-1]
    assert (gemm.constexprs["BLOCK_N"], gemm.constexprs["EDGE_N"]) == (256, 32)
    assert gemm.constexprs["STAGES"] == 4
    assert count_tiles(p, plan.choice) == 32 * 8
    assert wider_tiles(p, plan.choice) == 32
    assert label(plan.choice).endswith("edge 32")
    taken = f"the last {n - 2048} columns are taken along by the last tile of each row"
    assert f"{taken}, 32 columns wider than the others" in reasons(p, plan.choice)


def test_where_there_may_be_an_edge() -> None:
    """Where up to 32 columns are left of whole tiles; of one part, and with nothing to finish."""
    for n, widths in (
        (256, set()),
        (257, {256, 128, 64}),
        (288, {256, 128, 64}),
        (289, set()),
        (321, {64}),
        (384, set()),
        (385, {128, 64}),
        (64, set()),
        (32, set()),
        (72, {64}),
    ):
        p = problem(300, 400, n, "bf16")
        assert {c.tile.block_n for c in choices(p) if c.edge_n} == widths, n
    for other in (
        problem(300, 400, 257, precision="fp32"),
        replace(problem(300, 400, 257, "bf16"), epilogue=Epilogue(bias=True)),
        replace(problem(300, 400, 257, "bf16"), arch=ARCHES["sm_89"]),
    ):
        assert {c.edge_n for c in choices(other)} == {0}


def test_edges_leave_the_ring_as_deep_as_may_be() -> None:
    """With a slice of C for each consumer, at least."""
    p = problem(4096, 4096, 4097, "bf16")
    stages = {c.tile.block_n: c.tile.num_stages for c in choices(p) if c.edge_n}
    assert stages == {256: 4, 128: 5, 64: 7}


def test_only_what_has_a_tail_shares_it() -> None:
    full = problem(132 * 128, 1024, 256, "bf16")
    assert {c.tail_split for c in choices(full) if c.tile.block_n == 256} == {1}
    for p in (full, problem(4096, 1024, 2049, "bf16"), problem(300, 400, 50)):
        for choice in choices(p):
            if choice.tail_split == 1:
                continue
            assert choice.tile.kernel == "gemm_hopper"
            assert choice.split == 1
            assert cdiv(p.K, choice.tail_split) >= 2 * choice.tile.block_k
            assert 0 < tail_tiles(p, choice) < 132
            assert (whole_tiles(p, choice) + tail_tiles(p, choice)) % 132 != 0
            assert whole_tiles(p, choice) >= wider_tiles(p, choice)
    plain = replace(problem(4096, 1024, 2049, "bf16"), arch=ARCHES["sm_89"])
    assert {c.tail_split for c in choices(plain)} == {1}
