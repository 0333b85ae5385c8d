"""How a choice divides C: into classes of rows, tiles, those of the last wave, wider ones."""

from math import gcd

from fastmm_op.problem import COPY_BYTES, ITEMSIZE, Problem, cdiv, is_aligned, spare_elements
from fastmm_op.tiles import Choice, is_converted, operand_kind


def classes_of(row_bytes: int) -> int:
    """How many rows in a row start at different addresses modulo 16, if they are so long."""
    return COPY_BYTES // gcd(COPY_BYTES, row_bytes)


def a_classes(problem: Problem, choice: Choice) -> int:
    """How many classes of equally misaligned rows A is read in, or 1."""
    by_classes = choice.tile.kernel == "gemm_hopper" and not choice.pack_a
    if not by_classes or is_aligned(problem.a, problem.dtype):
        return 1
    return classes_of(problem.a.row_stride * ITEMSIZE[problem.dtype])


def row_classes(problem: Problem, choice: Choice) -> int:
    """How many classes of equally aligned rows C has, if the Hopper kernel stores by them; else 1.

    Only for one batch item and no split; A and B must be K-major, and B packed (with its first rows
    repeated past the end); M large enough that whole tiles of one class exist.
    """
    if choice.tile.kernel != "gemm_hopper" or problem.batch > 1 or choice.split > 1:
        return 1
    classes = classes_of(problem.N * ITEMSIZE[problem.dtype])
    k_major = (choice.pack_a or problem.a.k_major) and choice.pack_b
    elements = COPY_BYTES // ITEMSIZE[problem.dtype]
    fits = choice.tile.block_m * classes <= problem.M and elements <= problem.N
    return classes if k_major and fits else 1


def stores_are_aligned(problem: Problem, choice: Choice) -> bool:
    """Whether the Hopper kernel's tiles of C start on 16-byte boundaries."""
    itemsize = 4 if choice.split > 1 else ITEMSIZE[problem.dtype]
    return problem.N * itemsize % COPY_BYTES == 0 or row_classes(problem, choice) > 1


def is_transposed(problem: Problem, choice: Choice) -> bool:
    """Whether what is computed is B^T A^T, for A is the one that is K-major."""
    if choice.tile.kernel != "gemm_tf32_hopper" or problem.b.k_major:
        return False
    return not is_converted(problem, operand_kind(problem, choice.pack_a, choice.pack_b))


def count_tiles(problem: Problem, choice: Choice) -> int:
    """Tiles of C, batch included."""
    rows, columns = problem.M, problem.N + spare_elements(problem.b, problem.dtype)
    if is_transposed(problem, choice):
        rows, columns = columns, rows
    columns -= edge_columns(problem, choice)
    return count_tile_rows(problem, choice, rows) * cdiv(columns, choice.tile.block_n)


def wider_tiles(problem: Problem, choice: Choice) -> int:
    """Tiles, the first ones, that are edge_n columns wider than the others."""
    return count_tile_rows(problem, choice, problem.M) if choice.edge_n else 0


def count_tile_rows(problem: Problem, choice: Choice, rows: int) -> int:
    """Rows of tiles, batch included; the same number for each class of A's rows, if it has some."""
    classes = a_classes(problem, choice)
    return problem.batch * classes * cdiv(rows, classes * choice.tile.block_m)


def whole_tiles(problem: Problem, choice: Choice) -> int:
    """Tiles that tail_split does not concern, the first ones: full waves, if the rest is shared."""
    return count_tiles(problem, choice) - tail_tiles(problem, choice)


def tail_tiles(problem: Problem, choice: Choice) -> int:
    """Tiles, the last ones, that tail_split programs share; 0 if none are."""
    return count_tiles(problem, choice) % problem.arch.sms if choice.tail_split > 1 else 0


def edge_columns(problem: Problem, choice: Choice) -> int:
    """Columns of C, the last ones, that wider tiles take along."""
    return problem.N % choice.tile.block_n if choice.edge_n else 0
