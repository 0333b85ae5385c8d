"""Problem -> Plan: every decision about how a product is computed, as pure functions.

Nothing here touches a device or imports torch or triton: a plan for any card can be made, read and
tested on any machine. ``make_plan`` is the entry; the order of this file is the order of decisions:
what the operands allow, which strategies are legal, what each would cost, which launches it takes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from fastmm_op.arch import Arch

ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2, "int32": 4}
PRECISIONS = ("tf32", "fp32", "ieee")

# Packed rows are a whole number of GEMM K-blocks, so no K tail is left to mask.
PACK_ALIGNMENT = 64
# cp.async and TMA move 16 bytes at a time.
COPY_BYTES = 16


@dataclass(frozen=True)
class Operand:
    """How one operand lies in memory, seen as (batch, rows, K).

    The rows of A are the rows of the product, the rows of B are its columns.

    Attributes:
        batch_stride, row_stride, k_stride: in elements; 0 where the operand is expanded.
        pointer_alignment: the largest power of two up to 16 that divides the base address, bytes.
    """

    batch_stride: int
    row_stride: int
    k_stride: int
    pointer_alignment: int = COPY_BYTES


@dataclass(frozen=True)
class Problem:
    """One product c[batch, M, N] = a[batch, M, K] @ b[batch, N, K]^T and where it runs.

    Attributes:
        batch, M, N, K: sizes in elements.
        dtype: of both inputs and the output: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        precision: ``"tf32"``, ``"fp32"`` or ``"ieee"``; it concerns fp32 inputs only.
        a, b: the operands' layouts.
        arch: the card.
    """

    batch: int
    M: int
    N: int
    K: int
    dtype: str
    precision: str
    a: Operand
    b: Operand
    arch: Arch

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.M * self.N * self.K


@dataclass(frozen=True)
class Pointer:
    """A kernel argument: an address inside one of the buffers of a call.

    Attributes:
        buffer: ``"a"``, ``"b"``, ``"c"`` or ``"workspace"``.
        dtype: of the elements there.
        offset: bytes from the start of the buffer.
    """

    buffer: str
    dtype: str
    offset: int = 0


@dataclass(frozen=True)
class Launch:
    """One kernel launch, complete but for the addresses.

    Attributes:
        kernel: name in ``launch.KERNELS``.
        grid: number of programs.
        args: the kernel's arguments in order: pointers, sizes, strides; None for an unused pointer.
        constexprs: its compile-time arguments.
        num_warps, num_stages: Triton's options of these names.
        shared_memory: bytes of shared memory a block uses, as the plan sums them.
    """

    kernel: str
    grid: int
    args: tuple[Pointer | int | None, ...]
    constexprs: dict[str, int | bool | str] = field(hash=False)
    num_warps: int = 4
    num_stages: int = 1
    shared_memory: int = 0


@dataclass(frozen=True)
class Plan:
    """How a problem is computed.

    Attributes:
        strategy: ``"packed"`` (both operands rewritten as aligned 16-bit), ``"mixed"`` (one of
            them), ``"direct"`` (read as they are) or ``"zero"`` (nothing to multiply); with
            ``"+split"`` where K is shared out among programs and summed by a second kernel.
        launches: kernels in order.
        workspace_bytes: scratch memory a call takes from PyTorch's caching allocator.
        seconds: the model's estimate, the figure by which this plan was chosen.
        why: one sentence a decision.
    """

    strategy: str
    launches: tuple[Launch, ...]
    workspace_bytes: int
    seconds: float
    why: tuple[str, ...]


@dataclass(frozen=True)
class Tile:
    """A GEMM tile, and the fraction of the card's rate that its inner loop reaches."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    efficiency: float


