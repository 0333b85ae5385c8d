"""Persistent warp-specialised 16-bit GEMM for Hopper, in Gluon.

    C[z, m, n] = 2^(row_exp[z, m] + col_exp[z, n]) * sum_k A[z, m, k] * B[z, k, n]

A and B are fp16 or bf16 in either order, products are summed in fp32, and C (fp32, fp16 or bf16)
is rounded once. Rows of two PARTS hold hi and lo (kernels/pack.py); their three products are
summed. One program per SM walks over the work items (batch, tile, split). In it run

    producer     1 warp: TMA loads of BLOCK_M x 64 of A and 64 x BLOCK_N of B into a ring of
                 slots, of every part
    consumer 0   4 warps: wgmma into the upper half of the tile, then the scales and the stores
    consumer 1   4 warps: the same for the lower half

which hand slots to each other through the mbarriers `full` and `empty`, the scheme of CUTLASS's
"cooperative" kernel. A tile has 128 rows, or 256 and at most 128 columns, which reads half as much
of B and twice as much of A. What an odd N costs is decided by how C is written:

    aligned    C's rows start on 16-byte boundaries: TMA stores slices of a tile from shared memory,
               a few on their way at a time; or, where a residual is added to them or little else
               is done (STREAMS), consumers store them, rearranged (kernels/hopper_store.py).
    classes    C's rows do not, and sectors would be straddled. Rows equal modulo
               CLASSES = 16 / gcd(16, row bytes) are aligned alike, so a tile takes rows of one
               class, CLASSES apart, and moves its columns right by `shift` < 16 bytes to the next
               boundary; the columns this leaves at the left wrap around to the end of the class's
               last column tile. B's N is an outer TMA coordinate, free to start anywhere; its
               buffer repeats its first rows after the last one for the wrapped columns. Of an fp32
               C, tiles in which nothing wraps are stored by TMA, which sees CLASSES rows as one.
               The last M mod (BLOCK_M CLASSES) rows go the unaligned way.
    unaligned  through shared memory, so that a warp writes one row's consecutive columns.

A misaligned A is read as it is if it is K-major. Rows equal modulo A_CLASSES are misaligned alike,
so a tile takes rows of one class, A_CLASSES apart. TMA sees A_CLASSES rows as one long row, whose
pitch is aligned, and starts on the last boundary before the tile's rows, `lead` elements early. B
is N-major: its K, an outer coordinate, starts as early. Outside of B there are zeros, but beside
A's rows there are others, perhaps Inf and NaN; where a slot has some of them, each consumer clears
them in its part before it multiplies.

A last wave of few tiles would leave most SMs idle. Given a partial_ptr, work items from `whole` on
are parts of the tiles from `whole` on, split_k of each: they leave their fp32 accumulators there,
as they are, for kernels/reduce_tail.py to sum and finish.

Where N leaves a few columns of whole tiles, the last tile of a row takes these along: EDGE_N more
columns of B for the same A, in accumulators of their own. They are stored as they lie. These wider
tiles are the first work items, so that no program has two before each has one.

All descriptors have rank 3, the batch outermost, so a tail in K or M never reads the next batch.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastmm_op.kernels.chain import let_next_start, wait_for_previous
from fastmm_op.kernels.hopper import advance, barrier, before, count_work, matrix_view, tma_load
from fastmm_op.kernels.hopper_scale import NARROW, apply_exponents, scale_edge
from fastmm_op.kernels.hopper_store import (
    copy_slice,
    load_bias,
    split_columns,
    store_partial,
    store_slice,
)
from fastmm_op.kernels.hopper_tiles import (
    BLOCK_K,
    count_column_tiles,
    count_row_tiles,
    find_class,
    in_long_rows,
    is_whole,
    item_of_width,
    k_range,
    lead_of,
    next_program,
    tile_rows,
)


class Config(NamedTuple):
    """Compile-time arguments of gemm_hopper_kernel by their names, and what follows from others.

    VECTOR: elements of C in 16 bytes. TAIL: whether the last work items are parts of tiles.
    """

    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr
    EDGE_N: gl.constexpr
    GROUP_M: gl.constexpr
    STAGES: gl.constexpr
    PARTS: gl.constexpr
    A_CLASSES: gl.constexpr
    CLASSES: gl.constexpr
    VECTOR: gl.constexpr
    TAIL: gl.constexpr
    A_K_MAJOR: gl.constexpr
    B_K_MAJOR: gl.constexpr
    SCALED: gl.constexpr
    ALIGNED: gl.constexpr
    ACTIVATION: gl.constexpr
    STREAMS: gl.constexpr
    SLICE_N: gl.constexpr
    ONE_STEP: gl.constexpr


@gluon.jit
def load_columns(b_desc, batch, col, k, bar, dst, K_MAJOR: gl.constexpr):
    if K_MAJOR:
        tma_load(b_desc, [batch, col, k], bar, dst)
    else:
        tma_load(b_desc, [batch, k, col], bar, dst)


@gluon.jit
def load_tiles(
    descriptors, ring, stage, phase, first, items, tiles, sizes, batch_steps, lo_offset, strides,
    CONFIG: gl.constexpr, EDGE_N: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Loads what the work items from `first` on need that are this program's, of one width."""
    BLOCK_N: gl.constexpr = CONFIG.BLOCK_N
    PARTS: gl.constexpr = CONFIG.PARTS
    A_CLASSES: gl.constexpr = CONFIG.A_CLASSES
    CLASSES: gl.constexpr = CONFIG.CLASSES
    B_K_MAJOR: gl.constexpr = CONFIG.B_K_MAJOR
    WARPGROUP_M: gl.constexpr = CONFIG.BLOCK_M // 2
    a_desc, a_class_desc, b_desc, edge_desc = descriptors
    a_smem, b_smem, edge_smem, full, empty = ring
    M, _, K, batch, split_k, whole = sizes
    tiles_m, tiles_n = tiles
    a_step, b_step = batch_steps
    stride_am, stride_cm = strides
    for work in range(first, items, gl.num_programs(0)):
        pid_m, pid_n, z, split, splits = item_of_width(
            work, tiles_m, tiles_n, batch, whole, split_k, EDGE_N, CONFIG.GROUP_M, TAIL
        )
        row0, _, in_class, shift = tile_rows(
            pid_m, M, stride_cm, CONFIG.BLOCK_M, A_CLASSES, CLASSES, CONFIG.VECTOR
        )
        col0 = pid_n * BLOCK_N + shift
        lead = lead_of(row0, stride_am, A_CLASSES)
        long_row, long_col, has_more = find_class(row0, M, stride_am, A_CLASSES)
        k_first, k_last = k_range(split, K + lead, splits)
        a_batch = z % batch * a_step
        b_batch = z % batch * b_step
        for step in range(k_first, k_last):
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, PARTS * (CONFIG.BLOCK_M + BLOCK_N + EDGE_N) * BLOCK_K * 2)
            for part in gl.static_range(PARTS):
                k = step * BLOCK_K + part * lo_offset
                slot = stage * PARTS + part
                for i in gl.static_range(2):
                    a_dst = a_smem.index(slot * 2 + i)
                    if A_CLASSES > 1:
                        row = long_row + i * WARPGROUP_M
                        if a_class_desc is None:
                            tma_load(a_desc, [0, row, long_col + k], bar, a_dst)
                        elif has_more:
                            tma_load(a_desc, [0, row, long_col + k], bar, a_dst)
                        else:
                            tma_load(a_class_desc, [0, row, long_col + k], bar, a_dst)
                    elif CLASSES > 1:
                        if in_class:
                            row = row0 // CLASSES + i * WARPGROUP_M
                            dst = a_dst.reshape([WARPGROUP_M, 1, BLOCK_K])
                            tma_load(a_class_desc, [row, row0 % CLASSES, k], bar, dst)
                        else:
                            tma_load(a_desc, [a_batch, row0 + i * WARPGROUP_M, k], bar, a_dst)
                    elif CONFIG.A_K_MAJOR:
                        tma_load(a_desc, [a_batch, row0 + i * WARPGROUP_M, k], bar, a_dst)
                    else:
                        tma_load(a_desc, [a_batch, k, row0 + i * WARPGROUP_M], bar, a_dst)
                load_columns(b_desc, b_batch, col0, k - lead, bar, b_smem.index(slot), B_K_MAJOR)
                if EDGE_N:
                    edge0, dst = col0 + BLOCK_N, edge_smem.index(slot)
                    load_columns(edge_desc, b_batch, edge0, k - lead, bar, dst, B_K_MAJOR)
            stage, phase = advance(stage, phase, CONFIG.STAGES)
    return stage, phase


