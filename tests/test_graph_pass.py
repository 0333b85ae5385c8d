"""The graph pass: what it reads in a graph, what it writes there, and what it leaves alone.

Graphs of fake CUDA tensors, or of CPU tensors decided about as for a card: no GPU is needed.
"""

import logging
import pickle
from types import SimpleNamespace

import expecttest
import pytest
import torch
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._inductor import config
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes import joint_graph, pad_mm
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fastmm_op.arch import ARCHES
from fastmm_op.compile import graph_pass, products
from fastmm_op.compile.backend import options
from fastmm_op.compile.compat import Flags
from fastmm_op.compile.graph_pass import HOOKS, MatmulPass
from fastmm_op.compile.products import read_product
from fastmm_op.compile.settings import Settings
from graphs import ALWAYS, graph_lines, run, trace

aten = torch.ops.aten
OURS = torch.ops.fastmm.matmul_in_graph.default
H200 = Settings(arch="sm_90")
BF16 = torch.bfloat16
FLAGS = Flags(pads=False, tunes=False, graphs=False)


def only(decisions: list) -> graph_pass.Decision:
    (decision,) = decisions
    return decision


def product_of(graph: torch.fx.GraphModule) -> products.Product:
    (found,) = [p for node in graph.graph.nodes if (p := read_product(node))]
    return found


# What it writes.


def test_mm_and_addmm() -> None:
    def function(x, weight, bias):
        return torch.addmm(bias, x, weight).relu() @ weight.mT

    graph = trace(function, (5, 7), (7, 9), (9,))
    run(graph)
    expecttest.assert_expected_inline(
        graph_lines(graph),
        """\
permute_default = aten.permute.default(weight_1, [1, 0])
linear_in_graph_default = fastmm.linear_in_graph.default(x_1, permute_default, bias_1, None, activation='relu', precision='fp32')
transpose = aten.transpose.int(weight_1, -2, -1)
matmul_in_graph_default = fastmm.matmul_in_graph.default(linear_in_graph_default, transpose, precision='fp32')""",  # noqa: E501
    )


def test_bmm_and_baddbmm() -> None:
    def function(a, b, c):
        return torch.baddbmm(c, a, b), torch.bmm(a, a.mT)

    graph = trace(function, (3, 5, 7), (3, 7, 9), (5, 9), dtype=BF16)
    run(graph)
    expecttest.assert_expected_inline(
        graph_lines(graph),
        """\
matmul_in_graph_default = fastmm.matmul_in_graph.default(a_1, b_1, precision='fp32')
add_tensor = aten.add.Tensor(matmul_in_graph_default, c_1)
transpose = aten.transpose.int(a_1, -2, -1)
matmul_in_graph_default_1 = fastmm.matmul_in_graph.default(a_1, transpose, precision='fp32')""",
    )


