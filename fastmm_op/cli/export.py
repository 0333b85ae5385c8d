"""``export``: the plan of a product as one Python file that needs torch and Triton only."""

import shlex
import sys
from argparse import Namespace
from pathlib import Path

from fastmm_op.arch import ARCHES
from fastmm_op.cli.explain import chosen_problem
from fastmm_op.problem import Problem


def command_of(problem: Problem, layout: str, autotune: bool) -> str:
    """The command line that exports this problem on any machine."""
    arch = problem.arch
    words = ["--shape", problem.M, problem.K, problem.N, "--dtype", problem.dtype]
    words += ["--layout", layout] if layout != "NN" else []
    words += ["--precision", problem.precision, "--arch", arch.name]
    usual = ARCHES[arch.name]
    words += ["--sms", arch.sms] if arch.sms != usual.sms else []
    other_memory = arch.bandwidth != usual.bandwidth
    words += ["--bandwidth", round(arch.bandwidth / 1e9)] if other_memory else []
    words += ["--autotune"] if autotune else []
    return shlex.join(["python", "-m", "fastmm_op", "export", *map(str, words)])


def main(options: Namespace) -> int:
    """Write the file for parsed command line options; 2 if they do not allow one."""
    from fastmm_op import __version__
    from fastmm_op.export import export

    problem = chosen_problem(options)
    try:
        command = command_of(problem, options.layout, options.autotune)
        text = export(problem, command, __version__, autotune=options.autotune)
        if options.output:
            Path(options.output).write_text(text)
        else:
            sys.stdout.write(text)
    except (ValueError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    return 0
