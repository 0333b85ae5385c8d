"""Reading products in a graph: what ATen multiplies, how it lies, and what stands around it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from fastmm_op.arch import Arch
from fastmm_op.compile.compat import Flags, hint, surely_equal
from fastmm_op.compile.peer import Surroundings
from fastmm_op.contract import DTYPES
from fastmm_op.problem import COPY_BYTES, Operand, Problem

aten = torch.ops.aten
fastmm = torch.ops.fastmm

# Where the operands of each op are; before them, a term that is added.
MATRIX_PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1}
BATCHED_PRODUCTS = {aten.bmm.default: 0, aten.baddbmm.default: 1}
FIRST_OPERAND = MATRIX_PRODUCTS | BATCHED_PRODUCTS

# What writes its output in one layout only, so that nothing can be padded on the way.
FIXED_OUTPUT = {
    *FIRST_OPERAND,
    fastmm.matmul.default,
    fastmm.matmul_in_graph.default,
    fastmm.linear.default,
    fastmm.linear_in_graph.default,
    aten.convolution.default,
    aten.convolution_backward.default,
}


@dataclass(frozen=True)
class Product:
    """A node of the graph that multiplies two matrices, or two batches of them.

    Attributes:
        node: an ``aten.mm``, ``addmm``, ``bmm`` or ``baddbmm``.
        a, b: the operands: (M, K) and (K, N), or with a batch dimension before.
        added: what ``addmm`` and ``baddbmm`` add, else None.
    """

    node: Node
    a: Node
    b: Node
    added: Node | None

    @property
    def op(self) -> str:
        return self.node.target._schema.name.removeprefix("aten::")

    @property
    def adds_itself(self) -> bool:
        """Whether what is added is a bias or residual of linear's, which costs no kernel."""
        if self.added is None or self.node.target not in MATRIX_PRODUCTS:
            return False
        return is_row(self.added, self.node) or alike(self.added, self.node)

    @property
    def values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The operands' fake tensors."""
        return self.a.meta["val"], self.b.meta["val"]

    @property
    def sizes(self) -> tuple[int | torch.SymInt, ...]:
        """Batch (1 for one product), M, N, K; possibly symbolic."""
        a, b = self.values
        batch = a.shape[0] if a.dim() == 3 else 1
        return batch, a.shape[-2], b.shape[-1], a.shape[-1]

    def unsupported(self) -> str | None:
        """Why the op cannot stand in for this node, or None."""
        a, b = self.values
        for x in (a, b):
            if x.dtype not in DTYPES:
                return f"{str(x.dtype).removeprefix('torch.')} is left to ATen"
            if x.layout is not torch.strided:
                return f"layout {x.layout} is left to ATen"
        if a.dtype is not b.dtype or self.node.meta["val"].dtype is not a.dtype:
            return "the result has another dtype"
        for name in ("beta", "alpha"):
            if self.node.kwargs.get(name, 1) != 1:
                return f"{name} is {self.node.kwargs[name]}: scaled sums are left to ATen"
        return None

    def problem(self, precision: str, arch: Arch) -> Problem | None:
        """The problem as planned for, at the sizes seen when compiling; None if one has no hint."""
        a, b = self.values
        sizes = [hint(size) for size in self.sizes]
        strides_a, strides_b = hinted_strides(a), hinted_strides(b)
        if None in (*sizes, *strides_a, *strides_b):
            return None
        batch, M, N, K = sizes
        return Problem(
            batch,
            M,
            N,
            K,
            DTYPES[a.dtype],
            precision,
            Operand(*strides_a, pointer_alignment(a)),
            Operand(strides_b[0], strides_b[2], strides_b[1], pointer_alignment(b)),
            arch,
        )

    def surroundings(self, flags: Flags) -> Surroundings:
        """What stands around the product, as far as it makes one way or the other cheaper."""
        a, b = self.values
        _, *matrix_sizes = self.sizes
        static = tuple(isinstance(size, int) for size in matrix_sizes)
        paddable = all(any(isinstance(size, int) for size in x.shape) for x in (a, b))
        users = list(users_through_views(self.node))
        pointwise = [is_pointwise(user) for user in users]
        # Inductor adds a bias in the pointwise kernel that follows, if one does; else cuBLAS adds
        # it. With templates the kernel that follows becomes their epilogue.
        adds_alone = self.added is not None and not self.adds_itself and not any(pointwise)
        fuses_epilogue = flags.tunes and bool(users) and all(pointwise)
        return Surroundings(
            # pad_mm is done with the batched ones by the time that they are decided.
            pads=flags.pads and paddable and self.node.target in MATRIX_PRODUCTS,
            static=static,
            a_made_here=is_made_here(self.a),
            b_made_here=is_made_here(self.b),
            c_leaves=any(user.op == "output" for user in users),
            extra_pass=adds_alone or fuses_epilogue,
            graphs=flags.graphs,
        )


