"""The launches that multiply operands, wherever these lie by now, and those that sum the parts.

A function a kernel; plan.py says which of them a choice takes.
"""

from dataclasses import replace

from fastmm_op.choices import (
    a_classes,
    count_tiles,
    is_transposed,
    row_classes,
    stores_are_aligned,
    tail_tiles,
    whole_tiles,
)
from fastmm_op.epilogue import (
    epilogue_pointers,
    hopper_slice_columns,
    product_epilogue,
    slice_columns,
)
from fastmm_op.launches import Descriptor, Launch, Pointer
from fastmm_op.packing import GemmOperand
from fastmm_op.problem import (
    COPY_BYTES,
    ITEMSIZE,
    Problem,
    cdiv,
    is_aligned,
    next_power_of_two,
    round_up,
    spare_elements,
)
from fastmm_op.shared_memory import ring_slot, shared_memory
from fastmm_op.tile_order import group_m
from fastmm_op.tiles import Choice, Tile, gemv_matrix, is_converted, operand_kind

# TMA's boxes are at most so wide along memory where shared memory is swizzled.
TMA_BOX_BYTES = 128
# Of a K so short stores take longest. They are 1 to 14 % faster then without TMA, and marked as not
# to be read soon; with K of 512 and more they are slower
# (benchmarks/results/NVIDIA_H100_80GB_HBM3/streamed_2026-11-27.txt).
LARGEST_STREAMED_K = 256
# The sum over splits: partial sums of one element that a program reads at once, and all it reads.
REDUCE_DEPTH = 256
REDUCE_ELEMENTS = 4096
# Elements of C that a program sums of the tail: 4 to 16 rows, so that a few tiles occupy all SMs.
TAIL_ELEMENTS = 1024


