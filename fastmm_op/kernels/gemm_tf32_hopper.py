"""Persistent warp-specialised GEMM for Hopper of fp32 operands as they lie, in Gluon.

    C[z, m, n] = sum_k A[z, m, k] * B[z, k, n]

in TF32: of operands that are rounded to it on their way to the tensor core (PARTS 1), or split into
two of its numbers, of which three products are summed (PARTS 2; kernels/tf32.py). Nothing is
packed, so each operand is read from memory once. One program per SM walks over the work items
(batch, tile, split), as kernels/gemm_hopper.py does. In it run

    producer     1 warp: TMA loads of 128 x 32 of A and 32 x BLOCK_N of B into a ring of slots
    converter    if CONVERTS, 4 warps: reads B from its slot, rounds or splits it, and writes it to
                 one of SLOTS others, K-major, as wgmma wants fp32
    consumer 0   4 warps: reads rows 0..63 of A into registers, and rounds or splits them there if
                 CONVERTS; wgmma; then the stores
    consumer 1   4 warps: the same for rows 64..127

Without a converter TMA has rounded what it copies, B is K-major, and an A that is K-major stays in
shared memory. A K-major A beside another B is multiplied as B^T A^T (TRANSPOSED): the caller gives
them in that order, and rows of the tile are columns of C.

With two parts each block of K ends in products of its own, which an ordinary addition adds to the
sum, and what is too large to be split makes a sum that is not finite. Consumers look for that
when a tile is done, and compute it again in IEEE fp32.

Both descriptors have rank 3, the batch outermost, and give zeros outside of M, N and K.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastmm_op.kernels.chain import let_next_start, wait_for_previous
from fastmm_op.kernels.hopper import (
    advance,
    barrier,
    count_work,
    matrix_view,
    share_of,
    tma_load,
    work_item,
)
from fastmm_op.kernels.hopper_store import (
    load_bias,
    load_bias_of_rows,
    split_columns,
    store_slice,
    store_transposed,
)
from fastmm_op.kernels.tf32 import SPLIT_SCALE, add_half_of_tf32, split_in_tf32

BLOCK_M = gl.constexpr(128)
WARPGROUP_M = gl.constexpr(64)  # rows of a tile that one consumer has
BLOCK_K = gl.constexpr(32)
PIECE_N = gl.constexpr(64)  # columns of B that the converter has in registers
SLOTS = gl.constexpr(2)  # of B as wgmma reads it
INF = gl.constexpr(float("inf"))
# Of a sum in IEEE fp32: its chains, and what is loaded at once of one.
CHAIN = gl.constexpr(1024)
UNROLLED = gl.constexpr(4)


@gluon.jit
def count_items(sizes, BLOCK_N: gl.constexpr):
    M, N, _, batch, split_k = sizes
    return count_work(gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N) * batch, 0, split_k, False)


@gluon.jit
def locate(work, sizes, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr):
    """Of a work item: row, column and item of C; first and last block of K of its share."""
    M, N, K, batch, split_k = sizes
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, BLOCK_N)
    pid_m, pid_n, z, split, splits = work_item(
        work, tiles_m, tiles_n, batch, 0, split_k, GROUP_M, False
    )
    first, last = share_of(gl.cdiv(K, BLOCK_K), split, splits)
    return pid_m * BLOCK_M, pid_n * BLOCK_N, z, first, last


@gluon.jit
def producer(
    a_desc, b_desc, ring, sizes, batch_steps,
    BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
    A_K_MAJOR: gl.constexpr, B_K_MAJOR: gl.constexpr,
):  # fmt: skip
    a_smem, b_smem, full, empty = ring
    batch = sizes[3]
    a_step, b_step = batch_steps
    stage = 0
    phase = 1  # every slot starts empty
    for work in range(gl.program_id(0), count_items(sizes, BLOCK_N), gl.num_programs(0)):
        row0, col0, z, first, last = locate(work, sizes, BLOCK_N, GROUP_M)
        a_batch = z % batch * a_step
        b_batch = z % batch * b_step
        for step in range(first, last):
            k = step * BLOCK_K
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_K * 4)
            for i in gl.static_range(2):
                a_dst = a_smem.index(stage * 2 + i)
                if A_K_MAJOR:
                    tma_load(a_desc, [a_batch, row0 + i * WARPGROUP_M, k], bar, a_dst)
                else:
                    tma_load(a_desc, [a_batch, k, row0 + i * WARPGROUP_M], bar, a_dst)
            if B_K_MAJOR:
                tma_load(b_desc, [b_batch, col0, k], bar, b_smem.index(stage))
            else:
                tma_load(b_desc, [b_batch, k, col0], bar, b_smem.index(stage))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def converter(
    ring, converted, sizes,
    BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
    B_K_MAJOR: gl.constexpr,
):  # fmt: skip
    # Each thread has four numbers along K, 16 bytes of the copy; a warp's are neighbours as B lies.
    ROWS_OF_WARP: gl.constexpr = 4 if B_K_MAJOR else 16
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [1, 4], [ROWS_OF_WARP, 32 // ROWS_OF_WARP], [4, 1], [1, 0]
    )
    b_smem, full, empty = ring[1], ring[2], ring[3]
    copies, ready, taken = converted
    stage = 0
    phase = 0
    slot = 0
    slot_phase = 1
    for work in range(gl.program_id(0), count_items(sizes, BLOCK_N), gl.num_programs(0)):
        _, _, _, first, last = locate(work, sizes, BLOCK_N, GROUP_M)
        for _ in range(first, last):
            mbarrier.wait(full.index(stage), phase)
            mbarrier.wait(taken.index(slot), slot_phase)
            source = matrix_view(b_smem.index(stage), B_K_MAJOR)
            for i in gl.static_range(BLOCK_N // PIECE_N):
                b = source.slice(i * PIECE_N, PIECE_N, 0).load(LAYOUT)
                if PARTS == 2:
                    hi, lo = split_in_tf32(b)
                    copies.index(slot * 2).slice(i * PIECE_N, PIECE_N, 0).store(hi)
                    copies.index(slot * 2 + 1).slice(i * PIECE_N, PIECE_N, 0).store(lo)
                else:
                    rounded = add_half_of_tf32(b)
                    copies.index(slot).slice(i * PIECE_N, PIECE_N, 0).store(rounded)
            fence_async_shared()
            barrier()
            mbarrier.arrive(empty.index(stage))
            mbarrier.arrive(ready.index(slot))
            stage, phase = advance(stage, phase, STAGES)
            slot, slot_phase = advance(slot, slot_phase, SLOTS)


@gluon.jit
def sum_in_ieee(
    a_ptr, b_ptr, row0, col0, first_k, last_k, M, N, strides, SLICE_N: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """(WARPGROUP_M, SLICE_N) of A @ B by the ordinary fp32 units; a_ptr and b_ptr are the item's.

    In chains of CHAIN products, whose sums are added: as accurate as a K that is shared out.
    """
    stride_am, stride_ak, stride_bn, stride_bk = strides
    rows = row0 + gl.arange(0, WARPGROUP_M, gl.SliceLayout(1, LAYOUT))
    cols = col0 + gl.arange(0, SLICE_N, gl.SliceLayout(0, LAYOUT))
    a_ptrs = a_ptr + rows.to(gl.int64) * stride_am
    b_ptrs = b_ptr + cols.to(gl.int64) * stride_bn
    total = gl.zeros([WARPGROUP_M, SLICE_N], gl.float32, LAYOUT)
    for chain_k in range(first_k, last_k, CHAIN):
        acc = gl.zeros_like(total)
        for some_k in range(chain_k, min(chain_k + CHAIN, last_k), UNROLLED):
            for i in gl.static_range(UNROLLED):
                k = some_k + i
                k_there = gl.where(k < last_k, k, first_k).to(gl.int64)
                a = gl.load(a_ptrs + k_there * stride_ak, mask=(rows < M) & (k < last_k), other=0.0)
                b = gl.load(b_ptrs + k_there * stride_bk, mask=(cols < N) & (k < last_k), other=0.0)
                acc += gl.expand_dims(a, 1) * gl.expand_dims(b, 0)
        total += acc
    return total


@gluon.jit
def consumer(
    operands, sizes, strides, output,
    INDEX: gl.constexpr,
    BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
    CONVERTS: gl.constexpr, TRANSPOSED: gl.constexpr, A_K_MAJOR: gl.constexpr,
    ALIGNED: gl.constexpr, ACTIVATION: gl.constexpr, STREAMS: gl.constexpr, SLICE_N: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 8])
    SLICE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLICE_N, 8])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, MMA, 1)
    SLICES: gl.constexpr = BLOCK_N // SLICE_N
    ring, converted, a_ptr, b_ptr = operands
    a_smem, b_smem, full, empty = ring
    copies, ready, taken = converted
    M, N, K, batch, _ = sizes
    stride_ab, stride_bb, strides_in_item = strides
    c_ptr, stride_cz, stride_cm, bias_ptr, residual_ptr = output
    stage = 0
    phase = 0
    slot = 0
    slot_phase = 0
    for work in range(gl.program_id(0), count_items(sizes, BLOCK_N), gl.num_programs(0)):
        tile_row0, col0, z, first, last = locate(work, sizes, BLOCK_N, GROUP_M)
        row0 = tile_row0 + INDEX * WARPGROUP_M
        acc = gl.zeros((WARPGROUP_M, BLOCK_N), gl.float32, MMA)
        for _ in range(first, last):
            mbarrier.wait(full.index(stage), phase)
            a = matrix_view(a_smem.index(stage * 2 + INDEX), A_K_MAJOR)
            if PARTS == 2:
                a_hi, a_lo = split_in_tf32(a.load(A_LAYOUT))
                mbarrier.wait(ready.index(slot), slot_phase)
                b_hi = copies.index(slot * 2).permute([1, 0])
                b_lo = copies.index(slot * 2 + 1).permute([1, 0])
                nothing = gl.zeros_like(acc)
                products = warpgroup_mma(a_lo, b_hi, nothing, use_acc=False, is_async=True)
                products = warpgroup_mma(a_hi, b_lo, products, is_async=True)
                products = warpgroup_mma(a_hi, b_hi, products, is_async=True)
                products, _, _ = warpgroup_mma_wait(0, deps=(products, a_hi, a_lo))
                acc += products
            elif CONVERTS:
                rounded = add_half_of_tf32(a.load(A_LAYOUT))
                mbarrier.wait(ready.index(slot), slot_phase)
                b = copies.index(slot).permute([1, 0])
                acc = warpgroup_mma(rounded, b, acc, is_async=True)
                acc, _ = warpgroup_mma_wait(0, deps=(acc, rounded))
            else:
                b = matrix_view(b_smem.index(stage), True).permute([1, 0])
                if A_K_MAJOR:
                    acc = warpgroup_mma(a, b, acc, is_async=True)
                    acc = warpgroup_mma_wait(0, deps=(acc,))
                else:
                    in_registers = a.load(A_LAYOUT)
                    acc = warpgroup_mma(in_registers, b, acc, is_async=True)
                    acc, _ = warpgroup_mma_wait(0, deps=(acc, in_registers))
            # Not before: that A has been read is certain once it has been multiplied.
            mbarrier.arrive(empty.index(stage))
            stage, phase = advance(stage, phase, STAGES)
            if CONVERTS:
                mbarrier.arrive(taken.index(slot))
                slot, slot_phase = advance(slot, slot_phase, SLOTS)
        finite = True
        if PARTS == 2:
            outside = row0 >= M  # zero times a NaN of B is no reason to look at these
            finite = outside | (gl.min(gl.min((gl.abs(acc) < INF).to(gl.int32), 1), 0) == 1)
            acc *= 1 / (SPLIT_SCALE * SPLIT_SCALE)
        item = (z % batch).to(gl.int64)
        c_z = c_ptr + z.to(gl.int64) * stride_cz
        residual_z = None
        if residual_ptr is not None:
            residual_z = residual_ptr + z.to(gl.int64) * stride_cz
        parts = split_columns(acc, SLICES)
        for i in gl.static_range(SLICES):
            x = gl.convert_layout(parts[i], SLICE, assert_trivial=True)
            if PARTS == 2:
                if not finite:
                    x = sum_in_ieee(
                        a_ptr + item * stride_ab, b_ptr + item * stride_bb, row0,
                        col0 + i * SLICE_N, first * BLOCK_K, min(last * BLOCK_K, K), M, N,
                        strides_in_item, SLICE_N, SLICE,
                    )  # fmt: skip
            if TRANSPOSED:
                if bias_ptr is not None:
                    x += load_bias_of_rows(bias_ptr, row0, M, WARPGROUP_M, SLICE)
                store_transposed(c_z, x, row0, col0 + i * SLICE_N, M, N, stride_cm, residual_z,
                                 ALIGNED, ACTIVATION, STREAMS)  # fmt: skip
            else:
                if bias_ptr is not None:
                    x += load_bias(bias_ptr, col0 + i * SLICE_N, 0, N, SLICE_N, SLICE)
                store_slice(c_z, x, row0, 1, False, col0 + i * SLICE_N, 0, M, N, stride_cm,
                            residual_z, ALIGNED, 1, ACTIVATION, STREAMS,
                            not CONVERTS)  # fmt: skip


SIZES = ["M", "N", "K", "batch", "split_k"]
STRIDES = ["stride_ab", "stride_am", "stride_ak", "stride_bb", "stride_bn", "stride_bk"]
STRIDES += ["stride_cz", "stride_cm", "a_step", "b_step"]


@gluon.jit(do_not_specialize=[*SIZES, *STRIDES])
def gemm_tf32_hopper_kernel(
    a_desc,  # (batch, M, K) or (batch, K, M)
    b_desc,  # (batch, N, K) or (batch, K, N)
    a_ptr, b_ptr,  # the same operands, read if PARTS is 2
    c_ptr,  # (batch, M, N), or (split_k * batch, M, N) sums if split_k > 1
    bias_ptr, residual_ptr,  # (N,), or (M,) if TRANSPOSED, and C's shape; or None
    M, N, K, batch, split_k,
    stride_ab, stride_am, stride_ak,
    stride_bb, stride_bn, stride_bk,
    stride_cz, stride_cm, a_step, b_step,
    BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
    CONVERTS: gl.constexpr, TRANSPOSED: gl.constexpr,
    A_K_MAJOR: gl.constexpr, B_K_MAJOR: gl.constexpr, ALIGNED: gl.constexpr,
    ACTIVATION: gl.constexpr, STREAMS: gl.constexpr, SLICE_N: gl.constexpr,
    WAITS: gl.constexpr, LETS_NEXT: gl.constexpr,
):  # fmt: skip
    """a_step and b_step are 1, or 0 for an operand that all batch items share; see the module.

    TRANSPOSED: C is (batch, N, M) in memory, its rows stride_cm apart. ALIGNED: these start on
    16-byte boundaries. SLICE_N: columns of the tile that are finished and stored at a time.
    STREAMS: as kernels/hopper_store.py has it.
    """
    let_next_start(LETS_NEXT)
    gl.static_assert(gl.num_warps() == 4, "a consumer is one warpgroup")
    gl.static_assert(CONVERTS or (PARTS == 1 and B_K_MAJOR))
    gl.static_assert(not (CONVERTS and TRANSPOSED))
    a_shape: gl.constexpr = [STAGES * 2] + a_desc.block_shape
    b_shape: gl.constexpr = [STAGES] + b_desc.block_shape
    copy_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_K], gl.float32)
    a_smem = gl.allocate_shared_memory(gl.float32, a_shape, a_desc.layout)
    b_smem = gl.allocate_shared_memory(gl.float32, b_shape, b_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=3 if CONVERTS else 2)
    ring = (a_smem, b_smem, full, empty)
    converted = (None, None, None)
    if CONVERTS:
        copy_shape: gl.constexpr = [SLOTS * PARTS, BLOCK_N, BLOCK_K]
        copies = gl.allocate_shared_memory(gl.float32, copy_shape, copy_layout)
        ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
        taken = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(SLOTS):
            mbarrier.init(ready.index(i), count=1)
            mbarrier.init(taken.index(i), count=2)
        converted = (copies, ready, taken)
    operands = (ring, converted, a_ptr, b_ptr)
    sizes = (M, N, K, batch, split_k)
    strides = (stride_ab, stride_bb, (stride_am, stride_ak, stride_bn, stride_bk))
    output = (c_ptr, stride_cz, stride_cm, bias_ptr, residual_ptr)
    wait_for_previous(WAITS)
    # Registers of consumer 1 and those after it. Consumer 0 has what is left of four times 128, or
    # of three times 168.
    if CONVERTS:
        REGISTERS: gl.constexpr = [216, 56, 24] if PARTS == 2 else [168, 136, 40]
        gl.warp_specialize([
            (consumer, (operands, sizes, strides, output, 0, BLOCK_N, GROUP_M, STAGES, PARTS, True,
                        False, A_K_MAJOR, ALIGNED, ACTIVATION, STREAMS, SLICE_N)),
            (consumer, (operands, sizes, strides, output, 1, BLOCK_N, GROUP_M, STAGES, PARTS, True,
                        False, A_K_MAJOR, ALIGNED, ACTIVATION, STREAMS, SLICE_N)),
            (converter, (ring, converted, sizes, BLOCK_N, GROUP_M, STAGES, PARTS, B_K_MAJOR)),
            (producer, (a_desc, b_desc, ring, sizes, (a_step, b_step), BLOCK_N, GROUP_M, STAGES,
                        A_K_MAJOR, B_K_MAJOR)),
        ], [4, 4, 1], REGISTERS)  # fmt: skip
    else:
        gl.warp_specialize([
            (consumer, (operands, sizes, strides, output, 0, BLOCK_N, GROUP_M, STAGES, 1, False,
                        TRANSPOSED, A_K_MAJOR, ALIGNED, ACTIVATION, STREAMS, SLICE_N)),
            (consumer, (operands, sizes, strides, output, 1, BLOCK_N, GROUP_M, STAGES, 1, False,
                        TRANSPOSED, A_K_MAJOR, ALIGNED, ACTIVATION, STREAMS, SLICE_N)),
            (producer, (a_desc, b_desc, ring, sizes, (a_step, b_step), BLOCK_N, GROUP_M, STAGES,
                        A_K_MAJOR, B_K_MAJOR)),
        ], [4, 1], [232, 40])  # fmt: skip
