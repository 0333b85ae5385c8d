"""What a choice is made of: tiles, how operands reach the main loop, and which tiles suit them."""

from dataclasses import dataclass

from fastmm_op.problem import Operand, Problem, is_aligned, loads_are_wide


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
        edge_n: columns by which the last tile of a row is wider, for what N leaves of whole ones;
            0 if it is not.
        b_classes: rows of a misaligned B (as it lies in memory, so along K or along N) that start
            equally far behind 16-byte addresses are multiplied together, as a batch item; more than
            1 where B is read 16 bytes at a time like that.
    """

    pack_a: bool
    pack_b: bool
    tile: Tile
    split: int
    tail_split: int = 1
    slabs: int = 1
    edge_n: int = 0
    b_classes: int = 1


# The persistent kernels, whose operands come by TMA: of 16 bits, and fp32 as it lies.
HOPPER_KERNELS = ("gemm_hopper", "gemm_tf32_hopper")
# Columns that the last tile of gemm_hopper's may have more: twice as many leave too few registers.
EDGE_N = 32
# What TMA and wgmma make of 16-bit operands, one part each.
HOPPER_TILES = (
    Tile("gemm_hopper", 128, 256, 64, 4, 4, 1.00),
    Tile("gemm_hopper", 128, 128, 64, 4, 6, 0.90),
    Tile("gemm_hopper", 128, 64, 64, 4, 8, 0.64),
)
# Reads half as much of B as the first of those, and twice as much of A.
TALL_TILE = Tile("gemm_hopper", 256, 128, 64, 4, 4, 0.98)
MISALIGNED_TILES = (
    Tile("gemm", 64, 128, 32, 8, 2, 1.00),
    Tile("gemm", 64, 64, 32, 4, 2, 0.75),
    Tile("gemm", 32, 64, 64, 4, 2, 0.50),
    Tile("gemm", 16, 64, 64, 4, 2, 0.30),
    Tile("gemm", 16, 32, 128, 4, 2, 0.20),
)

DIRECT_TILES = (
    Tile("gemm", 64, 128, 32, 8, 3, 1.00),
    Tile("gemm", 64, 64, 32, 4, 3, 0.80),
    Tile("gemm", 32, 64, 32, 4, 3, 0.60),
    Tile("gemm", 16, 128, 32, 8, 3, 0.40),
    Tile("gemm", 16, 32, 64, 4, 3, 0.20),
)

# How the main loop gets its operands, and the tiles worth choosing from, largest first. What the
# planner takes of them for the suite on sm_89 compiles without spills (tests/test_codegen.py).
TILES = {
    ("sm_90", "16-bit"): (
        TALL_TILE,
        *HOPPER_TILES,
        Tile("gemm", 128, 256, 64, 8, 3, 0.80),
        Tile("gemm", 128, 128, 64, 4, 4, 0.76),
        Tile("gemm", 64, 128, 64, 4, 4, 0.60),
        Tile("gemm", 64, 64, 64, 4, 5, 0.55),
        Tile("gemm", 32, 64, 128, 4, 4, 0.22),
        Tile("gemm", 32, 32, 128, 4, 6, 0.16),
        Tile("gemm", 16, 64, 128, 4, 4, 0.20),
        Tile("gemm", 16, 32, 128, 4, 6, 0.10),
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
    # wgmma wants B in shared memory, so rounding to TF32 would take it there twice. Two warps, or
    # 32 rows at most, keep the compiler on mma.sync (uses_wgmma), which is faster here
    # (benchmarks/results/NVIDIA_H200/study_2026-11-25_tf32_tiles.txt), but for the kernel that
    # converts beside what multiplies, or has TMA round: so many times mma.sync's rate if it
    # converts, here and under "tf32x3"
    # (benchmarks/results/NVIDIA_H100_80GB_HBM3/as_it_lies_2026-11-27.txt). Of 32 x 32 less than of
    # its neighbours: 17 and 32 rows (NVIDIA_H200/tune_skinny.json).
    ("sm_90", "tf32"): (
        Tile("gemm_tf32_hopper", 128, 256, 32, 4, 4, 1.70),
        Tile("gemm_tf32_hopper", 128, 128, 32, 4, 4, 1.45),
        Tile("gemm_tf32_hopper", 128, 64, 32, 4, 6, 1.05),
        Tile("gemm", 64, 128, 32, 2, 3, 1.00),
        Tile("gemm", 128, 64, 32, 2, 3, 1.00),
        Tile("gemm", 64, 64, 32, 2, 3, 0.86),
        Tile("gemm", 64, 64, 64, 2, 3, 0.80),
        Tile("gemm", 32, 128, 32, 4, 3, 0.68),
        Tile("gemm", 32, 64, 64, 4, 3, 0.61),
        Tile("gemm", 32, 64, 32, 4, 3, 0.61),
        Tile("gemm", 32, 32, 64, 4, 3, 0.55),
        Tile("gemm", 16, 128, 32, 4, 3, 0.40),
        Tile("gemm", 16, 64, 64, 4, 3, 0.35),
    ),
    # Odd strides cost an address register an element: few of them fit.
    ("sm_90", "misaligned tf32"): (
        Tile("gemm", 32, 128, 32, 4, 3, 0.38),
        Tile("gemm", 32, 64, 32, 4, 3, 0.34),
        Tile("gemm", 32, 32, 64, 4, 3, 0.28),
        Tile("gemm", 16, 128, 32, 4, 3, 0.28),
        Tile("gemm", 16, 64, 64, 4, 3, 0.23),
    ),
    ("sm_90", "tf32x3"): (
        Tile("gemm_tf32_hopper", 128, 128, 32, 4, 5, 2.30),
        Tile("gemm_tf32_hopper", 128, 64, 32, 4, 7, 1.65),
        Tile("gemm", 32, 128, 32, 4, 3, 1.00),
        Tile("gemm", 32, 64, 32, 4, 3, 0.90),
        Tile("gemm", 16, 128, 32, 4, 3, 0.85),
    ),
    ("sm_90", "ieee"): (
        Tile("gemm", 32, 128, 64, 4, 3, 1.00),
        Tile("gemm", 32, 128, 32, 4, 3, 1.00),
        Tile("gemm", 32, 64, 32, 4, 3, 0.80),
        Tile("gemm", 32, 32, 64, 4, 3, 0.60),
        Tile("gemm", 16, 128, 32, 4, 3, 0.60),
        Tile("gemm", 16, 64, 64, 4, 3, 0.50),
    ),
    # Two accumulators: half the tile, unless one block is all of K. Efficiencies are shares of a
    # third of the 16-bit rate.
    ("sm_90", "hi and lo"): (
        Tile("gemm_hopper", 128, 256, 64, 4, 2, 1.10),
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
        ("tf32", DIRECT_TILES),
        ("misaligned tf32", DIRECT_TILES),
        (
            "tf32x3",
            (
                Tile("gemm", 32, 64, 32, 4, 3, 0.90),
                Tile("gemm", 16, 128, 32, 8, 3, 0.60),
            ),
        ),
        ("ieee", DIRECT_TILES),
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


# Of fp32 operands that are read as they are.
FP32_KINDS = ("tf32", "misaligned tf32", "tf32x3", "ieee")
# What the GEMM reads of one element, by the kind of its operands.
OPERAND_BYTES = {"16-bit": 2, "hi and lo": 4, "misaligned 16-bit": 2} | dict.fromkeys(FP32_KINDS, 4)

# Tiles for a matrix along K, or along its rows: of fp32, and of 16-bit elements that come by 16
# bytes, or one by one.
GEMV_TILES = {
    (True, "fp32"): Tile("gemv", 1, 16, 256, 4, 1, 1.0),
    (True, "16-bit"): Tile("gemv", 1, 8, 1024, 4, 1, 1.0),
    (True, "misaligned 16-bit"): Tile("gemv", 1, 16, 512, 4, 1, 1.0),
    (False, "fp32"): Tile("gemv", 1, 128, 32, 4, 1, 1.0),
    (False, "16-bit"): Tile("gemv", 1, 256, 16, 2, 1, 1.0),
    (False, "misaligned 16-bit"): Tile("gemv", 1, 128, 32, 4, 1, 1.0),
}


def gemv_matrix(problem: Problem) -> Operand:
    """The operand that a one-wide product reads as a matrix: the other one is a vector."""
    return problem.b if problem.M == 1 else problem.a


def gemv_tile(problem: Problem) -> Tile:
    """The tile for a one-wide product's matrix, by how many of its elements a load takes."""
    matrix, kind = gemv_matrix(problem), "fp32"
    if problem.dtype != "fp32":
        strides = matrix.k_stride, matrix.row_stride
        wide = loads_are_wide(matrix, *(strides if matrix.k_major else strides[::-1]))
        kind = "16-bit" if wide else "misaligned 16-bit"
    return GEMV_TILES[matrix.k_major, kind]


