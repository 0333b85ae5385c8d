"""Where the tiles of gemm_hopper_kernel lie in A, B and C, and in which order (gemm_hopper.py)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastmm_op.kernels.hopper import share_of, work_item

BLOCK_K = gl.constexpr(64)


@gluon.jit
def k_range(split, K, split_k):
    return share_of(gl.cdiv(K, BLOCK_K), split, split_k)


@gluon.jit
def count_row_tiles(M, BLOCK_M: gl.constexpr, A_CLASSES: gl.constexpr):
    """The same number for each class of A's rows, the last ones of which may lack rows, or all."""
    if A_CLASSES == 1:
        return gl.cdiv(M, BLOCK_M)
    else:
        return gl.cdiv(M, BLOCK_M * A_CLASSES) * A_CLASSES


@gluon.jit
def tile_rows(
    pid_m, M, stride_cm,
    BLOCK_M: gl.constexpr, A_CLASSES: gl.constexpr, CLASSES: gl.constexpr, VECTOR: gl.constexpr,
):  # fmt: skip
    """First row, distance of rows, whether they are one class of C, shift of its columns.

    VECTOR: elements of C in 16 bytes.
    """
    if A_CLASSES > 1:
        return pid_m // A_CLASSES * (BLOCK_M * A_CLASSES) + pid_m % A_CLASSES, A_CLASSES, False, 0
    elif CLASSES == 1:
        return pid_m * BLOCK_M, 1, False, 0
    else:
        in_class = pid_m < M // (BLOCK_M * CLASSES) * CLASSES
        r = pid_m % CLASSES
        row0 = gl.where(in_class, pid_m // CLASSES * (BLOCK_M * CLASSES) + r, pid_m * BLOCK_M)
        misalignment = r * (stride_cm % VECTOR).to(gl.int32) % VECTOR
        shift = gl.where(in_class, (VECTOR - misalignment) % VECTOR, 0)
        return row0, gl.where(in_class, CLASSES, 1), in_class, shift


@gluon.jit
def is_whole(in_class, col0, N, BLOCK_N: gl.constexpr):
    """Whether TMA can store a tile of a class of C's rows: no column of it wraps around."""
    return in_class & (col0 + BLOCK_N <= N)


@gluon.jit
def in_long_rows(row0, col0, N, CLASSES: gl.constexpr):
    """Where a place in C is, if CLASSES of its rows are one."""
    return row0 // CLASSES, row0 % CLASSES * N + col0


@gluon.jit
def lead_of(row0, stride_am, A_CLASSES: gl.constexpr):
    """Elements of 16 bits between the last 16-byte boundary and the start of a row of A."""
    if A_CLASSES == 1:
        return 0
    else:
        return row0 % A_CLASSES * (stride_am % 8) % 8


@gluon.jit
def find_class(row0, M, stride_am, A_CLASSES: gl.constexpr):
    """Where a tile starts in A's long rows (row, column); whether its class has a row more."""
    if A_CLASSES == 1:
        return row0, 0, False
    else:
        row_class = row0 % A_CLASSES
        col = row_class * stride_am - lead_of(row0, stride_am, A_CLASSES)
        return row0 // A_CLASSES, col, row_class < M % A_CLASSES


@gluon.jit
def count_column_tiles(N, BLOCK_N: gl.constexpr, EDGE_N: gl.constexpr):
    """Tiles of a row, without the wider one that EDGE_N makes of the last whole one."""
    if EDGE_N == 0:
        return gl.cdiv(N, BLOCK_N)
    else:
        return N // BLOCK_N - 1


@gluon.jit
def item_of_width(
    work, tiles_m, tiles_n, batch, whole, split_k,
    EDGE_N: gl.constexpr, GROUP_M: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """work_item of the tiles_n columns of tiles; or, by EDGE_N, of the wider ones behind them."""
    if EDGE_N == 0:
        return work_item(work, tiles_m, tiles_n, batch, whole, split_k, GROUP_M, TAIL)
    else:
        return work % tiles_m, tiles_n, work // tiles_m, 0, 1


@gluon.jit
def next_program(program, programs, done):
    """The place of a program among those that go on after so many work items."""
    return (program + programs - done % programs) % programs
