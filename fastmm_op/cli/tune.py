"""``tune``: searches on this GPU for the fastest choice of each case, and keeps it."""

import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable

import torch
from rich.console import Console

from fastmm_op import cache, ops
from fastmm_op.arch import Arch
from fastmm_op.bench import cases as suite
from fastmm_op.bench import environment, warm
from fastmm_op.bench.cases import Case
from fastmm_op.bench.runner import DeviceLost
from fastmm_op.bench.session import Reporter, write
from fastmm_op.cli import tune_report as report
from fastmm_op.cli.demo import say
from fastmm_op.plan import write_plan
from fastmm_op.search import STAGES, shortlist
from fastmm_op.tiles import Choice
from fastmm_op.timing import Timer


def cases_of(options: Namespace) -> list[Case]:
    """The cases that parsed options ask for.

    Raises:
        ValueError: there are none, or no such group of the suite; says which.
    """
    dtype, precision = options.dtype, options.precision
    kind = precision if dtype == "fp32" else dtype
    cases = [
        Case("shape", *shape, dtype, kind, options.layout, options.batch) for shape in options.shape
    ]
    if options.suite is not None:
        cases += suite_cases(options.suite, precision)
    if not cases:
        raise ValueError("nothing to tune: give --shape M K N, or --suite")
    return cases


def suite_cases(groups: list[str], precision: str) -> list[Case]:
    """The benchmark suite's cases; of some groups only, if any are named."""
    found = suite.load_cases(precision=precision)
    known = suite.groups(found)
    for group in groups:
        if group not in known:
            raise ValueError(f"argument --suite: no group {group!r}; there are {known}")
    return [case for case in found if not groups or case.group in groups]


def device_to_tune() -> tuple[torch.device, Arch, str]:
    """The current CUDA device (the CPU, if kernels are interpreted), its entry and name.

    Raises:
        RuntimeError: there is none, or it does not run this project's kernels.
        ValueError: FASTMM_ARCH does not fit it.
    """
    if not ops.HAVE_TRITON:
        raise RuntimeError("Triton is not installed: there are no kernels to tune")
    if not ops.INTERPRETED and not torch.cuda.is_available():
        raise RuntimeError("no CUDA device: there is nothing to measure on")
    from fastmm_op.launch import card_name

    device = torch.device("cpu")
    if not ops.INTERPRETED:
        device = torch.device("cuda", torch.cuda.current_device())
    arch = environment.device_arch(device)
    if arch is None:
        raise RuntimeError("this card is older than sm_80 and gets ATen's products")
    return device, arch, card_name(device.index)


class Tuner:
    """Searches case after case, keeps the winners, and writes down what was measured.

    Args:
        options: parsed; what is searched and how.
        device, arch, card: as ``device_to_tune`` returns them.
        timer: a ``timing.Timer`` or its like.
        env: ``environment.describe``'s result.
    """

    def __init__(
        self,
        options: Namespace,
        device: torch.device,
        arch: Arch,
        card: str,
        timer: Timer,
        env: dict[str, object],
    ) -> None:
        self.options = options
        self.device = device
        self.arch = arch
        self.card = card
        self.timer = timer
        self.top = None if options.all else options.top
        self.stages = STAGES if options.stages else ()
        self.rows: list[dict] = []
        self.not_kept: list[str] = []
        how = {"top": self.top, "stages": list(self.stages), "seconds": options.seconds}
        self.results = {"env": env, "search": how, "rows": self.rows}

    def run(self, cases: list[Case]) -> None:
        """Search all cases, or as many as the budget lets begin and the device survives."""
        work = [(c, shortlist(c.problem(self.arch), self.top, self.stages)) for c in cases]
        self.compile_first(work)
        started = time.monotonic()
        reporter = Reporter(sum(len(choices) for _, choices in work))
        with reporter.progress:
            done = 0
            for case, choices in work:
                if self.options.budget and time.monotonic() - started > self.options.budget:
                    self.results["stopped"] = f"budget of {self.options.budget:g} s spent"
                    break
                reporter.starting(done, case.name)
                try:
                    row = self.tune(case, choices, lambda: reporter.progress.advance(reporter.task))
                except DeviceLost as error:
                    self.results["stopped"] = f"device lost at {case.name}: {error}"
                    reporter.failed(self.results["stopped"])
                    break
                done += len(choices)
                for text in report.failures(row):
                    reporter.failed(f"FAILED {text}")
                self.rows.append(row)
                self.write(cases)
        self.write(cases)

    def compile_first(self, work: list[tuple[Case, list[Choice]]]) -> None:
        """Compile everything that is going to be measured, if other processes are to do that."""
        if self.options.compile_processes is None or self.device.type != "cuda":
            return
        problems = [(case.problem(self.arch), choices) for case, choices in work]
        plans = [(p, write_plan(p, choice)) for p, choices in problems for choice in choices]
        warm.compile_all(plans, self.device, self.options.compile_processes)

    def tune(self, case: Case, choices: list[Choice], advance: Callable[[], object]) -> dict:
        """Search one case and keep its winner; the row that says what was found."""
        from fastmm_op.bench import tune

        problem = case.problem(self.arch)
        row = report.row_of(case)
        try:
            search = tune.search(
                problem, choices, self.device, self.timer, self.options.seconds, advance
            )
        except torch.OutOfMemoryError as error:
            return row | {"failed": str(error).splitlines()[0]}
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if search.best and cache.is_enabled():
            entry = cache.Entry(search.best.choice, float(search.best.final.us))
            if cache.store(problem, self.card, entry) is None:
                self.not_kept.append(case.name)
        return row | report.found(search)

    def write(self, cases: list[Case]) -> None:
        self.results["missing"] = [case.name for case in cases[len(self.rows) :]]
        self.results["as_good_share"] = report.share(self.rows)
        if self.options.json:
            write(self.results, self.options.json)


def main(options: Namespace, argv: list[str], timer: Timer | None = None) -> int:
    """Tune what parsed options ask for; print the table.

    Args:
        argv: what was parsed, for the record.
        timer: replaces the device's own, for tests.

    Returns:
        0; 1 if a result was wrong, a case could not be measured, a winner could not be kept or
        there is no device; 2 for options that name nothing to tune.
    """
    console = Console()
    try:
        cases = cases_of(options)
    except ValueError as error:
        print(f"python -m fastmm_op tune: error: {error}", file=sys.stderr)
        return 2
    try:
        device, arch, card = device_to_tune()
    except (RuntimeError, ValueError) as error:
        say(console, f"tune: {error}")
        return 1
    env = environment.describe(device, shlex.join(["python", "-m", "fastmm_op", *argv]))
    tuner = Tuner(options, device, arch, card, timer or Timer(device), env)
    tuner.run(cases)
    report.print_results(tuner.results, console)
    if not cache.is_enabled():
        say(console, "Nothing was kept: FASTMM_NO_CACHE is set.")
    elif tuner.not_kept:
        say(console, f"NOT kept: {', '.join(tuner.not_kept)}")
    elif tuner.rows:
        say(console, f"The best are kept in {cache.root()}, for processes that start from now on.")
    lost = tuner.results.get("stopped", "").startswith("device lost")
    return int(lost or bool(tuner.not_kept) or any(map(report.went_wrong, tuner.rows)))
