"""The readable model by which plans are ranked: seconds that a choice should take."""

from fastmm_op.choices import classes_as_batch, partial_products, slabs_as_batch
from fastmm_op.packing import balance_groups, scaled_in_strips
from fastmm_op.partition import (
    a_classes,
    count_tiles,
    stores_are_aligned,
    tail_tiles,
    whole_tiles,
    wider_tiles,
)
from fastmm_op.problem import (
    ITEMSIZE,
    Operand,
    Problem,
    cdiv,
    is_aligned,
    round_up,
    starts_in_sectors,
)
from fastmm_op.tiles import (
    HOPPER_KERNELS,
    OPERAND_BYTES,
    Choice,
    Tile,
    gemv_matrix,
    is_converted,
    operand_kind,
    uses_wgmma,
)

# What a wider tile costs more, in tiles of 128 x 256: 0.23 of programs of two tiles, less of many
# (8192x8192x8200; benchmarks/results/NVIDIA_H200/wider_tiles_2026-11-28.txt).
EDGE_TILES = 0.15
# One trip through the main loop cannot be faster than the latency of its copies and products.
STEP_SECONDS = 0.2e-6
# What remains of the rate when operands are copied element by element instead of 16 bytes at once,
# and how much longer reading them takes where memory is the limit: K-major operands, then others
# (of 16 bits and K-major: 8 and 32 x 4097 x 11009 NT in
# benchmarks/results/NVIDIA_H200/study_2026-11-25_tf32_tiles.txt).
MISALIGNED_RATE = {"fp32": 0.6, "fp16": 0.25, "bf16": 0.25}
MISALIGNED_READ = {"fp32": (2.2, 3.4), "fp16": (3.2, 5.5), "bf16": (3.2, 5.5)}
# As MISALIGNED_RATE, where only the few rows of A are, beside a B that is read by classes: by the
# instructions that a step takes, by the kind of the operands.
A_BY_ELEMENT = {"tf32": 0.4, "tf32x3": 0.8, "ieee": 0.9, "misaligned 16-bit": 0.5}
# Steps of the main loop that a program spends on what it masks of a shifted B, at both ends.
SHIFTED_STEPS = 2
# Packing's share of a copy's bandwidth: it loads misaligned operands element by element. In strips
# it reads them a second time, from L2 (benchmarks/results/NVIDIA_H100_80GB_HBM3/
# strips_2026-11-27.txt).
PACK_BANDWIDTH = 0.85
STRIPS_BANDWIDTH = {"aligned": 0.78, "misaligned": 0.65}
# Stores of C that straddle memory sectors cost so many times their bytes; half of the time that
# stores take is not hidden under the next tile's main loop, or all of it (stores_wait).
MISALIGNED_STORE = 2.5
EXPOSED_STORES = 0.5
# Where K is split, the persistent kernels have few steps to fill a ring for. 23 such choices took
# 2.8 us longer than modelled in the median, 31 others 0.2 (benchmarks/results/
# NVIDIA_H100_80GB_HBM3/tune_squares.json, whose estimates are of before this); a whole 3 us more
# would give up a split that is the faster one (256 rows, 768 of 3072 features, prepack.txt there).
HOPPER_SPLIT_SECONDS = 2e-6
# Of fp32 as it lies, what is left of that for programs of a single tile: 1024^3 took 17.3 us on an
# H200 and 17.8 on an H100 where 14.1 and 14.8 were estimated, but 2048^3 49 where 53 were
# (matmul.json of both).
ONE_TILE_SECONDS = 1e-6
# What the partial sums of slabs cost beside that: 50257x8192x768 (TN, in two parts) took 4905 us in
# slabs, 4216 without (benchmarks/results/NVIDIA_H200/suite_fp32_2026-11-25.json and -24).
SLAB_STORES = 1.0
# What a program needs for its share of a tile of up to 128 x 128, or of a larger one, beside the
# products: to fill its ring, and for stores that no next tile hides
# (benchmarks/results/NVIDIA_H200/tall_tile_2026-11-28.txt).
TAIL_SECONDS = {"small": 2e-6, "large": 6e-6}
# Kernels that are not persistent finish a tile before they begin another: on wgmma, with one or two
# of them on an SM, their stores take so many times as long.
STORES_AFTER_WGMMA = 2.0
# What the shorter of arithmetic and memory traffic adds to the longer: overlap is never perfect.
IMPERFECT_OVERLAP = 0.1
# What remains of TMA's rate on an operand whose rows start inside memory sectors, by how many rows
# of the other each is multiplied with in a tile: more than 128 or not. Of the first 0.96 to 0.98
# remain (0.87 of 1000 columns on an H100), of the others 0.85 to 0.93 on an H200, 0.76 on an H100
# (tall_tile_2026-11-28.txt and edges_2026-11-28.txt of both in benchmarks/results). Rows that are
# read by classes lose nothing (study_2026-11-25.txt of the H200).
SPLIT_SECTORS_RATE = {"many": 0.96, "few": 0.84}
# How many times the rate of gemm_tf32_hopper with a converter it has without one
# (benchmarks/results/NVIDIA_H100_80GB_HBM3/rounded_by_tma_2026-11-28.txt).
ROUNDED_BY_TMA = 1.6
# Rows of each operand that kernels/balance.py looks at, and its share of the bandwidth.
BALANCE_SAMPLES = 32
BALANCE_BANDWIDTH = 0.35
# Programs an SM that keep enough loads in flight to reach the memory's bandwidth: of the persistent
# kernel, and of those that load element by element.
HOPPER_PROGRAMS, MISALIGNED_PROGRAMS = 1.25, 4
# Others must have the bandwidth times this in flight, what a load takes of a busy memory: an H100
# reads at its bandwidth with 40 KB an SM, with 24 it does not
# (benchmarks/results/NVIDIA_H100_80GB_HBM3/skinny_2026-11-28.txt, as the rest of this).
LOADED_LATENCY = 1.5e-6
# Of a B that is read by classes of rows along K there must be so many all the same: with one an SM
# 20 x 100000 x 100 took 38.6 us in bf16, with four of a fourth of K each 32.5
# (suite_2026-11-28.json and suite_2026-11-27.json there).
CLASS_PROGRAMS = 2.5
# The share of small operands that has to be in flight at a time, however fast the memory is.
MOST_IN_FLIGHT = 0.5
# What cp.async makes of the bandwidth that TMA has (by which products are faster in
# NVIDIA_H100_80GB_HBM3/tune_suite.json and NVIDIA_H200/tune_skinny.json), and what is left of it
# where a tile has so many bytes of each row of an N-major B.
CP_ASYNC_BANDWIDTH = 0.98
SHORT_SEGMENTS = {32: 0.6, 64: 0.82}
# So many warps fill an SM's registers, if each thread takes all that it may.
WARPS_OF_ALL_REGISTERS = 8
# Warps that keep the four tensor cores of an SM busy.
BUSY_WARPS = 4
GEMV_PROGRAMS = 5
# The GEMV kernel: its share of a copy's bandwidth, and how much longer loads of one element take.
GEMV_BANDWIDTH = 0.85
GEMV_MISALIGNED = {"fp32": 1.2, "fp16": 1.5, "bf16": 1.5}


