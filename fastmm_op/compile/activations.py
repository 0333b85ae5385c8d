"""Finding an activation in a graph: as one operation, or as what Inductor decomposes it into.

Most are decomposed before any hook of Inductor's: a 16-bit gelu is ten nodes, of which the first
casts to float32 and the last back. The patterns are traced from PyTorch's own functions with
Inductor's own table, so they are those of the torch that runs; what computes the same in another
way (a gelu written out by hand, say) is rounded elsewhere, and is not found.
"""

from collections.abc import Iterable
from functools import cache

import torch
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from fastmm_op import aten
from fastmm_op.compile.compat import fake_tensors_only, select_decomp_table
from fastmm_op.problem import ACTIVATIONS


@cache
def patterns(dtype: torch.dtype, device_type: str) -> tuple[tuple[str, Node], ...]:
    """Names of activations and the results of graphs that compute them."""
    names = [name for name in ACTIVATIONS if name != "none"]
    with fake_tensors_only():
        x = torch.empty(2, 3, dtype=dtype, device=device_type)
        tables = {}, select_decomp_table()
        return tuple((name, result_of(name, x, table)) for table in tables for name in names)


def result_of(activation: str, x: torch.Tensor, decompositions: dict) -> Node:
    """The result of a graph whose only input is x."""
    graph = make_fx(lambda x: aten.activate(x, activation), decompositions)(x).graph
    return graph.output_node().args[0]


def activation_of(x: Node) -> tuple[str, list[Node]] | None:
    """The activation that is all that becomes of x; its nodes, the last of which is its result."""
    value = x.meta["val"]
    known = patterns(value.dtype, value.device.type)
    longest = max(len(result.graph.nodes) for _, result in known)
    # Every path from x goes through one of the nodes ahead, or ends inside.
    inside, ahead = [], set(x.users)
    while ahead and len(inside) < longest:
        first = min(ahead)
        if len(ahead) == 1:
            for name, pattern in known:
                if same(pattern, first, x):
                    return name, [*inside, first]
        if not first.users:
            return None
        inside.append(first)
        ahead = (ahead - {first}) | set(first.users)
    return None


def same(pattern, found, x: Node) -> bool:
    """Whether ``found`` is computed from x as ``pattern`` is from its graph's only input."""
    if not isinstance(pattern, Node):
        return type(found) is type(pattern) and found == pattern
    if pattern.op == "placeholder":
        return found is x
    return (
        isinstance(found, Node)
        and found.target is pattern.target
        and found.kwargs.keys() == pattern.kwargs.keys()
        and all_same(pattern.args, found.args, x)
        and all_same(pattern.kwargs.values(), [found.kwargs[k] for k in pattern.kwargs], x)
    )


def all_same(patterns: Iterable, found: Iterable, x: Node) -> bool:
    patterns, found = list(patterns), list(found)
    pairs = zip(patterns, found, strict=False)
    return len(patterns) == len(found) and all(same(one, other, x) for one, other in pairs)
