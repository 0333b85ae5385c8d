"""The command line: ``python -m fastmm_op {demo,explain,codegen,export,tune,bench,doctor}``.

Exit codes: 0 it worked, 1 a check failed or nothing here is usable, 2 bad arguments.
"""

import argparse
import math
import sys
from pathlib import Path

from fastmm_op.arch import ARCHES
from fastmm_op.problem import ACTIVATIONS, ITEMSIZE, PRECISIONS

LAYOUTS = ("NN", "NT", "TN", "TT")
DTYPES = tuple(name for name in ITEMSIZE if name != "int32")


def size(text: str) -> int:
    """An argument that counts something: an integer, zero or more."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of zero or more")
    return value


def positive(text: str) -> int:
    if (value := size(text)) == 0:
        raise argparse.ArgumentTypeError("must be at least 1, got 0")
    return value


def positive_seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def add_bench(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--suite", choices=("seed", "full"), default="seed", help="the seed workload, or all cases"
    )
    command.add_argument("--precision", choices=PRECISIONS, default="tf32", help="of fp32 cases")
    command.add_argument(
        "--inductor",
        action="store_true",
        help="also torch.compile's longest search, which takes seconds a case",
    )
    command.add_argument("--seconds-per-case", type=positive_seconds, default=0.6, metavar="S")
    command.add_argument(
        "--budget", type=positive_seconds, metavar="S", help="start no case after so long"
    )
    command.add_argument("--out", type=Path, help="JSON file; the report is the same with .md")


def add_kind(command: argparse.ArgumentParser) -> None:
    """The options that describe a product but for its sizes."""
    command.add_argument("--dtype", choices=DTYPES, default="fp32")
    command.add_argument(
        "--layout", choices=LAYOUTS, default="NN", help="T: that operand is a transposed view"
    )
    command.add_argument("--precision", choices=PRECISIONS, default="tf32")


def add_problem(command: argparse.ArgumentParser) -> None:
    """The options that describe a product and a card."""
    command.add_argument(
        "--shape", nargs=3, type=size, required=True, metavar=("M", "K", "N"), help="A is M x K"
    )
    add_kind(command)
    command.add_argument("--bias", action="store_true", help="of linear: one is added")
    command.add_argument("--activation", choices=ACTIVATIONS, default="none", help="of linear")
    command.add_argument("--residual", action="store_true", help="of linear: one is added")
    command.add_argument("--arch", choices=tuple(ARCHES), help="default: this GPU's, or sm_89")
    command.add_argument("--sms", type=positive, help="multiprocessors, if not the usual number")
    bandwidth = "of a large copy, if not the usual: what is read and written, GB a second"
    command.add_argument("--bandwidth", type=positive, metavar="GB", help=bandwidth)


def add_search(command: argparse.ArgumentParser) -> None:
    """The options of ``tune``: what is searched for, how widely, and what is kept."""
    command.add_argument(
        "--shape",
        nargs=3,
        type=positive,
        action="append",
        default=[],
        metavar=("M", "K", "N"),
        help="A is M x K; may be given several times",
    )
    command.add_argument("--batch", type=positive, default=1, help="items (default 1)")
    add_kind(command)
    command.add_argument(
        "--suite",
        nargs="*",
        metavar="GROUP",
        help="the benchmark suite, or groups of it; of the above takes --precision alone",
    )
    width = command.add_mutually_exclusive_group()
    width.add_argument(
        "--top",
        type=positive,
        default=24,
        metavar="N",
        help="measure the N best by the cost model, and the best of every other road (default 24)",
    )
    width.add_argument("--all", action="store_true", help="measure every legal choice")
    command.add_argument(
        "--stages", action="store_true", help="try 1 to 4 pipeline stages for plain Triton tiles"
    )
    command.add_argument(
        "--seconds", type=positive_seconds, default=0.1, help="of timing a choice (default 0.1)"
    )
    command.add_argument("--budget", type=positive_seconds, help="start no case after SECONDS")
    command.add_argument(
        "--compile-processes",
        type=positive,
        metavar="N",
        help="first compile all kernels in N processes (default: each when it is its turn)",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write all measurements there")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m fastmm_op", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    commands.add_parser("demo", help="run, check and time the seed workload (small with no GPU)")

    for name, what in (
        ("explain", "print the plan of a product, and why; no GPU"),
        ("codegen", "compile what the plan launches and look at the machine code; no GPU"),
    ):
        command = commands.add_parser(name, help=what)
        add_problem(command)
        command.add_argument("--batch", type=size, default=1, help="items (default 1)")
        command.add_argument("--json", action="store_true", help="for programs")

    export = commands.add_parser("export", help="write the plan as one Triton file; no GPU")
    add_problem(export)
    export.add_argument("--output", metavar="FILE", help="where to (default: standard output)")
    export.add_argument(
        "--autotune", action="store_true", help="the file tries 1 to 4 pipeline stages by itself"
    )
    export.set_defaults(batch=1)

    tune = commands.add_parser("tune", help="measure choices on this GPU, keep the fastest")
    add_search(tune)

    add_bench(commands.add_parser("bench", help="check, time and compare on this GPU; a report"))

    doctor = commands.add_parser("doctor", help="what this machine has and what will run on it")
    doctor.add_argument("--json", action="store_true", help="for programs")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line on ``argv`` (default: the process's own) and return the exit code.

    Raises:
        SystemExit: with code 2 for bad arguments, after saying what is wrong with them.
    """
    argv = sys.argv[1:] if argv is None else argv
    options = make_parser().parse_args(argv)
    if options.command == "demo":
        from fastmm_op.cli import demo

        return demo.main()
    if options.command == "explain":
        from fastmm_op.cli import explain

        return explain.main(options)
    if options.command == "codegen":
        from fastmm_op.cli import codegen

        return codegen.main(options)
    if options.command == "export":
        from fastmm_op.cli import export

        return export.main(options)
    if options.command == "tune":
        from fastmm_op.cli import tune

        return tune.main(options, argv)
    if options.command == "bench":
        from fastmm_op.cli import bench

        return bench.main(options)
    from fastmm_op.cli import doctor

    return doctor.main(options.json)


if __name__ == "__main__":
    sys.exit(main())
