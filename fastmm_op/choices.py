"""Every legal way to compute a product: what is packed, by which kernel and tile, how split."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

from fastmm_op.problem import (
    COPY_BYTES,
    ITEMSIZE,
    Epilogue,
    Operand,
    Problem,
    cdiv,
    is_aligned,
    round_up,
)

# Splits of K worth trying: few output tiles leave most of the card idle.
SPLITS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# Products of few rows or columns are bandwidth-bound and split by cuBLAS too, whose fp32 sums are
# the more accurate for it: a chain of IEEE sums is so long at most, if there are splits enough.
FEW_ROWS = 32
LONGEST_CHAIN = 1024
# Sums in the tensor core are truncated, which shows where thousands of numbers of one sign are
# added. Of a result so small that cuBLAS shares out K, so long a chain loses no more than cuBLAS's
# (uniform numbers, 509 x 4095 x 511: 1024 lose 1.4 times as much; benchmarks/results/NVIDIA_H200).
LONGEST_TRUNCATED_CHAIN = 512
# Rows up to this many elements are packed by one program that holds them in registers.
MAX_ROW_IN_REGISTERS = 8192
# Columns that are packed whole by one program: beyond this, reading them twice is faster.
MAX_COLUMN_IN_REGISTERS = 1024
SLAB_ALIGNMENT = 64
# Programs that may share each tile of a last, partly filled wave.
TAIL_SPLITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Tile:
    """A kernel, its tile, and the fraction of the card's rate that its main loop reaches.

    For ``gemv``, block_n counts the rows of the matrix, and bandwidth is the rate.
    """

    kernel: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    efficiency: float


@dataclass(frozen=True)
class Choice:
    """One way to compute a problem, before it is written out as launches.

    Attributes:
        pack_a, pack_b: whether the operand is rewritten first.
        tile: the kernel and its tile.
        split: programs that share K of every tile.
        tail_split: programs that share K of each tile of the last, partly filled wave; more than 1
            only for the Hopper kernel without a split.
        slabs: parts of K that are packed and multiplied as batch items, each scaled by itself, and
            summed; more than 1 where that packs a long K in one read.
    """

    pack_a: bool
    pack_b: bool
    tile: Tile
    split: int
    tail_split: int = 1
    slabs: int = 1


# What TMA and wgmma make of 16-bit operands, one part each.
HOPPER_TILES = (
    Tile("gemm_hopper", 128, 256, 64, 4, 4, 1.00),
    Tile("gemm_hopper", 128, 128, 64, 4, 6, 0.90),
    Tile("gemm_hopper", 128, 64, 64, 4, 8, 0.64),
)
MISALIGNED_TILES = (
    Tile("gemm", 64, 128, 32, 8, 2, 1.00),
    Tile("gemm", 64, 64, 32, 4, 2, 0.75),
    Tile("gemm", 32, 64, 64, 4, 2, 0.50),
    Tile("gemm", 16, 64, 64, 4, 2, 0.30),
    Tile("gemm", 16, 32, 128, 4, 2, 0.20),
)

# How the main loop gets its operands, and the tiles worth choosing from, largest first. What the
# planner takes of them for the suite on sm_89 compiles without spills (tests/test_codegen.py).
TILES = {
    ("sm_90", "16-bit"): (
        *HOPPER_TILES,
        Tile("gemm", 128, 256, 64, 8, 3, 0.80),
        Tile("gemm", 128, 128, 64, 4, 4, 0.76),
        Tile("gemm", 64, 128, 64, 4, 4, 0.60),
        Tile("gemm", 64, 64, 64, 4, 5, 0.45),
        Tile("gemm", 32, 64, 128, 4, 4, 0.25),
        Tile("gemm", 16, 64, 128, 4, 4, 0.13),
        Tile("gemm", 16, 32, 128, 4, 4, 0.08),
    ),
    ("sm_80", "16-bit"): (
        Tile("gemm", 128, 256, 32, 8, 4, 1.00),
        Tile("gemm", 128, 128, 32, 4, 4, 0.95),
        Tile("gemm", 64, 128, 32, 4, 4, 0.75),
        Tile("gemm", 64, 64, 64, 4, 4, 0.50),
        Tile("gemm", 32, 64, 64, 4, 4, 0.25),
        Tile("gemm", 16, 64, 64, 4, 4, 0.13),
        Tile("gemm", 16, 32, 128, 4, 4, 0.08),
    ),
    ("sm_89", "16-bit"): (
        Tile("gemm", 128, 256, 32, 8, 3, 1.00),
        Tile("gemm", 128, 128, 32, 4, 4, 0.97),
        Tile("gemm", 64, 128, 32, 4, 4, 0.75),
        Tile("gemm", 64, 64, 64, 4, 4, 0.50),
        Tile("gemm", 32, 64, 64, 4, 4, 0.25),
        Tile("gemm", 16, 64, 64, 4, 4, 0.13),
        Tile("gemm", 16, 32, 128, 4, 4, 0.08),
    ),
    # wgmma wants B in shared memory, so rounding to TF32 would take it there twice: 32 rows at most
    # keep the compiler on mma.sync, which is faster here (n=512 on the H200: 14.5 us against 52;
    # benchmarks/results/NVIDIA_H200/study_2026-11-22.txt).
    ("sm_90", "fp32"): (
        Tile("gemm", 32, 128, 64, 4, 3, 1.00),
        Tile("gemm", 32, 128, 32, 4, 3, 1.00),
        Tile("gemm", 32, 64, 32, 4, 3, 0.80),
        Tile("gemm", 32, 32, 64, 4, 3, 0.60),
        Tile("gemm", 16, 128, 32, 4, 3, 0.60),
        Tile("gemm", 16, 64, 64, 4, 3, 0.50),
    ),
    # Two accumulators: half the tile. Efficiencies are shares of a third of the 16-bit rate.
    ("sm_90", "hi and lo"): (
        Tile("gemm_hopper", 128, 128, 64, 4, 3, 1.05),
        Tile("gemm_hopper", 128, 64, 64, 4, 4, 0.75),
        Tile("gemm", 128, 128, 32, 8, 4, 0.65),
        Tile("gemm", 64, 64, 64, 4, 3, 0.40),
        Tile("gemm", 32, 64, 64, 4, 3, 0.25),
        Tile("gemm", 16, 64, 64, 4, 3, 0.13),
    ),
    ("sm_80", "misaligned 16-bit"): MISALIGNED_TILES,
    ("sm_89", "misaligned 16-bit"): MISALIGNED_TILES,
    # The Hopper kernel may read a misaligned A by its rows' classes.
    ("sm_90", "misaligned 16-bit"): (*HOPPER_TILES, *MISALIGNED_TILES),
} | {
    # Odd strides cost an address register an element: large tiles of them would spill.
    (arch, kind): tiles
    for kind, tiles in (
        (
            "fp32",
            (
                Tile("gemm", 64, 128, 32, 8, 3, 1.00),
                Tile("gemm", 64, 64, 32, 4, 3, 0.80),
                Tile("gemm", 32, 64, 32, 4, 3, 0.60),
                Tile("gemm", 16, 128, 32, 8, 3, 0.40),
                Tile("gemm", 16, 32, 64, 4, 3, 0.20),
            ),
        ),
        (
            "hi and lo",
            (
                Tile("gemm", 128, 128, 32, 8, 3, 0.85),
                Tile("gemm", 64, 128, 32, 4, 3, 0.75),
                Tile("gemm", 64, 64, 32, 4, 3, 0.50),
                Tile("gemm", 32, 64, 64, 4, 3, 0.25),
                Tile("gemm", 16, 64, 64, 4, 3, 0.13),
            ),
        ),
    )
    for arch in ("sm_80", "sm_89")
}


# What the GEMM reads of one element, by the kind of its operands.
OPERAND_BYTES = {"16-bit": 2, "hi and lo": 4, "fp32": 4, "misaligned 16-bit": 2}

# Tiles for a matrix along K, or along its rows, by the elements that a thread has in flight.
GEMV_TILES = {
    (True, 32): Tile("gemv", 1, 16, 256, 4, 1, 1.0),
    (True, 64): Tile("gemv", 1, 16, 512, 4, 1, 1.0),
    (False, 32): Tile("gemv", 1, 128, 32, 4, 1, 1.0),
    (False, 64): Tile("gemv", 1, 128, 64, 4, 1, 1.0),
}


def gemv_matrix(problem: Problem) -> Operand:
    """The operand that a one-wide product reads as a matrix: the other one is a vector."""
    return problem.b if problem.M == 1 else problem.a


def gemv_tile(problem: Problem) -> Tile:
    """Twice as many 16-bit elements as fp32 ones, unless they are misaligned along the rows."""
    matrix = gemv_matrix(problem)
    wide = matrix.k_major or is_aligned(matrix, problem.dtype)
    return GEMV_TILES[matrix.k_major, 64 if wide and problem.dtype != "fp32" else 32]


def operand_kind(problem: Problem, pack_a: bool, pack_b: bool) -> str:
    """How the GEMM's main loop gets its operands: a key of TILES."""
    if problem.dtype == "fp32":
        packed_kind = "hi and lo" if problem.parts == 2 else "16-bit"
        return packed_kind if pack_a and pack_b else "fp32"
    a_aligned = pack_a or is_aligned(problem.a, problem.dtype)
    b_aligned = pack_b or is_aligned(problem.b, problem.dtype)
    return "16-bit" if a_aligned and b_aligned else "misaligned 16-bit"


