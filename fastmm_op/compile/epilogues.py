"""Reading what a graph does to a product: what of it ``linear_in_graph`` can do in its place."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from fastmm_op.compile.activations import activation_of
from fastmm_op.compile.products import MATRIX_PRODUCTS, Product, alike, is_row, same_sizes

aten = torch.ops.aten

# Metadata that says when and where a node is computed: nodes that differ in it stay apart.
# Forward or backward; recomputed or saved, in which checkpointed region; the user's annotations.
PLACE = ("partitioner_tag", "recompute", "ac_graph_id", "custom")


@dataclass(frozen=True)
class Tail:
    """A product and what follows it: activation(x @ b + bias) + residual.

    Attributes:
        x: (..., K): the product's first operand, or what that is a view of.
        nodes: what is computed, from the product to the result; none but the last has other users.
        bias: (N,).
        activation: one of ``problem.ACTIVATIONS``.
        residual: of the result's shape.
    """

    x: Node
    nodes: tuple[Node, ...]
    bias: Node | None = None
    activation: str = "none"
    residual: Node | None = None

    @property
    def result(self) -> Node:
        return self.nodes[-1]

    @property
    def parts(self) -> tuple[str, ...]:
        """What is fused, for people."""
        bias = ("bias",) * (self.bias is not None)
        activation = (self.activation,) * (self.activation != "none")
        return bias + activation + ("residual",) * (self.residual is not None)

    def then(self, *nodes: Node, **parts) -> "Tail":
        return replace(self, nodes=self.nodes + nodes, **parts)


def read_tail(product: Product) -> Tail | None:
    """What can be fused into a product that is taken; None: nothing.

    Roundings stay where the graph has them, because the op rounds 16-bit values after the bias, the
    activation and the residual. So a 16-bit ``mm`` takes no bias: its sum would be rounded once.
    """
    node, added = product.node, product.added
    if node.target not in MATRIX_PRODUCTS:
        return None
    tail = Tail(product.a, (node,))
    if added is not None:
        if is_row(added, node):
            tail = tail.then(bias=added)
        elif alike(added, node):
            # Rounded once in a 16-bit addmm, but twice as a sum after the product, fused or not.
            return tail.then(residual=added)
        else:
            return None
    longer = extend(tail)
    if longer is tail:
        longer = through_view(tail)
    return longer if longer.parts else None


def through_view(tail: Tail) -> Tail:
    """What follows a view that undoes that of the first operand, as linear layers have them."""
    view, x = only_user(tail.result), tail.x
    if not (view and is_reshape(view) and is_reshape(x) and may_absorb(tail, [view])):
        return tail
    source = x.args[0]
    rows = view.meta["val"].shape[:-1]
    if not same_sizes((*rows, x.meta["val"].shape[-1]), source.meta["val"].shape):
        return tail
    if not same_sizes(view.meta["val"].shape[-1:], tail.result.meta["val"].shape[-1:]):
        return tail
    viewed = replace(tail, x=source, nodes=(*tail.nodes, view))
    longer = extend(viewed)
    return tail if longer is viewed else longer


def extend(tail: Tail) -> Tail:
    """The tail with the bias, the activation and the residual that follow it; itself if none do."""
    if tail.bias is None and tail.result.meta["val"].dtype is torch.float32:
        tail = with_sum(tail, "bias", is_row)
    if found := activation_of(tail.result):
        activation, nodes = found
        if may_absorb(tail, nodes) and alike(nodes[-1], tail.result):
            tail = tail.then(*nodes, activation=activation)
    return with_sum(tail, "residual", alike)


def with_sum(tail: Tail, part: str, fits) -> Tail:
    """The tail with a term that is added to it, if it fits."""
    total, value = only_user(tail.result), tail.result
    if total is None or total.target is not aten.add.Tensor or total.kwargs.get("alpha", 1) != 1:
        return tail
    terms = [term for term in total.args if term is not value]
    if len(terms) != 1 or not isinstance(terms[0], Node) or not fits(terms[0], value):
        return tail
    if not may_absorb(tail, [total]) or not alike(total, value):
        return tail
    return tail.then(total, **{part: terms[0]})


def only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_reshape(node: Node) -> bool:
    targets = aten.view.default, aten._unsafe_view.default, aten.reshape.default
    return node.op == "call_function" and node.target in targets


def may_absorb(tail: Tail, nodes: Sequence[Node]) -> bool:
    """Whether nodes are computed where the product is, and nothing is overwritten in between."""
    first = tail.nodes[0]
    here = [first.meta.get(key) for key in PLACE]
    if any([node.meta.get(key) for key in PLACE] != here for node in nodes):
        return False
    between, last = tail.result, nodes[-1]
    while between is not last:
        between = between.next
        if writes(between):
            return False
    return True


def writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def weight_of(b: Node) -> Node | None:
    """What ``b``, a matrix, is the transpose of, if the graph has that."""
    match b.target, b.args:
        case aten.t.default, (weight,):
            return weight
        case aten.permute.default, (weight, [first, second]) if (first % 2, second % 2) == (1, 0):
            return weight
        case aten.transpose.int, (weight, first, second) if first % 2 != second % 2:
            return weight
    return None
