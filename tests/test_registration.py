"""Does PyTorch know the op as it knows torch.matmul? Every system that it is registered with."""

import subprocess
import sys
from functools import partial

import expecttest
import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastmm_op

op = torch.ops.fastmm.matmul.default

# (a, b) of every pair of ranks that broadcasts differently.
RANKS = [
    ((3,), (3,)),
    ((3,), (3, 2)),
    ((2, 3), (3,)),
    ((2, 3), (3, 4)),
    ((3,), (2, 3, 2)),
    ((2, 2, 3), (3,)),
    ((2, 2, 3), (3, 4)),
    ((2, 3), (2, 3, 2)),
    ((2, 2, 3), (2, 3, 2)),
    ((1, 2, 3), (2, 3, 2)),
    ((2, 2, 3), (1, 3, 2)),
    ((2, 1, 2, 3), (2, 3, 2)),
    ((2, 1, 2, 3), (3, 2)),
]


def ids(x) -> str:
    return str(x).replace(" ", "")


def randn(shape, dtype=torch.float64, device="cpu", requires_grad=False) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=device, requires_grad=requires_grad)


def permuted(shape, dtype, device, requires_grad=False) -> torch.Tensor:
    """Of that shape, with the dimensions in reverse order in memory."""
    x = randn(shape[::-1], dtype, device).permute(*reversed(range(len(shape))))
    return x.detach().requires_grad_(requires_grad)


def test_schema() -> None:
    expecttest.assert_expected_inline(
        f"{op._schema}\n{sorted(tag.name for tag in op.tags)}",
        """\
fastmm::matmul(Tensor a, Tensor b, *, str precision="tf32") -> Tensor
['needs_exact_strides', 'pt2_compliant_tag']""",
    )


# opcheck: schema, autograd registration, fake kernel (shape, dtype, strides), traced and dynamic.


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [randn, permuted])
def test_opcheck_dtypes(layout, dtype, requires_grad, device) -> None:
    make = partial(layout, dtype=dtype, device=device, requires_grad=requires_grad)
    torch.library.opcheck(op, (make((5, 7)), make((7, 3))))


@pytest.mark.parametrize(("shape_a", "shape_b"), RANKS, ids=ids)
def test_opcheck_ranks(shape_a, shape_b, device) -> None:
    make = partial(permuted, dtype=torch.float64, device=device, requires_grad=True)
    torch.library.opcheck(op, (make(shape_a), make(shape_b)))


@pytest.mark.parametrize(
    ("shape_a", "shape_b"), [((0, 3), (3, 2)), ((2, 0), (0, 2)), ((2, 3), (3, 0))], ids=ids
)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
def test_opcheck_zero_sizes(shape_a, shape_b, requires_grad, device) -> None:
    make = partial(randn, dtype=torch.float32, device=device, requires_grad=requires_grad)
    torch.library.opcheck(op, (make(shape_a), make(shape_b)))


@pytest.mark.parametrize("precision", ["fp32", "ieee"])
def test_opcheck_precisions(precision, device) -> None:
    make = partial(randn, dtype=torch.float32, device=device, requires_grad=True)
    torch.library.opcheck(op, (make((4, 9)), make((9, 5))), {"precision": precision})


# Fake tensors: what is promised without data is what the data then has.


@pytest.mark.parametrize(("shape_a", "shape_b"), RANKS, ids=ids)
def test_meta(shape_a, shape_b) -> None:
    got = fastmm_op.matmul(randn(shape_a, device="meta"), randn(shape_b, device="meta"))
    want = torch.matmul(randn(shape_a), randn(shape_b)).contiguous()
    assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)
    assert got.is_meta


# Autograd.


@pytest.mark.parametrize(("shape_a", "shape_b"), RANKS, ids=ids)
def test_gradients(shape_a, shape_b) -> None:
    inputs = randn(shape_a, requires_grad=True), randn(shape_b, requires_grad=True)
    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)