def choices(problem: Problem) -> Iterator[Choice]:
    """Every legal combination of packing, tile and split."""
    dtype, arch = problem.dtype, problem.arch
    if problem.one_wide:
        tile = gemv_tile(problem)
        for split in SPLITS:
            if split == 1 or cdiv(problem.K, split) >= 2 * tile.block_k:
                yield Choice(False, False, tile, split)
        return
    if dtype == "fp32":
        packings = [(False, False), (True, True)] if problem.parts else [(False, False)]
    else:
        # On Hopper aligned operands may be worth packing too: TMA reads rows that start inside a
        # memory sector more slowly, and row classes read past B's end. A packed B at hand is free.
        a_ways = [False] if is_aligned(problem.a, dtype) and not arch.tma else [False, True]
        b_as_it_is = is_aligned(problem.b, dtype) and not (arch.tma or problem.prepacked)
        b_ways = [False] if b_as_it_is else [False, True]
        packings = [(a, b) for a in a_ways for b in b_ways]
    for pack_a, pack_b in packings:
        kind = operand_kind(problem, pack_a, pack_b)
        for tile in TILES[arch.name, kind]:
            if tile.kernel == "gemm_hopper" and not hopper_can_run(problem, pack_a, pack_b):
                continue
            for split in SPLITS:
                choice = Choice(pack_a, pack_b, tile, split)
                if shared_memory(problem, choice) > arch.shared_memory:
                    continue
                deep_enough = split == 1 or cdiv(problem.K, split) >= 2 * tile.block_k
                if not deep_enough or not epilogue_fits(problem, choice):
                    continue
                if chain_is_short(problem, kind, split):
                    yield choice
                    yield from tail_splits(problem, choice)
                yield from in_slabs(problem, choice)


