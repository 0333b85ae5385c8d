"""Every legal way to compute a product: what is packed, by which kernel and tile, how split."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

from fastmm_op.chains import (
    FEW_ROWS,
    MOST_SPLITS,
    chain_is_short,
    longest_truncated_chain,
    sums_must_be_short,
)
from fastmm_op.partition import (
    a_classes,
    classes_of,
    count_tiles,
    row_classes,
    stores_are_aligned,
    whole_tiles,
    wider_tiles,
)
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
from fastmm_op.shared_memory import shared_memory
from fastmm_op.tiles import (
    EDGE_N,
    HOPPER_KERNELS,
    HOPPER_TILES,
    TALL_TILE,
    TILES,
    Choice,
    Tile,
    gemv_matrix,
    gemv_tile,
    is_converted,
    operand_kind,
)

# Columns of a tile beside whose products there are registers for a converter, or as many sums.
WIDEST_BESIDE = 128
# Splits of K worth trying: few output tiles leave most of the card idle.
SPLITS = (1, 2, 4, 8, 16, 32, 64, 128, 256, MOST_SPLITS)
# Rows of the smallest tiles: mma.sync's.
FEWEST_ROWS = 16
# Rows up to this many elements are packed by one program that holds them in registers.
MAX_ROW_IN_REGISTERS = 8192
# Columns that are packed whole by one program: beyond this, reading them twice is faster.
MAX_COLUMN_IN_REGISTERS = 1024
SLAB_ALIGNMENT = 64
# Programs that may share each tile of a last, partly filled wave.
TAIL_SPLITS = (2, 3, 4, 5, 6, 8)


def choices(problem: Problem) -> Iterator[Choice]:
    """Every legal combination of packing, tile and split."""
    dtype, arch = problem.dtype, problem.arch
    if problem.one_wide:
        tile = gemv_tile(problem)
        for split in SPLITS:
            if split == 1 or cdiv(problem.K, split) >= 2 * tile.block_k:
                yield Choice(False, False, tile, split)
        yield from in_b_classes(problem)
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
            if tile.kernel in HOPPER_KERNELS and not hopper_can_run(problem, pack_a, pack_b):
                continue
            if half_would_do(problem, tile) or not tile_fits(problem, tile, kind):
                continue
            for split in SPLITS:
                choice = Choice(pack_a, pack_b, tile, split)
                if shared_memory(problem, choice) > arch.shared_memory:
                    continue
                deep_enough = split == 1 or cdiv(problem.K, split) >= 2 * tile.block_k
                if tile == TALL_TILE and not suits_tall_tile(problem, choice):
                    continue
                if not (deep_enough and epilogue_fits(problem, choice)):
                    continue
                if kind == "tf32" and not registers_suffice(problem, choice):
                    continue
                if chain_is_short(problem, kind, split, tile.kernel):
                    yield choice
                    yield from tail_splits(problem, choice)
                    yield from with_edge(problem, choice, kind)
                yield from in_slabs(problem, choice)
    yield from in_b_classes(problem)


def in_b_classes(problem: Problem) -> Iterator[Choice]:
    """Choices that read a misaligned B, or matrix of a one-wide product, by classes of its rows."""
    classes = count_b_classes(problem)
    if classes == 1:
        return
    product = classes_as_batch(problem, classes)
    along_n = classes_lie_along_n(problem)
    ways, kind, tiles = (False,), "gemv", (gemv_tile(product),)
    if not problem.one_wide:
        ways, kind = pack_ways(product), operand_kind(product, True, False)
        # Short of K: the last step of a shifted K has an address for each of its elements.
        of_kind = TILES["sm_89" if along_n else problem.arch.name, kind]
        tiles = tuple(t for t in of_kind if t.kernel == "gemm" and t.block_m <= FEW_ROWS)
    for pack_a, tile, split in itertools.product(ways, tiles, SPLITS):
        choice = Choice(pack_a, False, tile, split)
        depth = cdiv(product.K, split)
        deep_enough = depth >= 2 * tile.block_k or (split == 1 and not along_n)
        fits = shared_memory(product, choice) <= problem.arch.shared_memory
        if deep_enough and fits and chain_is_short(product, kind, split, tile.kernel):
            yield replace(choice, b_classes=classes)


def half_would_do(problem: Problem, tile: Tile) -> bool:
    """Whether a plain tile has twice the rows of A, or more, and half of it is a tile too.

    Of each kind there are tiles of FEWEST_ROWS and up.
    """
    return tile.kernel == "gemm" and tile.block_m >= 2 * max(problem.M, FEWEST_ROWS)


def tile_fits(problem: Problem, tile: Tile, kind: str) -> bool:
    """Whether Hopper's wide tiles leave registers for what has to be beside them.

    That is a converter, or the sum to which each block of K adds its products of two parts.
    """
    if tile.kernel not in HOPPER_KERNELS or tile.block_n <= WIDEST_BESIDE:
        return True
    if tile.kernel == "gemm_hopper":
        return kind != "hi and lo" or tile.block_k >= problem.K
    return not is_converted(problem, kind)


def pack_ways(product: Problem) -> tuple[bool, ...]:
    """Whether A's few rows may be packed, or not, beside a B that is read by classes.

    Packing takes A's classes along K and copies them; where K is shifted, A comes by element. Of
    16 bits, A comes by element in no other case.
    """
    if product.b.k_major or is_aligned(product.a, product.dtype):
        return (False,)
    return (True,) if product.dtype != "fp32" else (True, False)


def count_b_classes(problem: Problem) -> int:
    """How many classes of equally misaligned rows the operand has that most bytes are read of.

    1: it has none, as where it is aligned, or cannot be read by them. It must be contiguous along
    one dimension (of a one-wide product: not along K), in rows that do not overlap, and a single
    batch item at an aligned address. Beside more than a few rows of A, it is no longer its reading
    that takes the time.
    """
    operand = gemv_matrix(problem) if problem.one_wide else problem.b
    misaligned = not is_aligned(operand, problem.dtype)
    at_aligned_address = operand.pointer_alignment == COPY_BYTES
    single = problem.batch == 1 and not problem.prepacked
    bound_by_reading = problem.one_wide or problem.M <= FEW_ROWS
    along_k, along_n = operand.row_stride == 1, operand.k_stride == 1 and not problem.one_wide
    readable = misaligned and at_aligned_address and (along_k or along_n)
    if not (readable and single and bound_by_reading):
        return 1
    pitch = operand.k_stride if along_k else operand.row_stride
    row_length = max(problem.M, problem.N) if problem.one_wide else problem.N
    if pitch < (row_length if along_k else problem.K):
        return 1  # rows overlap: what is read beside one may lie outside of all
    classes = classes_of(pitch * ITEMSIZE[problem.dtype])
    return classes if 2 * classes <= (problem.K if along_k else problem.N) else 1


def classes_as_batch(problem: Problem, classes: int) -> Problem:
    """The product of the classes, one a batch item, without the epilogue.

    Rows along K: every item is a part of K, and the items' sum is wanted. Rows along N (a K-major
    B): every item is some columns, of all of A, which is read from wherever B's shift leads.
    """

    def part_of_k(operand: Operand, shifted: bool) -> Operand:
        strides = {"batch_stride": operand.k_stride, "k_stride": classes * operand.k_stride}
        return replace(operand, **strides, shifted=shifted)

    product = replace(problem, batch=classes, epilogue=Epilogue())
    if classes_lie_along_n(problem):
        pitch = problem.b.row_stride
        return replace(
            product,
            N=cdiv(problem.N, classes),
            a=replace(problem.a, batch_stride=0, pointer_alignment=ITEMSIZE[problem.dtype]),
            b=replace(problem.b, batch_stride=pitch, row_stride=classes * pitch, shifted=True),
        )
    of_a = problem.one_wide and gemv_matrix(problem) is problem.a
    return replace(
        product,
        K=cdiv(problem.K, classes),
        a=part_of_k(problem.a, of_a),
        b=part_of_k(problem.b, not of_a),
    )


def classes_lie_along_n(problem: Problem) -> bool:
    """Whether the rows of B, as it lies in memory, are columns of the product."""
    return not problem.one_wide and problem.b.k_major


def partial_products(problem: Problem, choice: Choice) -> int:
    """Partial sums of C that a choice with classes leaves."""
    return choice.split * (1 if classes_lie_along_n(problem) else choice.b_classes)


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


def tail_splits(problem: Problem, choice: Choice) -> Iterator[Choice]:
    """The choice with its last wave shared, in each legal way."""
    tile = choice.tile
    if tile.kernel != "gemm_hopper" or choice.split > 1:
        return
    if count_tiles(problem, choice) % problem.arch.sms == 0:
        return
    for tail_split in TAIL_SPLITS:
        shared = replace(choice, tail_split=tail_split)
        if whole_tiles(problem, shared) < wider_tiles(problem, shared):
            return  # wider tiles are not shared
        if cdiv(problem.K, tail_split) >= 2 * tile.block_k and epilogue_fits(problem, shared):
            yield shared


def with_edge(problem: Problem, choice: Choice, kind: str) -> Iterator[Choice]:
    """The choice, and its last wave shared, with wider last tiles for what N leaves of whole ones.

    With as many stages of the ring as leave room for their columns. Not with an epilogue, nor
    beside the products of two parts: there are no registers for it. Nor of the tall tile, where a
    shared last wave is faster (benchmarks/results/NVIDIA_H200/tall_tile_2026-11-28.txt). kind: of
    its operands, a key of TILES.
    """
    tile, left = choice.tile, problem.N % choice.tile.block_n
    if tile.kernel != "gemm_hopper" or choice.split > 1:
        return
    if problem.epilogue != Epilogue() or kind == "hi and lo" or tile == TALL_TILE:
        return
    if not 0 < left <= EDGE_N or left == problem.N:
        return
    for stages in range(tile.num_stages, 1, -1):
        wider = replace(choice, tile=replace(tile, num_stages=stages), edge_n=EDGE_N)
        if shared_memory(problem, wider) <= problem.arch.shared_memory:
            yield wider
            yield from tail_splits(problem, wider)
            return


def suits_tall_tile(problem: Problem, choice: Choice) -> bool:
    """Whether A has rows for it, and TMA stores whole sums: it leaves registers for no more."""
    aligned = stores_are_aligned(problem, choice) and row_classes(problem, choice) == 1
    by_tma = aligned and choice.split == 1 and not problem.epilogue.residual
    return by_tma and HOPPER_TILES[0].block_m < problem.M


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


def registers_suffice(problem: Problem, choice: Choice) -> bool:
    """Whether a tile in TF32 compiles without spills: two warps hold less of an A not along K."""
    tile = choice.tile
    wide = tile.num_warps == 2 and tile.block_m * tile.block_n > 64 * 64
    return problem.a.k_major or not (problem.arch.wgmma and wide)


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
