"""The clock of a GPU's SMs under a load, by their own counters.

The driver answers when the load is over, and names the clock of an idle card.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

# Of waiting: the timer that the clock is held against ticks once in a microsecond on some cards.
WAIT_NS = 200_000
# Calls of the load before the measurement, and behind it, so that the card sees no pause.
WARM_UP_CALLS, CALLS_AFTER = 200, 5


@triton.jit
def cycles():
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def nanoseconds():
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def clock_kernel(out_ptr, wait_ns):
    """(cycles, nanoseconds) that passed while one warp waited for wait_ns."""
    first_ns = nanoseconds()
    first = cycles()
    now = first_ns
    while now - first_ns < wait_ns:
        now = nanoseconds()
    tl.store(out_ptr, cycles() - first)
    tl.store(out_ptr + 1, now - first_ns)


def sm_clock(device: torch.device, work: Callable[[], object]) -> float:
    """Hz of the SMs right after a while of ``work``, before the clock has had time to rise."""
    out = torch.zeros(2, dtype=torch.int64, device=device)
    clock_kernel[(1,)](out, WAIT_NS, num_warps=1)  # compiled before it matters
    for _ in range(WARM_UP_CALLS):
        work()
    clock_kernel[(1,)](out, WAIT_NS, num_warps=1)
    for _ in range(CALLS_AFTER):
        work()
    passed, waited = out.tolist()
    return 1e9 * passed / waited
