"""What is asked: one product, as plain numbers that need neither torch nor a GPU."""

from dataclasses import dataclass

from fastmm_op.arch import Arch

ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2, "int32": 4}
PRECISIONS = ("tf32", "fp32", "ieee")
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")

# cp.async and TMA move 16 bytes at a time.
COPY_BYTES = 16
# The unit in which a GPU's memory is read.
SECTOR_BYTES = 32
# Sums of fewer products than this hardly round in fp32, and would show that hi and lo hold 22 bits.
MIN_K_OF_PARTS = 16


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    return cdiv(a, multiple) * multiple


def next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def runs_along_k(row_stride: int, k_stride: int) -> bool:
    """Whether K has the smaller stride; a dimension of stride 0 has no neighbours at all."""
    return row_stride == 0 or 0 < k_stride <= row_stride


@dataclass(frozen=True)
class Operand:
    """How one operand lies in memory, seen as (batch, rows, K).

    The rows of A are the rows of the product, the rows of B are its columns.

    Attributes:
        batch_stride, row_stride, k_stride: in elements; 0 where the operand is expanded, and for
            dimensions of size one.
        pointer_alignment: the largest power of two up to 16 that divides the base address, bytes.
        shifted: batch items start a little behind 16-byte addresses, and are read from these; in
            themselves they are aligned.
    """

    batch_stride: int
    row_stride: int
    k_stride: int
    pointer_alignment: int = COPY_BYTES
    shifted: bool = False

    @property
    def k_major(self) -> bool:
        """Whether neighbours along K are the closest in memory."""
        return runs_along_k(self.row_stride, self.k_stride)


@dataclass(frozen=True)
class Epilogue:
    """What becomes of a product before it is stored: activation(product + bias) + residual.

    Attributes:
        bias: whether there is one: (N,), contiguous, 16-byte aligned, of the product's dtype.
        activation: one of ACTIVATIONS.
        residual: whether there is one: of the result's shape and dtype, contiguous and aligned.
    """

    bias: bool = False
    activation: str = "none"
    residual: bool = False


@dataclass(frozen=True)
class Problem:
    """One product c[batch, M, N] = a[batch, M, K] @ b[batch, N, K]^T and where it runs.

    Attributes:
        batch, M, N, K: sizes in elements.
        dtype: of both inputs and the output: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        precision: ``"tf32"``, ``"fp32"`` or ``"ieee"``; it concerns fp32 inputs only.
        a, b: the operands' layouts.
        arch: the card.
        epilogue: what is done to the product.
        prepacked: whether a packed copy of B, made before, is at hand (kept.py); B is there too.
    """

    batch: int
    M: int
    N: int
    K: int
    dtype: str
    precision: str
    a: Operand
    b: Operand
    arch: Arch
    epilogue: Epilogue = Epilogue()
    prepacked: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.M * self.N * self.K

    @property
    def tf32(self) -> bool:
        """Whether fp32 operands may be rounded to 10-bit significands.

        Not in a product that is one wide (or one deep): bandwidth bounds it, so exactness costs
        nothing, and torch computes it in fp32 under its TF32 setting too.
        """
        rounded = not self.one_wide and self.K > 1
        return self.dtype == "fp32" and self.precision == "tf32" and rounded

    @property
    def parts(self) -> int:
        """16-bit matrices that packing both operands makes of each; 0 where it costs accuracy.

        fp32 operands: one where they may be rounded, else two ("hi" and "lo"), if many products are
        summed; none for ``"ieee"``. 16-bit operands: one, a copy.
        """
        if self.dtype != "fp32" or self.tf32:
            return 1
        summed = not self.one_wide and self.K >= MIN_K_OF_PARTS
        return 2 if self.precision == "fp32" and summed else 0

    @property
    def split_in_registers(self) -> bool:
        """Whether fp32 operands that are not packed are split on their way to the tensor core."""
        return self.parts == 2 and self.arch.splits_fp32

    @property
    def one_wide(self) -> bool:
        """A matrix times a vector, from either side."""
        return 1 in (self.M, self.N)


def problem_of(
    M: int, K: int, N: int, *, batch: int, dtype: str, layout: str, precision: str, arch: Arch
) -> Problem:
    """The Problem of freshly allocated operands.

    Args:
        M, K, N: A is (M, K) and B is (K, N), ``batch`` of each.
        dtype: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        layout: a letter for A and one for B; N is row-major, T a transposed view.
        precision: as ``fastmm_op.matmul``.
        arch: the card.
    """

    def stride(size: int, elements: int) -> int:
        # As launch.describe: the stride of a dimension of size one is never used.
        return 0 if size == 1 else elements

    a_strides = (K, 1) if layout[0] == "N" else (1, M)
    b_strides = (1, N) if layout[1] == "N" else (K, 1)
    return Problem(
        batch=batch,
        M=M,
        N=N,
        K=K,
        dtype=dtype,
        precision=precision,
        a=Operand(stride(batch, M * K), stride(M, a_strides[0]), stride(K, a_strides[1])),
        b=Operand(stride(batch, K * N), stride(N, b_strides[0]), stride(K, b_strides[1])),
        arch=arch,
    )


def starts_in_sectors(operand: Operand, dtype: str) -> bool:
    """Whether an aligned operand's rows, or columns, all start where a memory sector does."""
    pitch = max(operand.row_stride, operand.k_stride)
    return pitch * ITEMSIZE[dtype] % SECTOR_BYTES == 0


def spare_elements(operand: Operand, dtype: str) -> int:
    """How far tiles of an operand that is shifted along its rows may begin before the first."""
    along_rows = operand.shifted and not operand.k_major
    return COPY_BYTES // ITEMSIZE[dtype] - 1 if along_rows else 0


def is_aligned(operand: Operand, dtype: str) -> bool:
    """Whether all rows, or all columns, are read from 16-byte addresses and are contiguous."""
    elements = COPY_BYTES // ITEMSIZE[dtype]
    strides = [operand.row_stride, operand.k_stride]
    contiguous = 1 in strides
    if contiguous:
        strides.remove(1)
    strides += [] if operand.shifted else [operand.batch_stride]
    pointer_is_aligned = operand.pointer_alignment % COPY_BYTES == 0
    return contiguous and pointer_is_aligned and all(s % elements == 0 for s in strides)


def loads_are_wide(operand: Operand, neighbours: int, pitch: int = 0) -> bool:
    """Whether Triton loads several neighbours at once. Of integers it knows if 16 divides them.

    Args:
        neighbours: their stride.
        pitch: the other stride, if there is one.
    """
    known = pitch % 16 == 0 and operand.batch_stride % 16 == 0
    aligned = operand.pointer_alignment == COPY_BYTES
    return neighbours == 1 and aligned and (known or operand.shifted)
