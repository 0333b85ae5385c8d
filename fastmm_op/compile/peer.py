"""What Inductor would do with a product by itself, in seconds: cuBLAS, or cuBLAS on padded copies.

Pure arithmetic on a Problem; no torch. The rates of sm_90 are fitted to torch.matmul's and
Inductor's times in benchmarks/results/NVIDIA_H200/suite_2026-11-25.json, tests hold them against
later runs. Those of sm_80 and sm_89 are predictions: this project has measured neither card.
"""

from dataclasses import dataclass, field, replace
from math import ceil

from fastmm_op.chains import FEW_ROWS
from fastmm_op.problem import COPY_BYTES, ITEMSIZE, Operand, Problem, cdiv, round_up

# Reading and writing, as a share of a large copy's bandwidth.
BANDWIDTH = 0.85


@dataclass(frozen=True)
class Rates:
    """cuBLAS on one architecture; shares of ``Arch.fp16_flops`` unless said otherwise.

    Attributes:
        fp32_flops: FLOP a second of fp32 products without TF32; alignment matters little.
        half: fp16 and bf16 products, by the bytes that divide every row of A, B and C.
        tf32: fp32 products with TF32, likewise.
        tf32_tn: share of ``tf32`` where A is column-major and B row-major, as for a weight's
            gradient.
        few_rows: bytes a second that slow products of few rows reach, whatever the memory could
            give: those of fp32, and others that read elements one by one. Empty if nobody has
            looked.
        storing: the share of the memory's bandwidth at which products of a short K store a large C;
            None if nobody has looked.
    """

    fp32_flops: float
    half: dict[int, float]
    tf32: dict[int, float]
    tf32_tn: float = 1.0
    few_rows: dict[str, float] = field(default_factory=dict)
    storing: float | None = None


RATES = {
    # Published for the RTX 4090: bf16 at odd sizes 107-116 TFLOP/s of 154-172.
    "sm_89": Rates(50e12, {16: 1.1, 8: 0.9, 4: 0.75, 2: 0.75}, {16: 0.54, 8: 0.45, 4: 0.4}),
    "sm_80": Rates(19e12, {16: 1.1, 8: 0.7, 4: 0.5, 2: 0.5}, {16: 0.54, 8: 0.45, 4: 0.4}),
    # At 4 bytes (half) and 8 (TF32) nothing was measured: between their neighbours. Few rows of
    # fp32 take 98-144 us for 180 MB, on an H100 107-149 (matmul_fp32.json); in TF32, TN takes 1.2
    # to 2.1 times as long as NN, mostly 1.5 (study_2026-11-25_split.txt). Elements one by one take
    # 85-160 us of 16 bits (90 MB) and 79-88 in TF32 (180 MB), on an H100 89-163 and 94-98
    # (matmul.json). 32768x64x32768 and 32768x32x32768 are stored at 0.74 to 0.82 of the bandwidth
    # on an H200, on an H100 at 0.81 to 0.93 (matmul.json); ours took 0.80 to 0.97 of the time.
    "sm_90": Rates(
        50e12,
        {16: 1.1, 8: 0.39, 4: 0.3, 2: 0.2},
        {16: 0.56, 8: 0.36, 4: 0.19},
        tf32_tn=0.7,
        few_rows={"fp32": 1.5e12, "half": 1.05e12, "tf32": 2.27e12},
        storing=0.8,
    ),
}

# Tiles in which cuBLAS spreads C over the card. TF32's are twice as wide on aligned operands; of
# aligned 16 bits there are many, of which it takes one that leaves few SMs idle (Hopper's, by the
# kernels' names in benchmarks/results/NVIDIA_H200/gpt2_bf16_2026-11-28.txt).
TILES = ((128, 128),)
ALIGNED_TILES = {
    "tf32": ((128, 256),),
    "half": ((128, 128), (128, 160), (128, 192), (128, 256), (192, 128), (192, 192), (256, 128)),
}
# The longest K with which storing C takes longest.
SHORT_K = 64
# Programs that share K where there are few tiles keep at least this much of it each.
MIN_SPLIT_K = 512
# As BANDWIDTH, where a product of a few rows reads elements one by one: the H200's rates, as shares
# of its memory's, for cards on which nobody has looked.
BANDWIDTH_BY_ELEMENT = {"half": 0.25, "tf32": 0.54}
# What the shorter of arithmetic and memory traffic adds to the longer.
IMPERFECT_OVERLAP = 0.1
# pad_mm pads what it measures to be this much faster padded, its copies included.
WORTH_PADDING = 1.1
# pad_mm looks at products with more than this share of the card's FLOP a byte.
COMPUTE_BOUND = 0.5