@gluon.jit
def producer(
    descriptors, ring, sizes, batch_steps, lo_offset, strides, CONFIG: gl.constexpr
):  # fmt: skip
    M, N, _, batch, split_k, whole = sizes
    tiles_m = count_row_tiles(M, CONFIG.BLOCK_M, CONFIG.A_CLASSES)
    tiles = (tiles_m, count_column_tiles(N, CONFIG.BLOCK_N, CONFIG.EDGE_N))
    stage = 0
    phase = 1  # a fresh barrier lets the waiter of the other phase through: every slot starts empty
    first = gl.program_id(0)
    if CONFIG.EDGE_N:
        edge_items = tiles_m * batch
        stage, phase = load_tiles(
            descriptors, ring, stage, phase, first, edge_items, tiles, sizes, batch_steps,
            lo_offset, strides, CONFIG, CONFIG.EDGE_N, False,
        )  # fmt: skip
        first = next_program(first, gl.num_programs(0), edge_items)
    items = count_work(tiles[0] * tiles[1] * batch, whole, split_k, CONFIG.TAIL)
    load_tiles(
        descriptors, ring, stage, phase, first, items, tiles, sizes, batch_steps, lo_offset,
        strides, CONFIG, 0, CONFIG.TAIL,
    )  # fmt: skip