def estimate(problem: Problem, choice: Choice) -> float:
    """Seconds: packing, the product, the sum over splits; every kernel adds its launch.

    All but the first are taken to start early (launches.starts_early knows which do not).
    """
    first, launch = problem.arch.launch_seconds, problem.arch.next_seconds
    if choice.slabs > 1:
        product, inner = slabs_as_batch(problem, choice)
        summed = launch + reduce_seconds(problem, choice.slabs)
        return estimate(product, inner) + SLAB_STORES * store_seconds(product, inner) + summed
    if choice.b_classes > 1:
        product = classes_as_batch(problem, choice.b_classes)
        multiply = gemv_seconds if problem.one_wide else gemm_seconds
        packed = pack_seconds(product, "a", copied=True) if choice.pack_a else 0.0
        summed = launch + reduce_seconds(problem, partial_products(problem, choice))
        return packed + first + multiply(product, choice) + summed
    seconds = first
    if choice.tile.kernel == "gemv":
        seconds += gemv_seconds(problem, choice)
    else:
        seconds += balance_seconds(problem) if is_scaled(problem, choice) else 0.0
        seconds += pack_seconds(problem, "a") if choice.pack_a else 0.0
        seconds += pack_seconds(problem, "b") if choice.pack_b and not problem.prepacked else 0.0
        seconds += gemm_seconds(problem, choice)
    if choice.split > 1:
        seconds += launch + reduce_seconds(problem, choice.split)
    if choice.tail_split > 1:
        seconds += launch + reduce_tail_seconds(problem, choice)
    return seconds


def is_scaled(problem: Problem, choice: Choice) -> bool:
    return problem.dtype == "fp32" and choice.pack_a and choice.pack_b


