"""The pass over Inductor's graphs that puts fastmm's products where they are predicted to win."""

import hashlib
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch.fx import Graph, Node

import fastmm_op
from fastmm_op import ops
from fastmm_op.arch import Arch
from fastmm_op.compile.compat import CustomGraphPass, flags
from fastmm_op.compile.decide import Verdict, decide
from fastmm_op.compile.epilogues import Tail, read_tail, weight_of
from fastmm_op.compile.products import BATCHED_PRODUCTS, MATRIX_PRODUCTS, Product, read_product
from fastmm_op.compile.settings import Settings, float32_precision

log = logging.getLogger("fastmm_op.compile")

# Inductor's hook -> the products that are decided there.
#
# Matrix products before pad_mm, which works on the joint graph of forward and backward: what we
# take, it must not pad first. Batched ones after the joint graph's passes, which find attention by
# the two batched products in it.
HOOKS = {
    "joint_custom_pre_pass": MATRIX_PRODUCTS,
    "post_grad_custom_pre_pass": BATCHED_PRODUCTS,
}

# Metadata that says what a node's value is like.
VALUE = ("val", "tensor_meta")


@dataclass(frozen=True)
class Decision:
    """What became of one product of a graph.

    Attributes:
        node: its name in the graph.
        op: ``"mm"``, ``"addmm"``, ``"bmm"`` or ``"baddbmm"``.
        batch, M, N, K: its sizes; where dynamic, a symbol and the size seen when compiling.
        dtype: of the operands.
        precision: for fp32 operands, what the user's setting allows; else None.
        source: the model's line that asked for it, if the graph knows.
        verdict: whether it was taken, and why.
        fused: what is computed with it: any of ``"bias"``, an activation, ``"residual"``.
    """

    node: str
    op: str
    batch: str
    M: str
    N: str
    K: str
    dtype: str
    precision: str | None
    source: str
    verdict: Verdict
    fused: tuple[str, ...] = ()

    @property
    def fate(self) -> str:
        """In two words, or what was taken along as well."""
        if not self.verdict.take:
            return "left alone"
        return f"taken with {', '.join(self.fused)}" if self.fused else "taken"

    def __str__(self) -> str:
        items = "" if self.batch == "1" else f"{self.batch} x "
        what = self.precision or self.dtype
        if self.precision:
            what = f"{self.dtype} ({self.precision})"
        sizes = f"{items}({self.M}, {self.K}) @ ({self.K}, {self.N})"
        return f"{self.node}: {self.op} {sizes} {what}: {self.fate}: {self.verdict.why}"


class MatmulPass(CustomGraphPass):
    """Rewrites the products of one hook of Inductor's.

    Args:
        hook: a key of HOOKS.
        settings: how products are chosen.
        record: every Decision is appended to it, if given.
    """

    def __init__(self, hook: str, settings: Settings, record: list[Decision] | None = None) -> None:
        self.hook = hook
        self.settings = settings
        self.record = record

    def __call__(self, graph: Graph) -> None:
        precision = float32_precision()
        decisions = []
        for node in list(graph.nodes):
            if node.target not in HOOKS[self.hook]:
                continue
            product = read_product(node)
            verdict = judge(product, precision, self.settings)
            tail = read_tail(product) if verdict.take else None
            decisions.append(describe(product, precision, verdict, tail))
            log.debug("%s", decisions[-1])
            if tail is not None:
                replace_with_linear(graph, product, tail, precision)
            elif verdict.take:
                replace_with_matmul(graph, product, precision)
        if decisions:
            taken = sum(decision.verdict.take for decision in decisions)
            log.info("%s: %d of %d products taken", self.hook, taken, len(decisions))
        if self.record is not None:
            self.record += decisions

    def uuid(self) -> tuple:
        """All that the pass's result depends on, besides the graph and Inductor's configuration.

        Part of the keys of Inductor's and AOTAutograd's caches. Both are asked for while compiling,
        so the user's precision is the one that the pass would see.
        """
        return source_hash(), self.hook, repr(self.settings), float32_precision(), repr(cards())