def operand_kind(problem: Problem, pack_a: bool, pack_b: bool) -> str:
    """How the GEMM's main loop gets its operands: a key of TILES."""
    a_aligned = pack_a or is_aligned(problem.a, problem.dtype)
    b_aligned = pack_b or is_aligned(problem.b, problem.dtype)
    if problem.dtype == "fp32":
        if pack_a and pack_b:
            return "hi and lo" if problem.parts == 2 else "16-bit"
        # Beside a B that is read by classes, A's few rows come element by element.
        wide_copies = b_aligned and (a_aligned or problem.b.shifted)
        if problem.tf32:
            return "tf32" if wide_copies else "misaligned tf32"
        return "tf32x3" if problem.split_in_registers and wide_copies else "ieee"
    return "16-bit" if a_aligned and b_aligned else "misaligned 16-bit"


def is_converted(problem: Problem, kind: str) -> bool:
    """Whether gemm_tf32_hopper_kernel has a warpgroup that converts B beside those that multiply.

    It need not if TMA rounds both operands, and one of them is K-major: wgmma wants that of one.
    """
    k_major = problem.a.k_major or problem.b.k_major
    return kind == "tf32x3" or not (problem.arch.tma_rounds and k_major)


def uses_wgmma(problem: Problem, tile: Tile) -> bool:
    """Whether Triton multiplies a plain tile by wgmma, which wants 64 rows and four warps."""
    return problem.arch.wgmma and tile.block_m >= 64 and tile.num_warps >= 4


def a_is_k_major(problem: Problem, choice: Choice) -> bool:
    return choice.pack_a or problem.a.k_major
