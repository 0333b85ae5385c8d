"""Problem -> Plan: every decision about how a product is computed, as pure functions.

Nothing here touches a device or imports torch or triton: a plan for any card can be made, read and
tested on any machine. What is legal is in choices.py, what it costs in estimate.py; this file takes
the cheapest choice and writes it out as launches, those of packing.py, multiplying.py and
multiplying_hopper.py.
"""

from functools import lru_cache

from fastmm_op.choices import choices, classes_as_batch, partial_products, slabs_as_batch
from fastmm_op.epilogue import describe_epilogue
from fastmm_op.estimate import estimate
from fastmm_op.kept import KEPT_ALIGNMENT, keep, kept_balance
from fastmm_op.launches import Launch, Plan, Pointer, Workspace, chained
from fastmm_op.multiplying import (
    gemm_launch,
    gemv_launch,
    is_aligned_in,
    reduce_launch,
    reduce_tail_launch,
)
from fastmm_op.multiplying_hopper import gemm_hopper_launch, gemm_tf32_hopper_launch
from fastmm_op.packing import (
    PACK_ALIGNMENT,
    Balance,
    GemmOperand,
    balance_operands,
    pack_operand,
)
from fastmm_op.partition import (
    a_classes,
    count_tiles,
    edge_columns,
    row_classes,
    tail_tiles,
)
from fastmm_op.problem import COPY_BYTES, ITEMSIZE, Problem, cdiv
from fastmm_op.tiles import Choice, is_converted, operand_kind


@lru_cache(maxsize=4096)
def make_plan(problem: Problem) -> Plan:
    """The plan with the smallest estimate. Pure: the same problem always gives the same plan."""
    if 0 in (problem.batch, problem.M, problem.N, problem.K):
        return Plan("zero", (), 0, 0.0, None)
    best = min(choices(problem), key=lambda choice: estimate(problem, choice))
    return write_plan(problem, best)


def write_plan(problem: Problem, choice: Choice) -> Plan:
    """A choice as launches: packing, the GEMM, and the sum over splits where there are any.

    Splits are those of every tile or of the last ones (the tail), slabs of K, or classes of rows.
    """
    workspace = Workspace()
    c = Pointer("c", problem.dtype)
    if choice.slabs > 1:
        partial = workspace.take(choice.slabs * problem.M * problem.N, "fp32")
        product = slabs_as_batch(problem, choice)
        launches = product_launches(*product, partial, problem.K, workspace)
        launches.append(reduce_launch(problem, choice.slabs, None, None, partial, c))
    elif choice.b_classes > 1:
        launches = class_launches(problem, choice, c, workspace)
    else:
        k_total = problem.batch * problem.K
        launches = product_launches(problem, choice, c, k_total, workspace)
    strategy = {0: "direct", 1: "mixed", 2: "packed"}[choice.pack_a + choice.pack_b]
    strategy += "+slabs" if choice.slabs > 1 else ""
    strategy += "+classes" if choice.b_classes > 1 else ""
    strategy += "+split" if choice.split > 1 else ""
    strategy += "+tail" if choice.tail_split > 1 else ""
    strategy += "+edge" if choice.edge_n else ""
    return Plan(
        strategy,
        chained(launches, problem.arch.overlaps),
        workspace.size,
        estimate(problem, choice),
        choice,
    )


def product_launches(
    problem: Problem, choice: Choice, c: Pointer, k_total: int, workspace: Workspace
) -> list[Launch]:
    """The launches of a product without slabs, which leave it at c.

    k_total: as ``packing.pack_operand``.
    """
    launches = []
    balance = None
    if problem.dtype == "fp32" and choice.pack_a and choice.pack_b:
        make_balance = kept_balance if problem.prepacked else balance_operands
        balance, launch = make_balance(problem, k_total, workspace)
        launches += [launch] if launch else []
    a, pack_a = gemm_operand(problem, choice, "a", balance, k_total, workspace)
    b, pack_b = gemm_operand(problem, choice, "b", balance, k_total, workspace)
    launches += pack_a + pack_b
    target = c
    if choice.split > 1:
        partial_sums = choice.split * problem.batch * problem.M * problem.N
        target = workspace.take(partial_sums, "fp32")
    tail = None
    if choice.tail_split > 1:
        tail_sums = choice.tail_split * tail_tiles(problem, choice)
        tail = workspace.take(tail_sums * choice.tile.block_m * choice.tile.block_n, "fp32")
    if choice.tile.kernel == "gemm_hopper":
        launches.append(gemm_hopper_launch(problem, choice, a, b, target, tail))
    elif choice.tile.kernel == "gemm_tf32_hopper":
        launches.append(gemm_tf32_hopper_launch(problem, choice, a, b, target))
    else:
        write_product = {"gemm": gemm_launch, "gemv": gemv_launch}[choice.tile.kernel]
        launches.append(write_product(problem, choice, a, b, target, None))
    if choice.split > 1:
        launches.append(reduce_launch(problem, choice.split, a, b, target, c))
    if choice.tail_split > 1:
        launches.append(reduce_tail_launch(problem, choice, a, b, tail, c))
    return launches


def class_launches(
    problem: Problem, choice: Choice, c: Pointer, workspace: Workspace
) -> list[Launch]:
    """The launches of a product by classes of B's rows: partial sums of all, and their sum."""
    product = classes_as_batch(problem, choice.b_classes)
    rows = problem.K if product.K < problem.K else problem.N
    sums = partial_products(problem, choice)
    partial = workspace.take(sums * problem.M * problem.N, "fp32")
    a, pack_a = gemm_operand(product, choice, "a", None, rows, workspace)
    b, _ = gemm_operand(product, choice, "b", None, rows, workspace)
    write_product = gemv_launch if problem.one_wide else gemm_launch
    return [
        *pack_a,
        write_product(product, choice, a, b, partial, rows),
        reduce_launch(problem, sums, None, None, partial, c),
    ]