def balance_seconds(problem: Problem) -> float:
    """A launch; the samples are read in one step, or at a share of the bandwidth if K is long.

    With B packed before, K has been balanced; what is left is to prepare A's maxima, if A has any.
    """
    if problem.prepacked:
        return problem.arch.next_seconds if scaled_in_strips(problem, "a") else 0.0
    sampled = 2 * BALANCE_SAMPLES * problem.K * ITEMSIZE[problem.dtype] * balance_groups(problem)
    bandwidth = BALANCE_BANDWIDTH * problem.arch.bandwidth
    return problem.arch.next_seconds + sampled / bandwidth


def pack_seconds(problem: Problem, buffer: str, copied: bool = False) -> float:
    """Bandwidth: each element is read and written once, part by part or as it is; and a launch."""
    operand, rows = (problem.a, problem.M) if buffer == "a" else (problem.b, problem.N)
    size = ITEMSIZE[problem.dtype]
    written = 2 * problem.parts if problem.dtype == "fp32" and not copied else size
    moved = problem.batch * rows * problem.K * (size + written)
    share = PACK_BANDWIDTH
    if scaled_in_strips(problem, buffer) and not copied:
        share = STRIPS_BANDWIDTH["aligned" if is_aligned(operand, problem.dtype) else "misaligned"]
    return moved / (share * problem.arch.bandwidth) + problem.arch.next_seconds


def gemm_seconds(problem: Problem, choice: Choice) -> float:
    """Arithmetic and its exposed stores, or memory traffic, or the latency of the K loop."""
    depth = round_up(cdiv(problem.K, choice.split), choice.tile.block_k)
    if choice.tail_split > 1 and whole_tiles(problem, choice) == 0:
        depth = tail_depth(problem, choice)
    stores = store_seconds(problem, choice)
    exposed = 1.0 if stores_wait(problem, choice) else EXPOSED_STORES
    arithmetic = arithmetic_seconds(problem, choice, depth) + exposed * stores
    traffic = read_seconds(problem, choice) + stores
    latency = depth // choice.tile.block_k * STEP_SECONDS
    seconds = max(arithmetic, traffic, latency) + IMPERFECT_OVERLAP * min(arithmetic, traffic)
    if choice.split > 1:
        return seconds + (HOPPER_SPLIT_SECONDS if choice.tile.kernel in HOPPER_KERNELS else 0.0)
    return seconds + (ONE_TILE_SECONDS if one_tile_each(problem, choice) else 0.0)


def one_tile_each(problem: Problem, choice: Choice) -> bool:
    """Whether gemm_tf32_hopper's programs have no next tile, which would hide this one's ends."""
    programs = count_tiles(problem, choice) * choice.split
    return choice.tile.kernel == "gemm_tf32_hopper" and programs <= problem.arch.sms


def stores_wait(problem: Problem, choice: Choice) -> bool:
    """Whether nothing hides the stores of gemm_tf32_hopper's consumers.

    A converter waits for them, and where programs have one tile each there is no next one.
    """
    if choice.tile.kernel != "gemm_tf32_hopper":
        return False
    kind = operand_kind(problem, choice.pack_a, choice.pack_b)
    return one_tile_each(problem, choice) or is_converted(problem, kind)


