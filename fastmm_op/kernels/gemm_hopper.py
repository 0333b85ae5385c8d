"""Persistent warp-specialised 16-bit GEMM for Hopper, in Gluon.

    C[z, m, n] = 2^(row_exp[z, m] + col_exp[z, n]) * sum_k A[z, m, k] * B[z, k, n]

A and B are fp16 or bf16 in either order, products are summed in fp32, and C (fp32, fp16 or bf16) is
rounded once. One program per SM walks over the work items (batch, tile, split); inside it run

    producer     1 warp: TMA loads of a 128 x 64 piece of A and a 64 x BLOCK_N piece of B into a ring
    consumer 0   4 warps: wgmma into rows 0..63 of the tile, then the scales and the stores
    consumer 1   4 warps: the same for rows 64..127

which hand ring slots to each other through the mbarriers `full` and `empty`, as CUTLASS's "cooperative"
kernel does. The stores of a tile are handed to the TMA unit and drain under the next tile's main loop.
STORE names how C is written:

    "tma"      C's base and pitches are multiples of 16 bytes: everything by TMA, which clips the edges.
    "class"    C's rows are not 16-byte aligned (an odd N). Rows equal modulo P = 16 / gcd(16, row bytes)
               are aligned alike, so a tile takes 128 rows of one class, P apart, and C is described as
               [M // P, P * N]: class r starts at column r * N of every super-row. TMA wants the first
               column on a 16-byte boundary, so class r shifts its column tiles right by `shift` < 16 bytes
               and the columns this leaves at the left wrap around to the end of its last column tile. B
               pays for that: its N is an outer coordinate, free to start anywhere, and E - 1 more rows
               (E = 16 bytes of C) repeat its first rows. Only the slices that reach past N and the last
               M mod 128 P rows go the masked way.
    "masked"   ordinary stores, through shared memory so that a warp writes one row's consecutive columns.

All descriptors have rank 3, the batch outermost, so a tail in K or M never reads the next batch.
"""

from dataclasses import dataclass
from math import gcd

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.9 renamed both copies.
tma_load = getattr(tma, "async_load", None) or getattr(tma, "async_copy_global_to_shared", None)
tma_store = getattr(tma, "async_store", None) or getattr(tma, "async_copy_shared_to_global", None)
if tma_load is None or tma_store is None or not hasattr(gl, "warp_specialize"):
    raise ImportError(f"Gluon of Triton {triton.__version__} lacks TMA copies or warp_specialize")

BLOCK_M, BLOCK_K = 128, 64
WARPGROUP_M = gl.constexpr(64)
NARROW = gl.constexpr(60)  # |exponent| up to here: two multiplications can neither overflow nor underflow


@gluon.jit
def work_item(work, tiles_m, tiles_n, batch, GROUP_M: gl.constexpr):
    tiles = tiles_m * tiles_n
    z = work // tiles  # split * batch + batch index
    tile = work % tiles
    group_size = GROUP_M * tiles_n
    first_m = tile // group_size * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)
    pid_m = first_m + tile % group_size % rows
    pid_n = tile % group_size // rows
    return pid_m, pid_n, z


@gluon.jit
def k_range(split, K, BLOCK_K: gl.constexpr, SPLIT_K: gl.constexpr):
    steps = gl.cdiv(K, BLOCK_K)
    return split * steps // SPLIT_K, (split + 1) * steps // SPLIT_K


