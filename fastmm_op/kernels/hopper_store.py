"""How consumers of the persistent Gluon kernels for Hopper store their part of a tile of C."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from fastmm_op.kernels.epilogue import activated, add_residual
from fastmm_op.kernels.hopper import tma_store


@gluon.jit
def split_columns(x, PARTS: gl.constexpr):
    if PARTS == 1:
        return (x,)
    else:
        x0, x1 = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute(0, 2, 1).split()
        return split_columns(x0, PARTS // 2) + split_columns(x1, PARTS // 2)


@gluon.constexpr_function
def store_layout(mma_layout, bits, aligned, rearranged, columns):
    """How a slice of C lies in registers when it is stored.

    A warp writes long stretches of rows, 16 bytes a thread where rows start on 16-byte boundaries:
    an H200 takes 4.29 GB of them in 1.05 to 1.19 ms, and in 1.5 straight from the wgmma layout,
    whose warps write 32 bytes of eight rows (benchmarks/results/NVIDIA_H200/
    storing_2026-11-28.txt).
    C may go that way all the same, where shared memory or registers have no room for another.
    """
    if not rearranged:
        return mma_layout
    if not aligned:
        return gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    vector = 128 // bits
    along = min(32, columns // vector)
    return gl.BlockedLayout([1, vector], [32 // along, along], [4, 1], [1, 0])


@gluon.constexpr_function
def transposed_store_layout(aligned):
    """As store_layout, where rows of the slice are columns of C."""
    if not aligned:
        return gl.BlockedLayout([1, 1], [32, 1], [1, 4], [0, 1])
    return gl.BlockedLayout([4, 1], [16, 2], [1, 4], [0, 1])


@gluon.jit
def load_bias(bias_ptr, col0, shift, N, SLICE_N: gl.constexpr, LAYOUT: gl.constexpr):
    """(1, SLICE_N) of the bias in fp32; columns past N are the wrapped ones of their class."""
    cols = col0 + gl.arange(0, SLICE_N, gl.SliceLayout(0, LAYOUT))
    mask = cols < N + shift
    cols = gl.where(cols < N, cols, cols - N)
    return gl.expand_dims(gl.load(bias_ptr + cols, mask=mask, other=0.0).to(gl.float32), 0)


@gluon.jit
def load_bias_of_rows(bias_ptr, row0, M, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """(ROWS, 1) of the bias in fp32, where rows of the tile are columns of C."""
    rows = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    return gl.expand_dims(gl.load(bias_ptr + rows, mask=rows < M, other=0.0).to(gl.float32), 1)


@gluon.jit
def store_slice(
    c_ptr, x, row0, row_step, in_class, col0, shift, M, N, stride_cm, residual_ptr,
    ALIGNED: gl.constexpr, CLASSES: gl.constexpr, ACTIVATION: gl.constexpr, STREAMS: gl.constexpr,
    REARRANGED: gl.constexpr,
):  # fmt: skip
    """Writes activation(x) + residual to a slice of C, of x's shape.

    Columns past N are the wrapped ones of their class. ALIGNED: the rows of C start on 16-byte
    boundaries, or those of a class do once shifted; the residual lies as C does. STREAMS: L2 is
    told that nobody will read C soon. REARRANGED: through shared memory, as store_layout has it.
    """
    c_type: gl.constexpr = c_ptr.dtype.element_ty
    SLICE_N: gl.constexpr = x.shape[1]
    bits: gl.constexpr = c_type.primitive_bitwidth
    layout: gl.constexpr = store_layout(x.type.layout, bits, ALIGNED, REARRANGED, SLICE_N)
    y = gl.convert_layout(activated(x, ACTIVATION, c_type), layout)
    rows = row0 + row_step * gl.arange(0, x.shape[0], gl.SliceLayout(1, layout))
    offs = gl.arange(0, SLICE_N, gl.SliceLayout(0, layout))
    row_starts = rows.to(gl.int64) * stride_cm
    inside = (row0 + row_step * (x.shape[0] - 1) < M) & (col0 + SLICE_N <= N)
    if CLASSES > 1:
        inside = inside & in_class
    if inside:
        starts = c_ptr + (row_starts + col0)
        if ALIGNED:
            starts = gl.multiple_of(starts, 16)  # bytes
        if residual_ptr is not None:
            sources = residual_ptr + (row_starts + col0)
            if ALIGNED:
                sources = gl.multiple_of(sources, 16)
            sources = gl.expand_dims(sources, 1) + gl.expand_dims(offs, 0)
            y = add_residual(y, gl.load(sources))
        gl.store(
            gl.expand_dims(starts, 1) + gl.expand_dims(offs, 0),
            y,
            cache_modifier=".cs" if STREAMS else "",
        )
    else:
        cols = col0 + offs
        mask = gl.expand_dims(rows < M, 1) & gl.expand_dims(cols < N + shift, 0)
        cols = gl.where(cols < N, cols, cols - N)
        if residual_ptr is not None:
            sources = gl.expand_dims(residual_ptr + row_starts, 1) + gl.expand_dims(cols, 0)
            y = add_residual(y, gl.load(sources, mask=mask, other=0.0))
        gl.store(gl.expand_dims(c_ptr + row_starts, 1) + gl.expand_dims(cols, 0), y, mask=mask)


@gluon.jit
def store_transposed(
    c_ptr, x, row0, col0, M, N, stride_cm, residual_ptr,
    ALIGNED: gl.constexpr, ACTIVATION: gl.constexpr, STREAMS: gl.constexpr,
):  # fmt: skip
    """As store_slice, REARRANGED, of a C of which x is transposed.

    M and N are x's sizes, stride_cm is between C's rows.
    """
    layout: gl.constexpr = transposed_store_layout(ALIGNED)
    SLICE_N: gl.constexpr = x.shape[1]
    y = gl.convert_layout(activated(x, ACTIVATION, c_ptr.dtype.element_ty), layout)
    offs = gl.expand_dims(gl.arange(0, x.shape[0], gl.SliceLayout(1, layout)), 1)
    cols = col0 + gl.arange(0, SLICE_N, gl.SliceLayout(0, layout))
    starts = cols.to(gl.int64) * stride_cm + row0
    modifier: gl.constexpr = ".cs" if STREAMS else ""
    if (row0 + x.shape[0] <= M) & (col0 + SLICE_N <= N):
        targets = c_ptr + starts
        if ALIGNED:
            targets = gl.multiple_of(targets, 16)  # bytes
        if residual_ptr is not None:
            sources = residual_ptr + starts
            if ALIGNED:
                sources = gl.multiple_of(sources, 16)
            y = add_residual(y, gl.load(gl.expand_dims(sources, 0) + offs))
        gl.store(gl.expand_dims(targets, 0) + offs, y, cache_modifier=modifier)
    else:
        mask = (row0 + offs < M) & gl.expand_dims(cols < N, 0)
        places = gl.expand_dims(starts, 0) + offs
        if residual_ptr is not None:
            y = add_residual(y, gl.load(residual_ptr + places, mask=mask, other=0.0))
        gl.store(c_ptr + places, y, mask=mask, cache_modifier=modifier)


@gluon.jit
def copy_slice(
    c_desc, c_smem, x, z, row0, col0, SLICE: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Starts TMA's copy of activation(x) to a slice of C, which leaves out what is outside.

    c_smem: buffers that slices take in turn. A tile's slices are a multiple of them, so that what
    is waited for is the copy from the buffer whose turn it is.
    """
    SLICE_N: gl.constexpr = x.shape[1]
    BUFFERS: gl.constexpr = c_smem.shape[0]
    y = activated(x, ACTIVATION, c_desc.dtype)
    buffer = c_smem.index(SLICE % BUFFERS)
    tma.store_wait(BUFFERS - 1)
    buffer.reshape([x.shape[0], SLICE_N]).store(y)
    fence_async_shared()
    tma_store(c_desc, [z, row0, col0], buffer)


@gluon.jit
def store_partial(ptr, acc):
    """Writes a consumer's accumulator as a dense fp32 matrix of its own at ptr."""
    layout: gl.constexpr = acc.type.layout
    rows = gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))
    cols = gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    gl.store(ptr + (gl.expand_dims(rows * acc.shape[1], 1) + gl.expand_dims(cols, 0)), acc)
