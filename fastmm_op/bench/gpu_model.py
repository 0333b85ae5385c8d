"""A model of one kernel on one card: from its machine code and its memory traffic to seconds.

Pure functions of three frozen records; nothing here knows matrix products, Triton or torch.

A block's time is what its instructions take of the SM's pipes. Blocks that share an SM share the
pipes, but their waiting overlaps. All SMs together share the memory. Pipes that are nearly as busy
as the busiest get in its way (``combined``).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from fastmm_op.arch import occupancy

# Warp instructions an SM starts in a clock: one for each of its four partitions.
ISSUE = 4
# Bytes that an SM's shared memory moves in a clock, and one SM's port to L2.
SHARED_BYTES = 128
PORT_BYTES = 64
# The exponent of ``combined``: a pipe at half the load of the busiest costs 5 % more time, an equal
# one 28 %. With 2.85 the model meets the public time of a 4090 at a locked clock (4096^3, fp16: 895
# us); ada_on_hopper.py measures what that is worth elsewhere.
OVERLAP = 2.85
# Clocks in which a warp waits for others: a barrier, then the first values from shared memory.
BARRIER_CLOCKS = 60
# Clocks between an instruction and the next one of its warp, outside of the main loop.
DEPENDENT_CLOCKS = 2.0
# Clocks from the end of one block to the first instruction of its successor.
BLOCK_START_CLOCKS = 400


@dataclass(frozen=True)
class Machine:
    """A card, as far as the model knows it. Bytes and seconds; rates of all SMs together.

    Attributes:
        name: as the driver calls it.
        sms: multiprocessors.
        clock: of the SMs, Hz, under such a load.
        mma_flops: FLOP a clock and SM of mma.sync, by operand: ``"16-bit"`` (fp32 accumulators) and
            ``"tf32"``.
        shared_memory_per_sm, threads_per_sm: what resident blocks share.
        l2_bytes: capacity for reused data.
        l2_rate: L2 to SMs.
        l2_seconds: latency of a hit.
        dram_rate: a large copy, read plus written.
        dram_seconds: latency of a miss.
        launch_seconds: what each kernel in a row adds to its own work.
    """

    name: str
    sms: int
    clock: float
    mma_flops: Mapping[str, float]
    shared_memory_per_sm: int
    threads_per_sm: int
    l2_bytes: float
    l2_rate: float
    l2_seconds: float
    dram_rate: float
    dram_seconds: float
    launch_seconds: float


# Clock, SMs, L2, memory and tensor rates: NVIDIA's Ada whitepaper (165.2 and 82.6 TFLOP/s at
# 2520 MHz, 1008 GB/s, 72 MB). The rest: public microbenchmarks of the L40, the same chip with 142
# SMs: 5.2 TB/s from L2 at 2490 MHz (here by SMs), latencies of 274 and 625 clocks, copies at 92 %
# of the memory's rate, L2 useful to 95 % of its size.
RTX_4090 = Machine(
    name="NVIDIA GeForce RTX 4090",
    sms=128,
    clock=2.52e9,
    mma_flops={"16-bit": 165.2e12 / 128 / 2.52e9, "tf32": 82.6e12 / 128 / 2.52e9},
    shared_memory_per_sm=102400,
    threads_per_sm=1536,
    l2_bytes=0.95 * 72 * 2**20,
    l2_rate=4.75e12,
    l2_seconds=110e-9,
    dram_rate=0.92 * 1008e9,
    dram_seconds=251e-9,
    launch_seconds=3e-6,
)
# Copies as measured here (benchmarks/results/NVIDIA_H200); latencies, L2 rate and useful size from
# public microbenchmarks of the H200 and GH200. mma.sync reaches some 62 % of wgmma's 4096 FLOP a
# clock and SM. A launch costs what its smallest kernels show (ada_on_hopper.md).
H200 = Machine(
    name="NVIDIA H200",
    sms=132,
    clock=1.755e9,
    mma_flops={"16-bit": 0.62 * 4096, "tf32": 0.62 * 2048},
    shared_memory_per_sm=233472,
    threads_per_sm=2048,
    l2_bytes=0.8 * 50 * 2**20,
    l2_rate=9.7e12,
    l2_seconds=141e-9,
    dram_rate=4.21e12,
    dram_seconds=348e-9,
    launch_seconds=4e-6,
)
# The same chip beside slower memory; copies as in NVIDIA_H100_80GB_HBM3/matmul_fp32.json.
H100 = replace(H200, name="NVIDIA H100 80GB HBM3", dram_rate=3.0e12)
MACHINES = {machine.name: machine for machine in (RTX_4090, H200, H100)}


def bounds(machine: Machine) -> tuple[Machine, Machine]:
    """The same card as bad and as good as it may turn out: (slow, fast).

    Clock: power and temperature decide; public 4090 runs of fp16 products at 172 TFLOP/s need
    2.63 GHz. The others: how far public measurements of each lie apart.
    """
    slow = replace(
        machine,
        clock=0.96 * machine.clock,
        l2_rate=0.85 * machine.l2_rate,
        dram_rate=0.94 * machine.dram_rate,
        dram_seconds=1.3 * machine.dram_seconds,
        l2_seconds=1.3 * machine.l2_seconds,
        launch_seconds=1.7 * machine.launch_seconds,
    )
    fast = replace(
        machine,
        clock=1.08 * machine.clock,
        l2_rate=1.15 * machine.l2_rate,
        dram_rate=1.05 * machine.dram_rate,
        launch_seconds=0.6 * machine.launch_seconds,
    )
    return slow, fast


@dataclass(frozen=True)
class Kernel:
    """What the compiler made.

    Attributes:
        num_warps: of a block.
        registers: a thread.
        shared_memory: bytes a block.
        loop: instructions of one trip through the main loop, of one warp: name -> count.
        rest: those outside of it, of one warp, each executed once.
        prefetch: trips by which loads of the main loop run ahead; 0: they are waited for.
    """

    num_warps: int
    registers: int
    shared_memory: int
    loop: Mapping[str, int]
    rest: Mapping[str, int]
    prefetch: float = 0.0


@dataclass(frozen=True)
class Work:
    """What a launch does.

    Attributes:
        blocks: of the grid.
        trips: through the main loop, of one block.
        dram_read, dram_written: bytes, after what L2 catches.
        l2_bytes: what the SMs exchange with L2, where it is known; else every load and store that
            stands in the code counts, masked or in a branch that is not taken.
    """

    blocks: int
    trips: float
    dram_read: float
    dram_written: float
    l2_bytes: float | None = None


@dataclass(frozen=True)
class Prediction:
    """Seconds of one launch, and why.

    Attributes:
        seconds: launch included.
        bound_by: the busiest pipe, ``"latency"``, ``"dram"`` or ``"launch"``.
        blocks_per_sm: resident at once.
        waves: rounds of blocks.
        pipes: seconds for which each pipe alone would be busy.
    """

    seconds: float
    bound_by: str
    blocks_per_sm: int
    waves: int
    pipes: Mapping[str, float] = field(default_factory=dict)


def combined(loads: Iterable[float]) -> float:
    """Time of pipes that work side by side: the busiest one's, and some for being disturbed."""
    loads = list(loads)
    largest = max(loads, default=0.0)
    if largest == 0.0:
        return 0.0
    return largest * sum((load / largest) ** OVERLAP for load in loads) ** (1 / OVERLAP)


