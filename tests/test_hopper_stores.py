"""What the consumers of Hopper's kernels write and read of C and a residual, element by element.

The interpreter cannot run Gluon, but what kernels/hopper_store.py does is arithmetic on tensors,
whatever their layouts: here it runs on PyTorch's.
"""

from types import FunctionType, SimpleNamespace

import pytest
import torch

from fastmm_op.problem import cdiv

WARPGROUP_M, SLICE_N, BASE = 64, 32, 8
BITS = {torch.float32: 32, torch.bfloat16: 16}


class Addresses:
    """Elements of a buffer, as pointers to them; the buffer itself starts on 16 bytes."""

    def __init__(self, buffer: torch.Tensor, offsets=0) -> None:
        self.buffer, self.offsets = buffer, offsets
        element = SimpleNamespace(primitive_bitwidth=BITS[buffer.dtype])
        self.dtype = SimpleNamespace(element_ty=element)

    def __add__(self, offsets) -> "Addresses":
        return Addresses(self.buffer, self.offsets + offsets)

    def bytes(self) -> torch.Tensor:
        return torch.as_tensor(self.offsets) * self.buffer.itemsize


class Slice(torch.Tensor):
    """A tensor that has a layout, as kernels ask for it."""

    type = SimpleNamespace(layout=None)


def multiple_of(addresses: Addresses, multiple: int) -> Addresses:
    assert not (addresses.bytes() % multiple).any(), "the kernel says so"
    return addresses


def expand_dims(x, dim: int):
    if isinstance(x, Addresses):
        return Addresses(x.buffer, x.offsets.unsqueeze(dim))
    return x.unsqueeze(dim)


def load(addresses: Addresses, mask=True, other=0.0) -> torch.Tensor:
    mask = torch.as_tensor(mask).expand(addresses.offsets.shape)
    found = torch.full(mask.shape, other, dtype=addresses.buffer.dtype)
    found[mask] = addresses.buffer[addresses.offsets[mask]]
    return found


def store(addresses: Addresses, values: torch.Tensor, mask=True, cache_modifier="") -> None:
    mask = torch.as_tensor(mask).expand(addresses.offsets.shape)
    places = addresses.offsets[mask]
    assert addresses.buffer[places].isnan().all(), "nothing is stored twice"
    addresses.buffer[places] = values[mask].to(addresses.buffer.dtype).as_subclass(torch.Tensor)


GL = SimpleNamespace(
    arange=lambda first, last, layout: torch.arange(first, last),
    SliceLayout=lambda dim, parent: None,
    constexpr=None,
    convert_layout=lambda x, layout: x,
    expand_dims=expand_dims,
    int64=torch.int64,
    load=load,
    multiple_of=multiple_of,
    store=store,
    where=lambda condition, x, y: torch.where(torch.as_tensor(condition), x, y),
)


def on_tensors(name: str) -> FunctionType:
    """A function of kernels/hopper_store.py that Python runs."""
    hopper_store = pytest.importorskip("fastmm_op.kernels.hopper_store")
    names = {
        "gl": GL,
        "WARPGROUP_M": WARPGROUP_M,
        "activated": lambda x, activation, dtype: x,
        "add_residual": lambda y, residual: y + residual,
        "store_layout": lambda *how: None,
        "transposed_store_layout": lambda aligned: None,
    }
    return FunctionType(getattr(hopper_store, name).fn.__code__, names)


def buffers(m: int, n: int, dtype: torch.dtype, has_residual: bool):
    """C, full of NaN, and a residual or None: matrices with some elements before and after."""
    c = torch.full((BASE + m * n + BASE,), torch.nan, dtype=dtype)
    residual = torch.randn(c.shape).to(dtype) if has_residual else None
    return c, residual


