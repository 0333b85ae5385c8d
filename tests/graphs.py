"""Graphs as short texts that people read in tests."""

import torch


def graph_lines(graph: torch.fx.GraphModule) -> str:
    """The calls of a graph, one a line."""
    return "\n".join(
        f"{node.name} = {node.target}({', '.join(map(str, node.args))}{keywords(node)})"
        for node in graph.graph.nodes
        if node.op == "call_function"
    )


def keywords(node: torch.fx.Node) -> str:
    return "".join(f", {name}={value!r}" for name, value in node.kwargs.items())