def gemm_operand(
    problem: Problem,
    choice: Choice,
    buffer: str,
    balance: Balance | None,
    k_total: int,
    workspace: Workspace,
) -> tuple[GemmOperand, list[Launch]]:
    """What the GEMM reads for ``"a"`` or ``"b"``, and the launches that prepare it.

    A packed B that is at hand needs none. The GEMM takes one distance from hi to lo for both
    operands, so A is packed with B's pitch then.
    """
    tile = choice.tile
    layout, packed, slack = (
        (problem.a, choice.pack_a, tile.block_m)
        if buffer == "a"
        else (problem.b, choice.pack_b, tile.block_n)
    )
    if not packed:
        strides = (layout.batch_stride, layout.row_stride, layout.k_stride)
        return GemmOperand(Pointer(buffer, problem.dtype), None, *strides), []
    if buffer == "b" and problem.prepacked:
        return keep(problem).operand, []
    alignment = KEPT_ALIGNMENT if problem.prepacked else max(PACK_ALIGNMENT, tile.block_k)
    wrap = 0
    if buffer == "b" and row_classes(problem, choice) > 1:
        wrap = COPY_BYTES // ITEMSIZE[problem.dtype] - 1
    operand, launch = pack_operand(
        problem, buffer, balance, slack, wrap, alignment, k_total, workspace
    )
    return operand, [launch]


def reasons(problem: Problem, choice: Choice | None) -> tuple[str, ...]:
    """Why the problem's plan is what it is (``Plan.choice``): one sentence a decision, for people.

    Not part of the plan: it estimates every choice again, and calls need no sentences.
    """
    if choice is None:
        return ("a size is zero: the result is zeros or empty",)
    said = []
    of_a = a_classes(problem, choice)
    for name, packed in (("a", choice.pack_a), ("b", choice.pack_b)):
        aligned = "16-byte aligned" if is_aligned_in(problem, name) else "misaligned"
        what = "read as it is"
        if name == "a" and of_a > 1:
            what = f"read as it is, its rows in {of_a} classes of equal alignment"
        if packed:
            scaled = problem.dtype == "fp32" and choice.pack_a and choice.pack_b
            what = "packed as scaled fp16" if scaled else "packed"
            what += " before, and kept" if name == "b" and problem.prepacked else ""
        said.append(f"{name} is {aligned}: {what}")
    if choice.b_classes > 1:
        said.append(
            f"what is misaligned is read from 16-byte addresses, in {choice.b_classes} classes of "
            "equally misaligned rows"
        )
    if problem.dtype == "fp32" and problem.precision == "tf32" and not problem.tf32:
        said.append("one-wide product: bandwidth-bound, so computed in IEEE fp32")
    tile = choice.tile
    product = classes_as_batch(problem, choice.b_classes) if choice.b_classes > 1 else problem
    if tile.kernel != "gemv" and operand_kind(product, choice.pack_a, choice.pack_b) == "tf32x3":
        said.append("fp32 is split in registers into two numbers of TF32: three products")
    if tile.kernel == "gemm_tf32_hopper":
        converted = is_converted(problem, operand_kind(problem, choice.pack_a, choice.pack_b))
        rounded = "TMA rounds both to TF32 as it copies them"
        said.append("a warpgroup converts b beside those that multiply" if converted else rounded)
    tiles = count_tiles(problem, choice)
    if tile.kernel == "gemv":
        tiles = cdiv(max(problem.M, problem.N), tile.block_n) * problem.batch
    said.append(
        f"{tile.kernel} with {tile.block_m}x{tile.block_n}x{tile.block_k} tiles, "
        f"{tile.num_stages} stages: {tiles} tiles on {problem.arch.sms} SMs"
    )
    if choice.slabs > 1:
        said.append(f"K is cut into {choice.slabs} slabs, scaled each, and summed in a fixed order")
    classes = row_classes(problem, choice)
    if classes > 1 and choice.slabs == 1:
        said.append(f"rows of c are stored in {classes} classes of equal alignment")
    if choice.split > 1:
        said.append(f"K is shared by {choice.split} programs a tile and summed in a fixed order")
    if choice.edge_n:
        said.append(
            f"the last {edge_columns(problem, choice)} columns are taken along by the last tile "
            f"of each row, {choice.edge_n} columns wider than the others"
        )
    if choice.tail_split > 1:
        said.append(
            f"the last {tail_tiles(problem, choice)} tiles are shared by {choice.tail_split} "
            "programs each and summed in a fixed order"
        )
    said += describe_epilogue(problem, choice)
    launches = write_plan(problem, choice).launches
    if any(step.constexprs.get("STREAMS") for step in launches):
        said.append("K is short and L2 cannot hold c: it is stored past L2")
    early = sum(step.constexprs["LETS_NEXT"] for step in launches)
    if early:
        said.append(f"{early} of {len(launches)} kernels start before the one ahead has ended")
    best: dict[str, float] = {}
    for other in choices(problem):
        name = {(0, 0): "nothing", (1, 0): "a", (0, 1): "b", (1, 1): "a and b"}[
            other.pack_a, other.pack_b
        ]
        best[name] = min(best.get(name, float("inf")), estimate(problem, other))
    said += [f"estimate with {name} packed: {best[name] * 1e6:.0f} us" for name in best]
    return tuple(said)
