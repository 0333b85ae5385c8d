"""One product: does ours win over what Inductor would do by itself? Pure; no torch."""

from dataclasses import dataclass

from fastmm_op.compile import peer
from fastmm_op.compile.peer import Surroundings
from fastmm_op.plan import make_plan
from fastmm_op.problem import ITEMSIZE, Problem

# Both sides are models: a win has to be predicted this clearly.
MARGIN = 1.1
# What gemm_hopper's plans took of what the planner estimates, which is only to rank them: in the
# median 0.87 and 0.90 on an H100, 0.91 and 0.94 on an H200 (matmul.json and matmul_fp32.json of
# both in benchmarks/results).
OF_HOPPER_ESTIMATE = 0.94
# What a packed call costs the host (37 us, benchmarks/results/NVIDIA_H200/host_cost.json), and some
# for the dispatcher: a product that is over sooner would make the GPU wait for it, unless CUDA
# graphs replay it.
HOST_SECONDS = 45e-6


@dataclass(frozen=True)
class Verdict:
    """Whether to take a product, and why.

    Attributes:
        take: ours is to compute it.
        why: one phrase, for people.
        ours_seconds, inductor_seconds: what was predicted; None where nothing was.
    """

    take: bool
    why: str
    ours_seconds: float | None = None
    inductor_seconds: float | None = None


def decide(problem: Problem, around: Surroundings) -> Verdict:
    """Take a product only where the models predict a win; ties stay with Inductor."""
    if 0 in (problem.batch, problem.M, problem.N, problem.K):
        return Verdict(False, "a size is zero")
    if peer.memory_bound(problem) and not peer.moves_slowly(problem):
        return Verdict(False, "bound by memory traffic: nothing to gain")
    theirs, how = peer.inductor_seconds(problem, around)
    if theirs < HOST_SECONDS and not around.graphs:
        return Verdict(False, "too small: the call itself would cost more", None, theirs)
    plan = make_plan(problem)
    persistent = any(step.kernel == "gemm_hopper" for step in plan.launches)
    ours = plan.seconds * (OF_HOPPER_ESTIMATE if persistent else 1.0)
    if around.extra_pass:
        ours += pass_seconds(problem)
    ratio = theirs / ours
    take = ratio >= MARGIN
    why = f"predicted {ratio:.2f} times as fast as {how}"
    if not take:
        why += ": no clear win"
    return Verdict(take, why, ours, theirs)


def pass_seconds(problem: Problem) -> float:
    """One more kernel that reads and writes C."""
    moved = 2 * problem.batch * problem.M * problem.N * ITEMSIZE[problem.dtype]
    return problem.arch.launch_seconds + moved / problem.arch.bandwidth
