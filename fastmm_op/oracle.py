"""The judge of results: float64 on sampled rows, and the error that a precision allows.

Shared by the command line, the benchmark and users. Errors are normwise: the Frobenius norm of the
difference over that of the float64 product, on the sampled rows.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastmm_op import contract

# Promised multiples: of torch's own error, or of what rounding alone costs where that is more.
PROMISE = {"tf32": 1.1, "fp16": 1.1, "bf16": 1.1, "fp32": 2.0, "ieee": 2.0}
# Unit roundoff of what each precision rounds to.
ROUNDOFF = {"tf32": 2.0**-11, "fp16": 2.0**-11, "bf16": 2.0**-8, "fp32": 2.0**-24, "ieee": 2.0**-24}
MAX_ITEMS = 8


def spread(n: int, count: int) -> Tensor:
    """``min(n, count)`` sorted indices below n, first and last among them, the same every time."""
    if count >= n:
        return torch.arange(n)
    if count < 3:
        return torch.tensor([0, n - 1][:count])
    generator = torch.Generator().manual_seed(0)
    inner = torch.randperm(n - 2, generator=generator)[: count - 2] + 1
    return torch.cat([torch.tensor([0]), inner.sort().values, torch.tensor([n - 1])])


def round_to_tf32(x: Tensor) -> Tensor:
    """float32, any shape, with a 10-bit significand, ties away from zero; finite stays finite."""
    bits = x.contiguous().view(torch.int32)
    rounded = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    truncated = (bits & ~0x1FFF).view(torch.float32)
    rounded = torch.where(rounded.isfinite(), rounded, truncated)
    return torch.where(x.isfinite(), rounded, x)


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check.

    Attributes:
        error: normwise, against float64; NaN if the result has the wrong form.
        failure: None if the result passed, else one sentence.
    """

    error: float
    failure: str | None = None


class Oracle:
    """The float64 product of a and b, on up to ``max_rows`` of its rows.

    Args:
        a: (K,), (M, K) or (..., M, K); float32, float16 or bfloat16, finite.
        b: (K,), (K, N) or (..., K, N); same dtype and device.
        max_rows: rows compared, first and last included; for batches, spread over up to 8 items.
    """

    def __init__(self, a: Tensor, b: Tensor, max_rows: int = 256) -> None:
        self.out_shape = torch.Size(contract.result_shape(a, b))
        self.out_dtype = a.dtype
        a, b = contract.fold(a, b)
        self.matrix_shape = (a.shape[0], a.shape[1], b.shape[2])
        self.items = spread(a.shape[0], MAX_ITEMS).to(a.device)
        rows = max(1, max_rows // max(1, len(self.items)))
        self.rows = spread(a.shape[1], rows).to(a.device)
        self.a = a[self.items[:, None], self.rows]
        # One item is a view: indexing would copy all of B.
        self.b = b if b.shape[0] == 1 else b[self.items]
        self.exact = self.a.double() @ self.b.double()

    def sampled(self, out: Tensor) -> Tensor:
        """The sampled rows of a result of shape ``out_shape``, as float64 (items, rows, N)."""
        return out.reshape(self.matrix_shape)[self.items[:, None], self.rows].double()

    def error(self, out: Tensor) -> float:
        """Normwise error of a result on the sampled rows; absolute where the product is zero."""
        return self.distance(self.sampled(out))

    def distance(self, values: Tensor) -> float:
        difference = torch.linalg.vector_norm(values - self.exact).item()
        norm = torch.linalg.vector_norm(self.exact).item()
        return difference / norm if norm else difference

    @cached_property
    def rounding_error(self) -> float:
        """What rounding the result once to the output's dtype costs, all else being exact."""
        return self.distance(self.exact.to(self.out_dtype).double())

    @cached_property
    def tf32_error(self) -> float:
        """What rounding both (float32) operands to TF32 costs, all else being exact."""
        return self.distance(round_to_tf32(self.a).double() @ round_to_tf32(self.b).double())

    def allowed(self, precision: str, torch_error: float | None = None) -> float:
        """The largest error that the promise of ``precision`` admits.

        Args:
            precision: ``"tf32"``, ``"fp32"``, ``"ieee"``, or ``"fp16"``, ``"bf16"`` (the dtypes).
            torch_error: that of torch.matmul under the same setting, if it is known.
        """
        if precision in ("fp32", "ieee"):
            if torch_error is None:
                return self.plausible(precision)
            return PROMISE[precision] * max(torch_error, self.rounding_error)
        # Torch may do better than it was asked to (a GEMV stays in float32), which is no yardstick.
        own = self.tf32_error if precision == "tf32" else self.rounding_error
        return PROMISE[precision] * max(own, torch_error or 0.0)

    def plausible(self, precision: str) -> float:
        """A bound for anyone's kernel: four roundoffs, in float32 times the square root of K."""
        growth = max(1, self.a.shape[-1]) ** 0.5 if precision in ("fp32", "ieee") else 1.0
        return 4 * ROUNDOFF[precision] * growth

    def check(self, out: Tensor, allowed: float) -> Verdict:
        """Shape, dtype, no NaN anywhere, and a normwise error of at most ``allowed``.

        Args:
            out: the result to judge, of shape ``out_shape``, on the operands' device.
            allowed: a normwise error, as ``allowed`` and ``plausible`` return it.
        """
        if out.shape != self.out_shape or out.dtype != self.out_dtype:
            found = f"{tuple(out.shape)} {out.dtype}"
            expected = f"{tuple(self.out_shape)} {self.out_dtype}"
            return Verdict(float("nan"), f"result is {found}, expected {expected}")
        error = self.error(out)
        if torch.isnan(out).any().item():
            return Verdict(error, f"{int(torch.isnan(out).sum())} of {out.numel()} values are NaN")
        if not error <= allowed:
            return Verdict(error, f"error {error:.2e} exceeds {allowed:.2e}; {self.worst(out)}")
        return Verdict(error)

    def worst(self, out: Tensor) -> str:
        """The sampled value that is furthest from float64, in words."""
        values = self.sampled(out)
        flat = int((values - self.exact).abs().argmax())
        item, row, column = (int(i) for i in torch.unravel_index(torch.tensor(flat), values.shape))
        where = (int(self.items[item]), int(self.rows[row]), column)
        got, exact = values[item, row, column].item(), self.exact[item, row, column].item()
        return f"worst at (item, row, column) {where}: {got:.8g} for {exact:.8g}"


def poison(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    """Leave NaN in the block of memory that the next allocation of this size is likely to get."""
    torch.full(shape, float("nan"), dtype=dtype, device=device)