@gluon.jit
def clear_outside(a, k, K):
    """Makes zeros of the columns of a (WARPGROUP_M, BLOCK_K) slot of A that are outside [0, K).

    The first column is at k. All warps of the consumer wait until each can see the zeros.
    """
    if (k < 0) | (k + BLOCK_K > K):
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        offs_k = k + gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
        inside = gl.expand_dims((offs_k >= 0) & (offs_k < K), 0)
        x = a.load(layout)
        a.store(gl.where(inside, x, gl.zeros_like(x)))
        fence_async_shared()
        barrier()


@gluon.jit
def multiply_parts(a_smem, b_smem, stage, acc, INDEX: gl.constexpr, ONE_STEP: gl.constexpr):
    """acc + A @ B of one slot's hi and lo, without the product of the two lo.

    ONE_STEP: acc is zero, and has no registers of its own.

    The tensor core truncates its sums. The chain of three products ends here, small terms first,
    and is added to acc by an ordinary fp32 addition, which rounds; meanwhile the tensor core
    works for the other consumer.
    """
    a_hi = matrix_view(a_smem.index(stage * 4 + INDEX), True)
    a_lo = matrix_view(a_smem.index(stage * 4 + 2 + INDEX), True)
    b_hi = matrix_view(b_smem.index(stage * 2), True).permute([1, 0])
    b_lo = matrix_view(b_smem.index(stage * 2 + 1), True).permute([1, 0])
    nothing = gl.zeros_like(acc)
    products = warpgroup_mma(a_lo, b_hi, nothing, use_acc=False, is_async=True)
    products = warpgroup_mma(a_hi, b_lo, products, is_async=True)
    products = warpgroup_mma(a_hi, b_hi, products, is_async=True)
    products = warpgroup_mma_wait(0, deps=(products,))
    return products if ONE_STEP else acc + products


