"""torch.compile and torch.export: one opaque call, one graph, the numbers of the eager call."""

import expecttest
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch._inductor.utils import run_and_get_code
from torch.testing import FileCheck
from torch.utils.checkpoint import checkpoint

import fastmm_op
from graphs import graph_lines

in_graph = torch.ops.fastmm.matmul_in_graph.default
CALL = "torch.ops.fastmm.matmul.default("
CALL_IN_GRAPH = "torch.ops.fastmm.matmul_in_graph.default("
# They differ in divisibility, and in which is largest; 0 and 1 are always specialised.
SIZES = [(17, 33, 9), (16, 64, 48), (5, 130, 21), (64, 3, 7)]


def inputs(m=17, k=33, n=9, device="cpu", dtype=torch.float32, **kwargs) -> tuple:
    return (
        torch.randn(m, k, device=device, dtype=dtype, **kwargs),
        torch.randn(k, n, device=device, dtype=dtype, **kwargs),
    )


def counting(function, **kwargs) -> tuple:
    counter = CompileCounterWithBackend(kwargs.pop("backend", "aot_eager"))
    return torch.compile(function, backend=counter, fullgraph=True, **kwargs), counter


@pytest.mark.parametrize("precision", ["tf32", "fp32", "ieee"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_is_the_eager_result_bit_for_bit(dtype, precision, device) -> None:
    a, b = inputs(device=device, dtype=dtype)
    compiled, _ = counting(lambda a, b: fastmm_op.matmul(a, b, precision=precision))
    assert torch.equal(compiled(a, b), fastmm_op.matmul(a, b, precision=precision))


@pytest.mark.parametrize("shapes", [((7,), (7,)), ((2, 5, 7), (7, 3)), ((3, 1, 5, 7), (2, 7, 3))])
def test_broadcasting(shapes, device) -> None:
    a, b = (torch.randn(shape, device=device) for shape in shapes)
    compiled, counter = counting(fastmm_op.matmul, dynamic=True)
    assert torch.equal(compiled(a, b), fastmm_op.matmul(a, b))
    assert counter.frame_count == 1


@pytest.mark.parametrize("model", [fastmm_op.matmul, fastmm_op.ModelNew()], ids=["op", "ModelNew"])
def test_dynamic_shapes_compile_once(model, device) -> None:
    compiled, counter = counting(model, dynamic=True)
    for sizes in SIZES:
        a, b = inputs(*sizes, device=device)
        assert torch.equal(compiled(a, b), fastmm_op.matmul(a, b)), sizes
    assert counter.frame_count == 1


def test_static_shapes_compile_twice_at_most(device) -> None:
    """Dynamo's default: static at first, dynamic from the second shape on."""
    compiled, counter = counting(fastmm_op.ModelNew())
    for sizes in SIZES:
        a, b = inputs(*sizes, device=device)
        assert torch.equal(compiled(a, b), fastmm_op.matmul(a, b)), sizes
    assert counter.frame_count == 2


def test_strides_and_offsets_do_not_recompile(device) -> None:
    """Alignment is the plan's business, at run time; the graph knows nothing of it."""
    compiled, counter = counting(fastmm_op.matmul, dynamic=True)
    for offset in range(4):
        wide_a, b = inputs(17, 40 + offset, 9, device=device)
        a = wide_a[:, offset : offset + 33]
        b = b[:33]
        assert torch.equal(compiled(a, b), fastmm_op.matmul(a, b)), offset
    assert counter.frame_count == 1


def test_dynamo_never_sees_the_short_path(monkeypatch, device) -> None:
    """It asks private APIs that Dynamo cannot trace; on a CPU it would stop short of them."""

    def seen(a, b):
        raise AssertionError("takes_short_path was traced")

    monkeypatch.setattr("fastmm_op.functional.takes_short_path", seen)
    a, b = inputs(device=device)
    compiled, counter = counting(fastmm_op.matmul)
    assert torch.equal(compiled(a, b), torch.ops.fastmm.matmul(a, b))
    assert counter.frame_count == 1


def test_no_graph_break(device) -> None:
    def function(a, b):
        return fastmm_op.matmul(a.relu(), b, precision="fp32").sum()

    explained = torch._dynamo.explain(function)(*inputs(device=device))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_backward(dynamic, device) -> None:
    compiled, counter = counting(lambda a, b: fastmm_op.matmul(a, b).sin().sum(), dynamic=dynamic)
    a, b = inputs(device=device, requires_grad=True)
    compiled(a, b).backward()
    got, a.grad, b.grad = (a.grad, b.grad), None, None
    fastmm_op.matmul(a, b).sin().sum().backward()
    assert torch.equal(got[0], a.grad)
    assert torch.equal(got[1], b.grad)
    assert counter.frame_count == 1


def test_graphs() -> None:
    """What AOTAutograd makes of a product and its backward: three calls of the op on views."""
    graphs = []

    def capture(graph, example_inputs):
        graphs.append(graph_lines(graph))
        return make_boxed_func(graph.forward)

    def backend(graph, example_inputs):
        return aot_module_simplified(graph, example_inputs, capture, bw_compiler=capture)

    def function(a, b):
        return -fastmm_op.matmul(a, b, precision="fp32")

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    compiled(*inputs(requires_grad=True)).sum().backward()
    expecttest.assert_expected_inline(
        "\n\n".join(graphs),
        """\
matmul_in_graph = fastmm.matmul_in_graph.default(primals_1, primals_2, precision='fp32')
neg = aten.neg.default(matmul_in_graph)

neg_1 = aten.neg.default(tangents_1)
transpose = aten.transpose.int(primals_2, -2, -1)
matmul_in_graph_1 = fastmm.matmul_in_graph.default(neg_1, transpose, precision='fp32')
view = aten.view.default(matmul_in_graph_1, [17, 33])
transpose_1 = aten.transpose.int(primals_1, -2, -1)
matmul_in_graph_2 = fastmm.matmul_in_graph.default(transpose_1, neg_1, precision='fp32')
view_1 = aten.view.default(matmul_in_graph_2, [33, 9])""",
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_calls_the_op_once(dynamic, device) -> None:
    """Opaque: no decomposition, no copy of a transposed operand, and the eager numbers."""
    compiled = torch.compile(
        lambda a, b: fastmm_op.matmul(a, b.mT).relu(), fullgraph=True, dynamic=dynamic
    )
    a, b = inputs(device=device)
    b = b.mT.contiguous()
    with torch._inductor.config.patch(force_disable_caches=True):
        got, (code, *_) = run_and_get_code(compiled, a, b)
    FileCheck().check_count(CALL_IN_GRAPH, 1, exactly=True).run(code)
    FileCheck().check_not("aten.mm").check_not("extern_kernels.mm").run(code)
    assert torch.equal(got, fastmm_op.matmul(a, b.mT).relu())


def test_autocast_inside(device) -> None:
    def function(a, b):
        with torch.autocast(device, dtype=torch.bfloat16):
            inside = fastmm_op.matmul(a, b)
        return inside, fastmm_op.matmul(a, b)

    a, b = inputs(device=device)
    compiled, _ = counting(function)
    for got, want in zip(compiled(a, b), function(a, b), strict=True):
        assert got.dtype is want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", ["matmul", "linear"])
def test_backward_under_autocast(name, recomputed, device) -> None:
    """A graph that was compiled without autocast runs without, whatever its caller does."""

    def function(a, b):
        return getattr(torch.ops.fastmm, name)(a, b, precision="fp32").sin()

    def checkpointed(a, b):
        return checkpoint(function, a, b, use_reentrant=False)

    a = torch.randn(17, 33, device=device, requires_grad=True)
    b = torch.randn(33, 33, device=device, requires_grad=True)
    compiled = torch.compile(
        checkpointed if recomputed else function, backend="aot_eager", fullgraph=True
    )
    out = compiled(a, b)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = torch.autograd.grad(out.sum(), (a, b))
    want = torch.autograd.grad(function(a, b).sum(), (a, b))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_export_round_trip(dynamic, tmp_path, device) -> None:
    a, b = inputs(device=device)
    m, k, n = map(torch.export.Dim, "mkn")
    sizes = {"A": {0: m, 1: k}, "B": {0: k, 1: n}} if dynamic else None
    program = torch.export.export(fastmm_op.ModelNew("fp32"), (a, b), dynamic_shapes=sizes)
    FileCheck().check_count(CALL, 1, exactly=True).run(program.graph_module.code)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for size in SIZES if dynamic else [SIZES[0]]:
        a, b = inputs(*size, device=device)
        assert torch.equal(loaded(a, b), fastmm_op.matmul(a, b, precision="fp32"))


def test_decompositions_leave_it_alone() -> None:
    program = torch.export.export(fastmm_op.ModelNew(), inputs()).run_decompositions()
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [in_graph]


def test_the_module_in_eager(device) -> None:
    a, b = inputs(device=device)
    model = fastmm_op.ModelNew("ieee")
    assert torch.equal(model(a, b), fastmm_op.matmul(a, b, precision="ieee"))
    assert repr(model) == "ModelNew(precision='ieee')"
