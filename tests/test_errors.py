"""Bad input: one message that names the argument and its value, however the op is called."""

import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastmm_op

op = torch.ops.fastmm.matmul.default


def f(*shape: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


# id: (inputs, keyword arguments, exception, what the message says).
BAD = {
    "0-d a": (lambda: (f(), f(3)), {}, RuntimeError, "a is 0-dimensional"),
    "0-d b": (lambda: (f(3), f()), {}, RuntimeError, "b is 0-dimensional"),
    "inner size": (
        lambda: (f(2, 3), f(4, 5)),
        {},
        RuntimeError,
        "a is (2, 3), b is (4, 5); a's last size 3 must equal b's size 4",
    ),
    "inner size of 1-D": (
        lambda: (f(3), f(4)),
        {},
        RuntimeError,
        "a is (3,), b is (4,); a's last size 3 must equal b's size 4",
    ),
    "inner size of a batch": (
        lambda: (f(2, 2, 3), f(2, 1, 5)),
        {},
        RuntimeError,
        "a is (2, 2, 3), b is (2, 1, 5); a's last size 3 must equal b's size 1",
    ),
    "batch": (
        lambda: (f(2, 4, 3), f(5, 3, 4)),
        {},
        RuntimeError,
        "a is (2, 4, 3), b is (5, 3, 4); at dimension -3 2 meets 5",
    ),
    "outer batch": (
        lambda: (f(6, 2, 4, 3), f(5, 1, 3, 4)),
        {},
        RuntimeError,
        "at dimension -4 6 meets 5",
    ),
    "mixed dtypes": (
        lambda: (f(2, 3), f(3, 2, dtype=torch.float16)),
        {},
        RuntimeError,
        "a and b must have one dtype, got torch.float32 and torch.float16",
    ),
    "int64": (
        lambda: (f(2, 3, dtype=torch.int64), f(3, 2, dtype=torch.int64)),
        {},
        TypeError,
        "a has dtype torch.int64; supported are float32, float16, bfloat16 and float64",
    ),
    "bool b": (
        lambda: (f(2, 3), f(3, 2, dtype=torch.bool)),
        {},
        TypeError,
        "b has dtype torch.bool",
    ),
    "complex": (
        lambda: (f(2, 3, dtype=torch.complex64), f(3, 2, dtype=torch.complex64)),
        {},
        TypeError,
        "a has dtype torch.complex64",
    ),
    "conjugated": (
        lambda: (f(2, 3, dtype=torch.complex64).conj(), f(3, 2, dtype=torch.complex64)),
        {},
        TypeError,
        "a has dtype torch.complex64",
    ),
    "fp8": (
        lambda: (f(2, 3).to(torch.float8_e4m3fn), f(3, 2).to(torch.float8_e4m3fn)),
        {},
        TypeError,
        "a has dtype torch.float8_e4m3fn",
    ),
    "precision": (
        lambda: (f(2, 3), f(3, 2)),
        {"precision": "tf16"},
        ValueError,
        "precision must be one of ('tf32', 'fp32', 'ieee'), got 'tf16'",
    ),
    "mixed devices": (
        lambda: (f(2, 3), f(3, 2, device="meta")),
        {},
        RuntimeError,
        "a and b must be on one device, got cpu and meta",
    ),
}
# Layouts that fake tensors and compiled graphs cannot hold, or that have no sizes to speak of.
BAD_LAYOUTS = {
    "sparse": (lambda: (f(2, 3).to_sparse(), f(3, 2)), "a must be a dense strided tensor, got"),
    "sparse b": (lambda: (f(2, 3), f(3, 2).to_sparse()), "b must be a dense strided tensor, got"),
    "csr": (lambda: (f(2, 3).to_sparse_csr(), f(3, 2)), "got layout torch.sparse_csr"),
    "quantized": (
        lambda: (torch.quantize_per_tensor(f(2, 3), 0.1, 0, torch.qint8), f(3, 2)),
        "a must be a dense strided tensor, got a quantized tensor (torch.qint8)",
    ),
    "nested": (
        lambda: (torch.nested.nested_tensor([f(2, 3), f(1, 3)]), f(2, 3, 2)),
        "a must be a dense strided tensor, got a nested tensor",
    ),
}

ROUTES = {"op": op, "function": fastmm_op.matmul}


@pytest.fixture
def launches_nothing(guarded_memory):
    """No output and no workspace was allocated: the checks come before everything else."""
    yield
    assert not guarded_memory.allocations


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.usefixtures("launches_nothing")
def test_eager(route, case, device) -> None:
    make, kwargs, error, message = BAD[case]
    args = [x if x.is_meta else x.to(device) for x in make()]
    message = message.replace("got cpu", f"got {args[0].device}")
    with pytest.raises(error, match=re.escape(message)):
        ROUTES[route](*args, **kwargs)


@pytest.mark.parametrize("case", BAD_LAYOUTS)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.usefixtures("launches_nothing")
@pytest.mark.filterwarnings("ignore::UserWarning")  # layouts in beta, deprecated quantization
def test_layouts(route, case) -> None:
    make, message = BAD_LAYOUTS[case]
    with pytest.raises(TypeError, match=re.escape(message)):
        ROUTES[route](*make())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_jagged_nested_tensor() -> None:
    """A subclass with dispatch rules of its own: only the public function can speak first."""
    jagged = torch.nested.nested_tensor([f(2, 3), f(1, 3)], layout=torch.jagged)
    with pytest.raises(TypeError, match="a must be a dense strided tensor, got a nested tensor"):
        fastmm_op.matmul(jagged, f(3, 2))


@pytest.mark.parametrize("value", [[[1.0]], None, 2.0], ids=str)
def test_not_a_tensor(value) -> None:
    with pytest.raises(TypeError, match=f"a must be a torch.Tensor, got {type(value).__name__}"):
        fastmm_op.matmul(value, f(3, 2))
    with pytest.raises(TypeError, match=f"b must be a torch.Tensor, got {type(value).__name__}"):
        fastmm_op.matmul(f(2, 3), value)


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("route", ROUTES)
def test_fake(route, case) -> None:
    make, kwargs, error, message = BAD[case]
    with FakeTensorMode() as mode, pytest.raises(error, match=re.escape(message)):
        ROUTES[route](*map(mode.from_tensor, make()), **kwargs)


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("route", ROUTES)
def test_meta(route, case) -> None:
    make, kwargs, error, message = BAD[case]
    a, b = make()
    with pytest.raises(error, match=re.escape(message)):
        ROUTES[route](a if b.is_meta else a.to("meta"), b.to("meta"), **kwargs)


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.usefixtures("launches_nothing")
def test_compiled(dynamic, case) -> None:
    """Dynamo wraps what is raised while it traces; the message inside is the same."""
    make, kwargs, error, message = BAD[case]
    compiled = torch.compile(
        lambda a, b: fastmm_op.matmul(a, b, **kwargs),
        fullgraph=True,
        dynamic=dynamic,
        backend="aot_eager",
    )
    pattern = re.escape(message)
    if dynamic:  # a symbolic size may print as its symbol
        pattern = re.sub(r"(?<![-\w])\d+", r"(?:\g<0>|s\\d+)", pattern)
    with pytest.raises((error, torch._dynamo.exc.TorchDynamoException), match=pattern):
        compiled(*make())
