"""Measure whole models: eager, torch.compile and the fastmm backend, checked before they are timed.

    python benchmarks/bench_models.py [--workloads gpt2,vit] [--settings fp32,tf32,bf16] [--tiny]

Logits and gradients are held against float64, the loss curves of 50 steps against eager's. Writes
JSON after every model. Exit codes: 0 fine, 1 something was wrong or did not run, 2 bad arguments.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

# Nothing need be installed: run as a script, the repository itself is what is measured.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.table import Table

from benchmarks.bench_matmul import RESULTS, choose_device, positive_seconds
from benchmarks.model_runs import CONTENDERS, SETTINGS, ModelRun
from benchmarks.models import WORKLOADS
from fastmm_op.bench import environment
from fastmm_op.bench.session import Reporter, write
from fastmm_op.timing import Timer


def some_of(known):
    """An argparse type: names out of ``known``, comma-separated."""

    def parse(text: str) -> list[str]:
        names = [part.strip() for part in text.split(",")]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for option, known in (
        ("--workloads", WORKLOADS),
        ("--settings", SETTINGS),
        ("--contenders", CONTENDERS),
    ):
        default, names = list(known), ", ".join(known)
        parser.add_argument(option, type=some_of(known), default=default, help=names)
    parser.add_argument("--tiny", action="store_true", help="small versions of the models")
    parser.add_argument("--steps", type=positive, default=50, help="of training, for loss curves")
    parser.add_argument("--seconds", type=positive_seconds, default=2.0, help="of timing each")
    parser.add_argument("--budget", type=positive_seconds, help="start no model after SECONDS")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/<gpu>/models.json")
    parser.add_argument("--device", help="default cuda if there is one, else cpu")
    return parser


def main(argv: list[str] | None = None, timer: Timer | None = None, contenders=CONTENDERS) -> int:
    """Run the benchmark with command line arguments ``argv``; returns the exit code.

    ``timer`` and ``contenders`` replace the real ones, for tests.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    options = parser.parse_args(argv)
    device = choose_device(parser, options.device)
    contenders = {name: make for name, make in contenders.items() if name in options.contenders}
    folder = environment.folder_name(environment.device_name(device))
    name = "models_tiny.json" if options.tiny else "models.json"
    out = options.out or RESULTS / folder / name
    command = shlex.join(["python", "benchmarks/bench_models.py", *argv])
    results = {"env": environment.describe(device, command), "tiny": options.tiny, "rows": []}
    results["skipped"] = [
        reason for name in options.workloads if (reason := WORKLOADS[name].missing())
    ]
    runs = [
        (WORKLOADS[name], setting)
        for name in options.workloads
        if not WORKLOADS[name].missing()
        for setting in options.settings
    ]
    reporter, timer, started = Reporter(len(runs)), timer or Timer(device), time.monotonic()
    for reason in results["skipped"]:
        reporter.failed(f"skipped: {reason}")
    with reporter.progress:
        for done, (workload, setting) in enumerate(runs):
            if options.budget and time.monotonic() - started > options.budget:
                results["stopped"] = f"budget of {options.budget:g} s spent"
                break
            reporter.starting(done, f"{workload.name} {setting}")
            run = ModelRun(
                workload, setting, device, options.tiny, options.steps, options.seconds, timer
            )
            rows = run.rows(contenders)
            del run
            for row in rows:
                if "failed" in row:
                    reporter.failed(f"FAILED {workload.name} {setting} {row['contender']}: "
                                    f"{row['failed']}")  # fmt: skip
            results["rows"] += rows
            write(results, out)
    write(results, out)
    Console().print(table(results))
    return int(any("failed" in row for row in results["rows"]))


def table(results: dict) -> Table:
    """A row a model and setting; milliseconds a step, and ours over the fastest of the others."""
    found = Table(title=f"{results['env']['gpu']}: milliseconds a step")
    names = list(dict.fromkeys(row["contender"] for row in results["rows"]))
    for heading in ("model", "setting", *names, "x best other", "products taken"):
        found.add_column(heading, justify="left" if heading in ("model", "setting") else "right")
    groups: dict[tuple, dict] = {}
    for row in results["rows"]:
        groups.setdefault((row["workload"], row["setting"]), {})[row["contender"]] = row
    for (workload, setting), rows in groups.items():
        times = {name: row["ms"] for name, row in rows.items() if "failed" not in row}
        others = [ms for name, ms in times.items() if name != "fastmm"]
        gain = "-"
        if others and "fastmm" in times:
            gain = f"{min(others) / times['fastmm']:.2f}"
        ours = rows.get("fastmm", {})
        taken = f"{ours['products_taken']} of {ours['products']}" if "products" in ours else "-"
        cells = [f"{times[name]:.3f}" if name in times else "failed" for name in names]
        found.add_row(workload, setting, *cells, gain, taken)
    return found


if __name__ == "__main__":
    sys.exit(main())