def test_linear_and_its_backward() -> None:
    """The joint graph that AOTAutograd makes: forward, and both gradients."""

    def function(x, weight, bias):
        return (torch.nn.functional.linear(x, weight, bias).sin(),)

    args = [torch.empty(shape, requires_grad=True) for shape in ((2, 5, 7), (9, 7), (9,))]
    graph = aot_export_joint_simple(function, args, trace_joint=True)
    run(graph)
    expecttest.assert_expected_inline(
        graph_lines(graph),
        """\
view = aten.view.default(primals_1, [10, 7])
t = aten.t.default(primals_2)
linear_in_graph_default = fastmm.linear_in_graph.default(view, primals_2, primals_3, None, activation='none', precision='fp32')
view_1 = aten.view.default(linear_in_graph_default, [2, 5, 9])
sin = aten.sin.default(view_1)
cos = aten.cos.default(view_1)
mul = aten.mul.Tensor(tangents_1, cos)
view_2 = aten.view.default(mul, [10, 9])
t_1 = aten.t.default(t)
matmul_in_graph_default = fastmm.matmul_in_graph.default(view_2, t_1, precision='fp32')
t_2 = aten.t.default(view_2)
matmul_in_graph_default_1 = fastmm.matmul_in_graph.default(t_2, view, precision='fp32')
t_3 = aten.t.default(matmul_in_graph_default_1)
sum_1 = aten.sum.dim_IntList(view_2, [0], True)
view_3 = aten.view.default(sum_1, [9])
t_4 = aten.t.default(t_3)
view_4 = aten.view.default(matmul_in_graph_default, [2, 5, 7])""",  # noqa: E501
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_rewritten_graph_computes_the_same(dtype) -> None:
    def function(x, weight, bias, a, b):
        y = torch.addmm(bias, x, weight.mT)
        return y @ weight, torch.baddbmm(y[:3, :2, None], a, b), torch.bmm(b.mT, a.mT)

    shapes = (5, 7), (9, 7), (9,), (3, 2, 4), (3, 4, 6)
    args = [torch.randn(shape, dtype=dtype) for shape in shapes]
    graph = make_fx(function)(*args)
    assert len(run(graph)) == 4
    assert not any(node.target in products.FIRST_OPERAND for node in graph.graph.nodes)
    # A sum after the product is rounded once more than one inside of it.
    allowed = 1e-6 if dtype is torch.float32 else 2**-10
    for got, want in zip(graph(*args), function(*args), strict=True):
        assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
        assert (got - want).double().norm() <= allowed * want.double().norm()


def test_dynamic_shapes() -> None:
    """Symbols stay symbols: no guard is added, and the decision is for the sizes seen."""
    args = torch.empty(4096, 4096, dtype=BF16), torch.empty(4096, 2041, dtype=BF16)
    graph = make_fx(torch.mm, tracing_mode="symbolic")(*args)
    shape_env = graph.shape_env
    guards = list(shape_env.guards)
    decision = only(run(graph, H200))
    assert list(shape_env.guards) == guards
    text = f"{graph_lines(graph)}\n{decision}".replace(decision.verdict.why, "...")
    for name in (decision.M.split("=")[0], decision.N.split("=")[0]):
        text = text.replace(name, "s")  # torch numbers its symbols as it likes
    expecttest.assert_expected_inline(
        text,
        """\
matmul_in_graph_default = fastmm.matmul_in_graph.default(arg0_1, arg1_1, precision='fp32')
mm: mm (s=4096, s=4096) @ (s=4096, s=2041) bfloat16: taken: ...""",
    )


def test_metadata_stays() -> None:
    """Where the node belongs and whether to recompute it; the strides the op is promised."""
    graph = trace(torch.mm, (5, 7), (7, 9, "T"))
    node = product_of(graph).node
    node.meta |= {"recompute": "must", "partitioner_tag": "is_backward", "seq_nr": 7}
    value = node.meta["val"]
    run(graph)
    (ours,) = [node for node in graph.graph.nodes if node.target is OURS]
    assert ours.meta["val"] is value
    assert [ours.meta[key] for key in ("recompute", "partitioner_tag", "seq_nr")] == [
        "must",
        "is_backward",
        7,
    ]
    operands, keywords = ours.meta["eager_input_vals"]
    assert [x.stride() for x in operands] == [(7, 1), (1, 7)]
    assert keywords == {"precision": "fp32"}


@pytest.mark.parametrize("ta", [False, True])
@pytest.mark.parametrize("tb", [False, True])
def test_results_lie_as_before(ta, tb) -> None:
    """ATen's results are contiguous whatever the operands' strides are: the op's, always."""
    t = {True: ("T",), False: ()}
    for function, batch in ((torch.mm, ()), (torch.bmm, (3,))):
        graph = trace(function, (*batch, 5, 7, *t[ta]), (*batch, 7, 9, *t[tb]))
        assert product_of(graph).node.meta["val"].is_contiguous()


# What it leaves alone, and the reason given.

LEFT_ALONE = {
    "float64": (torch.mm, [(5, 5)] * 2, {"dtype": torch.float64}, "float64 is left to ATen"),
    "int64": (torch.mm, [(5, 5)] * 2, {"dtype": torch.int64}, "int64 is left to ATen"),
    "complex": (torch.mm, [(5, 5)] * 2, {"dtype": torch.complex64}, "complex64 is left to ATen"),
    "alpha": (
        lambda c, a, b: torch.addmm(c, a, b, alpha=2),
        [(5, 5)] * 3,
        {},
        "alpha is 2: scaled sums are left to ATen",
    ),
    "beta": (
        lambda c, a, b: torch.baddbmm(c, a, b, beta=0),
        [(2, 5, 5)] * 3,
        {},
        "beta is 0: scaled sums are left to ATen",
    ),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone_always(case) -> None:
    function, shapes, how, why = LEFT_ALONE[case]
    graph = trace(function, *shapes, **how)
    before = graph.code
    assert only(run(graph)).verdict.why == why
    assert graph.code == before


def test_another_result_dtype_is_no_product_of_ours() -> None:
    def function(a, b):
        return torch.mm(a, b, out_dtype=torch.float32)

    graph = trace(function, (5, 7), (7, 9), dtype=BF16)
    assert aten.mm.dtype in {node.target for node in graph.graph.nodes}
    assert run(graph) == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tensors_that_are_on_no_card(device) -> None:
    """The CPU's, and fake CUDA tensors on a machine with no GPU; an arch decides all the same."""
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    graph = trace(torch.mm, (4095, 4095), (4095, 4095), dtype=BF16, device=device)
    assert "no GPU that fastmm has kernels for" in only(run(graph, Settings())).verdict.why
    with config.patch(shape_padding=False):
        assert only(run(graph, H200)).verdict.take


def test_sizes_known_at_run_time_only() -> None:
    def function(x, weight):
        rows = x.nonzero()  # as many as there are
        return rows.to(x.dtype) @ weight

    with FakeTensorMode(shape_env=ShapeEnv()):
        graph = make_fx(function)(torch.empty(5, 7), torch.empty(2, 9))
    assert only(run(graph, H200)).verdict.why == "a size is known at run time only"
    assert only(run(graph, ALWAYS)).verdict.take, "legal all the same"


# What it decides on: the card, the sizes, and what stands around a product.


@pytest.mark.parametrize(
    ("shapes", "dtype", "tf32", "take", "why"),
    [
        ([(4096, 4096), (4096, 2041)], BF16, False, True, "as fast as cuBLAS"),
        ([(4096, 4096), (4096, 2048)], BF16, False, False, "no clear win"),
        ([(8192, 8192), (8192, 8192)], torch.float32, True, True, "as fast as cuBLAS"),
        ([(1536, 1536), (1536, 1536)], torch.float32, True, False, "too small"),
        ([(1, 4096), (4096, 11008)], BF16, False, False, "bound by memory traffic"),
    ],
    ids=["odd bf16", "aligned bf16", "large TF32", "small TF32", "one row"],
)
def test_decisions_for_an_h200(shapes, dtype, tf32, take, why) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    graph = trace(torch.mm, *shapes, dtype=dtype)
    with config.patch(shape_padding=False):
        verdict = only(run(graph, H200)).verdict
    assert (verdict.take, why in verdict.why) == (take, True), verdict
    assert (OURS in {node.target for node in graph.graph.nodes}) == take


def test_the_card_that_the_tensors_are_on(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(graph_pass, "card", lambda device: asked.append(device) or ARCHES["sm_90"])
    graph = trace(torch.mm, (4096, 4096), (4096, 2041), dtype=BF16)
    with config.patch(shape_padding=False):
        assert only(run(graph, Settings())).verdict.take
    assert [str(device) for device in asked] == ["cuda:0"]


def test_the_problem_that_is_planned() -> None:
    """Sizes, strides and alignment as fastmm_op.launch would describe the tensors."""
    launch = pytest.importorskip("fastmm_op.launch", reason="needs Triton")
    base = torch.empty(4 * 40 * 50 + 8, dtype=torch.float16)
    a = base[4 : 4 + 4 * 5 * 48].view(4, 5, 48)[:, :, :7]  # padded rows, 8 bytes off
    b = torch.empty(1, 9, 7, dtype=torch.float16).mT.expand(4, 7, 9)
    for one, two in ((a, b), (b.mT, a.mT), (a[:1], b[:1])):
        graph = make_fx(torch.bmm, tracing_mode="fake")(one, two)
        found = product_of(graph).problem("tf32", ARCHES["sm_89"])
        assert found == launch.describe(one, two, "tf32", ARCHES["sm_89"])
    matrix = make_fx(torch.mm, tracing_mode="fake")(a[0], b[0])
    want = launch.describe(a[:1], b[:1], "fp32", ARCHES["sm_89"])
    assert product_of(matrix).problem("fp32", ARCHES["sm_89"]) == want


def around(function, *shapes, flags=FLAGS):
    return product_of(trace(function, *shapes)).surroundings(flags)


X, W = (5, 7), (7, 9)


def test_where_operands_come_from() -> None:
    """pad_mm counts nothing for padding what a kernel of the graph writes anyway."""
    assert not around(torch.mm, X, W).a_made_here, "an input of the graph"
    found = around(lambda x, w: torch.mm(x.relu(), w.view(7, 9)), X, W)
    assert (found.a_made_here, found.b_made_here) == (True, False)
    assert not around(lambda x, w: torch.mm(x.relu(), w), (5, 7, "T"), W).a_made_here, "strides"
    graph = trace(lambda x, w, v: x @ w @ v, X, W, (9, 9))
    second = [p for node in graph.graph.nodes if (p := read_product(node))][1]
    assert not second.surroundings(FLAGS).a_made_here, "another product writes it as it likes"


def test_where_results_go() -> None:
    assert around(torch.mm, X, W).c_leaves
    assert around(lambda x, w: torch.mm(x, w).view(45), X, W).c_leaves, "a view of it"
    assert not around(lambda x, w: torch.mm(x, w).view(45).relu(), X, W).c_leaves


def test_what_would_have_been_fused() -> None:
    bias = (9,)
    column = (5, 1)
    assert around(torch.addmm, column, X, W).extra_pass, "cuBLAS adds it"
    assert around(torch.baddbmm, bias, (2, *X), (2, *W)).extra_pass, "as it does in batches"
    assert not around(torch.addmm, bias, X, W).extra_pass, "so do we"
    assert not around(torch.addmm, (5, 9), X, W).extra_pass, "so do we"

    def fused(c, a, b):
        return torch.addmm(c, a, b).relu()

    assert not around(fused, column, X, W).extra_pass, "relu's kernel adds it, either way"
    tunes = Flags(pads=False, tunes=True, graphs=False)
    assert around(fused, bias, X, W, flags=tunes).extra_pass, "a template's epilogue"
    assert not around(torch.mm, X, W, flags=tunes).extra_pass


def test_what_may_be_padded() -> None:
    pads = Flags(pads=True, tunes=False, graphs=True)
    assert around(torch.mm, X, W, flags=pads).pads
    assert around(torch.mm, X, W, flags=pads).graphs
    assert not around(torch.bmm, (2, *X), (2, *W), flags=pads).pads, "pad_mm had its say"
    symbolic = make_fx(torch.mm, tracing_mode="symbolic")(torch.empty(X), torch.empty(W))
    found = product_of(symbolic).surroundings(pads)
    assert (found.pads, found.static) == (False, (False, False, False))


# What the pass is to Inductor: where it stands, and what its caches know of it.


def test_products_are_taken_before_they_are_padded(monkeypatch) -> None:
    monkeypatch.setattr(pad_mm, "has_triton", lambda *args: True)
    monkeypatch.setattr(pad_mm, "check_device", lambda *args: True)
    for patches, want in (({}, aten.mm.default), (options(always=True), OURS)):
        graph = trace(torch.mm, (129, 255), (255, 257), dtype=BF16, device="cpu")
        with config.patch({"force_shape_pad": True, **patches}):
            joint_graph.joint_graph_passes(graph)
        targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        assert want in targets
        assert (len(targets) == 1) == (want is OURS), "padded only where it is not taken"


def test_attention_is_found_before_its_products_are_taken() -> None:
    def attention(q, k, v):
        return torch.softmax(q @ k.mT / 8.0, -1) @ v

    with FakeTensorMode():
        graph = make_fx(attention, select_decomp_table())(*[torch.empty(2, 4, 16, 8)] * 3)
    with config.patch(options(always=True)):
        joint_graph.joint_graph_passes(graph)
    run(graph)
    assert aten.bmm.default not in {node.target for node in graph.graph.nodes}
    assert OURS not in {node.target for node in graph.graph.nodes}
    assert any("scaled_dot_product" in str(node.target) for node in graph.graph.nodes)


@pytest.mark.parametrize("api", ["allow_tf32", "fp32_precision", "set_float32_matmul_precision"])
def test_precision_is_the_users(api) -> None:
    def set_tf32(allowed: bool) -> None:
        if api == "allow_tf32":
            torch.backends.cuda.matmul.allow_tf32 = allowed
        elif api == "fp32_precision":
            torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
        else:
            torch.set_float32_matmul_precision("high" if allowed else "highest")

    for allowed in (False, True):
        set_tf32(allowed)
        before = torch.backends.cuda.matmul.fp32_precision
        graph = trace(torch.mm, X, W)
        decision = only(run(graph))
        want = "tf32" if allowed else "fp32"
        assert (decision.precision, f"precision = '{want}'" in graph.code) == (want, True)
        assert torch.backends.cuda.matmul.fp32_precision == before
    set_tf32(False)
    assert only(run(trace(torch.mm, X, W, dtype=BF16))).precision is None


def test_cache_keys() -> None:
    """Equal for equal passes; different for anything that could change the graph."""
    joint, post = HOOKS
    base = MatmulPass(joint, Settings()).uuid()
    assert pickle.loads(pickle.dumps(base)) == base
    assert base == MatmulPass(joint, Settings(), record=[]).uuid()
    others = [MatmulPass(post, Settings()), MatmulPass(joint, ALWAYS), MatmulPass(joint, H200)]
    keys = {base, *(other.uuid() for other in others)}
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    keys.add(MatmulPass(joint, Settings()).uuid())
    assert len(keys) == 5


def test_cache_keys_know_the_source_and_the_cards(monkeypatch) -> None:
    before = MatmulPass(next(iter(HOOKS)), Settings()).uuid()
    monkeypatch.setattr(graph_pass, "cards", lambda: [ARCHES["sm_80"]])
    with_card = MatmulPass(next(iter(HOOKS)), Settings()).uuid()
    monkeypatch.setattr(graph_pass, "source_hash", lambda: "another version")
    assert len({before, with_card, MatmulPass(next(iter(HOOKS)), Settings()).uuid()}) == 3


def test_source_hash_covers_the_package(monkeypatch, tmp_path) -> None:
    (tmp_path / "compile").mkdir()
    for name in ("__init__.py", "plan.py", "compile/peer.py"):
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(
        graph_pass, "fastmm_op", SimpleNamespace(__file__=str(tmp_path / "__init__.py"))
    )
    seen = {graph_pass.source_hash.__wrapped__()}
    for name in ("plan.py", "compile/peer.py"):
        (tmp_path / name).write_text("2")
        seen.add(graph_pass.source_hash.__wrapped__())
    assert len(seen) == 3


def test_log() -> None:
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")
    graph_pass.log.addHandler(handler)
    level = graph_pass.log.level
    graph_pass.log.setLevel(logging.DEBUG)
    try:
        run(trace(torch.bmm, (3, 5, 7), (3, 7, 9)))
        run(trace(torch.mm, (5, 7), (7, 9), dtype=BF16), H200)
    finally:
        graph_pass.log.removeHandler(handler)
        graph_pass.log.setLevel(level)
    expecttest.assert_expected_inline(
        "\n".join(lines),
        """\
DEBUG bmm: bmm 3 x (5, 7) @ (7, 9) float32 (fp32): taken: always=True
INFO post_grad_custom_pre_pass: 1 of 1 products taken
DEBUG mm: mm (5, 7) @ (7, 9) bfloat16: left alone: too small: the call itself would cost more
INFO joint_custom_pre_pass: 0 of 1 products taken""",
    )


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"arch": "sm_70"}, ValueError, "arch must be one of ('sm_80', 'sm_89', 'sm_90')"),
        ({"arch": 90}, TypeError, "got 90"),
        ({"always": 1}, TypeError, "always must be True or False, got 1"),
    ],
)
def test_bad_settings(bad, error, message) -> None:
    with pytest.raises(error) as caught:
        Settings(**bad)
    assert message in str(caught.value)
