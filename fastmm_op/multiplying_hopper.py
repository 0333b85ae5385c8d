"""The launches of Hopper's persistent kernels, which multiply what TMA brings them."""

from dataclasses import dataclass, replace

from fastmm_op.epilogue import NONE, epilogue_pointers, hopper_slice_columns, product_epilogue
from fastmm_op.launches import Descriptor, Launch, Pointer
from fastmm_op.packing import GemmOperand
from fastmm_op.partition import (
    a_classes,
    count_tiles,
    is_transposed,
    row_classes,
    stores_are_aligned,
    tail_tiles,
    whole_tiles,
    wider_tiles,
)
from fastmm_op.problem import COPY_BYTES, ITEMSIZE, Problem, cdiv, round_up
from fastmm_op.shared_memory import ring_slot, shared_memory, slice_bytes
from fastmm_op.tile_order import group_m
from fastmm_op.tiles import Choice, Tile, is_converted, operand_kind

# TMA's boxes are at most so wide along memory where shared memory is swizzled.
TMA_BOX_BYTES = 128
# Of a K so short stores take longest. Without TMA, marked as not to be read soon, they save 4 % of
# the time of 16384x256x16384, and cost 3 to 8 % where K is 512 and more (benchmarks/results/
# NVIDIA_H200/storing_2026-11-28.txt); of 32768x64x32768 they saved 5 % even from the accumulators
# (NVIDIA_H100_80GB_HBM3/streamed_2026-11-27.txt, D).
LARGEST_STREAMED_K = 256


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
    half = tile.block_m // 2  # a consumer's rows
    a_desc = None if of_a > 1 else operand_descriptor(a, batch, M, a_k, half, tile.block_k)
    b_desc = operand_descriptor(b, batch, N + wrap, b_k, tile.block_n, tile.block_k)
    a_class_desc = None
    if classes > 1:
        a_class_desc = Descriptor(
            a.pointer,
            (M // classes, classes, a_k),
            (classes * a.row_stride, a.row_stride, 1),
            (half, 1, tile.block_k),
        )
    if of_a > 1:
        a_desc, a_class_desc = class_descriptors(a, of_a, M, K, tile)
    edge_desc = None
    if choice.edge_n:
        edge_desc = operand_descriptor(b, batch, N + wrap, b_k, choice.edge_n, tile.block_k)
    split = choice.tail_split if tail else choice.split
    whole, work = 0, count_tiles(problem, choice) * split
    if tail:
        work = whole_tiles(problem, choice) + tail_tiles(problem, choice) * split
        whole = whole_tiles(problem, choice) - wider_tiles(problem, choice)
    epilogue = product_epilogue(problem, choice)
    stores = stores_of_c(problem, choice, target)
    return Launch(
        "gemm_hopper",
        min(problem.arch.sms, work),
        (a_desc, a_class_desc, b_desc, edge_desc, target, stores.descriptor, tail)
        + (a.row_exp, b.row_exp)
        + epilogue_pointers(problem, epilogue)
        + (M, N, K, batch, split, whole)
        + (a.row_stride if of_a > 1 else None, M * N, N)
        + (int(a.batch_stride > 0), int(b.batch_stride > 0), a.row_exp_stride, b.row_exp_stride)
        + (a.lo_offset,),
        {
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "EDGE_N": choice.edge_n,
            "GROUP_M": group_m(problem, choice),
            "STAGES": stores.stages,
            "PARTS": 2 if a.lo_offset else 1,
            "A_CLASSES": of_a,
            "CLASSES": classes,
            "A_K_MAJOR": a.k_major,
            "B_K_MAJOR": b.k_major,
            "SCALED": a.row_exp is not None and choice.split == 1,
            "ALIGNED": stores_are_aligned(problem, choice),
            "ACTIVATION": epilogue.activation,
            "STREAMS": stores.streams,
            "SLICE_N": stores.slice_n,
            "C_BUFFERS": stores.buffers,
            "ONE_STEP": tile.block_k >= K,
        },
        num_warps=tile.num_warps,
        shared_memory=shared_memory(problem, choice),
    )


@dataclass(frozen=True)
class Stores:
    """How gemm_hopper gets a tile of C out, and what that leaves of shared memory.

    Attributes:
        descriptor: of C, for TMA to store it; None: the consumers do.
        streams: whether they tell L2 that nobody will read C soon.
        slice_n: columns that are finished and stored at a time.
        buffers: of slices on TMA's way, each consumer's.
        stages: of the ring of A and B.
    """

    descriptor: Descriptor | None
    streams: bool
    slice_n: int
    buffers: int
    stages: int


def stores_of_c(problem: Problem, choice: Choice, target: Pointer) -> Stores:
    """By TMA where it can and is the faster way.

    Args:
        target: C, or the partial sums of a split.
    """
    tile, epilogue = choice.tile, product_epilogue(problem, choice)
    classes = row_classes(problem, choice)
    bytes_at_once = slice_bytes(problem, choice)
    slice_n = min(hopper_slice_columns(epilogue), bytes_at_once // ITEMSIZE[target.dtype])
    # Where K is short, a few slots hold the next tiles, and the room goes to C's slices.
    stages = min(tile.num_stages, max(2, 2 * cdiv(problem.K, tile.block_k)))
    freed = (tile.num_stages - stages) * ring_slot(problem, choice)
    # Rows that are neighbours, or of one class, which TMA sees as so many long ones. Of 16 bits
    # wrapped columns need shared memory on their way, and a slot less of the ring for it costs more
    # than TMA gains (benchmarks/results/NVIDIA_H200/class_stores_2026-11-28.txt).
    long_row = classes * problem.N
    by_class = classes == 1 or (target.dtype == "fp32" and long_row < 2**31)
    by_tma = a_classes(problem, choice) == 1 and by_class and stores_are_aligned(problem, choice)
    by_tma = by_tma and not epilogue.residual
    streams = by_tma and classes == 1 and c_is_streamed(problem, choice)
    if not by_tma or streams:
        # Longer stretches of a row are 3 % faster (NVIDIA_H200/storing_2026-11-28.txt; of rows of
        # 16 bits in classes edges_2026-11-28.txt there), if they fit: 512 bytes, or 256 of 16 bits.
        double = 2 * slice_n <= tile.block_n and epilogue == NONE
        if target.dtype == "fp32":
            double = double and streams and freed >= tile.block_m * slice_n * 4
        else:
            double = double and classes > 1 and bytes_at_once == 256
        return Stores(None, streams, slice_n * (2 if double else 1), 0, stages)
    slice_n = min(slice_n, TMA_BOX_BYTES // ITEMSIZE[target.dtype])
    shape = (choice.split * problem.batch, problem.M // classes, long_row)
    strides = (problem.M // classes * long_row, long_row, 1)
    fit = bytes_at_once // TMA_BOX_BYTES + freed // (tile.block_m * TMA_BOX_BYTES)
    buffers = max(n for n in (1, 2, 4, 8) if n <= min(fit, tile.block_n // slice_n))
    descriptor = Descriptor(target, shape, strides, (1, tile.block_m // 2, slice_n))
    return Stores(descriptor, False, slice_n, buffers, stages)


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
            "SLICE_N": hopper_slice_columns(epilogue) if rounds else 32,
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
        box = (1, tile.block_m // 2, tile.block_k)
        return Descriptor(a.pointer, (1, long_rows, length), strides, box)

    others = descriptor(whole, classes)
    return (descriptor(whole + 1, rest), others) if rest else (others, None)
