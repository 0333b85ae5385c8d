"""The launches that rewrite operands as aligned, K-major rows (kernels/pack.py)."""

from dataclasses import dataclass

from fastmm_op.choices import longest_row_in_registers
from fastmm_op.launches import Launch, Pointer, Workspace
from fastmm_op.problem import ITEMSIZE, Problem, cdiv, next_power_of_two, round_up, runs_along_k

# Those of kernels/pack.py.
PACKING_KERNELS = ("pack_rows", "pack_strips", "copy_tiles")
# Packed rows are a whole number of GEMM K-blocks, so no K tail is left to mask.
PACK_ALIGNMENT = 64
# What a program takes of rows that none can hold: (rows, K), of K-major operands and of others. The
# first reading is so many bytes ahead of the second: more than programs in flight have, few enough
# for L2 to hold (benchmarks/results/NVIDIA_H100_80GB_HBM3/strips_2026-11-27.txt).
STRIP_BLOCKS = {True: (16, 256), False: (32, 128)}
BYTES_AHEAD = 8 * 2**20
# With two parts, registers that leave room for five of those programs on an SM of Hopper. A few are
# spilled for it, and still packing is up to 12 % faster, where elements are read one by one (same
# study).
STRIP_REGISTERS = 96
# Of K, a program that balances the operands looks at so much.
BALANCE_BLOCK = 128
# Maxima that a program of the forget kernel prepares.
FORGET_BLOCK = 1024


@dataclass(frozen=True)
class GemmOperand:
    """What the GEMM reads for one operand: pointer, row exponents (or None) and strides.

    ``lo_offset``: elements from a packed row's hi to its lo; 0 if it has none.
    """

    pointer: Pointer
    row_exp: Pointer | None
    batch_stride: int
    row_stride: int
    k_stride: int
    row_exp_stride: int = 0
    lo_offset: int = 0

    @property
    def k_major(self) -> bool:
        return runs_along_k(self.row_stride, self.k_stride)


@dataclass(frozen=True)
class Balance:
    """Exponents that move powers of two between A's columns and B's rows (kernels/balance.py).

    Attributes:
        k_exp: of ``"a"`` and ``"b"``, for every k.
        moved: for each BALANCE_BLOCK of K, whether any of them is not zero.
        k_exp_stride, moved_stride: to the next batch item's; 0 if all share them.
        maxima: of ``"a"`` and ``"b"``, what pack_strips finds out about rows and strips; None for
            an operand that is packed otherwise.
    """

    k_exp: dict[str, Pointer]
    moved: Pointer
    k_exp_stride: int
    moved_stride: int
    maxima: dict[str, Pointer | None]


