"""Measure the suite: ours against its peers, every result checked before it is timed.

    python benchmarks/bench_matmul.py [--group G] [--filter TEXT] [--out FILE]

Writes JSON after every case, so that a run that is cut short leaves what it has. Exit codes:
0 fine, 1 a result (ours or a peer's) was wrong or ours did not run, 2 bad arguments.
"""

import argparse
import shlex
import sys
from pathlib import Path

# Nothing need be installed: run as a script, the repository itself is what is measured.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from fastmm_op.__main__ import positive_seconds
from fastmm_op.bench import environment, session
from fastmm_op.bench.cases import SUITE, Case, groups, load_cases
from fastmm_op.bench.contenders import PEERS
from fastmm_op.problem import PRECISIONS
from fastmm_op.timing import Timer

RESULTS = Path(__file__).with_name("results")


def names(text: str) -> list[str]:
    """A comma-separated list; empty for "" and "none"."""
    return [] if text in ("", "none") else [part.strip() for part in text.split(",")]


def count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative; 0 or more processes")
    return number


def peer_names(text: str) -> list[str]:
    for name in names(text):
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"unknown peer {name!r}; choose from {PEERS}")
    return names(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--group", type=names, default=[], help="only these groups (a,b,...)")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="tf32", help="of fp32 cases (default tf32)"
    )
    parser.add_argument("--peers", type=peer_names, default=["torch", "seed-style"])
    parser.add_argument(
        "--inductor-groups",
        type=names,
        default=["seed", "squares"],
        help="groups with the inductor peer, which compiles for seconds a case (or none)",
    )
    parser.add_argument("--seconds-per-case", type=positive_seconds, default=0.6)
    parser.add_argument("--budget", type=positive_seconds, help="start no case after SECONDS")
    parser.add_argument(
        "--compile-processes",
        type=count,
        default=0,
        metavar="N",
        help="first compile our kernels in N processes (default 0: each when it is its turn)",
    )
    parser.add_argument("--out", type=Path, help="default in benchmarks/results/<gpu>")
    parser.add_argument("--suite", type=Path, default=SUITE, help="another suite file")
    parser.add_argument("--device", help="default cuda if there is one, else cpu")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    return parser


def choose_cases(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for; ends the program (code 2) if there are none."""
    try:
        cases = load_cases(options.suite, options.precision)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"argument --suite: {options.suite}: {type(error).__name__}: {error}")
    known = groups(cases)
    for option in ("--group", "--inductor-groups"):
        for name in getattr(options, option.removeprefix("--").replace("-", "_")):
            if name not in known:
                parser.error(f"argument {option}: no group {name!r}; there are {known}")
    cases = [
        case
        for case in cases
        if (not options.group or case.group in options.group) and options.filter in case.name
    ]
    if not cases:
        parser.error(f"argument --filter: no case contains {options.filter!r}")
    return cases


def choose_device(parser: argparse.ArgumentParser, name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        parser.error(f"argument --device: {str(error).splitlines()[0]}")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"argument --device: {name} is neither cpu nor cuda")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error(f"argument --device: {name}, but there is no CUDA device")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def main(argv: list[str] | None = None, timer: Timer | None = None) -> int:
    """Run the benchmark with command line arguments ``argv``; returns the exit code.

    ``timer`` replaces the device's own, for tests.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    options = parser.parse_args(argv)
    cases = choose_cases(parser, options)
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    device = choose_device(parser, options.device)
    folder = environment.folder_name(environment.device_name(device))
    run = session.Session(
        cases,
        options.peers,
        options.inductor_groups,
        options.seconds_per_case,
        options.budget,
        shlex.join(["python", "benchmarks/bench_matmul.py", *argv]),
        compile_processes=options.compile_processes,
    )
    name = "matmul.json" if options.precision == "tf32" else f"matmul_{options.precision}.json"
    results = run.run(device, options.out or RESULTS / folder / name, timer)
    return session.exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
