"""Measure the suite: ours against its peers, every result checked before it is timed.

    python benchmarks/bench_matmul.py [--group G] [--filter TEXT] [--out FILE]

Writes JSON after every case, so that a run that is cut short leaves what it has. Exit codes:
0 fine, 1 a result (ours or a peer's) was wrong or ours did not run, 2 bad arguments.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

# Nothing need be installed: run as a script, the repository itself is what is measured.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import environment, summary
from benchmarks.cases import SUITE, Case, groups, load_cases
from benchmarks.contenders import PEERS
from benchmarks.runner import DeviceLost, Runner
from fastmm_op.problem import PRECISIONS
from fastmm_op.timing import Timer

# Where stdout is no terminal, a line of progress at most this often.
SECONDS_BETWEEN_LINES = 20


def names(text: str) -> list[str]:
    """A comma-separated list; empty for "" and "none"."""
    return [] if text in ("", "none") else [part.strip() for part in text.split(",")]


def peer_names(text: str) -> list[str]:
    for name in names(text):
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"unknown peer {name!r}; choose from {PEERS}")
    return names(text)


def positive_seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


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
    parser.add_argument("--out", type=Path, help="default benchmarks/results/<gpu>/matmul.json")
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


def write(results: dict, path: Path) -> None:
    """Write a results file in one step: readers see the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(part, path)


class Reporter:
    """Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int) -> None:
        self.console = Console(stderr=True)
        self.total = total
        self.started = self.last_line = time.monotonic()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("", total=total)

    def starting(self, done: int, what: str) -> None:
        self.progress.update(self.task, completed=done, description=what)
        now = time.monotonic()
        if not self.console.is_terminal and now - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = now
            print(f"[{now - self.started:.0f} s] {done}/{self.total} {what}", file=sys.stderr)

    def failed(self, text: str) -> None:
        self.console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)


def run_cases(
    cases: list[Case], options: argparse.Namespace, runner: Runner, results: dict, out: Path
) -> None:
    """Fill ``results`` and write it after every case; stop at the budget or a lost device."""
    started = time.monotonic()
    reporter = Reporter(len(cases))
    with reporter.progress:
        for done, case in enumerate(cases):
            if options.budget and time.monotonic() - started > options.budget:
                results["stopped"] = f"budget of {options.budget:g} s spent"
                break
            reporter.starting(done, case.name)
            peers = set(options.peers)
            if case.group in options.inductor_groups:
                peers.add("inductor")
            try:
                rows = runner.run(case, peers)
            except DeviceLost as error:
                results["stopped"] = f"device lost at {case.name}: {error}"
                reporter.failed(results["stopped"])
                break
            for text in summary.failures(rows):
                reporter.failed(f"FAILED {text}")
            results["rows"] += rows
            results["missing"] = [missing.name for missing in cases[done + 1 :]]
            write(results, out)
    write(results, out)


def exit_code(results: dict) -> int:
    """1 if anything of ours failed, a peer's result was wrong, or the device was lost."""
    rows = results["rows"]
    wrong = any(peer.get("wrong") for row in rows for peer in row["peers"].values())
    lost = results.get("stopped", "").startswith("device lost")
    return int(wrong or lost or any("failed" in row for row in rows))


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
    env = environment.describe(device, argv)
    folder = environment.folder_name(env["gpu"])
    out = options.out or environment.ROOT / "benchmarks/results" / folder / "matmul.json"
    timer = timer or Timer(device)
    print(
        f"{env['gpu']}, torch {env['torch']}, triton {env['triton']}: {len(cases)} cases -> {out}"
    )

    ceilings = environment.measure(device, timer)
    results = {"env": env | ceilings, "rows": [], "missing": [case.name for case in cases]}
    runner = Runner(device, ceilings, options.seconds_per_case, timer)
    run_cases(cases, options, runner, results, out)
    if not results["missing"]:
        del results["missing"]
        write(results, out)

    rates = {name: f"{rate / 1e12:.0f}" for name, rate in ceilings["matmul_ceiling_flops"].items()}
    print(f"ceilings: {ceilings['copy_bandwidth_bytes_per_s'] / 1e12:.2f} TB/s, TFLOP/s {rates}")
    print(f"host us per call: {json.dumps(ceilings['host_us'])}")
    print(summary.text(results))
    if "stopped" in results:
        print(f"stopped early: {results['stopped']}")
    return exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
