"""The readable model by which plans are ranked: seconds that a choice should take."""

from fastmm_op.choices import Choice, stores_are_aligned
from fastmm_op.packing import packing_passes
from fastmm_op.problem import ITEMSIZE, Problem, cdiv, is_aligned, round_up

# One trip through the main loop cannot be faster than the latency of its copies and products.
STEP_SECONDS = 0.2e-6
# What remains of the rate when operands are copied element by element instead of 16 bytes at once.
MISALIGNED_EFFICIENCY = {"fp32": 0.6, "fp16": 0.25, "bf16": 0.25}
# Stores of C that straddle memory sectors cost about so many times their bytes.
MISALIGNED_STORE = 2.0


def estimate(problem: Problem, choice: Choice) -> float:
    """Seconds: packing, then the GEMM, then the sum over splits; every kernel adds its launch.

    The GEMM is the largest of arithmetic (whole waves of tiles at the tile's rate), memory traffic,
    and the latency of its K loop; its stores are what no main loop hides.
    """
    arch = problem.arch
    seconds = pack_seconds(problem, "a") if choice.pack_a else 0.0
    seconds += pack_seconds(problem, "b") if choice.pack_b else 0.0
    seconds += arch.launch_seconds
    seconds += max(
        arithmetic(problem, choice), traffic(problem, choice), latency(choice, problem.K)
    )
    if choice.split > 1:
        seconds += arch.launch_seconds
    return seconds


def pack_seconds(problem: Problem, buffer: str) -> float:
    """Bandwidth: each element is read once or twice and written once."""
    rows = problem.M if buffer == "a" else problem.N
    passes = packing_passes(problem, buffer)
    traffic = problem.batch * rows * problem.K * (passes * ITEMSIZE[problem.dtype] + 2)
    return traffic / problem.arch.bandwidth + passes * problem.arch.launch_seconds


def arithmetic(problem: Problem, choice: Choice) -> float:
    """Whole waves of tiles, each at its share of the card's rate."""
    arch, tile = problem.arch, choice.tile
    tiles = cdiv(problem.M, tile.block_m) * cdiv(problem.N, tile.block_n)
    tiles *= problem.batch * choice.split
    depth = round_up(cdiv(problem.K, choice.split), tile.block_k)
    flops = 2 * tile.block_m * tile.block_n * depth
    return cdiv(tiles, arch.sms) * flops / (rate(problem, choice) * tile.efficiency / arch.sms)


def rate(problem: Problem, choice: Choice) -> float:
    """FLOP a second of a good main loop for the choice's operands."""
    arch = problem.arch
    best = arch.fp16_flops
    if problem.dtype == "fp32" and not choice.pack_a:
        best = arch.tf32_flops if problem.tf32 else arch.fp32_flops
    a_misaligned = not choice.pack_a and not is_aligned(problem.a, problem.dtype)
    b_misaligned = not choice.pack_b and not is_aligned(problem.b, problem.dtype)
    if a_misaligned or b_misaligned:
        best *= MISALIGNED_EFFICIENCY[problem.dtype]
    return best


def traffic(problem: Problem, choice: Choice) -> float:
    """Operands read once, C written once, partial sums of split-K written and read."""
    size = ITEMSIZE[problem.dtype]
    elements_c = problem.batch * problem.M * problem.N
    moved = problem.batch * problem.M * problem.K * (2 if choice.pack_a else size)
    moved += problem.batch * problem.N * problem.K * (2 if choice.pack_b else size)
    aligned = choice.tile.kernel != "gemm_hopper" or stores_are_aligned(problem, choice)
    moved += elements_c * size * (1 if aligned else MISALIGNED_STORE)
    if choice.split > 1:
        moved += 2 * choice.split * elements_c * 4
    return moved / problem.arch.bandwidth


def latency(choice: Choice, k: int) -> float:
    return cdiv(cdiv(k, choice.split), choice.tile.block_k) * STEP_SECONDS