def width(name: str) -> int:
    """Bytes that an instruction on memory moves for one thread."""
    if size := re.search(r"\.(64|128)(?:\.|$)", name):
        return int(size.group(1)) // 8
    if re.search(r"\.[US]16(?:\.|$)", name):
        return 2
    return 1 if re.search(r"\.[US]8(?:\.|$)", name) else 4


def mma_flops(name: str) -> int:
    """FLOP of one matrix instruction of a warp: ``HMMA.16816`` is 16 x 8 x 16."""
    shape = re.match(r"HMMA\.(16)(8)(4|8|16)\b", name)
    if shape is None:
        raise ValueError(f"no model of matrix instructions like {name}, only of HMMA.168*")
    m, n, k = (int(size) for size in shape.groups())
    return 2 * m * n * k


def global_bytes(code: Mapping[str, int], num_warps: int) -> int:
    """Bytes that a block exchanges with L2 in one pass through some code."""
    kinds = ("LDG", "LDGSTS", "STG")
    return sum(
        n * 32 * num_warps * width(name) for name, n in code.items() if name.split(".")[0] in kinds
    )


def pipes(machine: Machine, code: Mapping[str, int], num_warps: int, sms: int) -> dict[str, float]:
    """Clocks for which one block's pass through some code keeps each pipe of an SM busy.

    Args:
        code: instructions of one warp.
        num_warps: of the block.
        sms: how many share L2.
    """
    clocks = dict.fromkeys(("tensor", "issue", "shared", "load/store", "l2"), 0.0)
    for name, n in code.items():
        n *= num_warps
        kind = name.split(".")[0]
        clocks["issue"] += n / ISSUE
        if kind in ("HMMA", "HGMMA"):
            rate = machine.mma_flops["tf32" if ".TF32" in name else "16-bit"]
            clocks["tensor"] += n * mma_flops(name) / rate
        if kind in ("LDS", "STS", "LDGSTS"):
            clocks["shared"] += n * max(1.0, 32 * width(name) / SHARED_BYTES)
        if kind == "LDSM":
            matrices = int(name[-1]) if name[-1] in "24" else 1
            clocks["shared"] += n * matrices
        if kind == "SHFL":
            clocks["shared"] += n
        if kind in ("LDG", "STG", "LDGSTS"):
            clocks["load/store"] += n * max(1.0, 32 * width(name) / SHARED_BYTES)
    share = min(PORT_BYTES, machine.l2_rate / machine.clock / sms)
    clocks["l2"] = global_bytes(code, num_warps) / share
    return clocks