def in_slabs(problem: Problem, choice: Choice) -> Iterator[Choice]:
    """The choice with K cut into slabs, if an operand is then packed in one read that was not."""
    packs_numbers = problem.dtype == "fp32" and choice.pack_a and choice.pack_b
    operands = (problem.a, problem.b)
    expanded = any(x.k_stride == 0 for x in operands)
    whole_rows = problem.prepacked or problem.batch > 1
    if not packs_numbers or whole_rows or choice.split > 1 or expanded:
        return
    twice = [longest_row_in_registers(x) for x in operands]
    for longest in slab_lengths(problem):
        if any(longest <= held < problem.K for held in twice):
            yield replace(choice, slabs=cdiv(problem.K, slab_k(problem.K, longest)))


def slab_lengths(problem: Problem) -> tuple[int, ...]:
    """How long slabs may be: such that columns, or rows, are packed in one read."""
    if sums_must_be_short(problem):
        length = round_up(longest_truncated_chain(problem), SLAB_ALIGNMENT)
        return (min(length, MAX_COLUMN_IN_REGISTERS),)
    return (MAX_COLUMN_IN_REGISTERS, MAX_ROW_IN_REGISTERS)


def slab_k(K: int, longest: int) -> int:
    """K of slabs that are as long as each other, but for the last, and no longer than so much."""
    return round_up(cdiv(K, cdiv(K, longest)), SLAB_ALIGNMENT)


def slabs_as_batch(problem: Problem, choice: Choice) -> tuple[Problem, Choice]:
    """The product of the slabs, one a batch item, without the epilogue, and how it is computed."""
    k = round_up(cdiv(problem.K, choice.slabs), SLAB_ALIGNMENT)
    a, b = (replace(x, batch_stride=k * x.k_stride) for x in (problem.a, problem.b))
    product = replace(problem, batch=choice.slabs, K=k, a=a, b=b, epilogue=Epilogue())
    return product, replace(choice, slabs=1)


def longest_row_in_registers(operand: Operand) -> int:
    """How long rows may be that packing reads once: a row's scale is known after the whole row."""
    return MAX_ROW_IN_REGISTERS if operand.k_major else MAX_COLUMN_IN_REGISTERS