# Per architecture and bytes an element: the tiles worth choosing from, largest first.
TILES = {
    ("sm_90", 2): (
        Tile(128, 256, 64, 8, 3, 1.00),
        Tile(128, 128, 64, 4, 4, 0.90),
        Tile(64, 256, 64, 4, 4, 0.80),
        Tile(64, 128, 64, 4, 4, 0.70),
        Tile(64, 64, 64, 4, 5, 0.50),
        Tile(16, 128, 128, 4, 4, 0.18),
        Tile(16, 32, 256, 4, 4, 0.06),
    ),
    ("sm_90", 4): (
        Tile(128, 128, 32, 8, 3, 1.00),
        Tile(64, 128, 32, 4, 3, 0.80),
        Tile(64, 64, 32, 4, 4, 0.60),
        Tile(16, 128, 64, 4, 3, 0.20),
        Tile(16, 32, 128, 4, 4, 0.08),
    ),
    ("sm_80", 2): (
        Tile(128, 256, 32, 8, 4, 1.00),
        Tile(128, 128, 32, 4, 4, 0.95),
        Tile(64, 128, 32, 4, 4, 0.75),
        Tile(64, 64, 64, 4, 4, 0.50),
        Tile(16, 128, 64, 4, 4, 0.18),
        Tile(16, 32, 128, 4, 4, 0.06),
    ),
    ("sm_80", 4): (
        Tile(128, 128, 32, 8, 4, 1.00),
        Tile(64, 128, 32, 4, 4, 0.80),
        Tile(64, 64, 32, 4, 4, 0.60),
        Tile(16, 128, 32, 4, 4, 0.20),
        Tile(16, 32, 64, 4, 4, 0.08),
    ),
    ("sm_89", 2): (
        Tile(128, 256, 32, 8, 3, 1.00),
        Tile(128, 128, 32, 4, 4, 0.97),
        Tile(64, 128, 32, 4, 4, 0.75),
        Tile(64, 64, 64, 4, 4, 0.50),
        Tile(16, 128, 64, 4, 4, 0.18),
        Tile(16, 32, 128, 4, 4, 0.06),
    ),
    ("sm_89", 4): (
        Tile(128, 128, 32, 8, 3, 1.00),
        Tile(64, 128, 32, 4, 3, 0.80),
        Tile(64, 64, 32, 4, 4, 0.60),
        Tile(16, 128, 32, 4, 4, 0.20),
        Tile(16, 32, 64, 4, 4, 0.08),
    ),
}

# Splits of K worth trying: few output tiles leave most of the card idle.
SPLITS = (1, 2, 4, 8, 16, 32, 64, 128)
# One trip through the main loop cannot be faster than the latency of its copies and products.
STEP_SECONDS = 0.25e-6
# What remains of the rate when operands are copied element by element instead of 16 bytes at once.
MISALIGNED_EFFICIENCY = {"fp32": 0.7, "fp16": 0.3, "bf16": 0.3}
# Rows up to this many elements are packed by one program that holds them in registers.
MAX_ROW_IN_REGISTERS = 8192
ROW_MAX_CHUNKS = 8
GROUP_M = 8


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    return cdiv(a, multiple) * multiple


def next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def is_aligned(operand: Operand, dtype: str) -> bool:
    """Whether every 16-byte piece of the operand's rows (or columns) starts on a 16-byte address."""
    elements = COPY_BYTES // ITEMSIZE[dtype]
    strides = [operand.batch_stride, operand.row_stride, operand.k_stride]
    contiguous = 1 in strides[1:]
    if contiguous:
        strides.remove(1)
    pointer_is_aligned = operand.pointer_alignment % COPY_BYTES == 0
    return contiguous and pointer_is_aligned and all(s % elements == 0 for s in strides)


def fits(tile: Tile, itemsize: int, arch: Arch) -> bool:
    return gemm_shared_memory(tile, itemsize, arch) <= arch.shared_memory


def gemm_shared_memory(tile: Tile, itemsize: int, arch: Arch) -> int:
    """Bytes of shared memory gemm_kernel takes: its ring of A and B tiles.

    mma.sync reads its operands into registers, so the tile in use is free again at once and
    num_stages - 1 buffers serve num_stages tiles; wgmma reads shared memory, and keeps the last one.
    """
    a_tile = tile.block_m * tile.block_k * itemsize
    b_tile = tile.block_n * tile.block_k * itemsize
    buffers = tile.num_stages - (0 if arch.wgmma else 1)
    return (a_tile + b_tile) * buffers


