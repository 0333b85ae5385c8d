"""What the backend would do with a model's products, and why, without generating any code."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fastmm_op.arch import Arch
from fastmm_op.aten import linear as aten_linear
from fastmm_op.compile.backend import inductor_options
from fastmm_op.compile.compat import backward_at_once
from fastmm_op.compile.graph_pass import Decision
from fastmm_op.compile.settings import Settings

WIDTH = 140


@dataclass(frozen=True)
class Report:
    """Every product that was decided about, in the order of the graphs; prints as a table."""

    decisions: tuple[Decision, ...]

    @property
    def taken(self) -> tuple[Decision, ...]:
        """Those that fastmm computes."""
        return tuple(decision for decision in self.decisions if decision.verdict.take)

    def __rich__(self):
        from rich.table import Table

        table = Table(
            title=f"{len(self.taken)} of {len(self.decisions)} products taken",
            caption="times are the models' predictions, in microseconds",
        )
        table.add_column("op")
        table.add_column("product", overflow="fold")
        table.add_column("dtype", no_wrap=True)
        table.add_column("", overflow="fold")
        table.add_column("fastmm", justify="right", no_wrap=True)
        table.add_column("Inductor", justify="right", no_wrap=True)
        table.add_column("why", overflow="fold")
        table.add_column("where", overflow="fold")
        for one in self.decisions:
            verdict = one.verdict
            items = "" if one.batch == "1" else f"{one.batch} x "
            table.add_row(
                one.op,
                f"{items}({one.M}, {one.K}) @ ({one.K}, {one.N})",
                one.dtype + (f"\n{one.precision}" if one.precision else ""),
                f"[green]{one.fate}" if verdict.take else one.fate,
                microseconds(verdict.ours_seconds),
                microseconds(verdict.inductor_seconds),
                verdict.why,
                one.source,
            )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=WIDTH).print(self)
        return text.getvalue().rstrip()


def microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.0f}"


def explain(
    model: Callable,
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
    always: bool = False,
    arch: str | Arch | None = None,
    dynamic: bool | None = None,
) -> Callable[..., Report]:
    """Returns a function of the model's arguments that runs it once and returns a Report.

    ``print(explain(model)(x))``. The model is traced as under ``torch.compile(model,
    backend="fastmm")``, through Inductor's passes over the graphs; then the graphs are run by ATen:
    no code is generated and no kernel of fastmm's is started. Gradients are decided about where the
    call would record them; the model's own state (batch norm, say) is changed as by any call. As
    ``torch._dynamo.explain`` does, this drops what the process has compiled (it compiles again).

    Args:
        model, mode, options, dynamic: as ``torch.compile``.
        always, arch: as ``fastmm_op.compile.options``. With ``arch``, tensors on the CPU will do.
    """
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.compile_fx import compile_fx

    record: list[Decision] = []
    patches = inductor_options(mode, options, Settings(always, arch), record)
    # A graph from a cache would not pass by the pass.
    patches["force_disable_caches"] = True

    def trace(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        return compile_fx(graph, inputs, inner_compile=finish, config_patches=patches)

    def finish(graph: torch.fx.GraphModule, inputs: list, **kwargs) -> Callable:
        """In place of Inductor's own compiler, for each of forward and backward."""
        hook = torch._inductor.config.post_grad_custom_pre_pass
        for one in hook if isinstance(hook, (list, tuple)) else [hook]:
            one(graph.graph)
        run_by_aten(graph)
        return make_boxed_func(graph.forward)

    def run(*args, **kwargs) -> Report:
        record.clear()
        torch.compiler.reset()  # code compiled before would not be traced again
        try:
            with backward_at_once():
                torch.compile(model, backend=trace, dynamic=dynamic)(*args, **kwargs)
        finally:
            torch.compiler.reset()
        return Report(tuple(record))

    return run


def run_by_aten(graph: torch.fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if node.target is torch.ops.fastmm.matmul_in_graph.default:
            node.target, node.kwargs = torch.ops.aten.matmul.default, {}
        elif node.target is torch.ops.fastmm.linear_in_graph.default:
            node.target = aten_linear
    graph.recompile()