def assert_stored(c: torch.Tensor, residual: torch.Tensor | None, product: torch.Tensor) -> None:
    m, n = product.shape
    want = product if residual is None else product + residual[BASE:-BASE].view(m, n)
    assert torch.equal(c[BASE:-BASE].view(m, n), want.to(c.dtype))
    assert c[:BASE].isnan().all()
    assert c[-BASE:].isnan().all()


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize(("m", "n"), [(128, 96), (130, 104), (67, 45), (64, 33), (1, 8)])
def test_slices(m, n, dtype, has_residual) -> None:
    c, residual = buffers(m, n, dtype, has_residual)
    product = torch.randint(-9, 9, (m, n)).float()
    aligned = n * c.itemsize % 16 == 0
    store_slice = on_tensors("store_slice")
    for row0 in range(0, m, WARPGROUP_M):
        for col0 in range(0, n, SLICE_N):
            x = torch.full((WARPGROUP_M, SLICE_N), 99.0)
            inside = product[row0 : row0 + WARPGROUP_M, col0 : col0 + SLICE_N]
            x[: inside.shape[0], : inside.shape[1]] = inside
            c_ptr = Addresses(c) + BASE
            residual_ptr = Addresses(residual) + BASE if has_residual else None
            store_slice(
                c_ptr, x.as_subclass(Slice), row0, 1, False, col0, 0, m, n, n, residual_ptr,
                aligned, 1, "none", False, True,
            )  # fmt: skip
    assert_stored(c, residual, product)


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize(("m", "n"), [(520, 97), (515, 33), (1031, 131)])
def test_slices_of_row_classes(m, n, dtype, has_residual) -> None:
    """Rows that are misaligned alike, their first columns wrapped around; no rows are left here."""
    c, residual = buffers(m, n, dtype, has_residual)
    vector = 16 // c.itemsize
    m -= m % vector
    product = torch.randint(-9, 9, (m, n)).float()
    store_slice = on_tensors("store_slice")
    rows_of_class = m // vector
    for first in range(vector):
        shift = -first * n % vector
        for i in range(cdiv(rows_of_class, WARPGROUP_M)):
            row0 = first + i * WARPGROUP_M * vector
            rows = torch.arange(row0, m, vector)[:WARPGROUP_M]
            for col in range(0, n, SLICE_N):
                col0 = col + shift
                columns = torch.arange(col0, min(col0 + SLICE_N, n + shift))
                x = torch.full((WARPGROUP_M, SLICE_N), 99.0)
                x[: len(rows), : len(columns)] = product[rows][:, columns % n]
                c_ptr = Addresses(c) + BASE
                residual_ptr = Addresses(residual) + BASE if has_residual else None
                store_slice(
                    c_ptr, x.as_subclass(Slice), row0, vector, True, col0, shift, m, n, n,
                    residual_ptr, True, vector, "none", False, False,
                )  # fmt: skip
    stored = c[BASE : BASE + m * n].view(m, n)
    want = product if residual is None else product + residual[BASE : BASE + m * n].view(m, n)
    assert torch.equal(stored, want.to(dtype))
    assert c[:BASE].isnan().all()
    assert c[BASE + m * n :].isnan().all()


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize(("m", "n"), [(96, 128), (104, 132), (45, 67), (33, 64), (1, 4)])
def test_transposed_slices(m, n, has_residual) -> None:
    """Of C (m, n), whose transpose is computed: rows of a slice are its columns."""
    c, residual = buffers(m, n, torch.float32, has_residual)
    product = torch.randint(-9, 9, (m, n)).float()
    store_transposed = on_tensors("store_transposed")
    for row0 in range(0, n, WARPGROUP_M):
        for col0 in range(0, m, SLICE_N):
            x = torch.full((WARPGROUP_M, SLICE_N), 99.0)
            inside = product.T[row0 : row0 + WARPGROUP_M, col0 : col0 + SLICE_N]
            x[: inside.shape[0], : inside.shape[1]] = inside
            c_ptr = Addresses(c) + BASE
            residual_ptr = Addresses(residual) + BASE if has_residual else None
            store_transposed(
                c_ptr, x.as_subclass(Slice), row0, col0, n, m, n, residual_ptr,
                n % 4 == 0, "none", False,
            )  # fmt: skip
    assert_stored(c, residual, product)