def read_product(node: Node) -> Product | None:
    """The node as a product, or None. ``aten.mm`` with an ``out_dtype`` is another overload."""
    first = FIRST_OPERAND.get(node.target) if node.op == "call_function" else None
    if first is None:
        return None
    return Product(node, node.args[first], node.args[first + 1], node.args[0] if first else None)


def hinted_strides(x: torch.Tensor) -> list[int | None]:
    """Batch, row and column strides; 0 for dimensions of size one, as launch.describe."""
    strides = [
        0 if isinstance(size, int) and size == 1 else hint(stride)
        for size, stride in zip(x.shape, x.stride(), strict=True)
    ]
    return [0] * (3 - len(strides)) + strides


def pointer_alignment(x: torch.Tensor) -> int:
    """Of the first element, if the storage starts where PyTorch's allocators put it."""
    offset = hint(x.storage_offset())
    if offset is None:
        return x.itemsize
    address = offset * x.itemsize % COPY_BYTES
    return address & -address if address else COPY_BYTES


def is_view(node: Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target.is_view or node.target is aten._unsafe_view.default


def is_pointwise(node: Node) -> bool:
    tags = getattr(node.target, "tags", ()) if node.op == "call_function" else ()
    return torch.Tag.pointwise in tags


def users_through_views(node: Node) -> Iterator[Node]:
    for user in node.users:
        if is_view(user):
            yield from users_through_views(user)
        else:
            yield user


def is_made_here(node: Node) -> bool:
    """Whether a contiguous operand is written by a kernel of the graph that could pad it."""
    x = node.meta["val"]
    strides, expected = [hint(stride) for stride in x.stride()], 1
    for size, stride in zip(reversed(x.shape), reversed(strides), strict=True):
        if stride != expected or hint(size) is None:
            return False
        expected *= hint(size)
    while is_view(node):
        node = node.all_input_nodes[0]
    return node.op == "call_function" and node.target not in FIXED_OUTPUT


def is_row(node: Node, result: Node) -> bool:
    """Whether a node is what linear takes for a bias of this result."""
    row, value = node.meta.get("val"), result.meta["val"]
    return same_kind(row, value) and same_sizes(row.shape, value.shape[-1:])


def alike(node: Node, result: Node) -> bool:
    """Whether two nodes are of one dtype, device, shape and strides, at any sizes."""
    x, value = node.meta.get("val"), result.meta["val"]
    if not same_kind(x, value) or not same_sizes(x.shape, value.shape):
        return False
    return same_sizes(x.stride(), value.stride())


def same_kind(x, value: torch.Tensor) -> bool:
    if not isinstance(x, torch.Tensor) or x.layout is not torch.strided:
        return False
    return (x.dtype, x.device) == (value.dtype, value.device)


def same_sizes(sizes: Sequence, others: Sequence) -> bool:
    """Whether they are equal whatever the symbols in them stand for."""
    if len(sizes) != len(others):
        return False
    return all(surely_equal(one, other) for one, other in zip(sizes, others, strict=True))