def chain_is_short(problem: Problem, kind: str, split: int) -> bool:
    """Whether sums of so many splits are as accurate as the problem's precision promises."""
    chain = cdiv(problem.K, split)
    if kind == "fp32" and not problem.tf32 and min(problem.M, problem.N) <= FEW_ROWS:
        return chain <= max(LONGEST_CHAIN, cdiv(problem.K, SPLITS[-1]))
    if kind == "16-bit" and sums_must_be_short(problem):
        return chain <= longest_truncated_chain(problem)
    return True


def sums_must_be_short(problem: Problem) -> bool:
    """Whether cuBLAS, whose error in TF32 is the yardstick, would share out K among programs."""
    tiles = problem.batch * cdiv(problem.M, 128) * cdiv(problem.N, 128)
    return problem.tf32 and 4 * tiles <= problem.arch.sms and problem.K > LONGEST_CHAIN


def longest_truncated_chain(problem: Problem) -> int:
    return max(LONGEST_TRUNCATED_CHAIN, cdiv(problem.K, SPLITS[-1]))


def tail_splits(problem: Problem, choice: Choice) -> Iterator[Choice]:
    """The choice with its last wave shared, in each legal way."""
    tile = choice.tile
    if tile.kernel != "gemm_hopper" or choice.split > 1:
        return
    if count_tiles(problem, choice) % problem.arch.sms == 0:
        return
    for tail_split in TAIL_SPLITS:
        shared = replace(choice, tail_split=tail_split)
        if cdiv(problem.K, tail_split) >= 2 * tile.block_k and epilogue_fits(problem, shared):
            yield shared


def count_tiles(problem: Problem, choice: Choice) -> int:
    """Tiles of C, batch included; the same number for each class of A's rows, if it has classes."""
    tile, classes = choice.tile, a_classes(problem, choice)
    tiles_m = classes * cdiv(problem.M, classes * tile.block_m)
    return problem.batch * tiles_m * cdiv(problem.N, tile.block_n)


def whole_tiles(problem: Problem, choice: Choice) -> int:
    """Tiles that tail_split does not concern, the first ones: full waves, if the rest is shared."""
    return count_tiles(problem, choice) - tail_tiles(problem, choice)


def tail_tiles(problem: Problem, choice: Choice) -> int:
    """Tiles, the last ones, that tail_split programs share; 0 if none are."""
    if choice.tail_split == 1:
        return 0
    return count_tiles(problem, choice) % problem.arch.sms


def epilogue_fits(problem: Problem, choice: Choice) -> bool:
    """Whether the epilogue's registers fit beside the accumulator; Hopper's widest are tight.

    A residual of unaligned rows takes addresses of its own, as C does. Where A is read by classes,
    it leaves none to partial sums.
    """
    in_place = problem.epilogue.residual and choice.split == 1
    widest = problem.arch.wgmma and choice.tile.block_n > 128
    if not (in_place and widest):
        return True
    partial_sums = a_classes(problem, choice) > 1 and choice.tail_split > 1
    return stores_are_aligned(problem, choice) and not partial_sums


def hopper_can_run(problem: Problem, pack_a: bool, pack_b: bool) -> bool:
    """Whether TMA descriptors can hold the operands that are not packed.

    A may be misaligned if it can be read by row classes.
    """
    sizes = (problem.batch, problem.M, problem.N, problem.K)
    return (
        problem.arch.tma
        and max(sizes) < 2**31 - 2048  # where a tile that is not all inside ends: 32 bits
        and (pack_b or tma_can_read(problem.b, problem.dtype, problem.N, problem.K))
        and (
            pack_a
            or tma_can_read(problem.a, problem.dtype, problem.M, problem.K)
            or (not pack_b and a_has_classes(problem))
        )
    )


def tma_can_read(operand: Operand, dtype: str, rows: int, k: int) -> bool:
    """An aligned operand that is not expanded along its rows or K, strides within TMA's 40 bits."""
    if not is_aligned(operand, dtype):
        return False
    expanded = (operand.row_stride == 0 and rows > 1) or (operand.k_stride == 0 and k > 1)
    return not expanded and max(operand.batch_stride, operand.row_stride, operand.k_stride) < 2**38


def classes_of(row_bytes: int) -> int:
    """How many rows in a row start at different addresses modulo 16, if they are so long."""
    return COPY_BYTES // gcd(COPY_BYTES, row_bytes)