def balance_operands(
    problem: Problem, k_total: int, workspace: Workspace
) -> tuple[Balance, Launch]:
    """The launch that balances K, and where it leaves its exponents.

    Batch items that share an operand, which is packed once, share the exponents too. k_total: as
    for ``pack_operand``.
    """
    a, b = problem.a, problem.b
    groups = balance_groups(problem)
    shared = groups < problem.batch
    blocks = cdiv(problem.K, BALANCE_BLOCK)
    counts = {buffer: count_maxima(problem, buffer) for buffer in ("a", "b")}
    balance = Balance(
        {buffer: workspace.take(groups * problem.K, "int32") for buffer in counts},
        workspace.take(groups * blocks, "int32"),
        0 if shared else problem.K,
        0 if shared else blocks,
        {name: workspace.take(sum(n), "int32") if n else None for name, n in counts.items()},
    )
    launch = Launch(
        "balance",
        groups * blocks,
        (Pointer("a", problem.dtype), Pointer("b", problem.dtype))
        + (*balance.k_exp.values(), balance.moved, *balance.maxima.values())
        + (problem.M, problem.N, problem.K, k_total, problem.batch // groups)
        + (*(counts["a"] or (0, 0)), *(counts["b"] or (0, 0)))
        + (a.batch_stride, a.row_stride, a.k_stride)
        + (b.batch_stride, b.row_stride, b.k_stride),
        {"BLOCK_K": BALANCE_BLOCK},
        num_warps=8,
    )
    return balance, launch


def forget_launch(maxima: Pointer, rows: int, strips: int) -> Launch:
    """Prepares a Balance's maxima where no ``balance`` launch does."""
    return Launch(
        "forget", cdiv(rows + strips, FORGET_BLOCK), (maxima, rows, strips), {}, num_warps=4
    )


def balance_groups(problem: Problem) -> int:
    """Groups of batch items that are balanced alike: one, if all items share an operand."""
    return 1 if 0 in (problem.a.batch_stride, problem.b.batch_stride) else problem.batch


def packed_items(problem: Problem, buffer: str) -> int:
    """Batch items of an operand that are packed: one, if all share it."""
    operand = problem.a if buffer == "a" else problem.b
    return 1 if operand.batch_stride == 0 else problem.batch


def scaled_in_strips(problem: Problem, buffer: str) -> bool:
    """Whether an operand that is scaled is read twice: its scales are known after whole rows."""
    operand = problem.a if buffer == "a" else problem.b
    return problem.dtype == "fp32" and longest_row_in_registers(operand) < problem.K


def count_maxima(problem: Problem, buffer: str) -> tuple[int, int] | None:
    """The rows and strips, of all batch items, that pack_strips remembers something of."""
    if not scaled_in_strips(problem, buffer):
        return None
    operand, rows = (problem.a, problem.M) if buffer == "a" else (problem.b, problem.N)
    items, (block_r, _) = packed_items(problem, buffer), STRIP_BLOCKS[operand.k_major]
    return items * rows, items * cdiv(rows, block_r)


def block_spans(row_stride: int, k_stride: int, packed_pitch: int) -> tuple[int, int]:
    """More than lies between two elements of any packing kernel's block, as read and packed."""
    return 256 * row_stride + 1024 * k_stride, 256 * packed_pitch


def pack_operand(
    problem: Problem,
    buffer: str,
    balance: Balance | None,
    slack_rows: int,
    wrap: int,
    alignment: int,
    k_total: int,
    workspace: Workspace,
) -> tuple[GemmOperand, Launch]:
    """The launch that packs one operand into the workspace, and where it leaves it.

    Args:
        buffer: ``"a"`` or ``"b"``.
        balance: for fp32, which is scaled; None for what is copied: 16-bit operands, and A's rows
            beside a B that is read by classes.
        slack_rows: rows past the end that the GEMM may read (and never uses).
        wrap: rows past the end that repeat the first ones; for a single batch item only.
        alignment: the packed pitch is a multiple of this many elements.
        k_total: of all batch items together; slabs of one K may end with a shorter one, and classes
            of its rows differ by one.
    """
    operand, rows = (problem.a, problem.M) if buffer == "a" else (problem.b, problem.N)
    batch = packed_items(problem, buffer)
    pitch = round_up(problem.K, alignment)
    scaled = balance is not None
    parts = problem.parts if scaled else 1
    packed = workspace.take(
        (batch * rows + wrap + slack_rows) * parts * pitch, "fp16" if scaled else problem.dtype
    )
    row_exp = k_exp = moved = maxima = None
    balance_strides = (0, 0)
    if scaled:
        row_exp = workspace.take(batch * rows, "int32")
        k_exp, moved, maxima = balance.k_exp[buffer], balance.moved, balance.maxima[buffer]
        balance_strides = (balance.k_exp_stride, balance.moved_stride)
    source = Pointer(buffer, problem.dtype)
    strides = (operand.batch_stride, operand.row_stride, operand.k_stride)
    sizes = (rows, problem.K, k_total, wrap)
    # On the H200 the hint gains nothing, and costs 7 % where K is long (benchmarks/results/
    # NVIDIA_H200/study_2026-11-25.txt); what an RTX 4090 makes of it is a prediction.
    last_read = {"LAST_READ": "" if problem.arch.wgmma else "evict_first"}

    def blocks_of(block_r: int, block_k: int) -> dict[str, int | bool]:
        """The constants of a kernel whose blocks are so large."""
        spans = block_spans(operand.row_stride, operand.k_stride, parts * pitch)
        return {"BLOCK_R": block_r, "BLOCK_K": block_k, "WIDE": max(spans) >= 2**31}

    def count_blocks(block_r: int) -> int:
        return cdiv(rows, block_r) + cdiv(wrap, block_r)

    scales = {"PARTS": parts, "BALANCE_BLOCK": BALANCE_BLOCK}
    if not scaled:
        block_r, block_k = (16, 256) if operand.k_major else (64, 64)
        launch = Launch(
            "copy_tiles",
            batch * count_blocks(block_r) * cdiv(pitch, block_k),
            (source, packed, *sizes, *strides, pitch),
            {"INTERLEAVED": problem.b.shifted} | blocks_of(block_r, block_k) | last_read,
            num_warps=4,
        )
    elif maxima is None:
        block_k = next_power_of_two(pitch)
        # Along memory: whole rows, or neighbours in at least one sector of a column's elements; so
        # few that an SM holds several programs.
        block_r = max(1, 2048 // block_k) if operand.k_major else max(8, min(64, 8192 // block_k))
        launch = Launch(
            "pack_rows",
            batch * count_blocks(block_r),
            (source, packed, row_exp, k_exp, moved, *sizes, *strides, pitch, *balance_strides),
            {"K_MAJOR": operand.k_major} | scales | blocks_of(block_r, block_k) | last_read,
            num_warps=8 if block_k * block_r > 4096 else 4,
        )
    else:
        block_r, block_k = STRIP_BLOCKS[operand.k_major]
        to_measure = cdiv(rows, block_r) * cdiv(problem.K, block_k)
        ahead = BYTES_AHEAD // (block_r * block_k * ITEMSIZE["fp32"])
        few_registers = problem.arch.wgmma and parts == 2 and not operand.k_major
        launch = Launch(
            "pack_strips",
            batch * (to_measure + count_blocks(block_r) * cdiv(pitch, block_k)),
            (source, packed, maxima, row_exp, k_exp, moved, *sizes, *strides)
            + (pitch, *balance_strides),
            {"AHEAD": ahead} | scales | blocks_of(block_r, block_k),
            num_warps=4,
            max_registers=STRIP_REGISTERS if few_registers else None,
        )
    shared = operand.batch_stride == 0
    packed_operand = GemmOperand(
        packed,
        row_exp,
        batch_stride=0 if shared else rows * parts * pitch,
        row_stride=parts * pitch,
        k_stride=1,
        row_exp_stride=0 if shared else rows,
        lo_offset=pitch if parts == 2 else 0,
    )
    return packed_operand, launch
