"""What is answered: a plan is a list of kernel launches, complete but for the addresses."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from fastmm_op.problem import ITEMSIZE, round_up
from fastmm_op.tiles import Choice


@dataclass(frozen=True)
class Pointer:
    """A kernel argument: an address inside one of the buffers of a call.

    Attributes:
        buffer: ``"a"``, ``"b"``, ``"c"``, ``"bias"``, ``"residual"``, ``"workspace"`` or
            ``"packed_b"``, which an earlier plan has filled (kept.py).
        dtype: of the elements there.
        offset: bytes from the start of the buffer.
        elements: how many a piece of the workspace, or of packed_b, has; None elsewhere.
    """

    buffer: str
    dtype: str
    offset: int = 0
    elements: int | None = None


@dataclass(frozen=True)
class Descriptor:
    """A kernel argument: a TMA descriptor of a tensor at an address inside a buffer.

    Attributes:
        pointer: where the tensor starts; a multiple of 16 bytes.
        shape: elements in each dimension; what is read outside is zero.
        strides: elements; the last is 1, the others are multiples of 16 bytes.
        box: the piece that one copy moves.
        rounds: whether fp32 is rounded to TF32 as it is copied.
    """

    pointer: Pointer
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    rounds: bool = False


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: name in ``running.KERNELS``.
        grid: number of programs.
        args: the kernel's arguments in order: addresses, sizes, strides; None for an unused one.
        constexprs: its compile-time arguments.
        num_warps, num_stages: Triton's options of these names.
        max_registers: that a thread may take; None: as many as the compiler likes.
        shared_memory: bytes of shared memory a block uses, as the plan sums them.
        dependent: whether it may start before the launch ahead of it has ended (kernels/chain.py).
    """

    kernel: str
    grid: int
    args: tuple[Pointer | Descriptor | int | None, ...]
    constexprs: dict[str, int | bool | str] = field(hash=False)
    num_warps: int = 4
    num_stages: int = 1
    max_registers: int | None = None
    shared_memory: int = 0
    dependent: bool = False


@dataclass(frozen=True)
class Plan:
    """How a problem is computed.

    Attributes:
        strategy: ``"packed"`` (both operands rewritten as aligned 16-bit), ``"mixed"`` (one of
            them), ``"direct"`` (read as they are) or ``"zero"`` (nothing to multiply); with
            ``"+split"`` where K is shared out among programs and summed by a second kernel,
            ``"+tail"`` where that is done with some tiles only, ``"+edge"`` where wider tiles take
            the last columns, ``"+slabs"`` where parts of K are packed by themselves too, or
            ``"+classes"`` where rows along K are shared out by their alignment.
        launches: kernels in order.
        workspace_bytes: scratch memory a call takes from PyTorch's caching allocator.
        seconds: the model's estimate, the figure by which this plan was chosen.
        choice: what the launches were written from; None for ``"zero"``.
    """

    strategy: str
    launches: tuple[Launch, ...]
    workspace_bytes: int
    seconds: float
    choice: Choice | None


def chained(launches: Iterable[Launch], overlap: bool) -> tuple[Launch, ...]:
    """The launches of one call in order, those after the first dependent on the one ahead.

    Args:
        overlap: whether the card can start one before the other has ended; else all stay apart.
    """
    launches, found = tuple(launches), []
    for place, step in enumerate(launches):
        dependent = overlap and place > 0
        behind = launches[place + 1 : place + 3]
        lets_next = overlap and bool(behind) and starts_early(*behind)
        marks = {"WAITS": dependent, "LETS_NEXT": lets_next}
        found.append(replace(step, constexprs=step.constexprs | marks, dependent=dependent))
    return tuple(found)


def starts_early(step: Launch, following: Launch | None = None) -> bool:
    """Whether the kernel ahead should let a dependent launch start before it has ended itself.

    If not, the launch is only made ready meanwhile, and starts at once when that one has ended. It
    suits gemm_hopper where it stores tiles without TMA: C, or the rows that C's classes leave, or
    the partial sums of shared tiles, which reduce_tail adds. Of C it otherwise took 14 to 19 %
    longer itself in three of five cases
    (benchmarks/results/NVIDIA_H100_80GB_HBM3/chained_2026-11-27.txt), and with shared tiles
    4096x4096x2056 in bf16 took 167 us where 4096x4096x2055, which stores without TMA and did not
    start early, took 143 (matmul.json there, of commit f24832c).
    """
    if step.kernel != "gemm_hopper":
        return True
    by_tma = step.constexprs["C_BUFFERS"] > 0 and step.constexprs["CLASSES"] == 1
    return by_tma and (following is None or following.kernel != "reduce_tail")


class Workspace:
    """Hands out aligned pieces of a call's scratch memory while a plan is written.

    Args:
        buffer: another buffer to hand out pieces of.
    """

    def __init__(self, buffer: str = "workspace") -> None:
        self.buffer = buffer
        self.size = 0

    def take(self, elements: int, dtype: str) -> Pointer:
        pointer = Pointer(self.buffer, dtype, self.size, elements)
        self.size += round_up(elements * ITEMSIZE[dtype], 256)
        return pointer