@gluon.jit
def tile_rows(pid_m, M, stride_cm, BLOCK_M: gl.constexpr, P: gl.constexpr, E: gl.constexpr):
    """First row, distance between rows, whether these are one class, and the shift of its columns."""
    if P == 1:
        return pid_m * BLOCK_M, 1, False, 0
    else:
        class_tiles = M // (BLOCK_M * P) * P
        in_class = pid_m < class_tiles
        r = pid_m % P
        row0 = gl.where(in_class, pid_m // P * (BLOCK_M * P) + r, pid_m * BLOCK_M)
        shift = gl.where(in_class, (E - r * (stride_cm % E).to(gl.int32) % E) % E, 0)
        return row0, gl.where(in_class, P, 1), in_class, shift


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def producer(
    a_desc, a_class_desc, b_desc, ring, sizes, batch_steps, stride_cm,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    SPLIT_K: gl.constexpr, STAGES: gl.constexpr, P: gl.constexpr, E: gl.constexpr,
    A_K_MAJOR: gl.constexpr, B_K_MAJOR: gl.constexpr,
):  # fmt: skip
    a_smem, b_smem, full, empty = ring
    M, N, K, batch = sizes
    a_step, b_step = batch_steps
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, BLOCK_N)
    stage = 0
    phase = 1  # a fresh barrier lets the waiter of the other phase through: every slot starts empty
    for work in range(gl.program_id(0), tiles_m * tiles_n * batch * SPLIT_K, gl.num_programs(0)):
        pid_m, pid_n, z = work_item(work, tiles_m, tiles_n, batch, GROUP_M)
        row0, row_step, in_class, shift = tile_rows(pid_m, M, stride_cm, BLOCK_M, P, E)
        col0 = pid_n * BLOCK_N + shift
        k_first, k_last = k_range(z // batch, K, BLOCK_K, SPLIT_K)
        a_batch = z % batch * a_step
        b_batch = z % batch * b_step
        for step in range(k_first, k_last):
            k = step * BLOCK_K
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
            for i in gl.static_range(2):
                a_dst = a_smem.index(stage * 2 + i)
                if P > 1:
                    if in_class:
                        dst = a_dst.reshape([WARPGROUP_M, 1, BLOCK_K])
                        tma_load(a_class_desc, [row0 // P + i * WARPGROUP_M, row0 % P, k], bar, dst)
                    else:
                        tma_load(a_desc, [a_batch, row0 + i * WARPGROUP_M, k], bar, a_dst)
                elif A_K_MAJOR:
                    tma_load(a_desc, [a_batch, row0 + i * WARPGROUP_M, k], bar, a_dst)
                else:
                    tma_load(a_desc, [a_batch, k, row0 + i * WARPGROUP_M], bar, a_dst)
            if B_K_MAJOR:
                tma_load(b_desc, [b_batch, col0, k], bar, b_smem.index(stage))
            else:
                tma_load(b_desc, [b_batch, k, col0], bar, b_smem.index(stage))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def matrix_view(smem, K_INNER: gl.constexpr, ROWS: gl.constexpr, BLOCK_K: gl.constexpr):
    """A ring slot as (ROWS, BLOCK_K), whichever of the two is contiguous."""
    if K_INNER:
        return smem.reshape([ROWS, BLOCK_K])
    else:
        return smem.reshape([BLOCK_K, ROWS]).permute([1, 0])


@gluon.jit
def power_of_two(e):
    return ((e + 127) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def apply_exponents(x, row_e, col_e, wide):
    """x * 2^(row_e + col_e), every product but the last exact for 2^-48 <= |x| <= 2^50."""
    row_e = gl.expand_dims(row_e, 1)
    col_e = gl.expand_dims(col_e, 0)
    if wide:  # rare; the sum first: one huge and one tiny factor must not meet x one after the other
        e = gl.minimum(gl.maximum(row_e + col_e, -200), 176)  # beyond: 0 and Inf for every such x
        first = gl.minimum(gl.maximum(e, -76), 76)
        y = x * power_of_two(first) * power_of_two(e - first)
    else:
        y = x * power_of_two(row_e) * power_of_two(col_e)
    return y


@gluon.jit
def split_columns(x, PARTS: gl.constexpr):
    if PARTS == 1:
        return (x,)
    else:
        x0, x1 = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute(0, 2, 1).split()
        return split_columns(x0, PARTS // 2) + split_columns(x1, PARTS // 2)


@gluon.jit
def store_rows(c_ptr, smem, row0, row_step, col0, shift, M, N, stride_cm, SLICE_N: gl.constexpr,
               INTERIOR: gl.constexpr):  # fmt: skip
    """Writes a staged slice with ordinary stores; columns past N are the wrapped ones of its class."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [gl.num_warps(), 1], [1, 0])
    y = smem.load(layout)  # (64, SLICE_N)
    rows = row0 + row_step * gl.arange(0, WARPGROUP_M, gl.SliceLayout(1, layout))
    cols = col0 + gl.arange(0, SLICE_N, gl.SliceLayout(0, layout))
    row_ptrs = gl.expand_dims(c_ptr + rows.to(gl.int64) * stride_cm, 1)
    if INTERIOR:
        inside = (row0 + row_step * (WARPGROUP_M - 1) < M) & (col0 + SLICE_N <= N)
    else:
        inside: gl.constexpr = False
    if inside:
        gl.store(row_ptrs + gl.expand_dims(cols, 0), y)
    else:
        mask = gl.expand_dims(rows < M, 1) & gl.expand_dims(cols < N + shift, 0)
        gl.store(row_ptrs + gl.expand_dims(gl.where(cols < N, cols, cols - N), 0), y, mask=mask)


@gluon.jit
def consumer(
    c_desc, c_ptr, row_exp_ptr, col_exp_ptr, ring, staging, exponents, sizes, batch_steps, strides_c,
    INDEX: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    SPLIT_K: gl.constexpr, STAGES: gl.constexpr, P: gl.constexpr, E: gl.constexpr,
    A_K_MAJOR: gl.constexpr, B_K_MAJOR: gl.constexpr, SCALED: gl.constexpr,
    STORE: gl.constexpr, SLICE_N: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SLICE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLICE_N, 16])
    FLAT: gl.constexpr = gl.BlockedLayout([max(BLOCK_N // 128, 1)], [32], [4], [0])
    SLICES: gl.constexpr = BLOCK_N // SLICE_N
    a_smem, b_smem, full, empty = ring
    M, N, K, batch = sizes
    row_exp_step, col_exp_step = batch_steps
    stride_cz, stride_cm = strides_c
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, BLOCK_N)
    stage = 0
    phase = 0
    for work in range(gl.program_id(0), tiles_m * tiles_n * batch * SPLIT_K, gl.num_programs(0)):
        pid_m, pid_n, z = work_item(work, tiles_m, tiles_n, batch, GROUP_M)
        tile_row0, row_step, in_class, shift = tile_rows(pid_m, M, stride_cm, BLOCK_M, P, E)
        row0 = tile_row0 + row_step * (INDEX * WARPGROUP_M)
        col0 = pid_n * BLOCK_N + shift
        k_first, k_last = k_range(z // batch, K, BLOCK_K, SPLIT_K)
        if SCALED:  # asked for here, used after the main loop, which hides the latency
            row_exp = row_exp_ptr + (z % batch).to(gl.int64) * row_exp_step
            col_exp = col_exp_ptr + (z % batch).to(gl.int64) * col_exp_step
            rows = row0 + row_step * gl.arange(0, WARPGROUP_M, gl.SliceLayout(1, SLICE))
            row_e = gl.load(row_exp + rows, mask=rows < M, other=0)
            offs = gl.arange(0, BLOCK_N, FLAT)
            cols = col0 + offs
            cols = gl.where(cols < N, cols, cols - N)
            flat_col_e = gl.load(col_exp + cols, mask=pid_n * BLOCK_N + offs < N, other=0)
            flat_rows = row0 + row_step * (offs % WARPGROUP_M)
            flat_row_e = gl.load(row_exp + flat_rows, mask=flat_rows < M, other=0)

        acc = gl.zeros((WARPGROUP_M, BLOCK_N), gl.float32, MMA)
        previous = stage
        for step in range(k_first, k_last):
            mbarrier.wait(full.index(stage), phase)
            a = matrix_view(a_smem.index(stage * 2 + INDEX), A_K_MAJOR, WARPGROUP_M, BLOCK_K)
            b = matrix_view(b_smem.index(stage), B_K_MAJOR, BLOCK_N, BLOCK_K).permute([1, 0])
            pending = warpgroup_mma(a, b, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(pending,))
            mbarrier.arrive(empty.index(previous), pred=step > k_first)
            previous = stage
            stage, phase = advance(stage, phase, STAGES)
        if SCALED:  # under the last wgmma
            exponents.store(flat_col_e)
            wide = gl.max(gl.maximum(gl.abs(flat_row_e), gl.abs(flat_col_e)), 0) > NARROW
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(previous), pred=k_last > k_first)

        parts = split_columns(acc, SLICES)
        for i in gl.static_range(SLICES):
            x = gl.convert_layout(parts[i], SLICE, assert_trivial=True)  # (64, SLICE_N)
            col = col0 + i * SLICE_N
            if SCALED:
                col_e = exponents.slice(i * SLICE_N, SLICE_N).load(gl.SliceLayout(0, SLICE))
                x = apply_exponents(x, row_e, col_e, wide)
            buffer = staging.index(INDEX * BUFFERS + i % BUFFERS)
            smem = buffer.reshape([WARPGROUP_M, SLICE_N])
            if STORE == "masked":
                smem.store(x.to(c_ptr.dtype.element_ty))
                c_z = c_ptr + z.to(gl.int64) * stride_cz
                store_rows(c_z, smem, row0, row_step, col, shift, M, N, stride_cm, SLICE_N, STORE == "masked")
            else:
                tma.store_wait(BUFFERS - 1)  # the store that read this buffer last
                smem.store(x.to(c_ptr.dtype.element_ty))
                if STORE == "tma":
                    fence_async_shared()
                    tma_store(c_desc, [z, row0, col], buffer)
                elif in_class & (col + SLICE_N <= N):
                    fence_async_shared()
                    tma_store(c_desc, [0, row0 // P, (row0 % P * stride_cm + col).to(gl.int32)], buffer)
                else:
                    tma.store_wait(0)  # this slice adds no bulk group: keep the count above true
                    store_rows(c_ptr, smem, row0, row_step, col, shift, M, N, stride_cm, SLICE_N, STORE == "masked")
    if STORE != "masked":
        tma.store_wait(0)


INTEGERS = ["M", "N", "K", "batch", "stride_cz", "stride_cm", "a_step", "b_step"]


@gluon.jit(do_not_specialize=INTEGERS + ["row_exp_step", "col_exp_step"])
def gemm_hopper_kernel(
    a_desc, a_class_desc, b_desc, c_desc, c_ptr, row_exp_ptr, col_exp_ptr,
    M, N, K, batch,
    stride_cz, stride_cm, a_step, b_step, row_exp_step, col_exp_step,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    SPLIT_K: gl.constexpr, STAGES: gl.constexpr, P: gl.constexpr,
    A_K_MAJOR: gl.constexpr, B_K_MAJOR: gl.constexpr, SCALED: gl.constexpr,
    STORE: gl.constexpr, SLICE_N: gl.constexpr, BUFFERS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    gl.static_assert(num_warps == 4 and BLOCK_M == 128, "two consumers of four warps, 64 rows each")
    gl.static_assert(STORE == "class" or P == 1)
    gl.static_assert(STORE != "class" or (A_K_MAJOR and B_K_MAJOR and SPLIT_K == 1))
    c_type: gl.constexpr = c_ptr.dtype.element_ty
    E: gl.constexpr = 128 // c_type.primitive_bitwidth
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    staged: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 64, SLICE_N], c_type)
    a_smem = gl.allocate_shared_memory(a_desc.dtype, [STAGES * 2] + a_desc.block_shape, a_desc.layout)
    b_smem = gl.allocate_shared_memory(b_desc.dtype, [STAGES] + b_desc.block_shape, b_desc.layout)
    staging = gl.allocate_shared_memory(c_type, [2 * BUFFERS, 1, 64, SLICE_N], staged)
    exponents = gl.allocate_shared_memory(gl.int32, [2, BLOCK_N], flat)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    ring = (a_smem, b_smem, full, empty)
    sizes = (M, N, K, batch)
    exp_steps = (row_exp_step, col_exp_step)
    strides_c = (stride_cz, stride_cm)
    gl.warp_specialize([
        (consumer, (c_desc, c_ptr, row_exp_ptr, col_exp_ptr, ring, staging, exponents.index(0), sizes,
                    exp_steps, strides_c, 0, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLIT_K, STAGES, P, E,
                    A_K_MAJOR, B_K_MAJOR, SCALED, STORE, SLICE_N, BUFFERS)),
        (consumer, (c_desc, c_ptr, row_exp_ptr, col_exp_ptr, ring, staging, exponents.index(1), sizes,
                    exp_steps, strides_c, 1, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLIT_K, STAGES, P, E,
                    A_K_MAJOR, B_K_MAJOR, SCALED, STORE, SLICE_N, BUFFERS)),
        (producer, (a_desc, a_class_desc, b_desc, ring, sizes, (a_step, b_step), stride_cm,
                    BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLIT_K, STAGES, P, E, A_K_MAJOR, B_K_MAJOR)),
    ], [4, 1], [232, 40])  # fmt: skip


SHARED_MEMORY_LIMIT = 232448  # bytes a block may have on sm_90


@dataclass(frozen=True)
class HopperConfig:
    """One compiled shape of the kernel; slice_n and buffers size the staging area of the stores."""

    block_n: int = 256
    stages: int = 4
    group_m: int = 8
    store: str = "tma"  # "tma", "class" or "masked"
    slice_n: int = 32
    buffers: int = 2

    def __post_init__(self):
        slices, rest = divmod(self.block_n, self.slice_n)
        if self.block_n not in (64, 128, 256) or rest or slices % self.buffers:
            raise ValueError(f"slices and buffers do not divide the tile: {self}")
        if self.store not in ("tma", "class", "masked"):
            raise ValueError(f"unknown store {self.store!r}")

    def shared_memory_bytes(self, c_itemsize, scaled=True):
        """An upper bound, at most 512 bytes above what the compiler reports."""
        ring = self.stages * (BLOCK_M + self.block_n) * BLOCK_K * 2
        staging = 2 * self.buffers * 64 * self.slice_n * c_itemsize
        exponents = 2 * self.block_n * 4 if scaled else 0
        barriers = 2 * 8 * self.stages
        captures_and_padding = 512  # the partitions' arguments, scratch of one reduction
        return ring + staging + exponents + barriers + captures_and_padding


def row_classes(c_pitch, c_itemsize):
    """P: rows of C equal modulo P start at the same offset from a 16-byte boundary."""
    return 16 // gcd(16, c_pitch * c_itemsize)


def wrap_rows(c_itemsize):
    """Rows that B's buffer repeats after its N rows under store="class"."""
    return 16 // c_itemsize - 1


def _descriptor(tensor, shape, strides, box):
    dtype = getattr(gl, str(tensor.dtype).removeprefix("torch."))
    layout = gl.NVMMASharedLayout.get_default_for(box, dtype)
    return TensorDescriptor(tensor, shape, strides, box, layout)


def _batched(t):
    """(shape, strides) with a batch dimension; a broadcast one counts as a single matrix."""
    shape, strides = list(t.shape), list(t.stride())
    if len(shape) == 2:
        shape, strides = [1] + shape, [0] + strides
    if strides[0] == 0:
        shape[0] = 1
    return shape, strides


def _operand(t, rows_dim, box_rows, extra_rows=0):
    """Descriptor of A (rows_dim 1) or B (rows_dim 2) as [batch, rows, K] or [batch, K, rows]."""
    shape, strides = _batched(t)
    k_dim = 3 - rows_dim
    k_major = strides[k_dim] == 1
    outer, inner = (rows_dim, k_dim) if k_major else (k_dim, rows_dim)
    shape[rows_dim] += extra_rows
    pitch = strides[outer]
    batch_stride = strides[0] if shape[0] > 1 else pitch
    box = [1, box_rows, BLOCK_K] if k_major else [1, BLOCK_K, box_rows]
    dims = [shape[0], shape[outer], shape[inner]]
    return _descriptor(t, dims, [batch_stride, pitch, strides[inner]], box), k_major, shape[0] > 1


def launch(a, b, c, row_exp, col_exp, config, *, num_sms, split_k=1):
    """Runs the kernel on strided views: a [(batch,) M, K], b [(batch,) K, N], c [(batch,) M, N].

    a and b: one of the last two strides is 1, the other, and the batch stride, are multiples of 16 bytes, and
    so is the base; a batch of 1 or of stride 0 is broadcast. row_exp [(batch,) M] and col_exp [(batch,) N] are
    int32 and contiguous in their last dimension, or both None. With split_k > 1 c is a workspace
    [split_k * batch, M, N] for unscaled partial sums. c's last stride is 1; store="tma" also wants c's base,
    pitch and batch stride to be multiples of 16 bytes; store="class" wants K-major a and b without a
    batch, c's base on 16 bytes, and rows N .. N + wrap_rows(itemsize) - 1 in b's buffer that repeat
    its first ones (as col_exp is indexed modulo N, it needs nothing). K must not be 0.
    """
    M, K = a.shape[-2:]
    N = b.shape[-1]
    c_size = c.element_size()
    by_class = config.store == "class"
    c_shape, (stride_cz, stride_cm, _) = _batched(c)
    a_desc, a_k_major, a_batched = _operand(a, 1, 64)
    b_desc, b_k_major, b_batched = _operand(b, 2, config.block_n, wrap_rows(c_size) if by_class else 0)
    a_class_desc = c_desc = None
    classes = 1
    if by_class:
        classes = row_classes(stride_cm, c_size)
        if c_shape[0] > 1 or split_k > 1 or not (a_k_major and b_k_major) or N <= wrap_rows(c_size):
            raise ValueError('store="class" needs one batch, no split, K-major operands, N >= 16 bytes')
        if classes == 1:
            raise ValueError('C\'s rows are all aligned: use store="tma"')
        super_rows = max(M // classes, 1)  # of a shorter C no tile is a class tile
        pitch = a.stride(-2)
        a_class_desc = _descriptor(a, [super_rows, classes, K], [classes * pitch, pitch, 1], [64, 1, BLOCK_K])
        width = (classes - 1) * stride_cm + N
        super_pitch = classes * stride_cm
        c_desc = _descriptor(c, [1, super_rows, width], [super_pitch, super_pitch, 1], [1, 64, config.slice_n])
    elif config.store == "tma":
        z_stride = stride_cz if c_shape[0] > 1 else stride_cm
        c_desc = _descriptor(c, c_shape, [z_stride, stride_cm, 1], [1, 64, config.slice_n])

    work = triton.cdiv(M, BLOCK_M) * triton.cdiv(N, config.block_n) * c_shape[0]
    scaled = row_exp is not None
    return gemm_hopper_kernel[(min(num_sms, work),)](
        a_desc, a_class_desc, b_desc, c_desc, c, row_exp, col_exp,
        M, N, K, c_shape[0] // split_k,
        stride_cz, stride_cm, int(a_batched), int(b_batched),
        row_exp.stride(0) if scaled and row_exp.dim() == 2 else 0,
        col_exp.stride(0) if scaled and col_exp.dim() == 2 else 0,
        BLOCK_M, config.block_n, BLOCK_K, config.group_m, split_k, config.stages, classes,
        a_k_major, b_k_major, scaled, config.store, config.slice_n, config.buffers,
        num_warps=4,
    )  # fmt: skip