@gluon.jit
def compute_tiles(
    output, row_exp_ptr, col_exp_ptr, ring, exponents, stage, phase, first, items, tiles, sizes,
    exp_steps, strides, epilogue,
    INDEX: gl.constexpr, CONFIG: gl.constexpr, EDGE_N: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Multiplies, finishes and stores this program's work items from `first` on, of one width."""
    BLOCK_N: gl.constexpr = CONFIG.BLOCK_N
    SLICE_N: gl.constexpr = CONFIG.SLICE_N
    STAGES: gl.constexpr = CONFIG.STAGES
    A_CLASSES: gl.constexpr = CONFIG.A_CLASSES
    CLASSES: gl.constexpr = CONFIG.CLASSES
    B_K_MAJOR: gl.constexpr = CONFIG.B_K_MAJOR
    SCALED: gl.constexpr = CONFIG.SCALED
    WARPGROUP_M: gl.constexpr = CONFIG.BLOCK_M // 2
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SLICE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLICE_N, 16])
    FLAT: gl.constexpr = gl.BlockedLayout([max(BLOCK_N // 128, 1)], [32], [4], [0])
    SLICES: gl.constexpr = BLOCK_N // SLICE_N
    a_smem, b_smem, edge_smem, full, empty = ring
    M, N, K, batch, split_k, whole = sizes
    tiles_m, tiles_n = tiles
    row_exp_step, col_exp_step = exp_steps
    stride_am, stride_cz, stride_cm = strides
    c_ptr, c_desc, c_smem, partial_ptr = output
    bias_ptr, residual_ptr = epilogue
    rearranged: gl.constexpr = CLASSES == 1 or c_ptr.dtype.element_ty.primitive_bitwidth == 16
    for work in range(first, items, gl.num_programs(0)):
        pid_m, pid_n, z, split, splits = item_of_width(
            work, tiles_m, tiles_n, batch, whole, split_k, EDGE_N, CONFIG.GROUP_M, TAIL
        )
        tile_row0, row_step, in_class, shift = tile_rows(
            pid_m, M, stride_cm, CONFIG.BLOCK_M, A_CLASSES, CLASSES, CONFIG.VECTOR
        )
        row0 = tile_row0 + row_step * (INDEX * WARPGROUP_M)
        col0 = pid_n * BLOCK_N + shift
        lead = lead_of(tile_row0, stride_am, A_CLASSES)
        k_first, k_last = k_range(split, K + lead, splits)
        if SCALED:  # asked for here, used after the main loop, which hides the latency
            row_exp = row_exp_ptr + (z % batch).to(gl.int64) * row_exp_step
            col_exp = col_exp_ptr + (z % batch).to(gl.int64) * col_exp_step
            rows = row0 + row_step * gl.arange(0, WARPGROUP_M, gl.SliceLayout(1, SLICE))
            row_e = gl.load(row_exp + rows, mask=rows < M, other=0)
            offs = gl.arange(0, BLOCK_N, FLAT)
            cols = col0 + offs
            cols = gl.where(cols < N, cols, cols - N)
            inside = col0 - shift + offs < N
            flat_col_e = gl.load(col_exp + cols, mask=inside, other=0)
            flat_rows = row0 + row_step * (offs % WARPGROUP_M)
            flat_row_e = gl.load(row_exp + flat_rows, mask=flat_rows < M, other=0)

        acc = gl.zeros((WARPGROUP_M, BLOCK_N), gl.float32, MMA)
        if EDGE_N:
            EDGE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, EDGE_N, 16])
            edge = gl.zeros((WARPGROUP_M, EDGE_N), gl.float32, EDGE)
        for step in range(k_first, k_last):
            mbarrier.wait(full.index(stage), phase)
            if CONFIG.PARTS == 2:
                acc = multiply_parts(a_smem, b_smem, stage, acc, INDEX, CONFIG.ONE_STEP)
                mbarrier.arrive(empty.index(stage))
            else:
                a = matrix_view(a_smem.index(stage * 2 + INDEX), CONFIG.A_K_MAJOR)
                if A_CLASSES > 1:
                    clear_outside(a, step * BLOCK_K - lead, K)
                if EDGE_N:  # few columns: A would be read again more slowly than it is multiplied
                    a_part = a.load(gl.DotOperandLayout(0, EDGE, 2))
                    b = matrix_view(edge_smem.index(stage), B_K_MAJOR).permute([1, 0])
                    edge_pending = warpgroup_mma(a_part, b, edge, is_async=True)
                b = matrix_view(b_smem.index(stage), B_K_MAJOR).permute([1, 0])
                pending = warpgroup_mma(a, b, acc, is_async=True)
                if EDGE_N:
                    acc, edge = warpgroup_mma_wait(1, deps=(pending, edge_pending))
                else:
                    acc = warpgroup_mma_wait(1, deps=(pending,))
                mbarrier.arrive(empty.index(before(stage, STAGES)), pred=step > k_first)
            stage, phase = advance(stage, phase, STAGES)
        if SCALED:  # under the last wgmma
            exponents.store(flat_col_e)
            wide = gl.max(gl.maximum(gl.abs(flat_row_e), gl.abs(flat_col_e)), 0) > NARROW
        if CONFIG.PARTS == 1:
            if EDGE_N:
                acc, edge = warpgroup_mma_wait(0, deps=(acc, edge))
            else:
                acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index(before(stage, STAGES)), pred=k_last > k_first)

        finished = True
        if TAIL:
            finished = work < whole
            if work >= whole:
                slot = (work - whole).to(gl.int64) * 2 + INDEX
                store_partial(partial_ptr + slot * (WARPGROUP_M * BLOCK_N), acc)
        if finished:
            c_z = c_ptr + z.to(gl.int64) * stride_cz
            residual_z = None
            if residual_ptr is not None:
                residual_z = residual_ptr + z.to(gl.int64) * stride_cz
            parts = split_columns(acc, SLICES)
            for i in gl.static_range(SLICES):
                x = gl.convert_layout(parts[i], SLICE, assert_trivial=True)  # of half a tile
                if SCALED:
                    col_e = exponents.slice(i * SLICE_N, SLICE_N).load(gl.SliceLayout(0, SLICE))
                    x = apply_exponents(x, row_e, col_e, wide)
                col = col0 + i * SLICE_N
                if bias_ptr is not None:
                    x += load_bias(bias_ptr, col, shift, N, SLICE_N, SLICE)
                if c_desc is None:
                    store_slice(c_z, x, row0, row_step, in_class, col, shift, M, N,
                                stride_cm, residual_z, CONFIG.ALIGNED, CLASSES, CONFIG.ACTIVATION,
                                CONFIG.STREAMS, rearranged)  # fmt: skip
                elif CLASSES == 1:
                    copy_slice(c_desc, c_smem, x, z, row0, col, i, CONFIG.ACTIVATION)
                elif is_whole(in_class, col0, N, BLOCK_N):
                    long_row, long_col = in_long_rows(row0, col, N, CLASSES)
                    copy_slice(c_desc, c_smem, x, z, long_row, long_col, i, CONFIG.ACTIVATION)
                else:
                    store_slice(c_z, x, row0, row_step, in_class, col, shift, M, N,
                                stride_cm, None, CONFIG.ALIGNED, CLASSES, CONFIG.ACTIVATION,
                                CONFIG.STREAMS, rearranged)  # fmt: skip
            if EDGE_N:
                edge0 = col0 + BLOCK_N
                if SCALED:
                    edge = scale_edge(edge, row_e, col_exp, edge0, shift, N)
                store_slice(c_z, edge, row0, row_step, in_class, edge0, shift, M, N,
                            stride_cm, None, CONFIG.ALIGNED, CLASSES, "none", CONFIG.STREAMS,
                            False)  # fmt: skip
    return stage, phase