def judge(product: Product, precision: str, settings: Settings) -> Verdict:
    """Whether to take a product: is it legal, what card is it for, is it predicted to win."""
    if reason := product.unsupported():
        return Verdict(False, reason)
    if settings.always:
        return Verdict(True, "always=True")
    device = product.node.meta["val"].device
    arch = settings.arch or card(device)
    if arch is None:
        return Verdict(False, f"{device} is no GPU that fastmm has kernels for")
    problem = product.problem(precision, arch)
    if problem is None:
        return Verdict(False, "a size is known at run time only")
    return decide(problem, product.surroundings(flags()))


def card(device: torch.device) -> Arch | None:
    """The planner's entry for a device; None where the op would leave the product to ATen."""
    if device.type != "cuda" or not ops.HAVE_TRITON or not torch.cuda.is_available():
        return None
    from fastmm_op import launch  # imports triton

    index = device.index if device.index is not None else torch.cuda.current_device()
    return launch.device_arch(index)


def cards() -> list[Arch | None]:
    """This machine's cards, as plans see them."""
    return [card(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]


@cache
def source_hash() -> str:
    """Of the package: any file of it may change a decision."""
    root = Path(fastmm_op.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def replace_with_matmul(graph: Graph, product: Product, precision: str) -> None:
    """Put the op, and a sum where there was one, in the product's place."""
    node = product.node
    with graph.inserting_before(node):
        op = torch.ops.fastmm.matmul_in_graph.default
        result = call(graph, op, (product.a, product.b), {"precision": precision}, node)
        if product.added is not None:
            result = graph.call_function(torch.ops.aten.add.Tensor, (result, product.added))
            result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def replace_with_linear(graph: Graph, product: Product, tail: Tail, precision: str) -> None:
    """Put the op in the place of the product and of what follows it."""
    keywords = {"activation": tail.activation, "precision": precision}
    with graph.inserting_before(tail.result):
        weight = weight_of(product.b)
        if weight is None:
            weight = graph.call_function(torch.ops.aten.permute.default, (product.b, [1, 0]))
            weight.meta = product.node.meta | {"val": product.b.meta["val"].permute(1, 0)}
        operands = tail.x, weight, tail.bias, tail.residual
        result = call(
            graph, torch.ops.fastmm.linear_in_graph.default, operands, keywords, product.node
        )
        result.meta |= {key: tail.result.meta[key] for key in VALUE if key in tail.result.meta}
    tail.result.replace_all_uses_with(result)
    for node in reversed(tail.nodes):
        graph.erase_node(node)


def call(graph: Graph, op, operands: tuple[Node | None, ...], keywords: dict, old: Node) -> Node:
    """A node that stands for an old one: ours, with its metadata.

    That is its place in forward or backward, its tag for recomputation. Its result is contiguous,
    as the op's is.
    """
    result = graph.call_function(op, operands, keywords)
    # The strides that the op is promised (it is tagged needs_exact_strides).
    values = tuple(x if x is None else x.meta["val"] for x in operands)
    result.meta = old.meta | {"eager_input_vals": (values, keywords)}
    return result


def describe(product: Product, precision: str, verdict: Verdict, tail: Tail | None) -> Decision:
    dtype = str(product.values[0].dtype).removeprefix("torch.")
    return Decision(
        product.node.name,
        product.op,
        *map(size_text, product.sizes),
        dtype=dtype,
        precision=precision if dtype == "float32" else None,
        source=source_line(product.node),
        verdict=verdict,
        fused=tail.parts if tail else (),
    )


def size_text(size: int | torch.SymInt) -> str:
    if isinstance(size, int):
        return str(size)
    known = size.node.hint
    return str(size) if known is None else f"{size}={known}"


def source_line(node: Node) -> str:
    """The last line of the model in the node's stack trace; "" if there is none."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    # Python underlines the part of a line that is meant.
    lines = [line for line in lines if line.strip("^~")]
    return lines[-1] if lines else ""