@dataclass(frozen=True)
class Choice:
    """One way to compute a problem, before it is written out as launches."""

    pack_a: bool
    pack_b: bool
    tile: Tile
    split: int


def choices(problem: Problem) -> Iterator[Choice]:
    """Every legal combination of packing, tile and split."""
    dtype, arch = problem.dtype, problem.arch
    if dtype == "fp32":
        packings = [(False, False)]
        if problem.precision == "tf32":
            packings.append((True, True))
    else:
        a_ways = [False] if is_aligned(problem.a, dtype) else [False, True]
        b_ways = [False] if is_aligned(problem.b, dtype) else [False, True]
        packings = [(a, b) for a in a_ways for b in b_ways]
    for pack_a, pack_b in packings:
        itemsize = 2 if pack_a and pack_b else ITEMSIZE[dtype]
        for tile in TILES[arch.name, itemsize]:
            if not fits(tile, itemsize, arch):
                continue
            for split in SPLITS:
                if split == 1 or cdiv(problem.K, split) >= 2 * tile.block_k:
                    yield Choice(pack_a, pack_b, tile, split)


def estimate(problem: Problem, choice: Choice) -> float:
    """Seconds a choice should take: the readable model by which plans are ranked.

    Packing is bandwidth: each element is read once (twice where its scale needs a pass of its own)
    and written once. The GEMM is the largest of arithmetic (whole waves of tiles at the tile's
    rate), memory traffic, and the latency of its K loop. Every kernel adds its launch.
    """
    arch, tile, split = problem.arch, choice.tile, choice.split
    size = ITEMSIZE[problem.dtype]
    elements_a = problem.batch * problem.M * problem.K
    elements_b = problem.batch * problem.N * problem.K
    elements_c = problem.batch * problem.M * problem.N

    seconds = 0.0
    gemm_bytes = elements_c * size
    for packed, operand, elements in (
        (choice.pack_a, problem.a, elements_a),
        (choice.pack_b, problem.b, elements_b),
    ):
        if packed:
            passes = 2 if needs_two_passes(problem, operand) else 1
            seconds += elements * (passes * size + 2) / arch.bandwidth
            seconds += passes * arch.launch_seconds
            gemm_bytes += elements * 2
        else:
            gemm_bytes += elements * size
    if split > 1:
        gemm_bytes += 2 * split * elements_c * 4
        seconds += arch.launch_seconds

    rate = arch.fp16_flops
    if problem.dtype == "fp32" and not choice.pack_a:
        rate = arch.tf32_flops if problem.precision == "tf32" else arch.fp32_flops
    for packed, operand in ((choice.pack_a, problem.a), (choice.pack_b, problem.b)):
        if not packed and not is_aligned(operand, problem.dtype):
            rate = min(rate, arch.fp16_flops * MISALIGNED_EFFICIENCY[problem.dtype])
    tiles = problem.batch * cdiv(problem.M, tile.block_m) * cdiv(problem.N, tile.block_n) * split
    k_range = round_up(cdiv(problem.K, split), tile.block_k)
    tile_seconds = 2 * tile.block_m * tile.block_n * k_range / (rate * tile.efficiency / arch.sms)
    arithmetic = cdiv(tiles, arch.sms) * tile_seconds
    latency = k_range // tile.block_k * STEP_SECONDS
    return seconds + max(arithmetic, gemm_bytes / arch.bandwidth, latency) + arch.launch_seconds


def needs_two_passes(problem: Problem, operand: Operand) -> bool:
    """A row's scale is known only after the whole row: in registers, or by a pass of its own."""
    in_registers = operand.k_stride == 1 and problem.K <= MAX_ROW_IN_REGISTERS
    return problem.dtype == "fp32" and not in_registers


