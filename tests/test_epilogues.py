"""What follows a product in a graph: what the pass fuses into it, and what it leaves where it is.

Graphs of fake CUDA tensors, or of CPU tensors where values are compared: no GPU is needed.
"""

import expecttest
import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fastmm_op.compile.epilogues import read_tail
from fastmm_op.compile.products import read_product
from graphs import graph_lines, run, trace
from linear_oracle import ACTIVATIONS, assert_linear, eager, steps

OURS = torch.ops.fastmm.linear_in_graph.default
BF16 = torch.bfloat16
X, W, BIAS, Y = (5, 7), (9, 7), (9,), (5, 9)


def fused(function, *shapes, decompositions=None, **how) -> list[str]:
    """What was fused into each product, separated by commas."""
    graph = trace(function, *shapes, decompositions=decompositions, **how)
    return [",".join(decision.fused) for decision in run(graph)]


# What it writes.


def test_a_feed_forward_block() -> None:
    """As Inductor's joint graph has it: in two dimensions, and gelu in float32."""

    def block(x, up, bias, down):
        return x + F.linear(F.gelu(F.linear(x, up, bias)), down)

    shapes = (2, 5, 7), (33, 7), (33,), (7, 33)
    graph = trace(block, *shapes, dtype=BF16, decompositions=select_decomp_table())
    decisions = run(graph)
    graph.graph.eliminate_dead_code()
    expecttest.assert_expected_inline(
        "\n".join([graph_lines(graph), *map(str, decisions)]),
        """\
linear_in_graph_default = fastmm.linear_in_graph.default(x_1, up_1, bias_1, None, activation='gelu', precision='fp32')
linear_in_graph_default_1 = fastmm.linear_in_graph.default(linear_in_graph_default, down_1, None, x_1, activation='none', precision='fp32')
addmm: addmm (10, 7) @ (7, 33) bfloat16: taken with bias, gelu: always=True
mm: mm (10, 33) @ (33, 7) bfloat16: taken with residual: always=True""",  # noqa: E501
    )
    assert [tuple(node.meta["val"].shape) for node in graph.graph.nodes if node.target is OURS] == [
        (2, 5, 33),
        (2, 5, 7),
    ]


def test_weights_that_are_no_transposes() -> None:
    graph = trace(lambda x, b, bias: torch.addmm(bias, x, b), X, (7, 9), BIAS)
    run(graph)
    expecttest.assert_expected_inline(
        graph_lines(graph),
        """\
permute_default = aten.permute.default(b_1, [1, 0])
linear_in_graph_default = fastmm.linear_in_graph.default(x_1, permute_default, bias_1, None, activation='none', precision='fp32')""",  # noqa: E501
    )
    weight, ours = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert (weight.meta["val"].shape, weight.meta["val"].stride()) == ((9, 7), (1, 9))
    operands, keywords = ours.meta["eager_input_vals"]
    assert [x.stride() for x in operands[:2]] == [(7, 1), (1, 9)]
    assert (operands[3], keywords) == (None, {"activation": "none", "precision": "fp32"})


TRANSPOSES = {
    "t": lambda w: w.t(),
    "mT": lambda w: w.mT,
    "transpose": lambda w: w.transpose(-2, 1),
    "permute": lambda w: w.permute(1, 0),
    "permute -": lambda w: w.permute(-1, -2),
}


@pytest.mark.parametrize("transpose", TRANSPOSES)
def test_weights_as_modules_keep_them(transpose) -> None:
    def linear(x, w, bias):
        return torch.addmm(bias, x, TRANSPOSES[transpose](w))

    graph = trace(linear, X, W, BIAS)
    run(graph)
    (ours,) = [node for node in graph.graph.nodes if node.target is OURS]
    assert [node.op for node in ours.args[:3]] == ["placeholder"] * 3


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "none"])
def test_activations(activation, dtype, decomposed) -> None:
    """Whole, or in the nodes that Inductor's table makes of them in this version of torch."""
    table = select_decomp_table() if decomposed else None
    for x, y in ((X, Y), ((2, 5, 7), (2, 5, 9))):
        for parts, shapes in (
            (f"bias,{activation},residual", (x, W, BIAS, y)),
            (f"{activation},residual", (x, W, y)),
        ):

            def function(x, w, *rest):
                *bias, residual = rest
                return residual + ACTIVATIONS[activation](F.linear(x, w, *bias))

            found = fused(function, *shapes, dtype=dtype, decompositions=table)
            assert found == [parts], f"{x}"


