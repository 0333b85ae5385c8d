"""``explain``: the plan of a product on any card, and why. Needs no GPU and no Triton."""

import json
from argparse import Namespace
from dataclasses import asdict, replace

from rich.console import Console
from rich.table import Table

from fastmm_op.arch import ARCHES, Arch
from fastmm_op.launches import Descriptor, Launch, Plan, Pointer
from fastmm_op.plan import make_plan
from fastmm_op.problem import Operand, Problem


def problem_of(
    M: int, K: int, N: int, *, batch: int, dtype: str, layout: str, precision: str, arch: Arch
) -> Problem:
    """The Problem of freshly allocated operands.

    Args:
        M, K, N: A is (M, K) and B is (K, N), ``batch`` of each.
        dtype: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        layout: a letter for A and one for B; N is row-major, T a transposed view.
        precision: as ``fastmm_op.matmul``.
        arch: the card.
    """

    def stride(size: int, elements: int) -> int:
        # As launch.describe: the stride of a dimension of size one is never used.
        return 0 if size == 1 else elements

    a_strides = (K, 1) if layout[0] == "N" else (1, M)
    b_strides = (1, N) if layout[1] == "N" else (K, 1)
    return Problem(
        batch=batch,
        M=M,
        N=N,
        K=K,
        dtype=dtype,
        precision=precision,
        a=Operand(stride(batch, M * K), stride(M, a_strides[0]), stride(K, a_strides[1])),
        b=Operand(stride(batch, K * N), stride(N, b_strides[0]), stride(K, b_strides[1])),
        arch=arch,
    )


def default_arch() -> Arch:
    """The current GPU's entry, or sm_89's where there is none that plans exist for."""
    import torch

    from fastmm_op.ops import HAVE_TRITON

    if torch.cuda.is_available() and HAVE_TRITON:
        from fastmm_op.launch import device_arch

        return device_arch(torch.cuda.current_device()) or ARCHES["sm_89"]
    return ARCHES["sm_89"]


def argument(arg: Pointer | Descriptor | int | None) -> str | int | None:
    """A kernel argument as text: pointers as buffer+offset:dtype, descriptors with their shape."""
    if isinstance(arg, Descriptor):
        return f"tma {argument(arg.pointer)} {arg.shape} box {arg.box}"
    if isinstance(arg, Pointer):
        return f"{arg.buffer}+{arg.offset}:{arg.dtype}"
    return arg


def launch_as_dict(step: Launch) -> dict[str, object]:
    return {
        "kernel": step.kernel,
        "grid": step.grid,
        "args": [argument(arg) for arg in step.args],
        "constexprs": dict(step.constexprs),
        "num_warps": step.num_warps,
        "num_stages": step.num_stages,
        "shared_memory": step.shared_memory,
    }


def as_dict(problem: Problem, plan: Plan) -> dict[str, object]:
    """Everything ``explain`` knows, ready for JSON; times in microseconds, memory in bytes."""
    return {
        "problem": asdict(problem) | {"flops": problem.flops},
        "plan": {
            "strategy": plan.strategy,
            "workspace_bytes": plan.workspace_bytes,
            "estimate_us": plan.seconds * 1e6,
            "why": list(plan.why),
            "launches": [launch_as_dict(step) for step in plan.launches],
        },
    }


def constexprs_text(step: Launch) -> str:
    """A launch's compile-time arguments in one line: its blocks as a product, flags by name."""
    blocks = [str(v) for name, v in step.constexprs.items() if name.startswith("BLOCK_")]
    axes = "".join(n.removeprefix("BLOCK_") for n in step.constexprs if n.startswith("BLOCK_"))
    parts = [f"{axes} {'x'.join(blocks)}"] if blocks else []
    for name, value in step.constexprs.items():
        if name.startswith("BLOCK_") or value is False:
            continue
        parts.append(name if value is True else f"{name}={value}")
    return " ".join(parts)


def print_plan(problem: Problem, plan: Plan, console: Console) -> None:
    items = f"{problem.batch} x " if problem.batch != 1 else ""
    inputs = problem.dtype
    if inputs == "fp32":
        inputs += f' at precision "{problem.precision}"'
    console.print(
        f"{items}({problem.M}, {problem.K}) @ ({problem.K}, {problem.N}), {inputs}, "
        f"{problem.flops / 1e9:.1f} GFLOP, on {problem.arch.name} with {problem.arch.sms} SMs",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(title=f"plan: {plan.strategy}", title_justify="left")
    for heading in ("kernel", "grid", "warps", "stages", "shared KiB", "compile-time arguments"):
        right = heading not in ("kernel", "compile-time arguments")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for step in plan.launches:
        table.add_row(
            step.kernel,
            str(step.grid),
            str(step.num_warps),
            str(step.num_stages),
            f"{step.shared_memory / 1024:.0f}" if step.shared_memory else "-",
            constexprs_text(step),
        )
    console.print(table)
    console.print(
        f"workspace {plan.workspace_bytes / 2**20:.1f} MiB, "
        f"estimate {plan.seconds * 1e6:.0f} us (the model's figure, not a measurement)",
        highlight=False,
        soft_wrap=True,
    )
    console.print("why:", highlight=False)
    for reason in plan.why:
        console.print(f"  - {reason}", highlight=False, soft_wrap=True, markup=False)


def chosen_problem(options: Namespace) -> Problem:
    """The Problem that parsed command line options describe."""
    arch = ARCHES[options.arch] if options.arch else default_arch()
    if options.sms:
        arch = replace(arch, sms=options.sms)
    return problem_of(
        *options.shape,
        batch=options.batch,
        dtype=options.dtype,
        layout=options.layout,
        precision=options.precision,
        arch=arch,
    )


def main(options: Namespace) -> int:
    """Print the plan for parsed command line options."""
    problem = chosen_problem(options)
    plan = make_plan(problem)
    if options.json:
        print(json.dumps(as_dict(problem, plan), indent=1))
    else:
        print_plan(problem, plan, Console())
    return 0
