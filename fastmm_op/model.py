"""``ModelNew``: the op as a module, with the signature KernelBench evaluates."""

from torch import Tensor, nn

from fastmm_op.functional import matmul


class ModelNew(nn.Module):
    """``ModelNew()(A, B)`` is ``fastmm_op.matmul(A, B)``.

    Args:
        precision: ``"tf32"`` (default), ``"fp32"`` or ``"ieee"``; see ``fastmm_op.matmul``.
    """

    def __init__(self, precision: str = "tf32") -> None:
        super().__init__()
        self.precision = precision

    def forward(self, A: Tensor, B: Tensor) -> Tensor:
        """(..., M, K) by (..., K, N) -> (..., M, N); shapes, dtypes and errors as ``matmul``."""
        return matmul(A, B, precision=self.precision)

    def extra_repr(self) -> str:
        return f"precision={self.precision!r}"