def arithmetic_seconds(problem: Problem, choice: Choice, depth: int) -> float:
    """Whole waves of tiles, each at its share of the card's rate, then those of shared tiles.

    One program of few warps leaves part of an SM idle; programs that fill its registers come in
    groups, of which the last takes as long as a full one.
    """
    arch, tile = problem.arch, choice.tile
    waves = cdiv(whole_tiles(problem, choice) * choice.split, arch.sms)
    waves = max(waves, BUSY_WARPS / tile.num_warps) if waves else 0
    if waves > 1 and needs_registers(problem, choice):
        waves = round_up(waves, WARPS_OF_ALL_REGISTERS // tile.num_warps)
    each = tile_seconds(problem, choice, tile)
    if problem.b.shifted:
        depth += SHIFTED_STEPS * tile.block_k
    if choice.edge_n:
        wider = cdiv(wider_tiles(problem, choice), arch.sms)
        waves += wider * EDGE_TILES * 256 / tile.block_n
    tail_waves = cdiv(tail_tiles(problem, choice) * choice.tail_split, arch.sms)
    size = "large" if tile.block_m * tile.block_n > 128 * 128 else "small"
    tail = each * tail_depth(problem, choice) + TAIL_SECONDS[size]
    return waves * each * depth + tail_waves * tail


def tile_seconds(problem: Problem, choice: Choice, tile: Tile) -> float:
    """What an SM takes for an element of K of a tile."""
    flops = rate(problem, choice) * tile.efficiency / problem.arch.sms
    return 2 * tile.block_m * tile.block_n / flops


def needs_registers(problem: Problem, choice: Choice) -> bool:
    """Whether threads take all the registers they may, which then say how many programs fit an SM.

    They do for operands that are split in registers.
    """
    kind = operand_kind(problem, choice.pack_a, choice.pack_b)
    return kind == "tf32x3" and choice.tile.kernel == "gemm"


def tail_depth(problem: Problem, choice: Choice) -> int:
    """The K of one program that shares a tile."""
    return round_up(cdiv(problem.K, choice.tail_split), choice.tile.block_k)


def tail_share(problem: Problem, choice: Choice) -> float:
    """The part of C in shared tiles."""
    return tail_tiles(problem, choice) / count_tiles(problem, choice)


def tail_bytes(problem: Problem, choice: Choice) -> int:
    """The partial sums of shared tiles, whole tiles of fp32."""
    elements = choice.tile.block_m * choice.tile.block_n
    return 4 * elements * choice.tail_split * tail_tiles(problem, choice)


def rate(problem: Problem, choice: Choice) -> float:
    """FLOP a second of a good main loop for the choice's operands."""
    arch = problem.arch
    kind = operand_kind(problem, choice.pack_a, choice.pack_b)
    best = {
        "hi and lo": arch.fp16_flops / 3,
        "tf32": arch.tf32_flops,
        "misaligned tf32": arch.tf32_flops,
        "tf32x3": arch.tf32_flops / 3,
        "ieee": arch.fp32_flops,
    }.get(kind, arch.fp16_flops)
    if choice.tile.kernel == "gemm_tf32_hopper" and not is_converted(problem, kind):
        best *= ROUNDED_BY_TMA
    if kind == "ieee" and problem.b.k_major:
        best *= arch.ieee_k_major
    others = {"a": choice.tile.block_n, "b": choice.tile.block_m}
    for name, (operand, packed) in zip("ab", operands(problem, choice), strict=True):
        if read_misaligned(problem, choice, operand, packed):
            by_classes = problem.b.shifted
            return best * (A_BY_ELEMENT[kind] if by_classes else MISALIGNED_RATE[problem.dtype])
        tma = choice.tile.kernel in HOPPER_KERNELS and not packed
        by_classes = name == "a" and a_classes(problem, choice) > 1
        if tma and not by_classes and not starts_in_sectors(operand, problem.dtype):
            best *= SPLIT_SECTORS_RATE["many" if others[name] > 128 else "few"]
    return best


def read_seconds(problem: Problem, choice: Choice) -> float:
    """Operands, each read once; a few programs reach only their share of the bandwidth."""
    moved = 0.0
    size_packed = OPERAND_BYTES[operand_kind(problem, choice.pack_a, choice.pack_b)]
    wanted = (
        HOPPER_PROGRAMS if choice.tile.kernel in HOPPER_KERNELS else gemm_programs(problem, choice)
    )
    for (operand, packed), rows in zip(
        operands(problem, choice), (problem.M, problem.N), strict=True
    ):
        size = size_packed if packed else ITEMSIZE[problem.dtype]
        penalty = 1.0
        if not problem.b.shifted and read_misaligned(problem, choice, operand, packed):
            penalty = MISALIGNED_READ[problem.dtype][not operand.k_major]
            wanted = MISALIGNED_PROGRAMS
        moved += problem.batch * rows * problem.K * size * penalty
    programs = whole_tiles(problem, choice) * choice.split
    programs += tail_tiles(problem, choice) * choice.tail_split
    share = min(1.0, programs / (wanted * problem.arch.sms))
    if choice.tile.kernel in HOPPER_KERNELS:  # a program an SM: the last tiles leave some idle
        share = min(share, programs / round_up(programs, problem.arch.sms))
    return moved / (problem.arch.bandwidth * share * reading_share(problem, choice))


def gemm_programs(problem: Problem, choice: Choice) -> float:
    """Programs an SM of the plain kernel that reach the memory's bandwidth (Little's law).

    What programs of the same rows or columns have in flight comes from memory once.
    """
    tile, arch = choice.tile, problem.arch
    size = OPERAND_BYTES[operand_kind(problem, choice.pack_a, choice.pack_b)]
    a_rows = tile.block_m / cdiv(problem.N, tile.block_n)
    b_rows = tile.block_n / cdiv(problem.M, tile.block_m)
    in_flight = (a_rows + b_rows) * tile.block_k * size * max(1, tile.num_stages - 1)
    to_read = problem.batch * (problem.M + problem.N) * problem.K * size
    wanted = min(arch.bandwidth * LOADED_LATENCY, MOST_IN_FLIGHT * to_read)
    programs = wanted / arch.sms / in_flight
    by_classes = problem.b.shifted and not problem.b.k_major
    return max(programs, CLASS_PROGRAMS) if by_classes else programs


def reading_share(problem: Problem, choice: Choice) -> float:
    """The share of the bandwidth at which a kernel reads, if it has loads enough in flight."""
    by_element = any(read_misaligned(problem, choice, *x) for x in operands(problem, choice))
    if choice.tile.kernel != "gemm" or by_element:
        return 1.0
    segment = choice.tile.block_n * ITEMSIZE[problem.dtype]
    by_rows = choice.pack_b or problem.b.k_major
    return CP_ASYNC_BANDWIDTH * (1.0 if by_rows else SHORT_SEGMENTS.get(segment, 1.0))


def operands(problem: Problem, choice: Choice) -> tuple[tuple[Operand, bool], ...]:
    return (problem.a, choice.pack_a), (problem.b, choice.pack_b)


def read_misaligned(problem: Problem, choice: Choice, operand: Operand, packed: bool) -> bool:
    """Whether elements of an operand are copied one by one."""
    by_tma = operand is problem.a and a_classes(problem, choice) > 1
    return not packed and not by_tma and not is_aligned(operand, problem.dtype)


def store_seconds(problem: Problem, choice: Choice) -> float:
    """C, or the partial sums of split-K, written once; C's residual is read with it.

    Where tiles are shared, their partial sums are written in place of their part of C.
    """
    partial = choice.split > 1 or choice.b_classes > 1
    size = 4 * choice.split if partial else ITEMSIZE[problem.dtype]
    aligned = choice.tile.kernel not in HOPPER_KERNELS or stores_are_aligned(problem, choice)
    moved = problem.batch * problem.M * problem.N * size
    slower = 1.0 if aligned else MISALIGNED_STORE
    if choice.tile.kernel == "gemm" and uses_wgmma(problem, choice.tile):
        slower = STORES_AFTER_WGMMA
    seconds = moved * slower / problem.arch.bandwidth
    seconds += residual_seconds(problem) if choice.split == 1 else 0.0
    if choice.tail_split > 1:
        seconds *= 1 - tail_share(problem, choice)
        seconds += tail_bytes(problem, choice) / problem.arch.bandwidth
    return seconds


def reduce_seconds(problem: Problem, splits: int) -> float:
    """The partial sums of split-K and the residual read, C written."""
    size = 4 * splits + ITEMSIZE[problem.dtype]
    seconds = problem.batch * problem.M * problem.N * size / problem.arch.bandwidth
    return seconds + residual_seconds(problem)


def reduce_tail_seconds(problem: Problem, choice: Choice) -> float:
    """The partial sums of shared tiles and their part of the residual read, that of C written."""
    written = problem.batch * problem.M * problem.N * ITEMSIZE[problem.dtype]
    of_c = written / problem.arch.bandwidth + residual_seconds(problem)
    partial = tail_bytes(problem, choice) / problem.arch.bandwidth
    return partial + of_c * tail_share(problem, choice)


def residual_seconds(problem: Problem) -> float:
    """What the epilogue reads: an element for each of C. A bias stays in the cache."""
    if not problem.epilogue.residual:
        return 0.0
    elements = problem.batch * problem.M * problem.N
    return elements * ITEMSIZE[problem.dtype] / problem.arch.bandwidth


def gemv_seconds(problem: Problem, choice: Choice) -> float:
    """Bandwidth, of which a card with few programs reaches only their share."""
    rows = max(problem.M, problem.N)
    programs = problem.batch * choice.split * cdiv(rows, choice.tile.block_n)
    share = min(1.0, programs / (GEMV_PROGRAMS * problem.arch.sms))
    moved = problem.batch * rows * problem.K * ITEMSIZE[problem.dtype]
    if not is_aligned(gemv_matrix(problem), problem.dtype):
        moved *= GEMV_MISALIGNED[problem.dtype]
    return moved / (GEMV_BANDWIDTH * problem.arch.bandwidth * share)
