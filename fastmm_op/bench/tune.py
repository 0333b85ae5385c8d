"""Search on request: measures choices for one problem, each checked before it is timed."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastmm_op import launch, running
from fastmm_op.bench.runner import require_device
from fastmm_op.estimate import estimate
from fastmm_op.oracle import Oracle, Verdict
from fastmm_op.plan import write_plan
from fastmm_op.problem import COPY_BYTES, ITEMSIZE, Operand, Problem
from fastmm_op.search import label
from fastmm_op.tiles import Choice
from fastmm_op.timing import Timing, torch_tf32

Time = Callable[[Callable[[], object], float], Timing]

# The best of many noisy medians looks better than it is: so many of the fastest, and the planner's
# own choice, are timed again, so many times as long, and only that counts.
FINALISTS = 4
FINAL_LENGTH = 3


@dataclass(frozen=True)
class Measurement:
    """What became of one choice.

    Attributes:
        choice: as it was run.
        estimate_us: the cost model's figure, microseconds.
        error: normwise, against float64; NaN if it did not run.
        failure: None if its result was right, else one sentence; then it was not timed.
        wrong: it ran, and its result failed the check.
        timing: of the first round.
        final: of the second round, for those that reached it.
    """

    choice: Choice
    estimate_us: float
    error: float
    failure: str | None = None
    wrong: bool = False
    timing: Timing | None = None
    final: Timing | None = None


@dataclass(frozen=True)
class Search:
    """What was measured for one problem; times are those of the second round.

    Attributes:
        problem: what was computed.
        allowed_error: the normwise error that its precision promises.
        measurements: one a choice, the planner's own first.
    """

    problem: Problem
    allowed_error: float
    measurements: tuple[Measurement, ...]

    @property
    def chosen(self) -> Measurement:
        """The planner's own choice."""
        return self.measurements[0]

    @property
    def best(self) -> Measurement | None:
        """The fastest; None if no result was right."""
        timed = [m for m in self.measurements if m.final]
        return min(timed, key=lambda m: m.final.us, default=None)

    @property
    def ratio(self) -> float | None:
        """The time of the planner's choice over the best: 1 or more; None if it was wrong."""
        best = self.best
        return self.chosen.final.us / best.final.us if best and self.chosen.final else None

    @property
    def failed(self) -> list[Measurement]:
        return [m for m in self.measurements if m.failure is not None]


def search(
    problem: Problem,
    choices: Sequence[Choice],
    device: torch.device,
    time: Time,
    seconds: float,
    advance: Callable[[], object] = lambda: None,
) -> Search:
    """Check and time choices for a problem on standard normal operands.

    Args:
        problem: a product without an epilogue; its architecture is the device's.
        choices: at least one, the planner's own first; all legal for the problem.
        device: a CUDA device, or the CPU in a process that interprets kernels.
        time: a ``timing.Timer`` or its like.
        seconds: of timing for each choice in the first round.
        advance: called after every choice.

    Raises:
        runner.DeviceLost: after a failure that the device did not survive.
    """
    a, b = operands(problem, device)
    oracle = Oracle(a, b)
    allowed = allowed_error(problem, oracle, a, b)
    found = []
    for choice in choices:
        found.append(measure(problem, choice, a, b, oracle, allowed, time, seconds))
        advance()
    for i in finalists(found):
        timing = time(timed_call(problem, found[i].choice, a, b), FINAL_LENGTH * seconds)
        found[i] = replace(found[i], final=timing)
    return Search(problem, allowed, tuple(found))


def finalists(found: Sequence[Measurement]) -> Iterable[int]:
    """Which measurements to repeat: the fastest, and the first, which is the planner's own."""
    timed = [i for i, m in enumerate(found) if m.timing]
    fastest = sorted(timed, key=lambda i: found[i].timing.us)[:FINALISTS]
    return sorted({0, *fastest} & set(timed))


def measure(
    problem: Problem,
    choice: Choice,
    a: Tensor,
    b: Tensor,
    oracle: Oracle,
    allowed: float,
    time: Time,
    seconds: float,
) -> Measurement:
    """Check one choice, and time it if its result is right; its exceptions become failures."""
    estimate_us = estimate(problem, choice) * 1e6
    try:
        verdict = check(problem, choice, a, b, oracle, allowed)
        if verdict.failure is not None:
            return Measurement(choice, estimate_us, verdict.error, verdict.failure, wrong=True)
        timing = time(timed_call(problem, choice, a, b), seconds)
        return Measurement(choice, estimate_us, verdict.error, timing=timing)
    except Exception as error:  # one choice's trouble must not end the search
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        require_device(a.device, f"{label(choice)}: {text}")
        return Measurement(choice, estimate_us, math.nan, text)


def check(
    problem: Problem, choice: Choice, a: Tensor, b: Tensor, oracle: Oracle, allowed: float
) -> Verdict:
    """Run a choice into memory full of NaN and judge what it leaves there."""
    out = torch.full(oracle.out_shape, math.nan, dtype=a.dtype, device=a.device)
    running.run_plan(write_plan(problem, choice), a, b, out)
    return oracle.check(out, allowed)


def timed_call(problem: Problem, choice: Choice, a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """What is timed: a call as the op makes it, its output and workspace allocated by the call."""
    plan = write_plan(problem, choice)
    call = launch.Call(a, b, problem.precision, problem.arch, plan=plan)
    return lambda: call(a, b)


def allowed_error(problem: Problem, oracle: Oracle, a: Tensor, b: Tensor) -> float:
    """What the problem's precision promises, beside torch's own error under the same setting."""
    precision = problem.precision if problem.dtype == "fp32" else problem.dtype
    with torch_tf32(precision == "tf32"):
        return oracle.allowed(precision, oracle.error(torch.matmul(a, b)))


def operands(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor]:
    """Standard normal a (batch, M, K) and b (batch, K, N), laid out as the problem says."""
    generator = torch.Generator(device).manual_seed(0)

    def operand(layout: Operand, rows: int) -> Tensor:
        sizes = (problem.batch, rows, problem.K)
        strides = (layout.batch_stride, layout.row_stride, layout.k_stride)
        last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        # PyTorch's own memory is aligned; so many bytes further on it is as the problem says.
        skipped = layout.pointer_alignment % COPY_BYTES // ITEMSIZE[problem.dtype]
        dtype = running.TORCH_DTYPES[problem.dtype]
        options = {"dtype": dtype, "device": device, "generator": generator}
        memory = torch.randn(skipped + last + 1, **options)
        return memory.as_strided(sizes, strides, skipped)

    return operand(problem.a, problem.M), operand(problem.b, problem.N).mT