class Record(TorchDispatchMode):
    """The operators that PyTorch dispatches, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def of(self, *funcs) -> list[tuple]:
        return [(args, kwargs) for func, args, kwargs in self.calls if func in funcs]


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
def test_backward_computes_what_is_needed_on_views(wanted, precision, device) -> None:
    a = randn((5, 7), torch.float32, device, requires_grad=wanted[0])
    b = randn((7, 3), torch.float32, device, requires_grad=wanted[1])
    out = op(a, b, precision=precision)
    with Record() as record:
        out.backward(torch.ones_like(out))
    products = record.of(op)
    assert len(products) == sum(wanted)
    assert all(kwargs.get("precision", "tf32") == precision for _, kwargs in products)
    aten = torch.ops.aten
    assert not record.of(aten.clone.default, aten.copy_.default, aten._to_copy.default)
    operands = {x.untyped_storage().data_ptr() for args, _ in products for x in args}
    saved = [x for x, other in ((a, wanted[1]), (b, wanted[0])) if other]
    assert {x.untyped_storage().data_ptr() for x in saved} <= operands, "the operands themselves"
    assert (a.grad is not None, b.grad is not None) == wanted


def test_saves_only_what_backward_needs() -> None:
    saved = []
    a, b = randn((5, 7), requires_grad=True), randn((7, 3))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        op(a, b)
    assert [x.shape for x in saved] == [b.shape]


@pytest.mark.parametrize("argnum", [0, 1])
def test_func_grad_and_jacrev(argnum) -> None:
    a, b = randn((4, 3)), randn((3, 2))

    def transformed(f):
        def loss(a, b):
            return f(a, b).sin().sum()

        return torch.func.jacrev(f, argnum)(a, b), torch.func.grad(loss, argnum)(a, b)

    torch.testing.assert_close(transformed(fastmm_op.matmul), transformed(torch.matmul))


# vmap.


@pytest.mark.parametrize(("shape_a", "shape_b"), RANKS, ids=ids)
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (-1, 0), (0, -1), (-1, -1)])
def test_vmap(shape_a, shape_b, in_dims) -> None:
    def batched(shape, dim):
        x = randn(shape if dim is None else (5, *shape))
        return x if dim is None else x.movedim(0, dim)

    a, b = batched(shape_a, in_dims[0]), batched(shape_b, in_dims[1])
    got = torch.vmap(fastmm_op.matmul, in_dims)(a, b)
    torch.testing.assert_close(got, torch.vmap(torch.matmul, in_dims)(a, b))


@pytest.mark.parametrize("outer", [(0, 0), (0, None), (None, 0)])
@pytest.mark.parametrize("inner", [(0, 0), (0, None), (None, 0)])
def test_nested_vmap(outer, inner) -> None:
    sizes = {(None, None): (), (0, None): (4,), (None, 0): (5,), (0, 0): (4, 5)}
    a = randn((*sizes[outer[0], inner[0]], 2, 3))
    b = randn((*sizes[outer[1], inner[1]], 3, 2))

    def twice(f):
        return torch.vmap(torch.vmap(f, inner), outer)(a, b)

    torch.testing.assert_close(twice(fastmm_op.matmul), twice(torch.matmul))


def test_vmap_is_one_call() -> None:
    with Record() as record:
        torch.vmap(fastmm_op.matmul)(randn((5, 2, 3)), randn((5, 3, 2)))
    assert len(record.of(op)) == 1


def test_vmap_of_grad() -> None:
    def gradients(f):
        return torch.vmap(torch.func.grad(lambda a, b: f(a, b).square().sum(), (0, 1)))

    a, b = randn((5, 2, 3)), randn((5, 3, 2))
    torch.testing.assert_close(gradients(fastmm_op.matmul)(a, b), gradients(torch.matmul)(a, b))


# Autocast.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype_a", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype_b", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_is_torch_matmuls(dtype_a, dtype_b, dtype, device) -> None:
    a, b = randn((5, 7), dtype_a, device), randn((7, 3), dtype_b, device)

    def dtype_of(f):
        try:
            with torch.autocast(device, dtype=dtype):
                return f(a, b).dtype
        except RuntimeError:
            return "an error"

    want = dtype_of(torch.matmul)
    assert dtype_of(fastmm_op.matmul) == want
    assert dtype_of(op) == want


def test_autocast_backward_and_exit(device) -> None:
    a = randn((5, 7), torch.float32, device, requires_grad=True)
    b = randn((7, 3), torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = fastmm_op.matmul(a, b)
        with torch.autocast(device, enabled=False):
            assert fastmm_op.matmul(a, b).dtype is torch.float32
    out.sum().backward()
    assert (out.dtype, a.grad.dtype) == (torch.bfloat16, torch.float32)
    assert fastmm_op.matmul(a, b).dtype is torch.float32


# FLOPs.


@pytest.mark.parametrize(("shape_a", "shape_b"), RANKS, ids=ids)
def test_flop_count(shape_a, shape_b) -> None:
    def flops(f):
        a, b = randn(shape_a, requires_grad=True), randn(shape_b, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            f(a, b).sum().backward()
        return counter.get_total_flops()

    if len(shape_a) > 1 and len(shape_b) > 1:
        assert flops(fastmm_op.matmul) == flops(torch.matmul)
    else:  # PyTorch does not count the products of vectors
        out = torch.matmul(randn(shape_a), randn(shape_b))
        assert flops(fastmm_op.matmul) == 3 * 2 * shape_a[-1] * out.numel()


# Import.


def python(*lines: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_import_touches_neither_triton_nor_the_gpu() -> None:
    python(
        "import sys, types, torch",
        # torch's own FLOP counter imports Triton; that much is not ours to change.
        "counter = types.ModuleType('torch.utils.flop_counter')",
        "counter.register_flop_formula = lambda op, get_raw=False: lambda formula: formula",
        "sys.modules['torch.utils.flop_counter'] = counter",
        "def touched(*args, **kwargs): raise AssertionError('CUDA was touched')",
        "torch._C._cuda_init = torch._C._cuda_getDeviceCount = touched",
        "torch.cuda._lazy_init = torch.cuda.device_count = torch.cuda.is_available = touched",
        "import fastmm_op",
        "assert 'triton' not in sys.modules",
        "assert not torch.cuda.is_initialized()",
    )


def test_works_without_triton() -> None:
    python(
        "import sys",
        "class Without:",
        "    def __init__(self, finder): self.finder = finder",
        "    def __getattr__(self, name): return getattr(self.finder, name)",
        "    def find_spec(self, name, *args):",
        "        return None if name == 'triton' else self.finder.find_spec(name, *args)",
        "sys.meta_path[:] = map(Without, sys.meta_path)",
        "import torch, fastmm_op",
        "assert not fastmm_op.ops.HAVE_TRITON",
        "a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 2)",
        "out = fastmm_op.matmul(a, b)",
        "torch.testing.assert_close(out, a @ b)",
        "out.sum().backward()",
        "assert fastmm_op.ModelNew()(a, b).shape == (3, 2)",
    )


@pytest.mark.interpreted
def test_the_cpu_implementation_is_the_interpreted_kernels(monkeypatch) -> None:
    """Or else half of this suite would test ATen."""
    from fastmm_op import launch

    called = []
    monkeypatch.setattr(launch, "matmul", lambda a, b, p: called.append(p) or a @ b)
    fastmm_op.matmul(torch.ones(2, 3), torch.ones(3, 4), precision="fp32")
    assert called == ["fp32"]


def test_forward_mode() -> None:
    """A dual number's tangent is the product's, from either operand; transforms may nest."""
    a, da = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    b, db = (torch.randn(4, 5, dtype=torch.float64) for _ in range(2))
    with forward_ad.dual_level():
        dual_a, dual_b = forward_ad.make_dual(a, da), forward_ad.make_dual(b, db)
        both = da @ b + a @ db
        for x, y, want in ((dual_a, b, da @ b), (a, dual_b, a @ db), (dual_a, dual_b, both)):
            tangent = forward_ad.unpack_dual(fastmm_op.matmul(x, y)).tangent
            assert torch.allclose(tangent, want)
    _, tangent = torch.func.jvp(fastmm_op.matmul, (a, b), (da, db))
    assert torch.allclose(tangent, da @ b + a @ db)

    def loss(product):
        return lambda x: product(x, b).square().sum()

    assert torch.allclose(
        torch.func.hessian(loss(fastmm_op.matmul))(a), torch.func.hessian(loss(torch.matmul))(a)
    )
