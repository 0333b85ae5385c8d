"""``codegen``: compiles what a plan would launch, for any card and with none, and looks inside."""

import json
import re
from argparse import Namespace

from rich.console import Console
from rich.table import Table

from fastmm_op.cli.explain import chosen_plan, chosen_problem
from fastmm_op.launches import Launch
from fastmm_op.problem import Problem


def report(problem: Problem, step: Launch) -> dict[str, object]:
    """One launch, compiled: what it takes of an SM, and what its main loop does.

    Memory in bytes; instructions are counted in the machine code, once each however often they run.
    """
    from fastmm_op.codegen import MMA, blocks_per_sm, compile_launch, count, resources

    found = resources(compile_launch(problem, step))
    loop = found.main_loop
    matrix = count(loop, MMA)
    return {
        "kernel": step.kernel,
        "grid": step.grid,
        "registers": found.registers,
        "spills": found.spills,
        "shared_memory": found.shared_memory,
        "shared_memory_planned": step.shared_memory,
        "blocks_per_sm": blocks_per_sm(step, found, problem.arch),
        "mma": matrix,
        "ldsm": count(loop, "LDSM"),
        "ldgsts_bytes": copies_by_width(loop),
        "tma_loads": found.count("UTMALDG"),
        "scalar_loads": count_scalar_loads(loop),
        "loop_instructions": sum(loop.values()),
        "loop_instructions_per_mma": round(sum(loop.values()) / matrix, 2) if matrix else None,
    }


def count_scalar_loads(opcodes: dict[str, int]) -> int:
    """Loads from memory into registers."""
    return sum(n for name, n in opcodes.items() if name.split(".")[0] == "LDG")


def copies_by_width(opcodes: dict[str, int]) -> dict[int, int]:
    """Asynchronous copies to shared memory: bytes of one copy -> how many. No suffix is 4 bytes."""
    widths: dict[int, int] = {}
    for name, n in opcodes.items():
        if name.startswith("LDGSTS"):
            bits = re.search(r"\.(64|128)$", name)
            width = int(bits.group(1)) // 8 if bits else 4
            widths[width] = widths.get(width, 0) + n
    return widths


ROWS = {
    "registers a thread": "registers",
    "spills": "spills",
    "shared memory, bytes": "shared_memory",
    "blocks an SM": "blocks_per_sm",
    "main loop: instructions": "loop_instructions",
    "of them matrix": "mma",
    "instructions a matrix one": "loop_instructions_per_mma",
    "LDSM": "ldsm",
    "copies to shared, bytes x n": "ldgsts_bytes",
    "loads to registers": "scalar_loads",
    "TMA loads in the kernel": "tma_loads",
}


def print_reports(problem: Problem, reports: list[dict], console: Console) -> None:
    table = Table(title=f"machine code for {problem.arch.name}", title_justify="left")
    table.add_column("")
    for row in reports:
        table.add_column(row["kernel"], justify="right")
    for heading, name in ROWS.items():
        table.add_row(heading, *(cell(row[name]) for row in reports))
    console.print(table)


def cell(value: object) -> str:
    if isinstance(value, dict):
        value = " ".join(f"{width}x{n}" for width, n in value.items())
    return str(value) if value else ("0" if value == 0 else "-")


def main(options: Namespace) -> int:
    """Compile and print for parsed command line options; 1 if this process interprets kernels."""
    console = Console()
    problem = chosen_problem(options)
    plan, _ = chosen_plan(options, problem)
    try:
        reports = [report(problem, step) for step in plan.launches]
    except RuntimeError as error:
        console.print(f"codegen: {error}", highlight=False, markup=False)
        return 1
    if options.json:
        print(json.dumps({"arch": problem.arch.name, "kernels": reports}, indent=2))
    else:
        print_reports(problem, reports, console)
    return 0
