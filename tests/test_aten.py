"""ATen's products on a CPU: what lies behind a row stays out of the result."""

import pytest
import torch
from torch.nn import functional as F

from cases import DTYPES, LAYOUTS
from fastmm_op import aten


@pytest.fixture(autouse=True)
def one_thread():
    """oneDNN's kernel for so little work on several threads is another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("k", [1, 31, 45, 64, 65])
def test_a_nan_stays_in_its_row(k, dtype) -> None:
    a, b = torch.randn(19, k).to(DTYPES[dtype]), torch.randn(k, 21).to(DTYPES[dtype])
    a[7] = torch.nan
    bias = torch.randn(21).to(DTYPES[dtype])
    of_linear = aten.linear(a, b.mT.contiguous(), bias, None, "none", "tf32")
    for got in (aten.matmul(a, b, "tf32"), of_linear):
        assert got[7].isnan().all()
        assert got.isfinite().sum() == 18 * 21


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("layout", ["wide rows", "wide columns"])
def test_what_lies_between_rows_stays_there(layout, dtype) -> None:
    a, b = torch.randn(19, 45).to(DTYPES[dtype]), torch.randn(45, 21).to(DTYPES[dtype])
    got = aten.matmul(LAYOUTS[layout](a), LAYOUTS[layout](b), "tf32")
    torch.testing.assert_close(got, aten.matmul(a, b, "tf32"))


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize(
    ("shape_a", "shape_b"),
    [((45,), (45,)), ((19, 45), (45,)), ((45,), (45, 21)), ((2, 19, 45), (3, 1, 45, 21))],
)
def test_aten_is_given_whole_blocks_of_16_bits(shape_a, shape_b, dtype, monkeypatch) -> None:
    a, b = (torch.randn(shape).to(DTYPES[dtype]) for shape in (shape_a, shape_b))
    given = []
    product = torch.matmul
    monkeypatch.setattr(torch, "matmul", lambda a, b: given.append(a.shape[-1]) or product(a, b))
    got = aten.matmul(a, b, "tf32")
    assert given == [45 if dtype == "fp32" else 64]
    # Rounded once, to 8 bits at least; sums of 45 in fp32 err by far less.
    want = product(a.double(), b.double())
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-4)


def test_linear_is_given_them_too(monkeypatch) -> None:
    x, weight = torch.randn(3, 45).bfloat16(), torch.randn(21, 45).bfloat16()
    given = []
    linear = F.linear
    monkeypatch.setattr(
        F, "linear", lambda x, w, bias: given.append((x.shape, w.shape)) or linear(x, w, bias)
    )
    aten.linear(x, weight, None, None, "none", "tf32")
    assert given == [((3, 64), (21, 64))]