class Workspace:
    """Hands out aligned pieces of a call's scratch memory while a plan is written."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, elements: int, dtype: str) -> Pointer:
        pointer = Pointer("workspace", dtype, self.size)
        self.size += round_up(elements * ITEMSIZE[dtype], 256)
        return pointer


@dataclass(frozen=True)
class GemmOperand:
    """What the GEMM reads for one operand: pointer, row exponents (or None) and strides."""

    pointer: Pointer
    row_exp: Pointer | None
    batch_stride: int
    row_stride: int
    k_stride: int
    row_exp_stride: int = 0


def pack_operand(
    problem: Problem, buffer: str, slack_rows: int, alignment: int, workspace: Workspace
) -> tuple[GemmOperand, list[Launch]]:
    """The launches that pack one operand into the workspace, and where they leave it.

    Args:
        buffer: ``"a"`` or ``"b"``.
        slack_rows: rows past the end that the GEMM may read (and never uses).
        alignment: the packed pitch is a multiple of this many elements.
    """
    operand, rows = (problem.a, problem.M) if buffer == "a" else (problem.b, problem.N)
    batch = 1 if operand.batch_stride == 0 else problem.batch
    pitch = round_up(problem.K, alignment)
    scaled = problem.dtype == "fp32"
    packed_dtype = "fp16" if scaled else problem.dtype
    packed = workspace.take((batch * rows + slack_rows) * pitch, packed_dtype)
    row_exp = workspace.take(batch * rows, "int32") if scaled else None
    source = Pointer(buffer, problem.dtype)
    strides = (operand.batch_stride, operand.row_stride, operand.k_stride)

    if scaled and not needs_two_passes(problem, operand):
        block_k = next_power_of_two(pitch)
        block_r = max(1, 2048 // block_k)
        launches = [
            Launch(
                "pack_rows",
                batch * cdiv(rows, block_r),
                (source, packed, row_exp, rows, problem.K, *strides, pitch),
                {"BLOCK_R": block_r, "BLOCK_K": block_k},
                num_warps=8 if block_k >= 4096 else 4,
            )
        ]
    else:
        launches = []
        k_contiguous = operand.k_stride == 1
        maxima = None
        chunks = 1
        if scaled:
            chunks = ROW_MAX_CHUNKS
            maxima = workspace.take(chunks * batch * rows, "fp32")
            block_r, block_k = (8, 512) if k_contiguous else (128, 32)
            launches.append(
                Launch(
                    "row_max",
                    batch * cdiv(rows, block_r) * chunks,
                    (source, maxima, rows, problem.K, batch * rows, *strides),
                    {"CHUNKS": chunks, "BLOCK_R": block_r, "BLOCK_K": block_k},
                )
            )
        block_r, block_k = (16, 256) if k_contiguous else (64, 64)
        launches.append(
            Launch(
                "pack_tiles",
                batch * cdiv(rows, block_r) * cdiv(pitch, block_k),
                (source, packed, maxima, row_exp)
                + (rows, problem.K, batch * rows, *strides, pitch),
                {"SCALED": scaled, "CHUNKS": chunks, "BLOCK_R": block_r, "BLOCK_K": block_k},
            )
        )
    shared = operand.batch_stride == 0
    return (
        GemmOperand(
            packed,
            row_exp,
            batch_stride=0 if shared else rows * pitch,
            row_stride=pitch,
            k_stride=1,
            row_exp_stride=0 if shared else rows,
        ),
        launches,
    )


def write_plan(problem: Problem, choice: Choice) -> Plan:
    """A choice as launches: packing, the GEMM, and the sum over splits where there are any."""
    tile, split = choice.tile, choice.split
    workspace = Workspace()
    launches: list[Launch] = []
    operands = []
    for buffer, packed, layout, slack in (
        ("a", choice.pack_a, problem.a, tile.block_m),
        ("b", choice.pack_b, problem.b, tile.block_n),
    ):
        if packed:
            alignment = max(PACK_ALIGNMENT, tile.block_k)
            operand, packing = pack_operand(problem, buffer, slack, alignment, workspace)
            launches += packing
        else:
            strides = (layout.batch_stride, layout.row_stride, layout.k_stride)
            operand = GemmOperand(Pointer(buffer, problem.dtype), None, *strides)
        operands.append(operand)
    a, b = operands

    both_packed = choice.pack_a and choice.pack_b
    k = round_up(problem.K, tile.block_k) if both_packed else problem.K
    scaled = a.row_exp is not None
    elements_c = problem.batch * problem.M * problem.N
    c = Pointer("c", problem.dtype)
    target = workspace.take(split * elements_c, "fp32") if split > 1 else c
    tiles = cdiv(problem.M, tile.block_m) * cdiv(problem.N, tile.block_n)
    tf32 = problem.dtype == "fp32" and problem.precision == "tf32"
    itemsize = ITEMSIZE[a.pointer.dtype]
    launches.append(
        Launch(
            "gemm",
            problem.batch * split * tiles,
            (a.pointer, b.pointer, target, a.row_exp, b.row_exp)
            + (problem.M, problem.N, k, problem.batch)
            + (a.batch_stride, a.row_stride, a.k_stride)
            + (b.batch_stride, b.row_stride, b.k_stride)
            + (a.row_exp_stride, b.row_exp_stride),
            {
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
                "GROUP_M": GROUP_M,
                "SPLIT_K": split,
                "EVEN_K": k % tile.block_k == 0,
                "CLAMP": not both_packed,
                "SCALED": scaled,
                "ROUND": tf32 and not scaled,
                "DOT": "tf32" if tf32 or problem.dtype != "fp32" else "ieee",
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            shared_memory=gemm_shared_memory(tile, itemsize, problem.arch),
        )
    )
    if split > 1:
        block_m, block_n = (1, 1024) if problem.N >= 512 else (16, 64)
        launches.append(
            Launch(
                "reduce",
                problem.batch * cdiv(problem.M, block_m) * cdiv(problem.N, block_n),
                (target, c, a.row_exp, b.row_exp, problem.M, problem.N, problem.batch)
                + (a.row_exp_stride, b.row_exp_stride),
                {"SPLIT_K": split, "SCALED": scaled, "BLOCK_M": block_m, "BLOCK_N": block_n},
            )
        )
    strategy = {0: "direct", 1: "mixed", 2: "packed"}[choice.pack_a + choice.pack_b]
    return Plan(
        strategy + ("+split" if split > 1 else ""),
        tuple(launches),
        workspace.size,
        estimate(problem, choice),
        reasons(problem, choice),
    )


def reasons(problem: Problem, choice: Choice) -> tuple[str, ...]:
    """One sentence a decision, for people."""
    said = []
    for name, operand, packed in (("a", problem.a, choice.pack_a), ("b", problem.b, choice.pack_b)):
        aligned = "16-byte aligned" if is_aligned(operand, problem.dtype) else "misaligned"
        what = "read as it is"
        if packed:
            what = "packed as scaled fp16" if problem.dtype == "fp32" else "packed"
        said.append(f"{name} is {aligned}: {what}")
    tile = choice.tile
    tiles = cdiv(problem.M, tile.block_m) * cdiv(problem.N, tile.block_n) * problem.batch
    said.append(
        f"{tile.block_m}x{tile.block_n}x{tile.block_k} tiles, {tile.num_warps} warps, "
        f"{tile.num_stages} stages: {tiles} tiles on {problem.arch.sms} SMs"
    )
    if choice.split > 1:
        said.append(f"K is shared by {choice.split} programs a tile and summed in a fixed order")
    best = {}
    for other in choices(problem):
        packing = (other.pack_a, other.pack_b)
        best[packing] = min(best.get(packing, float("inf")), estimate(problem, other))
    for (pack_a, pack_b), seconds in best.items():
        name = "".join(n for n, p in (("a", pack_a), ("b", pack_b)) if p) or "nothing"
        said.append(f"estimate with {name} packed: {seconds * 1e6:.0f} us")
    return tuple(said)


@lru_cache(maxsize=4096)
def make_plan(problem: Problem) -> Plan:
    """The plan with the smallest estimate. Pure: the same problem always gives the same plan."""
    if 0 in (problem.batch, problem.M, problem.N, problem.K):
        return Plan("zero", (), 0, 0.0, ("a size is zero: the result is zeros or empty",))
    best = min(choices(problem), key=lambda choice: estimate(problem, choice))
    return write_plan(problem, best)
