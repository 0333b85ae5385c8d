"""Bytes of shared memory a block of each kernel takes, summed term by term."""

from fastmm_op.problem import COPY_BYTES, ITEMSIZE, Problem, is_aligned, loads_are_wide
from fastmm_op.tiles import (
    OPERAND_BYTES,
    Choice,
    Tile,
    a_is_k_major,
    gemv_matrix,
    is_converted,
    operand_kind,
    uses_wgmma,
)

# Blocks of B that gemm_tf32_hopper_kernel holds as wgmma reads them.
CONVERTED_SLOTS = 2


def shared_memory(problem: Problem, choice: Choice) -> int:
    """Bytes of shared memory a block of the choice's kernel uses.

    Exact for the plans of the benchmark's suite on plain Triton kernels, otherwise an upper bound
    (tests/test_codegen.py holds both against the compiler, Triton 3.6 and 3.7 alike).
    """
    if choice.tile.kernel == "gemv":
        return gemv_shared_memory(problem, choice.tile)
    if choice.tile.kernel == "gemm_hopper":
        return hopper_shared_memory(problem, choice)
    if choice.tile.kernel == "gemm_tf32_hopper":
        return tf32_hopper_shared_memory(problem, choice)
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
        # A row for all threads together: each has loaded what it needs.
        row_for_all = spread >= 32 * tile.num_warps * COPY_BYTES
        needed = not (row_for_all and loads_are_wide(matrix, matrix.k_stride, matrix.row_stride))
        return max(spread, sums) if needed and loads_are_wide(vector, vector.k_stride) else sums
    # A thread that loads one element has its column to itself: no sums to exchange.
    return sums if loads_are_wide(matrix, matrix.row_stride, matrix.k_stride) else 0


def hopper_shared_memory(problem: Problem, choice: Choice) -> int:
    """An upper bound for gemm_hopper_kernel; tests hold it against the compiler's figure."""
    return beside_slices(problem, choice) + choice.tile.block_m * slice_bytes(problem, choice)


def slice_bytes(problem: Problem, choice: Choice) -> int:
    """Bytes of a row of C that each of gemm_hopper_kernel's consumers may have on their way.

    64 columns of fp32 or 128 of 16 bits, or two slices of 128 bytes for TMA; half of it where
    the ring leaves no room for more.
    """
    room = problem.arch.shared_memory - beside_slices(problem, choice)
    return 128 if room < choice.tile.block_m * 256 else 256


def beside_slices(problem: Problem, choice: Choice) -> int:
    """What gemm_hopper_kernel takes of shared memory beside slices of C, at most."""
    tile = choice.tile
    ring = tile.num_stages * ring_slot(problem, choice)
    exponents = 2 * tile.block_n * 4
    barriers = 2 * 8 * tile.num_stages
    captured_arguments = 512
    return ring + exponents + barriers + captured_arguments


def tf32_hopper_shared_memory(problem: Problem, choice: Choice) -> int:
    """An upper bound for gemm_tf32_hopper_kernel; tests hold it against the compiler's figure."""
    tile = choice.tile
    kind = operand_kind(problem, choice.pack_a, choice.pack_b)
    parts = 2 if kind == "tf32x3" else int(is_converted(problem, kind))
    ring = tile.num_stages * ring_slot(problem, choice)
    copies = CONVERTED_SLOTS * parts * tile.block_n * tile.block_k * 4
    barriers = 2 * 8 * (tile.num_stages + CONVERTED_SLOTS)
    # Without a converter there is room for one of each consumer on its way to being stored.
    slices = 0 if parts else 2 * 64 * 64 * 4
    captured_arguments = 512
    return ring + copies + barriers + slices + captured_arguments


def ring_slot(problem: Problem, choice: Choice) -> int:
    """Bytes of one K-block of A and B."""
    tile = choice.tile
    itemsize = OPERAND_BYTES[operand_kind(problem, choice.pack_a, choice.pack_b)]
    return (tile.block_m + tile.block_n + choice.edge_n) * tile.block_k * itemsize


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
    wgmma = uses_wgmma(problem, tile)
    buffers = ring_buffers(tile, wgmma)
    ring = (a_tile + b_tile) * buffers
    if kind == "16-bit" and not wgmma and not a_is_k_major(problem, choice):
        # Triton transposes this A in registers: it has one buffer, however many stages there are.
        ring -= a_tile * (buffers - 1)
    return max(ring, c_tile)


def ring_buffers(tile: Tile, wgmma: bool) -> int:
    """How many tiles of an operand shared memory holds that cp.async copies there.

    mma.sync reads its operands into registers, so the tile in use is free again at once and
    num_stages - 1 buffers serve num_stages tiles; wgmma reads shared memory and keeps the last one.
    """
    return max(1, tile.num_stages - (0 if wgmma else 1))


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
    itemsize = 4 if choice.split > 1 or problem.b.shifted else ITEMSIZE[problem.dtype]
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
