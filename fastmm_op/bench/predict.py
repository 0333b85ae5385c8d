"""A plan on a card that need not be there: each launch compiled, its traffic followed, its time.

The machine code is what the plan would launch (fastmm_op/codegen.py); gpu_model.py turns it into
seconds, traffic.py and l2.py follow the operands through the cache from launch to launch.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from subprocess import SubprocessError

from fastmm_op.arch import Arch
from fastmm_op.bench import gpu_model
from fastmm_op.bench.cases import Case
from fastmm_op.bench.gpu_model import Kernel, Machine, Prediction, Work
from fastmm_op.bench.l2 import Cache
from fastmm_op.bench.traffic import SHARE_NOTHING, TRAFFIC, Step, panel_rows
from fastmm_op.codegen import Resources, compile_launch, resources
from fastmm_op.launches import Launch, Plan
from fastmm_op.plan import make_plan
from fastmm_op.problem import Problem
from fastmm_op.running import KERNELS


@dataclass(frozen=True)
class Forecast:
    """A plan's time on a card.

    Attributes:
        seconds, fastest, slowest: the model's, and on the same card as good and as bad as it may
            be (``gpu_model.bounds``).
        kernels: one prediction a launch, with its traffic.
    """

    seconds: float
    fastest: float
    slowest: float
    kernels: tuple[tuple[Step, Work, Prediction], ...]


def forecast(problem: Problem, plan: Plan, machine: Machine, flushed: bool = True) -> Forecast:
    """Predict a plan's time, of launches that wait for each other.

    Args:
        problem: the plan's.
        machine: the card; its own number of SMs counts, the plan may have been made for another.
        flushed: the L2 cache is overwritten before the call, as benchmarks do.

    Raises:
        ValueError: the plan has a kernel of which there is no model (``"gemm_hopper"``).
    """
    return forecast_steps([compiled(problem, x) for x in plan.launches], machine, flushed)


def forecast_steps(steps: list[Step], machine: Machine, flushed: bool) -> Forecast:
    """The same for launches that are compiled already."""
    slow, fast = gpu_model.bounds(machine)
    kernels = run(steps, machine, flushed)
    totals = [
        sum(prediction.seconds for _, _, prediction in run(steps, card, flushed))
        for card in (fast, slow)
    ]
    return Forecast(sum(p.seconds for _, _, p in kernels), *totals, tuple(kernels))


def predictor(gpu: str, arch: Arch) -> Callable[[Case], dict] | None:
    """What adds predictions to a benchmark's rows on a card; None for a card without a model.

    Args:
        gpu: the card's name, as the driver gives it.
        arch: by which the op plans there.
    """
    machine = gpu_model.MACHINES.get(gpu)

    def fields(case: Case) -> dict:
        problem = case.problem(arch)
        try:
            found = forecast(problem, make_plan(problem), machine)
        except (ValueError, OSError, SubprocessError) as error:  # no reason to end a benchmark
            return {"not_predicted": str(error)}
        return {
            "predicted_us": round(1e6 * found.seconds, 3),
            "predicted_us_range": [round(1e6 * s, 3) for s in (found.fastest, found.slowest)],
        }

    return machine and fields


def run(steps: list[Step], machine: Machine, flushed: bool) -> list[tuple[Step, Work, Prediction]]:
    """The launches of a plan one after the other, with what each leaves in L2."""
    cache = Cache(machine.l2_bytes, dirty=machine.l2_bytes if flushed else 0.0)
    panels = panel_rows(steps)
    found = []
    for step in steps:
        slots = machine.sms * gpu_model.blocks_per_sm(machine, step.kernel)
        trips = TRAFFIC[step.launch.kernel](step, cache, panels, slots)
        fetched, written_back, exchanged = cache.traffic()
        known = exchanged if step.launch.kernel in SHARE_NOTHING else None
        work = Work(step.launch.grid, trips, fetched, written_back, known)
        found.append((step, work, gpu_model.predict(machine, step.kernel, work)))
    return found


@lru_cache(maxsize=4096)
def compiled_kernel(problem: Problem, launch: Launch) -> Resources:
    return resources(compile_launch(problem, launch))


def compiled(problem: Problem, launch: Launch) -> Step:
    if launch.kernel not in TRAFFIC:
        raise ValueError(f"no model of the kernel {launch.kernel!r}, only of {sorted(TRAFFIC)}")
    names = KERNELS[launch.kernel].arg_names
    args = dict(zip(names, launch.args, strict=False))
    return step_of(launch, compiled_kernel(problem, launch), args)


def step_of(launch: Launch, found: Resources, args: dict[str, object]) -> Step:
    """A launch for the model: which instructions are executed, and how often."""
    # The longer sides of branches are for what is rare: powers of two that balancing moved.
    rest = Counter(found.opcodes) - Counter(found.main_loop) - Counter(found.detours)
    del rest["NOP"]  # padding after the end
    if any(name.startswith("LDGSTS") for name in found.main_loop):
        # Copies before the loop are those of its first trips; as many of its last make none.
        rest = {name: n for name, n in rest.items() if not name.startswith("LDGSTS")}
    kernel = Kernel(
        launch.num_warps,
        found.registers,
        found.shared_memory,
        found.main_loop,
        rest,
        prefetch(launch, found),
    )
    return Step(launch, found, kernel, args)


def prefetch(launch: Launch, found: Resources) -> float:
    """Trips between the start of a load in the main loop and the first use of what it brings.

    Triton keeps num_stages - 1 trips of copies in flight, and starts one amid a trip. It does not
    run ahead with loads of less than 4 bytes.
    """
    narrow = any(name.startswith("LDG.") and ".U16" in name for name in found.main_loop)
    return 0.0 if narrow or launch.num_stages < 2 else launch.num_stages - 1.5
