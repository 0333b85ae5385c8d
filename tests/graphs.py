"""Graphs for tests: traced with no GPU, rewritten, and as short texts that people read."""

import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fastmm_op.compile.graph_pass import HOOKS, Decision, MatmulPass
from fastmm_op.compile.settings import Settings

ALWAYS = Settings(always=True)


def graph_lines(graph: torch.fx.GraphModule) -> str:
    """The calls of a graph, one a line."""
    return "\n".join(
        f"{node.name} = {node.target}({', '.join(map(str, node.args))}{keywords(node)})"
        for node in graph.graph.nodes
        if node.op == "call_function"
    )


def keywords(node: torch.fx.Node) -> str:
    return "".join(f", {name}={value!r}" for name, value in node.kwargs.items())


def fake(*shape: int, dtype=torch.float32, device="cuda") -> torch.Tensor:
    """In a fake mode, a tensor that is nowhere; column-major where the shape ends in "T"."""
    if shape[-1] == "T":
        *batch, rows, columns = shape[:-1]
        return torch.empty(*batch, columns, rows, dtype=dtype, device=device).mT
    return torch.empty(shape, dtype=dtype, device=device)


def trace(
    function, *shapes, dtype=torch.float32, device="cuda", decompositions=None
) -> torch.fx.GraphModule:
    with FakeTensorMode():
        args = [fake(*s, dtype=dtype, device=device) for s in shapes]
        return make_fx(function, decompositions)(*args)


def run(graph: torch.fx.GraphModule, settings=ALWAYS) -> list[Decision]:
    """Both hooks' passes, as Inductor runs them; every decision, in order."""
    record = []
    for hook in HOOKS:
        MatmulPass(hook, settings, record)(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return record