@gluon.jit
def consumer(
    output, row_exp_ptr, col_exp_ptr, ring, exponents, sizes, exp_steps, strides, epilogue,
    INDEX: gl.constexpr, CONFIG: gl.constexpr,
):  # fmt: skip
    M, N, _, batch, split_k, whole = sizes
    tiles_m = count_row_tiles(M, CONFIG.BLOCK_M, CONFIG.A_CLASSES)
    tiles = (tiles_m, count_column_tiles(N, CONFIG.BLOCK_N, CONFIG.EDGE_N))
    stage = 0
    phase = 0
    first = gl.program_id(0)
    if CONFIG.EDGE_N:
        edge_items = tiles_m * batch
        stage, phase = compute_tiles(
            output, row_exp_ptr, col_exp_ptr, ring, exponents, stage, phase, first, edge_items,
            tiles, sizes, exp_steps, strides, epilogue, INDEX, CONFIG, CONFIG.EDGE_N, False,
        )  # fmt: skip
        first = next_program(first, gl.num_programs(0), edge_items)
    items = count_work(tiles[0] * tiles[1] * batch, whole, split_k, CONFIG.TAIL)
    compute_tiles(
        output, row_exp_ptr, col_exp_ptr, ring, exponents, stage, phase, first, items, tiles, sizes,
        exp_steps, strides, epilogue, INDEX, CONFIG, 0, CONFIG.TAIL,
    )  # fmt: skip
    _, c_desc, _, _ = output
    if c_desc is not None:
        tma.store_wait(0)  # shared memory lives no longer than the program


