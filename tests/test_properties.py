"""What holds for any sizes, strides and numbers: hypothesis looks for a counterexample."""

import pytest
import torch

import fastmm_op
from cases import DTYPES, LAYOUTS
from oracle import assert_accurate

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# derandomize: a failure in CI can be repeated. Fixtures are not reset between examples, and
# guarded_memory, the only one here, need not be.
FEW = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SIZE = st.integers(0, 40)
SEED = st.integers(0, 2**31)
KINDS = st.sampled_from(
    [("fp32", "tf32"), ("fp32", "fp32"), ("fp32", "ieee"), ("fp16", "tf32"), ("bf16", "tf32")]
)
LAYOUT = st.sampled_from(sorted(LAYOUTS))

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("guarded_memory")]


@FEW
@given(m=SIZE, k=SIZE, n=SIZE, kind=KINDS, layout_a=LAYOUT, layout_b=LAYOUT, seed=SEED)
def test_accurate_for_any_shape_and_layout(m, k, n, kind, layout_a, layout_b, seed, device) -> None:
    dtype, precision = kind
    torch.manual_seed(seed)
    a = LAYOUTS[layout_a](torch.randn(m, k, device=device, dtype=DTYPES[dtype]))
    b = LAYOUTS[layout_b](torch.randn(k, n, device=device, dtype=DTYPES[dtype]))
    assert_accurate(fastmm_op.matmul(a, b, precision=precision), a, b, precision)


@FEW
@given(m=st.integers(1, 40), k=SIZE, n=SIZE, kind=KINDS, seed=SEED)
def test_powers_of_two_go_through_exactly(m, k, n, kind, seed, device) -> None:
    """A row of a times 2**k, a column of b times 2**k: the products change by exactly that."""
    dtype, precision = kind
    torch.manual_seed(seed)
    # Small whole numbers and few powers: nothing leaves the range of fp16 or becomes subnormal.
    a = torch.randn(m, k).clamp(-4, 4).add_(5).to(device, DTYPES[dtype])
    b = torch.randn(k, n).clamp(-4, 4).add_(5).to(device, DTYPES[dtype])
    rows = 2.0 ** torch.randint(-3, 3, (m, 1), device=device)
    columns = 2.0 ** torch.randint(-3, 0, (n,), device=device)
    plain = fastmm_op.matmul(a, b, precision=precision)
    scaled = fastmm_op.matmul(
        (a * rows).to(a.dtype), (b * columns).to(b.dtype), precision=precision
    )
    assert torch.equal(scaled, (plain * rows * columns).to(a.dtype))


@FEW
@given(m=st.integers(1, 40), k=SIZE, n=SIZE, kind=KINDS, seed=SEED)
def test_rows_do_not_know_their_neighbours(m, k, n, kind, seed, device) -> None:
    """Permuting the rows of a permutes the rows of the product, bit for bit."""
    dtype, precision = kind
    torch.manual_seed(seed)
    a = torch.randn(m, k, device=device, dtype=DTYPES[dtype])
    b = torch.randn(k, n, device=device, dtype=DTYPES[dtype])
    order = torch.randperm(m, device=device)
    plain = fastmm_op.matmul(a, b, precision=precision)
    assert torch.equal(fastmm_op.matmul(a[order], b, precision=precision), plain[order])
