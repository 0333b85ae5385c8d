"""Measure whole models: eager, torch.compile and the fastmm backend, checked before they are timed.

    python benchmarks/bench_models.py [--workloads gpt2,vit] [--settings fp32,tf32,bf16]
        [--contenders eager,inductor,fastmm] [--add-to FILE] [--budget SECONDS] [--tiny]

Logits and gradients are held against float64, the loss curves of 50 steps against eager's. Writes
JSON after every contender. A run may be done in parts: ``--add-to`` starts from the rows of an
earlier results file of the same machine, and measures what is not there. Exit codes: 0 fine,
1 something was wrong or did not run, 2 bad arguments.
"""

import argparse
import json
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
from benchmarks.model_runs import CONTENDERS, FOR_INFERENCE, SETTINGS, ModelRun, Subject
from benchmarks.models import WORKLOADS, Workload
from fastmm_op.bench import environment
from fastmm_op.bench.session import Reporter, write
from fastmm_op.timing import Timer

# What its rows lose and how its losses fall, the others are judged by.
BASELINE = "eager"
OURS = ("fastmm", "prepacked")


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
    parser.add_argument("--budget", type=positive_seconds, help="start no contender after SECONDS")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/<gpu>/models.json")
    parser.add_argument("--add-to", type=Path, help="results whose rows are kept")
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
    env = environment.describe(device, command)
    try:
        results = load(options.add_to, env, options.tiny)
    except (OSError, ValueError) as error:
        parser.error(f"--add-to {options.add_to}: {error}")
    results["runs"].append(env)
    results["skipped"] = [
        reason for name in options.workloads if (reason := WORKLOADS[name].missing())
    ]
    found = results["rows"]
    asked = [
        (name, setting, contender)
        for name in options.workloads
        if not WORKLOADS[name].missing()
        for setting in options.settings
        for contender in contenders
        if may_run(WORKLOADS[name], setting, contender)
        and row_of(found, name, setting, contender) is None
    ]
    reporter, timer, started = Reporter(len(asked)), timer or Timer(device), time.monotonic()
    for reason in results["skipped"]:
        reporter.failed(f"skipped: {reason}")
    subject, bad = None, False
    with reporter.progress:
        for done, (name, setting, contender) in enumerate(asked):
            if options.budget and time.monotonic() - started > options.budget:
                missing = len(asked) - done
                env["stopped"] = f"budget of {options.budget:g} s spent: {missing} rows not run"
                reporter.failed(env["stopped"])
                break
            reporter.starting(done, f"{name} {setting} {contender}")
            if subject is None or subject.workload.name != name:
                subject = None  # its memory first
                subject = Subject(WORKLOADS[name], device, options.tiny)
            run = ModelRun(subject, setting, options.steps, options.seconds, timer)
            baseline = None
            if contender != BASELINE:
                baseline = row_of(found, name, setting, BASELINE)
            row = run.row(contender, contenders[contender], baseline)
            if "failed" in row:
                bad = True
                reporter.failed(f"FAILED {name} {setting} {contender}: {row['failed']}")
            found.append(row | {"run": len(results["runs"]) - 1})
            write(results, out)
    write(results, out)
    Console().print(table(results))
    return int(bad)


def load(path: Path | None, env: dict, tiny: bool) -> dict:
    """The results to add to: those of a file, without what failed in it, or none.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no results file, or one of another machine or size.
    """
    results = {"gpu": env["gpu"], "tiny": tiny, "runs": [], "rows": []}
    if path is None:
        return results
    old = json.loads(path.read_text())
    if not isinstance(old, dict) or not {"gpu", "tiny", "runs", "rows"} <= old.keys():
        raise ValueError("it holds no results of models")
    if old["tiny"] != tiny:
        raise ValueError("one is of tiny models and the other is not")
    for name in ("gpu", "torch", "triton"):
        for run in old["runs"]:
            if run[name] != env[name]:
                raise ValueError(f"its {name} is {run[name]}, here it is {env[name]}")
    results["runs"] = old["runs"]
    results["rows"] = [row for row in old["rows"] if "failed" not in row]
    return results


def may_run(workload: Workload, setting: str, contender: str) -> bool:
    """Prepacking is for inference, and not for autocast, whose weights are cast at each call."""
    return contender not in FOR_INFERENCE or not (workload.trains or setting == "bf16")


def row_of(rows: list[dict], workload: str, setting: str, contender: str) -> dict | None:
    """The row of a contender, if there is one; rows that failed count too."""
    wanted = (workload, setting, contender)
    matching = (r for r in rows if (r["workload"], r["setting"], r["contender"]) == wanted)
    return next(matching, None)


def table(results: dict) -> Table:
    """A row a model and setting; milliseconds a step, and ours over the fastest of the others."""
    found = Table(title=f"{results['gpu']}: milliseconds a step")
    present = {row["contender"] for row in results["rows"]}
    names = [name for name in CONTENDERS if name in present]
    for heading in ("model", "setting", *names, "x best other", "products taken"):
        found.add_column(heading, justify="left" if heading in ("model", "setting") else "right")
    groups: dict[tuple, dict] = {}
    for row in results["rows"]:
        groups.setdefault((row["workload"], row["setting"]), {})[row["contender"]] = row
    for (workload, setting), rows in groups.items():
        times = {name: row["ms"] for name, row in rows.items() if "failed" not in row}
        others = [ms for name, ms in times.items() if name not in OURS]
        gain = "-"
        if others and "fastmm" in times:
            gain = f"{min(others) / times['fastmm']:.2f}"
        ours = rows.get("fastmm", {})
        taken = f"{ours['products_taken']} of {ours['products']}" if "products" in ours else "-"
        missing = {name: "failed" if name in rows else "-" for name in names}
        cells = [f"{times[name]:.3f}" if name in times else missing[name] for name in names]
        found.add_row(workload, setting, *cells, gain, taken)
    return found


if __name__ == "__main__":
    sys.exit(main())