SIZES = ["M", "N", "K", "batch", "split_k", "whole"]
STRIDES = ["stride_am", "stride_cz", "stride_cm", "a_step", "b_step", "row_exp_step"]
STRIDES += ["col_exp_step", "lo_offset"]


@gluon.jit(do_not_specialize=[*SIZES, *STRIDES])  # TMA gains nothing from their divisibility
def gemm_hopper_kernel(
    a_desc,  # (batch, M, K) or (batch, K, M); by A_CLASSES (1, cdiv(M, A_CLASSES), a long row)
    a_class_desc,  # (M // CLASSES, CLASSES, K); (1, M // A_CLASSES, a long row); or None
    b_desc,  # (batch, N, K) or (batch, K, N)
    edge_desc,  # the same in boxes of EDGE_N, or None
    c_ptr,  # (batch, M, N); without a tail (split_k * batch, M, N), unscaled sums if split_k > 1
    c_desc,  # the same, by CLASSES (1, M // CLASSES, a long row), or None
    partial_ptr,  # (split_k, tail tiles, BLOCK_M, BLOCK_N) fp32, unscaled; None: there is no tail
    row_exp_ptr, col_exp_ptr,  # (batch, M) and (batch, N) int32, read if SCALED
    bias_ptr, residual_ptr,  # (N,) and C's shape, or None
    M, N, K, batch, split_k, whole,
    stride_am,  # read by A_CLASSES, or None
    stride_cz, stride_cm, a_step, b_step, row_exp_step, col_exp_step, lo_offset,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, EDGE_N: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr, A_CLASSES: gl.constexpr, CLASSES: gl.constexpr,
    A_K_MAJOR: gl.constexpr, B_K_MAJOR: gl.constexpr, SCALED: gl.constexpr, ALIGNED: gl.constexpr,
    ACTIVATION: gl.constexpr, STREAMS: gl.constexpr, SLICE_N: gl.constexpr,
    C_BUFFERS: gl.constexpr, ONE_STEP: gl.constexpr, WAITS: gl.constexpr, LETS_NEXT: gl.constexpr,
):  # fmt: skip
    """a_step and b_step are 1, or 0 for an operand that all batch items share; see the module.

    A long row is A_CLASSES rows, up to the last that is read. a_desc has those of the classes that
    have a row more than the others, which have theirs in a_class_desc.
    whole: tiles before the tail, without those that EDGE_N makes wider. split_k: programs that
    share a tile of the tail or, without one, every tile.
    SLICE_N: columns of C that are finished and stored at a time.
    """
    gl.static_assert(gl.num_warps() == 4, "a consumer is one warpgroup")
    gl.static_assert(CLASSES == 1 or (A_K_MAJOR and B_K_MAJOR and ALIGNED))
    if A_CLASSES > 1:
        gl.static_assert(A_K_MAJOR and not B_K_MAJOR and PARTS == 1)
        gl.static_assert(CLASSES == 1 and c_desc is None)
    gl.static_assert(PARTS == 1 or (A_K_MAJOR and B_K_MAJOR))
    gl.static_assert(BLOCK_N >= BLOCK_M // 2, "compute_tiles looks at as many rows' exponents")
    if EDGE_N:
        gl.static_assert(PARTS == 1 and bias_ptr is None and residual_ptr is None)
        gl.static_assert(ACTIVATION == "none")
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    a_shape: gl.constexpr = [STAGES * PARTS * 2] + a_desc.block_shape
    b_shape: gl.constexpr = [STAGES * PARTS] + b_desc.block_shape
    a_smem = gl.allocate_shared_memory(a_desc.dtype, a_shape, a_desc.layout)
    b_smem = gl.allocate_shared_memory(b_desc.dtype, b_shape, b_desc.layout)
    exponents = gl.allocate_shared_memory(gl.int32, [2, BLOCK_N], flat)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    descriptors = (a_desc, a_class_desc, b_desc, edge_desc)
    ring = (a_smem, b_smem, None, full, empty)
    if edge_desc is not None:
        edge_shape: gl.constexpr = [STAGES] + edge_desc.block_shape
        edge_smem = gl.allocate_shared_memory(edge_desc.dtype, edge_shape, edge_desc.layout)
        ring = (a_smem, b_smem, edge_smem, full, empty)
    outputs = ((c_ptr, None, None, partial_ptr), (c_ptr, None, None, partial_ptr))
    if c_desc is not None:
        gl.static_assert(BLOCK_N // SLICE_N % C_BUFFERS == 0)
        c_shape: gl.constexpr = [C_BUFFERS] + c_desc.block_shape
        c_smem_0 = gl.allocate_shared_memory(c_desc.dtype, c_shape, c_desc.layout)
        c_smem_1 = gl.allocate_shared_memory(c_desc.dtype, c_shape, c_desc.layout)
        outputs = ((c_ptr, c_desc, c_smem_0, partial_ptr), (c_ptr, c_desc, c_smem_1, partial_ptr))
    sizes = (M, N, K, batch, split_k, whole)
    exp_steps = (row_exp_step, col_exp_step)
    strides = (stride_am, stride_cz, stride_cm)
    epilogue = (bias_ptr, residual_ptr)
    CONFIG: gl.constexpr = Config(
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, EDGE_N=EDGE_N, GROUP_M=GROUP_M, STAGES=STAGES,
        PARTS=PARTS, A_CLASSES=A_CLASSES, CLASSES=CLASSES,
        VECTOR=128 // c_ptr.dtype.element_ty.primitive_bitwidth, TAIL=partial_ptr is not None,
        A_K_MAJOR=A_K_MAJOR, B_K_MAJOR=B_K_MAJOR, SCALED=SCALED, ALIGNED=ALIGNED,
        ACTIVATION=ACTIVATION, STREAMS=STREAMS, SLICE_N=SLICE_N, ONE_STEP=ONE_STEP,
    )  # fmt: skip
    wait_for_previous(WAITS)
    let_next_start(LETS_NEXT)
    gl.warp_specialize([
        (consumer, (outputs[0], row_exp_ptr, col_exp_ptr, ring, exponents.index(0), sizes,
                    exp_steps, strides, epilogue, 0, CONFIG)),
        (consumer, (outputs[1], row_exp_ptr, col_exp_ptr, ring, exponents.index(1), sizes,
                    exp_steps, strides, epilogue, 1, CONFIG)),
        (producer, (descriptors, ring, sizes, (a_step, b_step), lo_offset, (stride_am, stride_cm),
                    CONFIG)),
    ], [4, 1], [232, 40])  # fmt: skip