def a_has_classes(problem: Problem) -> bool:
    """Whether the Hopper kernel can read a misaligned A as it is, by classes of its rows.

    A: of 16 bits, K-major, one batch item, at an aligned address; rows enough that every class has
    a whole tile; TMA's coordinates, 32 bits, reach along a row of every class. B: N-major, for its
    K is moved with A's. C: aligned, its rows are stored as far apart as A's are.
    """
    a, b, tile = problem.a, problem.b, HOPPER_TILES[0]
    if problem.dtype == "fp32" or problem.batch > 1 or a.k_stride != 1 or b.row_stride != 1:
        return False
    classes = classes_of(a.row_stride * ITEMSIZE[problem.dtype])
    return (
        classes > 1
        and a.pointer_alignment == COPY_BYTES
        and a.row_stride >= problem.K
        and classes * (a.row_stride + tile.block_k) < 2**31
        and classes * tile.block_m <= problem.M
        and problem.N * ITEMSIZE[problem.dtype] % COPY_BYTES == 0
    )


def a_classes(problem: Problem, choice: Choice) -> int:
    """How many classes of equally misaligned rows A is read in, or 1."""
    by_classes = choice.tile.kernel == "gemm_hopper" and not choice.pack_a
    if not by_classes or is_aligned(problem.a, problem.dtype):
        return 1
    return classes_of(problem.a.row_stride * ITEMSIZE[problem.dtype])


def row_classes(problem: Problem, choice: Choice) -> int:
    """How many classes of equally aligned rows C has, if the Hopper kernel stores by them; else 1.

    Only for one batch item and no split; A and B must be K-major, and B packed (with its first rows
    repeated past the end); M large enough that whole tiles of one class exist.
    """
    if choice.tile.kernel != "gemm_hopper" or problem.batch > 1 or choice.split > 1:
        return 1
    classes = classes_of(problem.N * ITEMSIZE[problem.dtype])
    k_major = (choice.pack_a or problem.a.k_major) and choice.pack_b
    elements = COPY_BYTES // ITEMSIZE[problem.dtype]
    fits = choice.tile.block_m * classes <= problem.M and elements <= problem.N
    return classes if k_major and fits else 1


def stores_are_aligned(problem: Problem, choice: Choice) -> bool:
    """Whether the Hopper kernel's tiles of C start on 16-byte boundaries."""
    itemsize = 4 if choice.split > 1 else ITEMSIZE[problem.dtype]
    return problem.N * itemsize % COPY_BYTES == 0 or row_classes(problem, choice) > 1


def shared_memory(problem: Problem, choice: Choice) -> int:
    """Bytes of shared memory a block of the choice's kernel uses.

    Exact for the plans of the benchmark's suite on plain Triton kernels, otherwise an upper bound
    (tests/test_codegen.py holds both against the compiler, Triton 3.6 and 3.7 alike).
    """
    if choice.tile.kernel == "gemv":
        return gemv_shared_memory(problem, choice.tile)
    if choice.tile.kernel == "gemm_hopper":
        return hopper_shared_memory(problem, choice)
    return gemm_shared_memory(problem, choice)


def gemv_shared_memory(problem: Problem, tile: Tile) -> int:
    """The vector, spread as the matrix needs it, and each warp's sums of the rows it has seen.

    Both depend on how threads are laid out, which follows from what they can load at once.
    """
    matrix = gemv_matrix(problem)
    vector = problem.a if matrix is problem.b else problem.b
    sums = tile.block_n * tile.num_warps * 4
    if matrix.k_major:
        spread = tile.block_k * ITEMSIZE[problem.dtype]
        return max(spread, sums) if loads_are_wide(vector, vector.k_stride) else sums
    # A thread that loads one element has its column to itself: no sums to exchange.
    return sums if loads_are_wide(matrix, matrix.row_stride, matrix.k_stride) else 0


def loads_are_wide(operand: Operand, neighbours: int, pitch: int = 0) -> bool:
    """Whether Triton loads several neighbours at once. Of integers it knows if 16 divides them.

    Args:
        neighbours: their stride.
        pitch: the other stride, if there is one.
    """
    known = pitch % 16 == 0 and operand.batch_stride % 16 == 0
    return neighbours == 1 and known and operand.pointer_alignment == COPY_BYTES