def gemm_launch(
    problem: Problem,
    choice: Choice,
    a: GemmOperand,
    b: GemmOperand,
    target: Pointer,
    rows_total: int | None,
) -> Launch:
    """kernels/gemm.py: cp.async and mma.sync, any strides.

    rows_total: of all classes of rows of B, if the batch items are such.
    """
    tile = choice.tile
    both_packed = choice.pack_a and choice.pack_b
    k = round_up(problem.K, tile.block_k) if both_packed else problem.K
    scaled = a.row_exp is not None
    kind = operand_kind(problem, choice.pack_a, choice.pack_b)
    a_align = copy_elements(a, problem.M, choice.pack_a or is_aligned_in(problem, "a"))
    b_align = copy_elements(b, problem.N, choice.pack_b or is_aligned_in(problem, "b"))
    if problem.b.shifted:  # its runs may reach over C's columns on both sides
        b_align = COPY_BYTES // ITEMSIZE[problem.dtype]
    epilogue = product_epilogue(problem, choice)
    return Launch(
        "gemm",
        count_tiles(problem, choice) * choice.split,
        (a.pointer, b.pointer, target, a.row_exp, b.row_exp)
        + epilogue_pointers(problem, epilogue)
        + (problem.M, problem.N, k, problem.batch, choice.split, rows_total)
        + (a.batch_stride, a.row_stride, a.k_stride)
        + (b.batch_stride, b.row_stride, b.k_stride)
        + (a.row_exp_stride, b.row_exp_stride, a.lo_offset),
        {
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "GROUP_M": group_m(problem, choice),
            "EVEN_K": k % tile.block_k == 0 and not problem.b.shifted,
            "CLAMP": not both_packed,
            "SCALED": scaled,
            "PARTS": 2 if a.lo_offset else 1,
            "PARTIAL": choice.split > 1,
            "A_K_MAJOR": a.k_major,
            "B_K_MAJOR": b.k_major,
            "A_ALIGN": a_align,
            "B_ALIGN": b_align,
            "TAIL_RUN": tail_run(problem, k, (a, a_align), (b, b_align)),
            "B_SHIFTED": problem.b.shifted,
            "ROUND": problem.tf32 and not scaled,
            "DOT": kind if kind in ("tf32x3", "ieee") else "tf32",
            "WIDE": is_wide(problem, tile, a, b),
            "ACTIVATION": epilogue.activation,
            "SLICE_N": slice_columns(problem, epilogue, tile),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        shared_memory=shared_memory(problem, choice),
    )


def gemm_hopper_launch(
    problem: Problem,
    choice: Choice,
    a: GemmOperand,
    b: GemmOperand,
    target: Pointer,
    tail: Pointer | None,
) -> Launch:
    """kernels/gemm_hopper.py: TMA and wgmma, 16-bit operands, aligned but for A's rows in classes.

    Args:
        target: C, or the partial sums of a split.
        tail: for the partial sums of the last tiles, if these are shared.
    """
    tile = choice.tile
    M, N, K, batch = problem.M, problem.N, problem.K, problem.batch
    classes = row_classes(problem, choice)
    wrap = COPY_BYTES // ITEMSIZE[problem.dtype] - 1 if classes > 1 else 0
    # Packed rows end in zeros, which TMA reads faster than it fills them in (benchmarks/results/
    # NVIDIA_H100_80GB_HBM3/pingpong_2026-11-28.txt).
    a_k = a.row_stride if choice.pack_a else K
    b_k = b.row_stride if choice.pack_b else K
    of_a = a_classes(problem, choice)
    a_desc = None if of_a > 1 else operand_descriptor(a, batch, M, a_k, 64, tile.block_k)
    b_desc = operand_descriptor(b, batch, N + wrap, b_k, tile.block_n, tile.block_k)
    a_class_desc = None
    if classes > 1:
        a_class_desc = Descriptor(
            a.pointer,
            (M // classes, classes, a_k),
            (classes * a.row_stride, a.row_stride, 1),
            (64, 1, tile.block_k),
        )
    if of_a > 1:
        a_desc, a_class_desc = class_descriptors(a, of_a, M, K, tile)
    whole = whole_tiles(problem, choice) if tail else 0
    split = choice.tail_split if tail else choice.split
    work = whole + (count_tiles(problem, choice) - whole) * split
    epilogue = product_epilogue(problem, choice)
    slice_n = hopper_slice_columns(epilogue)
    c_desc = None
    neighbours = classes == of_a == 1  # the rows of a tile: TMA can store them
    by_tma = neighbours and stores_are_aligned(problem, choice) and not epilogue.residual
    streams = by_tma and c_is_streamed(problem, choice)
    if by_tma:
        slice_n = min(slice_n, TMA_BOX_BYTES // ITEMSIZE[target.dtype])
    if by_tma and not streams:
        c_desc = Descriptor(target, (choice.split * batch, M, N), (M * N, N, 1), (1, 64, slice_n))
    # Where K is short, a few slots hold the next tiles, and the room goes to C's slices.
    stages = min(tile.num_stages, max(2, 2 * cdiv(K, tile.block_k)))
    freed = (tile.num_stages - stages) * ring_slot(problem, choice)
    buffers = 2 + freed // (2 * 64 * TMA_BOX_BYTES)
    slices = tile.block_n // slice_n
    c_buffers = max(n for n in (1, 2, 4, 8) if n <= min(buffers, slices))
    return Launch(
        "gemm_hopper",
        min(problem.arch.sms, work),
        (a_desc, a_class_desc, b_desc, target, c_desc, tail, a.row_exp, b.row_exp)
        + epilogue_pointers(problem, epilogue)
        + (M, N, K, batch, split, whole)
        + (a.row_stride if of_a > 1 else None, M * N, N)
        + (int(a.batch_stride > 0), int(b.batch_stride > 0), a.row_exp_stride, b.row_exp_stride)
        + (a.lo_offset,),
        {
            "BLOCK_N": tile.block_n,
            "GROUP_M": group_m(problem, choice),
            "STAGES": stages,
            "PARTS": 2 if a.lo_offset else 1,
            "A_CLASSES": of_a,
            "CLASSES": classes,
            "A_K_MAJOR": a.k_major,
            "B_K_MAJOR": b.k_major,
            "SCALED": a.row_exp is not None and choice.split == 1,
            "ALIGNED": stores_are_aligned(problem, choice),
            "ACTIVATION": epilogue.activation,
            "STREAMS": streams,
            "SLICE_N": slice_n,
            "C_BUFFERS": c_buffers if c_desc else 0,
            "ONE_STEP": tile.block_k >= K,
        },
        num_warps=tile.num_warps,
        shared_memory=shared_memory(problem, choice),
    )


def c_is_streamed(problem: Problem, choice: Choice) -> bool:
    """Whether consumers store C past L2, because little but storing is done and L2 cannot hold C.

    Asked of what TMA would store, which has no such stores here, and of aligned fp32 as it lies.
    """
    elements = choice.split * problem.batch * problem.M * problem.N
    itemsize = 4 if choice.split > 1 else ITEMSIZE[problem.dtype]
    return problem.K <= LARGEST_STREAMED_K and elements * itemsize > problem.arch.l2_bytes


def gemm_tf32_hopper_launch(
    problem: Problem, choice: Choice, a: GemmOperand, b: GemmOperand, target: Pointer
) -> Launch:
    """kernels/gemm_tf32_hopper.py: TMA and wgmma, fp32 operands as they lie, aligned.

    It may be asked for B^T A^T, whose rows are columns of C.

    Args:
        target: C, or the partial sums of a split.
    """
    tile = choice.tile
    M, N, K, batch = problem.M, problem.N, problem.K, problem.batch
    kind = operand_kind(problem, choice.pack_a, choice.pack_b)
    rounds = not is_converted(problem, kind)
    epilogue = product_epilogue(problem, choice)
    transposed = is_transposed(problem, choice)
    if transposed:
        a, b, M, N = b, a, N, M
    a_desc = operand_descriptor(a, batch, M, K, 64, tile.block_k)
    b_desc = operand_descriptor(b, batch, N, K, tile.block_n, tile.block_k)
    return Launch(
        "gemm_tf32_hopper",
        min(problem.arch.sms, count_tiles(problem, choice) * choice.split),
        (replace(a_desc, rounds=rounds), replace(b_desc, rounds=rounds))
        + (a.pointer, b.pointer, target)
        + epilogue_pointers(problem, epilogue)
        + (M, N, K, batch, choice.split)
        + (a.batch_stride, a.row_stride, a.k_stride)
        + (b.batch_stride, b.row_stride, b.k_stride)
        + (M * N, problem.N, int(a.batch_stride > 0), int(b.batch_stride > 0)),
        {
            "BLOCK_N": tile.block_n,
            "GROUP_M": group_m(replace(problem, M=M, N=N), choice),
            "STAGES": tile.num_stages,
            "PARTS": 2 if kind == "tf32x3" else 1,
            "CONVERTS": not rounds,
            "TRANSPOSED": transposed,
            "A_K_MAJOR": a.k_major,
            "B_K_MAJOR": b.k_major,
            "ALIGNED": stores_are_aligned(problem, choice),
            "ACTIVATION": epilogue.activation,
            "STREAMS": rounds and c_is_streamed(problem, choice),
            "SLICE_N": 32,
        },
        num_warps=tile.num_warps,
        shared_memory=shared_memory(problem, choice),
    )


def gemv_launch(
    problem: Problem,
    choice: Choice,
    a: GemmOperand,
    b: GemmOperand,
    target: Pointer,
    rows_total: int | None,
) -> Launch:
    """kernels/gemv.py: a product one row or one column wide. rows_total: as gemm_launch."""
    tile, batch, split = choice.tile, problem.batch, choice.split
    matrix, vector, rows = (b, a, problem.N) if problem.M == 1 else (a, b, problem.M)
    stride_bias = 1 if problem.M == 1 else 0
    read_as = gemv_matrix(problem)
    epilogue = product_epilogue(problem, choice)
    return Launch(
        "gemv",
        batch * split * cdiv(rows + spare_elements(read_as, problem.dtype), tile.block_n),
        (matrix.pointer, vector.pointer, target)
        + epilogue_pointers(problem, epilogue)
        + (rows, problem.K, batch, split, rows_total)
        + (matrix.batch_stride, matrix.row_stride, matrix.k_stride)
        + (vector.batch_stride, vector.k_stride)
        + (stride_bias,),
        {
            "BLOCK_R": tile.block_n,
            "BLOCK_K": tile.block_k,
            "K_MAJOR": matrix.k_major,
            "SHIFTED": read_as.shifted,
            "ACTIVATION": epilogue.activation,
        },
        num_warps=tile.num_warps,
        shared_memory=shared_memory(problem, choice),
    )


def operand_descriptor(
    operand: GemmOperand, batch: int, rows: int, k: int, block_rows: int, block_k: int
) -> Descriptor:
    """(batch, rows, K), or (batch, K, rows) if rows are contiguous; batch 1 if items share it."""
    shape, box = (rows, k), (block_rows, block_k)
    pitch = operand.row_stride
    if not operand.k_major:
        shape, box = shape[::-1], box[::-1]
        pitch = operand.k_stride
    # Dimensions of size one have no stride of their own, but TMA wants one that is aligned.
    pitch = pitch or round_up(shape[1], COPY_BYTES)
    items = batch if operand.batch_stride else 1
    return Descriptor(
        operand.pointer,
        (items, *shape),
        (operand.batch_stride or pitch * shape[0], pitch, 1),
        (1, *box),
    )


def class_descriptors(
    a: GemmOperand, classes: int, rows: int, k: int, tile: Tile
) -> tuple[Descriptor, Descriptor | None]:
    """A with ``classes`` rows as one: for the classes that have a row more, and for the others.

    For all of them, and None, if they have the same number. A long row ends with the last row that
    these classes have in the last one, so nothing past A's end is read.
    """
    whole, rest = divmod(rows, classes)
    pitch = classes * a.row_stride

    def descriptor(long_rows: int, classes: int) -> Descriptor:
        length = (classes - 1) * a.row_stride + k
        strides = (pitch * long_rows, pitch, 1)
        return Descriptor(a.pointer, (1, long_rows, length), strides, (1, 64, tile.block_k))

    others = descriptor(whole, classes)
    return (descriptor(whole + 1, rest), others) if rest else (others, None)


def reduce_launch(
    problem: Problem,
    splits: int,
    a: GemmOperand | None,
    b: GemmOperand | None,
    partial: Pointer,
    c: Pointer,
) -> Launch:
    """The sum of split-K's partial products, in a fixed order.

    a, b: the operands whose exponents the sum applies; None if they have been applied.
    """
    scaled = a is not None and a.row_exp is not None
    exponents = (a.row_exp, b.row_exp) if scaled else (None, None)
    exponent_strides = (a.row_exp_stride, b.row_exp_stride) if scaled else (0, 0)
    epilogue = problem.epilogue
    # Without exponents or bias a row is nothing special: all of C is one long row.
    by_rows = scaled or epilogue.bias
    rows, columns = (problem.batch * problem.M, problem.N)
    if not by_rows:
        rows, columns = 1, rows * columns
    block_s = min(REDUCE_DEPTH, next_power_of_two(splits))
    block_n = max(32, min(256, REDUCE_ELEMENTS // block_s, next_power_of_two(columns)))
    return Launch(
        "reduce",
        rows * cdiv(columns, block_n),
        (partial, c, *exponents)
        + epilogue_pointers(problem, epilogue)
        + ((problem.M, problem.N, problem.batch) if by_rows else (1, columns, 1))
        + (splits,)
        + exponent_strides,
        {
            "SCALED": scaled,
            "BLOCK_S": block_s,
            "BLOCK_N": block_n,
            "ACTIVATION": epilogue.activation,
        },
        num_warps=8 if block_s * block_n > REDUCE_ELEMENTS else 4,
    )


def reduce_tail_launch(
    problem: Problem, choice: Choice, a: GemmOperand, b: GemmOperand, tail: Pointer, c: Pointer
) -> Launch:
    """The sum of the partial products of the last tiles, in a fixed order."""
    tile = choice.tile
    shared_tiles = tail_tiles(problem, choice)
    epilogue = problem.epilogue
    block_r = TAIL_ELEMENTS // tile.block_n
    return Launch(
        "reduce_tail",
        shared_tiles * (tile.block_m // block_r),
        (tail, c, a.row_exp, b.row_exp)
        + epilogue_pointers(problem, epilogue)
        + (problem.M, problem.N, whole_tiles(problem, choice), shared_tiles)
        + (a.row_exp_stride, b.row_exp_stride),
        {
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_R": block_r,
            "GROUP_M": group_m(problem, choice),
            "SPLITS": choice.tail_split,
            "A_CLASSES": a_classes(problem, choice),
            "CLASSES": row_classes(problem, choice),
            "SCALED": a.row_exp is not None,
            "ACTIVATION": epilogue.activation,
        },
    )


def is_aligned_in(problem: Problem, buffer: str) -> bool:
    return is_aligned(problem.a if buffer == "a" else problem.b, problem.dtype)


def copy_elements(operand: GemmOperand, rows: int, aligned: bool) -> int:
    """Elements that one 16-byte copy may take, inside the operand's bounds; 1 if misaligned."""
    elements = COPY_BYTES // ITEMSIZE[operand.pointer.dtype]
    whole_runs = operand.k_stride == 1 or (operand.row_stride == 1 and rows % elements == 0)
    return elements if aligned and whole_runs else 1


def tail_run(problem: Problem, k: int, *copied: tuple[GemmOperand, int]) -> int:
    """Elements of K that are inside of an operand, or outside, together: one copy's, or 1.

    copied: the operands, and how many elements one copy of each takes.
    """
    runs = [elements for operand, elements in copied if operand.k_major]
    run = max(runs, default=1)
    return run if k % run == 0 and not problem.b.shifted else 1


def is_wide(problem: Problem, tile: Tile, a: GemmOperand, b: GemmOperand) -> bool:
    """Whether an offset between two elements of one tile of A, B or C exceeds 32 bits."""
    largest = max(
        tile.block_m * a.row_stride + tile.block_k * a.k_stride,
        tile.block_n * b.row_stride + tile.block_k * b.k_stride,
        tile.block_m * problem.N,
    )
    return largest >= 2**31
