"""A whole run: cases one after the other, progress for people, a results file after each."""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastmm_op.bench import environment, summary, warm
from fastmm_op.bench.cases import Case
from fastmm_op.bench.runner import DeviceLost, Runner
from fastmm_op.plan import make_plan
from fastmm_op.timing import Timer

# Where stdout is no terminal, a line of progress at most this often.
SECONDS_BETWEEN_LINES = 20


@dataclass(frozen=True)
class Session:
    """What to measure, where, and for how long.

    Attributes:
        cases: in the order in which they run.
        peers: ``contenders.PEERS`` that every case gets.
        inductor_groups: groups whose cases get ``"inductor"`` too, which compiles for seconds.
        seconds_per_case: of timing, shared by a case's contenders.
        budget: seconds after which no case is started; None: no limit.
        command: the command line that asked for it, for the record.
        predict: fields to add to the rows of a case; see ``predict.predictor``.
        compile_processes: that compile our kernels before anything is timed; 0: each case compiles
            its own when it is its turn. Not counted in the budget.
    """

    cases: list[Case]
    peers: list[str]
    inductor_groups: list[str]
    seconds_per_case: float
    budget: float | None
    command: str
    predict: Callable[[Case], dict] | None = None
    compile_processes: int = 0

    def run(self, device: torch.device, out: Path, timer: Timer | None = None) -> dict:
        """Measure, print a summary, and return what stands in the results file ``out``.

        Args:
            device: a CUDA device, or the CPU.
            out: a JSON file, written after every case.
            timer: a ``timing.Timer`` or its like; made if None.
        """
        # What is measured is what ships, not what this user has tuned.
        os.environ["FASTMM_NO_CACHE"] = "1"
        env = environment.describe(device, self.command)
        timer = timer or Timer(device)
        print(
            f"{env['gpu']}, torch {env['torch']}, triton {env['triton']}: "
            f"{len(self.cases)} cases -> {out}"
        )
        if self.compile_processes and device.type == "cuda":
            self.compile_first(device)
        ceilings = environment.measure(device, timer)
        missing = [case.name for case in self.cases]
        results = {"env": env | ceilings, "rows": [], "missing": missing}
        self.run_cases(Runner(device, ceilings, self.seconds_per_case, timer), results, out)
        if not results["missing"]:
            del results["missing"]
            write(results, out)
        print_summary(results)
        return results

    def compile_first(self, device: torch.device) -> None:
        """Compile what the cases launch; on a card that runs none of our kernels, nothing."""
        arch = environment.device_arch(device)
        problems = [case.problem(arch) for case in self.cases] if arch else []
        work = [(problem, make_plan(problem)) for problem in problems]
        failed = warm.compile_all(work, device, self.compile_processes) if work else 0
        print(f"compiled what {len(work)} cases launch; {failed} failed")

    def run_cases(self, runner: Runner, results: dict, out: Path) -> None:
        """Fill ``results``, written after every case; stop at the budget or a lost device."""
        started = time.monotonic()
        reporter = Reporter(len(self.cases))
        with reporter.progress:
            for done, case in enumerate(self.cases):
                if self.budget and time.monotonic() - started > self.budget:
                    results["stopped"] = f"budget of {self.budget:g} s spent"
                    break
                reporter.starting(done, case.name)
                peers = set(self.peers)
                if case.group in self.inductor_groups:
                    peers.add("inductor")
                try:
                    rows = runner.run(case, peers)
                except DeviceLost as error:
                    results["stopped"] = f"device lost at {case.name}: {error}"
                    reporter.failed(results["stopped"])
                    break
                predicted = self.predict(case) if self.predict else {}
                rows = [row | predicted for row in rows]
                for text in summary.failures(rows):
                    reporter.failed(f"FAILED {text}")
                results["rows"] += rows
                results["missing"] = [missing.name for missing in self.cases[done + 1 :]]
                write(results, out)
        write(results, out)


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


def print_summary(results: dict) -> None:
    """Ceilings, host costs, a line a row, means, losses and failures."""
    env = results["env"]
    rates = {name: f"{rate / 1e12:.0f}" for name, rate in env["matmul_ceiling_flops"].items()}
    print(f"ceilings: {env['copy_bandwidth_bytes_per_s'] / 1e12:.2f} TB/s, TFLOP/s {rates}")
    print(f"host us per call: {json.dumps(env['host_us'])}")
    print(summary.text(results))
    if "stopped" in results:
        print(f"stopped early: {results['stopped']}")


def exit_code(results: dict) -> int:
    """1 if anything of ours failed, a peer's result was wrong, or the device was lost."""
    rows = results["rows"]
    wrong = any(peer.get("wrong") for row in rows for peer in row["peers"].values())
    lost = results.get("stopped", "").startswith("device lost")
    return int(wrong or lost or any("failed" in row for row in rows))