def hopper_shared_memory(problem: Problem, choice: Choice) -> int:
    """An upper bound for gemm_hopper_kernel; tests hold it against the compiler's figure."""
    tile = choice.tile
    ring = tile.num_stages * ring_slot(problem, choice)
    exponents = 2 * tile.block_n * 4
    barriers = 2 * 8 * tile.num_stages
    # Of each consumer: one as fp32 on its way through shared memory, or two of 128 bytes for TMA.
    slices = 2 * 64 * 64 * 4
    captured_arguments = 256
    return ring + exponents + barriers + slices + captured_arguments


def ring_slot(problem: Problem, choice: Choice) -> int:
    """Bytes of one K-block of A and B."""
    tile = choice.tile
    itemsize = OPERAND_BYTES[operand_kind(problem, choice.pack_a, choice.pack_b)]
    return (tile.block_m + tile.block_n) * tile.block_k * itemsize


def gemm_shared_memory(problem: Problem, choice: Choice) -> int:
    """Bytes of shared memory gemm_kernel takes: its rings of A and B tiles, later the C tile."""
    tile = choice.tile
    kind = operand_kind(problem, choice.pack_a, choice.pack_b)
    itemsize = OPERAND_BYTES[kind]
    a_tile = tile.block_m * tile.block_k * itemsize
    b_tile = tile.block_n * tile.block_k * itemsize
    c_tile = c_tile_bytes(problem, choice)
    if kind == "misaligned 16-bit":
        return max(misaligned_ring(problem, choice, a_tile, b_tile), c_tile)
    # fp32 is rounded in registers on the way, after which wgmma wants its B tile back.
    wgmma = uses_wgmma(problem, tile)
    buffers = ring_buffers(tile, wgmma and kind != "fp32")
    ring = (a_tile + b_tile) * buffers + (b_tile if wgmma and kind == "fp32" else 0)
    if kind == "16-bit" and not wgmma and not a_is_k_major(problem, choice):
        # Triton transposes this A in registers: it has one buffer, however many stages there are.
        ring -= a_tile * (buffers - 1)
    return max(ring, c_tile)


def uses_wgmma(problem: Problem, tile: Tile) -> bool:
    """Whether Triton multiplies a plain tile by wgmma, which wants 64 rows."""
    return problem.arch.wgmma and tile.block_m >= 64


def ring_buffers(tile: Tile, wgmma: bool) -> int:
    """How many tiles of an operand shared memory holds that cp.async copies there.

    mma.sync reads its operands into registers, so the tile in use is free again at once and
    num_stages - 1 buffers serve num_stages tiles; wgmma reads shared memory and keeps the last one.
    """
    return max(1, tile.num_stages - (0 if wgmma else 1))


def a_is_k_major(problem: Problem, choice: Choice) -> bool:
    return choice.pack_a or problem.a.k_major


def misaligned_ring(problem: Problem, choice: Choice, a_tile: int, b_tile: int) -> int:
    """What 16-bit operands take of which one or both come through registers, by one buffer."""
    b_aligned = choice.pack_b or is_aligned(problem.b, problem.dtype)
    a_aligned = choice.pack_a or is_aligned(problem.a, problem.dtype)
    if not a_is_k_major(problem, choice) and not b_aligned:
        ring = max(a_tile, b_tile)  # one after the other
    else:
        ring = a_tile + b_tile
    if a_aligned != b_aligned:
        wgmma = uses_wgmma(problem, choice.tile)
        aligned_tile = a_tile if a_aligned else b_tile
        ring += aligned_tile * (ring_buffers(choice.tile, wgmma) - 1)
        # Triton may arrange the warps of the K tail's product differently and move the sums.
        ring = max(ring, a_tile + choice.tile.block_m * choice.tile.block_n * 4)
    return ring


def c_tile_bytes(problem: Problem, choice: Choice) -> int:
    """Shared memory through which C's tile is rearranged for coalesced stores, part by part.

    How many parts Triton 3.6 and 3.7 make of it was read off kernels whose rings are smaller.
    """
    tile = choice.tile
    itemsize = 4 if choice.split > 1 else ITEMSIZE[problem.dtype]
    registers = tile.block_m * tile.block_n // (32 * tile.num_warps)
    aligned = problem.N % 16 == 0
    kind = operand_kind(problem, choice.pack_a, choice.pack_b)
    if kind == "hi and lo" or (kind == "16-bit" and uses_wgmma(problem, tile)):
        parts = 1
    elif itemsize == 4:
        parts = (2 if registers >= 64 else 1) * (2 if aligned and registers >= 16 else 1)
    else:
        parts = 2 if aligned and tile.block_n >= 32 * tile.num_warps else 1
    return tile.block_m * tile.block_n * itemsize // parts