@dataclass(frozen=True)
class Surroundings:
    """What the graph around a product, and its compiler, make cheap or dear.

    Attributes:
        pads: Inductor's ``pad_mm`` may pad this product.
        static: whether M, N and K are known when compiling: others are not padded.
        a_made_here, b_made_here: whatever writes the operand can write it padded, for nothing.
        c_leaves: the result is an output of the graph, so a padded one must be copied.
        extra_pass: taking the product costs another pass over C: a bias or an epilogue that
            Inductor would have added inside its own product.
        graphs: CUDA graphs replay the code, so that calls cost the host nothing.
    """

    pads: bool = False
    static: tuple[bool, bool, bool] = (True, True, True)
    a_made_here: bool = False
    b_made_here: bool = False
    c_leaves: bool = True
    extra_pass: bool = False
    graphs: bool = False


def kind(problem: Problem) -> str:
    """What the product is computed in: a name of Rates' tables, or ``"fp32"``."""
    if problem.dtype != "fp32":
        return "half"
    return "tf32" if problem.precision == "tf32" else "fp32"


def alignment(problem: Problem) -> int:
    """The bytes, up to 16, that divide every address at which a row of A, B or C starts."""
    size = ITEMSIZE[problem.dtype]
    pitches = [problem.N]
    start = COPY_BYTES
    for operand in (problem.a, problem.b):
        strides = [operand.batch_stride, operand.row_stride, operand.k_stride]
        if 1 in strides[1:]:
            strides.remove(1)
        elif problem.K > 1:
            return size  # no contiguous dimension: cuBLAS gets a copy, or reads by element
        pitches += strides
        start = min(start, operand.pointer_alignment)
    while any(pitch * size % start for pitch in pitches):
        start //= 2
    return max(start, size)


def flops_rate(problem: Problem, aligned_to: int) -> float:
    """FLOP a second of cuBLAS's main loop."""
    rates, what = RATES[problem.arch.name], kind(problem)
    if what == "fp32":
        return rates.fp32_flops
    share = getattr(rates, what)[aligned_to]
    if what == "tf32" and aligned_to == COPY_BYTES and is_tn(problem):
        share *= rates.tf32_tn
    return share * problem.arch.fp16_flops


def is_tn(problem: Problem) -> bool:
    """Whether A is column-major and B row-major."""
    return problem.a.row_stride == 1 and problem.b.row_stride == 1


def traffic(problem: Problem) -> float:
    """Bytes of A, B and C, each moved once."""
    elements = problem.M * problem.K + problem.K * problem.N + problem.M * problem.N
    return problem.batch * elements * ITEMSIZE[problem.dtype]


def memory_bound(problem: Problem) -> bool:
    """Whether moving A, B and C takes longer than the arithmetic of aligned operands."""
    arithmetic = problem.flops / flops_rate(problem, COPY_BYTES)
    return traffic(problem) / problem.arch.bandwidth > arithmetic


def bandwidth_share(problem: Problem) -> float:
    """What cuBLAS reaches of a large copy's bandwidth.

    Less where it mostly stores, and beside A's 2 to FEW_ROWS rows.
    """
    if mostly_stores(problem):
        return RATES[problem.arch.name].storing or BANDWIDTH
    what = kind(problem)
    # Of fp32 this was measured of matrices that come from memory.
    measured = what == "half" or (problem.batch == 1 and traffic(problem) > problem.arch.l2_bytes)
    if not (measured and 1 < problem.M <= FEW_ROWS):
        return BANDWIDTH
    if what != "fp32" and alignment(problem) > ITEMSIZE[problem.dtype]:
        return BANDWIDTH
    rates = RATES[problem.arch.name].few_rows
    if what not in rates:
        return BANDWIDTH_BY_ELEMENT.get(what, BANDWIDTH)
    return min(BANDWIDTH, rates[what] / problem.arch.bandwidth)


