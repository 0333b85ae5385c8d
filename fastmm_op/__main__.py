"""The command line: ``python -m fastmm_op {demo,explain,codegen,doctor}``.

Exit codes: 0 it worked, 1 a check failed or nothing here is usable, 2 bad arguments.
"""

import argparse
import sys

from fastmm_op.arch import ARCHES
from fastmm_op.problem import ITEMSIZE, PRECISIONS

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


def add_problem(command: argparse.ArgumentParser) -> None:
    """The options that describe a product and a card."""
    command.add_argument(
        "--shape", nargs=3, type=size, required=True, metavar=("M", "K", "N"), help="A is M x K"
    )
    command.add_argument("--batch", type=size, default=1, help="items (default 1)")
    command.add_argument("--dtype", choices=DTYPES, default="fp32")
    command.add_argument(
        "--layout", choices=LAYOUTS, default="NN", help="T: that operand is a transposed view"
    )
    command.add_argument("--precision", choices=PRECISIONS, default="tf32")
    command.add_argument("--arch", choices=tuple(ARCHES), help="default: this GPU's, or sm_89")
    command.add_argument("--sms", type=positive, help="multiprocessors, if not the usual number")
    command.add_argument("--json", action="store_true", help="for programs")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m fastmm_op", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    commands.add_parser("demo", help="run, check and time the seed workload (small with no GPU)")

    for name, what in (
        ("explain", "print the plan of a product, and why; no GPU"),
        ("codegen", "compile what the plan launches and look at the machine code; no GPU"),
    ):
        add_problem(commands.add_parser(name, help=what))

    doctor = commands.add_parser("doctor", help="what this machine has and what will run on it")
    doctor.add_argument("--json", action="store_true", help="for programs")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line on ``argv`` (default: the process's own) and return the exit code.

    Raises:
        SystemExit: with code 2 for bad arguments, after saying what is wrong with them.
    """
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
    from fastmm_op.cli import doctor

    return doctor.main(options.json)


if __name__ == "__main__":
    sys.exit(main())
