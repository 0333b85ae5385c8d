"""Does PyTorch know linear as it knows its own? And what linear refuses, in words."""

import re
from functools import partial

import expecttest
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastmm_op
from linear_oracle import ACTIVATIONS, eager

op = torch.ops.fastmm.linear.default
matmul = torch.ops.fastmm.matmul.default
SHAPES = [(3,), (5, 3), (2, 4, 3), (2, 1, 2, 3)]
N = 4


def operands(shape=(5, 3), dtype=torch.float64, device="cpu", requires_grad=False) -> tuple:
    """x, weight, bias, residual."""
    shapes = (shape, (N, shape[-1]), (N,), (*shape[:-1], N))
    like = {"dtype": dtype, "device": device, "requires_grad": requires_grad}
    return tuple(torch.randn(s, **like) for s in shapes)


def call(x, weight, bias, residual, activation, f=fastmm_op.linear) -> torch.Tensor:
    return f(x, weight, bias, activation=activation, residual=residual)


def ids(x) -> str:
    return str(x).replace(" ", "")


class Record(TorchDispatchMode):
    """The operators that PyTorch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


def test_schema() -> None:
    expecttest.assert_expected_inline(
        f"{op._schema}\n{sorted(tag.name for tag in op.tags)}",
        """\
fastmm::linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, *, str activation="none", str precision="tf32") -> Tensor
['needs_exact_strides', 'pt2_compliant_tag']""",  # noqa: E501
    )


# opcheck.


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_opcheck_dtypes(dtype, requires_grad, device) -> None:
    args = operands((5, 7), dtype, device, requires_grad)
    torch.library.opcheck(op, args, {"activation": "gelu"})


@pytest.mark.parametrize("shape", [*SHAPES, (0, 3), (2, 0)], ids=ids)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck_shapes_and_activations(activation, shape, device) -> None:
    x, weight, bias, residual = operands(shape, device=device, requires_grad=True)
    torch.library.opcheck(op, (x, weight, bias, residual), {"activation": activation})
    torch.library.opcheck(op, (x, weight), {"activation": activation})


def test_opcheck_strides(device) -> None:
    x, weight, bias, residual = operands((5, 6), device=device)
    args = (
        x.mT.contiguous().mT,
        weight.mT.contiguous().mT,
        bias.expand(2, N)[1],
        residual.mT.clone().mT,
    )
    torch.library.opcheck(op, args, {"precision": "ieee"})


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_meta(shape) -> None:
    got = call(*operands(shape, device="meta"), "gelu")
    want = eager(*operands(shape)[:3])
    assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)
    assert got.is_meta


# Autograd.


@pytest.mark.parametrize("route", [op, fastmm_op.linear], ids=["op", "function"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation, route) -> None:
    """Twice differentiable; the op computes what was activated again, the function keeps it."""
    args = operands(requires_grad=True)
    f = partial(call, activation=activation, f=route)
    assert torch.autograd.gradcheck(f, args)
    assert torch.autograd.gradgradcheck(f, args)


@pytest.mark.parametrize("route", [op, fastmm_op.linear], ids=["op", "function"])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 3), (2, 0)], ids=ids)
def test_gradients_are_torchs(shape, route) -> None:
    args = operands(shape, requires_grad=True)
    grad = torch.randn(*shape[:-1], N, dtype=torch.float64)
    got = torch.autograd.grad(call(*args, "gelu", f=route), args, grad)
    x, weight, bias, residual = args
    want = torch.autograd.grad(eager(x, weight, bias, "gelu", residual), args, grad)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride() or 0 in ours.shape


@pytest.mark.parametrize("route", [op, fastmm_op.linear], ids=["op", "function"])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("wanted", range(1, 16))
def test_gradients_of_some(wanted, activation, route) -> None:
    args = [x.requires_grad_(bool(wanted >> i & 1)) for i, x in enumerate(operands())]
    out = call(*args, activation, f=route)
    with Record() as record:
        out.sum().backward()
    assert [x.grad is not None for x in args] == [x.requires_grad for x in args]
    assert record.calls.count(matmul) == sum(x.requires_grad for x in args[:2])
    again = activation != "none" and route is op and any(x.requires_grad for x in args[:3])
    assert record.calls.count(op) == again
    x, weight, bias, residual = args
    wanted_args = [t for t in args if t.requires_grad]
    want = torch.autograd.grad(eager(x, weight, bias, activation, residual).sum(), wanted_args)
    for tensor, expected in zip(wanted_args, want, strict=True):
        torch.testing.assert_close(tensor.grad, expected)


def test_the_function_is_fused_where_nothing_is_recorded() -> None:
    args = operands()
    with Record() as record:
        call(*args, "gelu")
        with torch.no_grad():
            call(*[x.clone().requires_grad_() for x in args], "gelu")
    assert [f for f in record.calls if f.namespace == "fastmm"] == [op, op]
    assert torch.ops.aten.gelu.default not in record.calls
    args[1].requires_grad_()
    with Record() as record:
        call(*args, "none")
    assert record.calls == [op], "there is nothing to keep: the residual is added in the kernel"


def test_precision_of_backward(device) -> None:
    class Precisions(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fastmm":
                self.seen += ((kwargs or {}).get("precision", "tf32"),)
            return func(*args, **(kwargs or {}))

    x, weight, bias, _ = operands((5, 7), torch.float32, device, requires_grad=True)
    for route in (op, fastmm_op.linear):
        with Precisions() as mode:
            route(x, weight, bias, activation="silu", precision="ieee").sum().backward()
        assert set(mode.seen) == {"ieee"}


def test_saves_only_what_backward_needs() -> None:
    def saved(*args, f, activation="none") -> set[int]:
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            f(*args, activation=activation)
        return {t.untyped_storage().data_ptr() for t in found}

    x, weight, bias, _ = operands()
    pointers = [t.untyped_storage().data_ptr() for t in (x, weight, bias)]
    weight.requires_grad_()
    assert saved(x, weight, bias, f=op) == {pointers[0]}
    assert saved(x, weight, bias, f=op, activation="silu") == set(pointers)


# torch.func, forward mode, vmap.


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_func_transforms(activation) -> None:
    args = operands()

    def transformed(f):
        def loss(*args):
            return call(*args, activation, f=f).sin().sum()

        def torchs(x, weight, bias, activation, residual):
            return eager(x, weight, bias, activation, residual)

        every = tuple(range(4))
        return (
            torch.func.grad(loss, every)(*args),
            torch.func.jacrev(partial(call, activation=activation, f=f), every)(*args),
            torch.func.jacfwd(partial(call, activation=activation, f=f), every)(*args),
            torch.func.hessian(loss, 1)(*args),
        )

    got, want = transformed(fastmm_op.linear), transformed(eager)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dual", range(1, 16))
def test_forward_mode(dual) -> None:
    args, tangents = operands(), operands()

    def tangent(f):
        with forward_ad.dual_level():
            inputs = [
                forward_ad.make_dual(x, t) if dual >> i & 1 else x
                for i, (x, t) in enumerate(zip(args, tangents, strict=True))
            ]
            return forward_ad.unpack_dual(call(*inputs, "gelu_tanh", f=f)).tangent

    torch.testing.assert_close(tangent(fastmm_op.linear), tangent(eager))


@pytest.mark.parametrize("route", [op, fastmm_op.linear], ids=["op", "function"])
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("mapped", range(1, 16))
def test_vmap(mapped, shape, route) -> None:
    dims = tuple((0, -1, 0, -1)[i] if mapped >> i & 1 else None for i in range(4))
    args = [
        x if dim is None else torch.stack([x, x.sin(), x.cos()]).movedim(0, dim)
        for x, dim in zip(operands(shape), dims, strict=True)
    ]
    got = torch.vmap(partial(call, activation="silu", f=route), dims)(*args)
    want = torch.vmap(partial(call, activation="silu", f=eager), dims)(*args)
    torch.testing.assert_close(got, want)


def test_vmap_over_rows_is_one_call() -> None:
    x, weight, bias, _ = operands((6, 5, 3))
    with Record() as record:
        torch.vmap(partial(op, activation="gelu"), (0, None, None))(x, weight, bias)
    assert [f for f in record.calls if f.namespace == "fastmm"] == [op]


def test_vmap_of_grad() -> None:
    def gradients(f):
        def loss(x, weight, bias, residual):
            return call(x, weight, bias, residual, "gelu", f=f).square().sum()

        return torch.vmap(torch.func.grad(loss, (0, 1, 2)), (0, None, None, None))

    x, weight, bias, residual = operands((6, 5, 3))
    args = (x, weight, bias, residual[0])
    torch.testing.assert_close(gradients(fastmm_op.linear)(*args), gradients(eager)(*args))


# Autocast, FLOPs.


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, requires_grad, device) -> None:
    """Inputs of mixed types become the type that is active, the residual with them."""
    x, weight, bias, residual = operands((5, 7), torch.float32, device, requires_grad)
    with torch.autocast(device, dtype=dtype):
        out = call(x.to(dtype), weight, bias, residual, "gelu")
        direct = call(x.to(dtype), weight, bias, residual, "gelu", f=op)
        with torch.autocast(device, enabled=False):
            assert fastmm_op.linear(x, weight, bias).dtype is torch.float32
    assert out.dtype is direct.dtype is dtype
    args = [t.to(dtype) for t in (x, weight, bias, residual)]
    torch.testing.assert_close(out, call(*args, "gelu"))
    if requires_grad:
        out.sum().backward()
        assert weight.grad.dtype is torch.float32


@pytest.mark.parametrize("shape", SHAPES[1:], ids=ids)
def test_flop_count(shape) -> None:
    def flops(f):
        with FlopCounterMode(display=False) as counter:
            x, weight, bias, _ = operands(shape, requires_grad=True)
            f(x, weight, bias).sum().backward()
        return counter.get_total_flops()

    assert flops(fastmm_op.linear) == flops(op) == flops(F.linear)


# torch.compile and torch.export.


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_compiled(activation, dynamic, requires_grad, device) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    f = partial(call, activation=activation)
    compiled = torch.compile(f, backend=counter, fullgraph=True, dynamic=dynamic)
    for shape in ((5, 7), (9, 7), (3, 7)) if dynamic else ((5, 7),):
        args = operands(shape, torch.float32, device, requires_grad)
        got, want = compiled(*args), f(*args)
        assert torch.equal(got, want)
        if requires_grad:
            ours = torch.autograd.grad(got.sum(), args)
            for x, y in zip(ours, torch.autograd.grad(want.sum(), args), strict=True):
                assert torch.equal(x, y)
    assert counter.frame_count == 1


def test_compiled_autocast(device) -> None:
    def f(*args):
        with torch.autocast(device, dtype=torch.bfloat16):
            return call(*args, "gelu")

    for requires_grad in (False, True):
        args = operands((5, 7), torch.float32, device, requires_grad)
        got = torch.compile(f, backend="aot_eager", fullgraph=True)(*args)
        assert got.dtype is torch.bfloat16
        assert torch.equal(got, f(*args))


def test_export(tmp_path, device) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x, weight, bias, residual):
            return call(x, weight, bias, residual, "gelu")

    args = operands((5, 7), torch.float32, device)
    program = torch.export.export(Layer(), args)
    calls = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert calls == [op]
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    assert torch.equal(loaded(*args), Layer()(*args))


# Bad input.


def f(*shape: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


# id: (x, weight, bias, residual; keyword arguments, exception, what the message says).
BAD = {
    "0-d x": (lambda: (f(), f(4, 3)), {}, RuntimeError, "x is 0-dimensional"),
    "1-d weight": (
        lambda: (f(2, 3), f(3)),
        {},
        RuntimeError,
        "weight must be (N, K), got shape (3,)",
    ),
    "inner size": (
        lambda: (f(2, 3), f(3, 4)),
        {},
        RuntimeError,
        "x is (2, 3), weight is (3, 4); x's last size 3 must equal weight's 4",
    ),
    "bias size": (
        lambda: (f(2, 3), f(4, 3), f(3)),
        {},
        RuntimeError,
        "bias is (3,); it must be (4,): (N,)",
    ),
    "bias rank": (
        lambda: (f(2, 3), f(4, 3), f(1, 4)),
        {},
        RuntimeError,
        "bias is (1, 4); it must be (4,): (N,)",
    ),
    "residual is not broadcast": (
        lambda: (f(2, 3), f(4, 3), None, f(1, 4)),
        {},
        RuntimeError,
        "residual is (1, 4); it must be (2, 4): the result's shape; it is not broadcast",
    ),
    "residual rank": (
        lambda: (f(5, 2, 3), f(4, 3), None, f(2, 4)),
        {},
        RuntimeError,
        "residual is (2, 4); it must be (5, 2, 4)",
    ),
    "dtype of weight": (
        lambda: (f(2, 3), f(4, 3, dtype=torch.float16)),
        {},
        RuntimeError,
        "x and weight must have one dtype, got torch.float32 and torch.float16",
    ),
    "dtype of bias": (
        lambda: (f(2, 3), f(4, 3), f(4, dtype=torch.bfloat16)),
        {},
        RuntimeError,
        "x and bias must have one dtype, got torch.float32 and torch.bfloat16",
    ),
    "dtype of residual": (
        lambda: (f(2, 3), f(4, 3), None, f(2, 4, dtype=torch.float64)),
        {},
        RuntimeError,
        "x and residual must have one dtype, got torch.float32 and torch.float64",
    ),
    "integers": (
        lambda: (f(2, 3, dtype=torch.int64), f(4, 3, dtype=torch.int64)),
        {},
        TypeError,
        "x has dtype torch.int64; supported are float32, float16, bfloat16 and float64",
    ),
    "device of bias": (
        lambda: (f(2, 3), f(4, 3), f(4, device="meta")),
        {},
        RuntimeError,
        "x and bias must be on one device, got cpu and meta",
    ),
    "activation": (
        lambda: (f(2, 3), f(4, 3)),
        {"activation": "tanh"},
        ValueError,
        "activation must be one of ('none', 'relu', 'gelu', 'gelu_tanh', 'silu'), got 'tanh'",
    ),
    "precision": (
        lambda: (f(2, 3), f(4, 3)),
        {"precision": "tf16"},
        ValueError,
        "precision must be one of ('tf32', 'fp32', 'ieee'), got 'tf16'",
    ),
}


def function(x, weight, bias=None, residual=None, **kwargs) -> torch.Tensor:
    return fastmm_op.linear(x, weight, bias, residual=residual, **kwargs)


ROUTES = {"op": op, "function": function}


@pytest.fixture
def launches_nothing(guarded_memory):
    yield
    assert not guarded_memory.allocations


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.usefixtures("launches_nothing")
def test_bad_input(route, case, device) -> None:
    inputs, kwargs, error, message = BAD[case]
    args = [x if x is None or x.is_meta else x.to(device) for x in inputs()]
    message = message.replace("got cpu", f"got {args[0].device}")
    with pytest.raises(error, match=re.escape(message)):
        ROUTES[route](*args, **kwargs)


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("route", ROUTES)
def test_bad_fake_input(route, case) -> None:
    inputs, kwargs, error, message = BAD[case]
    with FakeTensorMode() as mode:
        args = [x if x is None else mode.from_tensor(x) for x in inputs()]
        with pytest.raises(error, match=re.escape(message)):
            ROUTES[route](*args, **kwargs)


@pytest.mark.parametrize(
    ("inputs", "kwargs", "message"),
    [
        (lambda: (f(2, 3), f(4, 3), None, f(1, 4)), {}, "residual is (1, 4); it must be (2, 4)"),
        (lambda: (f(2, 3), f(4, 3), None, f(2, 4).double()), {}, "x and residual must have one"),
        (lambda: (f(2, 3), f(4, 3)), {"activation": "tanh"}, "activation must be one of"),
    ],
    ids=["shape", "dtype", "activation"],
)
def test_bad_input_where_autograd_records(inputs, kwargs, message) -> None:
    """There the activation and what follows are not the op's to check."""
    x, weight, *rest = inputs()
    with pytest.raises((RuntimeError, ValueError), match=re.escape(message)):
        function(x, weight.requires_grad_(), *rest, **{"activation": "gelu"} | kwargs)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["x", "weight", "bias", "residual"])
def test_layouts(name) -> None:
    args = {"x": f(2, 3), "weight": f(4, 3), "bias": f(4), "residual": f(2, 4)}
    args[name] = args[name].to_sparse()
    for route in (op, fastmm_op.linear):
        with pytest.raises(TypeError, match=f"{name} must be a dense strided tensor, got"):
            route(**args)
    args[name] = [1.0]
    with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got list"):
        fastmm_op.linear(**args)


@pytest.mark.interpreted
def test_the_cpu_implementation_is_the_interpreted_kernels(monkeypatch) -> None:
    from fastmm_op import launch

    called = []
    monkeypatch.setattr(launch, "linear", lambda *args: called.append(args) or F.linear(*args[:2]))
    fastmm_op.linear(f(2, 3), f(4, 3), activation="silu", precision="fp32")
    assert called[0][4:] == ("silu", "fp32")
