"""``explain``: the plan of a product on any card, and why. Needs no GPU and no Triton."""

import json
from argparse import Namespace
from dataclasses import asdict, replace

from rich.console import Console
from rich.table import Table

from fastmm_op import cache
from fastmm_op.arch import ARCHES, Arch, card_text, resized
from fastmm_op.launches import Descriptor, Launch, Plan, Pointer
from fastmm_op.plan import make_plan, reasons, write_plan
from fastmm_op.problem import Epilogue, Problem, problem_of


def default_arch() -> Arch:
    """The current GPU's entry, or sm_89's where there is none that plans exist for."""
    import torch

    from fastmm_op.ops import HAVE_TRITON

    if torch.cuda.is_available() and HAVE_TRITON:
        from fastmm_op.launch import device_arch

        return device_arch(torch.cuda.current_device()) or ARCHES["sm_89"]
    return ARCHES["sm_89"]


def this_card() -> str | None:
    """The name of the card that calls of this process run on; None where no kernels run."""
    import torch

    from fastmm_op import ops

    if not ops.HAVE_TRITON or not (ops.INTERPRETED or torch.cuda.is_available()):
        return None
    from fastmm_op.launch import card_name

    return card_name(-1 if ops.INTERPRETED else torch.cuda.current_device())


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
        "max_registers": step.max_registers,
        "dependent": step.dependent,
    }


def as_dict(problem: Problem, plan: Plan, tuned: cache.Entry | None) -> dict[str, object]:
    """Everything ``explain`` knows, ready for JSON; times in microseconds, memory in bytes."""
    return {
        "problem": asdict(problem) | {"flops": problem.flops},
        "plan": {
            "strategy": plan.strategy,
            "workspace_bytes": plan.workspace_bytes,
            "estimate_us": plan.seconds * 1e6,
            "tuned_us": tuned and tuned.us,
            "why": list(reasons(problem, plan.choice)),
            "launches": [launch_as_dict(step) for step in plan.launches],
        },
    }


def constexprs_text(step: Launch) -> str:
    """A launch's compile-time arguments in one line: its blocks as a product, flags by name."""
    blocks = [str(v) for name, v in step.constexprs.items() if name.startswith("BLOCK_")]
    axes = "".join(n.removeprefix("BLOCK_") for n in step.constexprs if n.startswith("BLOCK_"))
    parts = [f"{axes} {'x'.join(blocks)}"] if blocks else []
    for name, value in step.constexprs.items():
        if name.startswith("BLOCK_") or value in (False, "none"):
            continue
        parts.append(name if value is True else f"{name}={value}")
    if step.max_registers:
        parts.append(f"registers<={step.max_registers}")
    return " ".join(parts)


def print_plan(problem: Problem, plan: Plan, tuned: cache.Entry | None, console: Console) -> None:
    items = f"{problem.batch} x " if problem.batch != 1 else ""
    inputs = problem.dtype
    if inputs == "fp32":
        inputs += f' at precision "{problem.precision}"'
    console.print(
        f"{items}({problem.M}, {problem.K}) @ ({problem.K}, {problem.N}), {inputs}, "
        f"{problem.flops / 1e9:.1f} GFLOP, on {card_text(problem.arch)}",
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
    if tuned:
        console.print(
            f"from the cache of tuned choices: {tuned.us:.0f} us when it was measured here",
            highlight=False,
            soft_wrap=True,
        )
    console.print("why:", highlight=False)
    for reason in reasons(problem, plan.choice):
        console.print(f"  - {reason}", highlight=False, soft_wrap=True, markup=False)


def chosen_problem(options: Namespace) -> Problem:
    """The Problem that parsed command line options describe."""
    arch = ARCHES[options.arch] if options.arch else default_arch()
    arch = resized(arch, options.sms, options.bandwidth and options.bandwidth * 1e9)
    problem = problem_of(
        *options.shape,
        batch=options.batch,
        dtype=options.dtype,
        layout=options.layout,
        precision=options.precision,
        arch=arch,
    )
    epilogue = Epilogue(options.bias, options.activation, options.residual)
    return replace(problem, epilogue=epilogue)


def chosen_plan(options: Namespace, problem: Problem) -> tuple[Plan, cache.Entry | None]:
    """The plan that calls get, and what it rests on if it was tuned on this very card."""
    elsewhere = options.arch or options.sms or options.bandwidth
    card = None if elsewhere else this_card()
    tuned = cache.lookup(problem, card) if card else None
    return (write_plan(problem, tuned.choice) if tuned else make_plan(problem)), tuned


def main(options: Namespace) -> int:
    """Print the plan for parsed command line options."""
    problem = chosen_problem(options)
    plan, tuned = chosen_plan(options, problem)
    if options.json:
        print(json.dumps(as_dict(problem, plan, tuned), indent=1))
    else:
        print_plan(problem, plan, tuned, Console())
    return 0