def test_sums_of_products() -> None:
    """Each addition goes to one product, the first that it can go to."""

    def function(x, w, b):
        return F.linear(x, w) + F.linear(x, w, b)

    assert fused(function, X, W, BIAS, dtype=BF16) == ["residual", "bias"]
    assert fused(lambda x, w: torch.mm(x, w.mT) + x @ w.mT, X, W) == ["residual", ""]


# What it leaves alone.


def linear_then(function):
    """function(x @ w.mT + bias, *rest)"""
    return lambda x, w, b, *rest: function(F.linear(x, w, b), *rest)


def overwritten(x, w, b, r):
    y = F.linear(x, w, b)
    x.add_(1)
    return y + r


APART = {
    "two users of the sum": (linear_then(lambda y: (y, y.relu())), [], "bias"),
    "two users of the activation": (
        linear_then(lambda y, r: (y.relu(), y.relu() + r)),
        [Y],
        "bias",
    ),
    "added to itself": (linear_then(lambda y: y + y), [], "bias"),
    "a row": (linear_then(lambda y, r: y + r), [BIAS], "bias"),
    "one row": (linear_then(lambda y, r: y + r), [(1, 9)], "bias"),
    "a column": (linear_then(lambda y, r: y + r), [(5, 1)], "bias"),
    "a larger term": (linear_then(lambda y, r: y + r), [(2, 5, 9)], "bias"),
    "a number": (linear_then(lambda y: y + 1), [], "bias"),
    "alpha": (linear_then(lambda y, r: torch.add(y, r, alpha=2)), [Y], "bias"),
    "another dtype": (linear_then(lambda y, r: y + r.double()), [Y], "bias"),
    "a transposed term": (linear_then(lambda y, r: r + y), [(5, 9, "T")], "bias"),
    "an activation last": (linear_then(lambda y, r: (y + r).relu()), [Y], "bias,residual"),
    "two residuals": (linear_then(lambda y, r: y + r + r), [Y], "bias,residual"),
    "another activation": (linear_then(torch.sigmoid), [], "bias"),
    "another view": (linear_then(lambda y, r: y.view(9, 5) + r), [(9, 5)], "bias"),
    "flattened": (linear_then(lambda y, r: y.view(45) + r), [(45,)], "bias"),
    "overwritten": (overwritten, [Y], "bias"),
}


@pytest.mark.parametrize("case", APART)
def test_left_alone(case) -> None:
    function, rest, parts = APART[case]
    assert fused(function, X, W, BIAS, *rest) == [parts]


def test_views_of_another_shape() -> None:
    """The rows of a batch, divided otherwise than the product's operand was."""

    def function(x, w, b, r):
        return F.linear(x, w, b).view(5, 2, 9) + r

    assert fused(function, (2, 5, 7), W, BIAS, (5, 2, 9)) == ["bias"]


def test_batched_products() -> None:
    assert fused(lambda a, b, r: a @ b + r, (3, 5, 7), (3, 7, 9), (3, 5, 9)) == [""]


@pytest.mark.parametrize(
    ("dtype", "parts"), [(torch.float32, "bias,relu"), (torch.float16, ""), (BF16, "")]
)
def test_a_row_added_to_mm(dtype, parts) -> None:
    """16-bit: eager rounds the product before it adds the row, which the op's bias is not."""
    assert fused(lambda x, w, b: (x @ w.mT + b).relu(), X, W, BIAS, dtype=dtype) == [parts]


@pytest.mark.parametrize(
    ("added", "parts"),
    [((9,), "bias"), ((5, 9), "residual"), ((5, 1), ""), ((1, 9), ""), ((1,), "")],
)
def test_what_addmm_adds(added, parts) -> None:
    assert fused(lambda c, x, w: torch.addmm(c, x, w.mT), added, X, W, dtype=BF16) == [parts]