def waiting(code: Mapping[str, int]) -> float:
    """Clocks that a block spends at barriers in one pass through some code."""
    return BARRIER_CLOCKS * sum(n for name, n in code.items() if name.startswith("BAR"))


def loop_latency(machine: Machine, kernel: Kernel, busy: float, miss: float) -> float:
    """Clocks of one trip of a block that has an SM to itself.

    Args:
        busy: clocks for which its pipes are busy.
        miss: the fraction of loads that go to DRAM.
    """
    own = busy + waiting(kernel.loop)
    loads = any(name.startswith("LDG") for name in kernel.loop)
    memory = memory_clocks(machine, miss) if loads else 0.0
    if kernel.prefetch:
        return max(own, memory / kernel.prefetch)
    return own + memory


def memory_clocks(machine: Machine, miss: float) -> float:
    seconds = machine.l2_seconds + miss * (machine.dram_seconds - machine.l2_seconds)
    return seconds * machine.clock


def rest_latency(machine: Machine, kernel: Kernel, busy: float, miss: float) -> float:
    """Clocks of what a block does before and after its main loop, the first loads included."""
    issued = DEPENDENT_CLOCKS * sum(kernel.rest.values())
    own = max(busy, issued) + waiting(kernel.rest)
    return BLOCK_START_CLOCKS + own + memory_clocks(machine, miss)


def blocks_per_sm(machine: Machine, kernel: Kernel) -> int:
    """Blocks that an SM holds at once.

    Raises:
        ValueError: not even one fits.
    """
    fit = occupancy(
        kernel.registers,
        kernel.num_warps,
        kernel.shared_memory,
        machine.shared_memory_per_sm,
        machine.threads_per_sm,
    )
    if fit == 0:
        raise ValueError(
            f"a block of {kernel.num_warps} warps with {kernel.registers} registers a thread and "
            f"{kernel.shared_memory} bytes of shared memory does not fit {machine.name}"
        )
    return fit


def predict(machine: Machine, kernel: Kernel, work: Work) -> Prediction:
    """Seconds of one launch on an otherwise idle card."""
    resident = blocks_per_sm(machine, kernel)
    sms = min(machine.sms, work.blocks)
    loop = pipes(machine, kernel.loop, kernel.num_warps, sms)
    rest = pipes(machine, kernel.rest, kernel.num_warps, sms)
    requested = work.blocks * (
        work.trips * global_bytes(kernel.loop, kernel.num_warps)
        + global_bytes(kernel.rest, kernel.num_warps)
    )
    if work.l2_bytes is not None:
        known = work.l2_bytes / requested
        loop["l2"], rest["l2"] = loop["l2"] * known, rest["l2"] * known
        requested = work.l2_bytes
    miss = min(1.0, work.dram_read / requested) if requested else 0.0
    loop_busy, rest_busy = combined(loop.values()), combined(rest.values())
    throughput = work.trips * loop_busy + rest_busy
    latency = work.trips * loop_latency(machine, kernel, loop_busy, miss)
    latency += rest_latency(machine, kernel, rest_busy, miss)

    full, left = divmod(work.blocks, resident * machine.sms)
    last = -(-left // machine.sms)
    clocks = full * max(resident * throughput, latency)
    clocks += max(last * throughput, latency) if left else 0.0
    dram = (work.dram_read + work.dram_written) / machine.dram_rate
    seconds = machine.launch_seconds + combined((clocks / machine.clock, dram))

    a_block = {name: work.trips * loop[name] + rest[name] for name in loop}
    rounds = full * resident + last  # one after the other on the busiest SM
    busy = {name: rounds * t / machine.clock for name, t in a_block.items()}
    busy["dram"] = dram
    reasons = busy | {"launch": machine.launch_seconds}
    if clocks > 1.05 * rounds * throughput:
        reasons["latency"] = clocks / machine.clock
    bound_by = max(reasons, key=reasons.get)
    return Prediction(seconds, bound_by, resident, full + bool(left), busy)