def mostly_stores(problem: Problem) -> bool:
    """Whether an aligned C that L2 cannot hold is made of a short K, in TF32 or 16 bits."""
    c_bytes = problem.M * problem.N * ITEMSIZE[problem.dtype]
    short = problem.batch == 1 and problem.K <= SHORT_K and c_bytes > problem.arch.l2_bytes
    return short and kind(problem) != "fp32" and alignment(problem) == COPY_BYTES


def moves_slowly(problem: Problem) -> bool:
    """Whether cuBLAS is far from the memory's bandwidth, so that there is something to gain."""
    return bandwidth_share(problem) < BANDWIDTH


def cublas_seconds(problem: Problem) -> float:
    """The product as it is: arithmetic in whole waves of tiles, or traffic."""
    arch = problem.arch
    aligned_to = alignment(problem)
    tiles = TILES
    if aligned_to == COPY_BYTES:
        tiles = ALIGNED_TILES.get(kind(problem), TILES)
    busy = max(busy_share(problem, *tile) for tile in tiles)
    arithmetic = problem.flops / (flops_rate(problem, aligned_to) * busy)
    moving = traffic(problem) / (bandwidth_share(problem) * arch.bandwidth)
    both = max(arithmetic, moving) + IMPERFECT_OVERLAP * min(arithmetic, moving)
    return arch.launch_seconds + both


def busy_share(problem: Problem, block_m: int, block_n: int) -> float:
    """The part of the card's arithmetic that makes C in such tiles: they come in whole waves."""
    covered = cdiv(problem.M, block_m) * cdiv(problem.N, block_n) * problem.batch
    waves = covered / problem.arch.sms
    if waves >= 1:
        return waves / ceil(waves)
    return waves * min(int(1 / waves), max(1, problem.K // MIN_SPLIT_K))


def padded(problem: Problem, static: tuple[bool, bool, bool]) -> Problem:
    """The product that pad_mm makes of it: sizes known when compiling rounded up, row-major."""
    multiple = COPY_BYTES // ITEMSIZE[problem.dtype]
    sizes = (problem.M, problem.N, problem.K)
    # A size of one is left alone: it can be squeezed away.
    M, N, K = (
        round_up(size, multiple) if known and size > 1 else size
        for size, known in zip(sizes, static, strict=True)
    )
    a, b = problem.a, problem.b
    if (M, K) != (problem.M, problem.K):
        a = Operand(M * K if problem.batch > 1 else 0, K, 1)
    if (N, K) != (problem.N, problem.K):
        b = Operand(N * K if problem.batch > 1 else 0, 1, N)
    return replace(problem, M=M, N=N, K=K, a=a, b=b)


def copy_seconds(problem: Problem, elements: int) -> float:
    """Reading and writing so many elements of the product's dtype."""
    moved = 2 * problem.batch * elements * ITEMSIZE[problem.dtype]
    return problem.arch.launch_seconds + moved / (BANDWIDTH * problem.arch.bandwidth)


def inductor_seconds(problem: Problem, around: Surroundings) -> tuple[float, str]:
    """What the product takes without us, and how: ``"cuBLAS"`` or ``"padded cuBLAS"``."""
    direct = cublas_seconds(problem)
    wide = padded(problem, around.static)
    if not around.pads or wide == problem or not worth_a_look(problem):
        return direct, "cuBLAS"
    seconds = cublas_seconds(wide)
    if wide.a != problem.a and not around.a_made_here:
        seconds += copy_seconds(problem, problem.M * problem.K)
    if wide.b != problem.b and not around.b_made_here:
        seconds += copy_seconds(problem, problem.N * problem.K)
    if direct <= WORTH_PADDING * seconds:
        return direct, "cuBLAS"
    if around.c_leaves and wide.N != problem.N:
        seconds += copy_seconds(problem, problem.M * problem.N)
    return seconds, "padded cuBLAS"


def worth_a_look(problem: Problem) -> bool:
    """pad_mm's own test for products bound by arithmetic."""
    sizes = problem.M * problem.K + problem.K * problem.N + problem.M * problem.N
    intensity = problem.M * problem.N * problem.K / sizes
    rate = flops_rate(problem, COPY_BYTES)
    return intensity > COMPUTE_BOUND * rate / problem.arch.bandwidth