def test_gelu_by_hand_is_rounded_otherwise() -> None:
    def function(x, w, b):
        y = F.linear(x, w, b)
        return 0.5 * y * (1 + torch.erf(y * 0.7071067811865476))

    assert fused(function, X, W, BIAS, dtype=BF16, decompositions=select_decomp_table()) == ["bias"]


@pytest.mark.parametrize("key", ["partitioner_tag", "recompute", "ac_graph_id"])
def test_nodes_that_belong_elsewhere(key) -> None:
    """To the backward pass, say, or to what is to be recomputed there."""
    graph = trace(linear_then(lambda y, r: y.relu() + r), X, W, BIAS, Y)
    product = next(p for node in graph.graph.nodes if (p := read_product(node)))
    assert read_tail(product).parts == ("bias", "relu", "residual")
    *_, total, _ = graph.graph.nodes
    total.meta[key] = "elsewhere"
    assert read_tail(product).parts == ("bias", "relu")
    for node in graph.graph.nodes:
        node.meta[key] = "elsewhere"
    assert read_tail(product).parts == ("bias", "relu", "residual")
    run(graph)
    (ours,) = [node for node in graph.graph.nodes if node.target is OURS]
    assert ours.meta[key] == "elsewhere"


@pytest.mark.parametrize("shape", [(6, 7), (3, 4, 7)], ids=str)
def test_dynamic_shapes(shape) -> None:
    """Sizes that are one symbol are equal: no guard is added."""

    def function(x, w, b, other):
        y = F.gelu(F.linear(x, w, b)) + F.relu(F.linear(x, w))
        return y, F.linear(x, w, b) + other

    args = [torch.empty(s) for s in (shape, W, BIAS, (*shape[:-1], 9))]
    graph = make_fx(function, select_decomp_table(), tracing_mode="symbolic")(*args)
    guards = list(graph.shape_env.guards)
    found = [",".join(decision.fused) for decision in run(graph)]
    assert list(graph.shape_env.guards) == guards
    assert found == ["bias,gelu,residual", "relu", "bias,residual"]


# What is computed.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_rewritten_graph_computes_the_same(activation, dtype, device) -> None:
    x, weight, bias, residual = (
        torch.randn(shape, dtype=dtype, device=device) for shape in ((2, 5, 7), W, BIAS, (2, 5, 9))
    )
    for parts in ("bias residual", "bias", "residual", ""):
        given = {"bias": bias, "residual": residual}
        given = {name: given[name] for name in parts.split()}

        def function(x, weight, *rest, names=tuple(given)):
            rest = dict(zip(names, rest, strict=True))
            return eager(x, weight, rest.get("bias"), activation, rest.get("residual"))

        args = x, weight, *given.values()
        graph = make_fx(function, select_decomp_table())(*args)
        (decision,) = run(graph)
        assert set(decision.fused) == {*given, activation} - {"none"}
        given = {"bias": None, "residual": None} | given
        got = graph(*args)
        assert_linear(got, x, weight, activation=activation, precision="fp32", **given)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_rounding_points(activation, device) -> None:
    """Bit for bit eager's: sums of small integers are exact, so the roundings are all there is."""
    like = {"device": device, "dtype": torch.float16}
    x = torch.randint(-8, 9, (24, 40), **like)
    weight = torch.randint(-8, 9, (17, 40), **like)
    bias, residual = torch.randn(17, **like), 100 * torch.randn(24, 17, **like)

    def function(x, weight, bias, residual):
        return eager(x, weight, bias, activation, residual)

    graph = make_fx(function, select_decomp_table())(x, weight, bias, residual)
    assert {"bias", "residual"} <= set(run(graph)[0].fused)
    got = graph(x, weight, bias, residual)
    args = [t.cpu() for t in (x, weight, bias)] + [activation, residual.cpu()]
    assert torch.equal(got.cpu(), steps(*args, dtype=torch.float16)[-1].half())
    assert not torch.equal(got.cpu(), steps(*args)[-1].half()), "these numbers cannot tell"
