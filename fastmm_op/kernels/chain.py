"""Kernels of one call that follow each other closely: programmatic dependent launch (sm_90).

A kernel that is launched as a dependent may start while the one ahead of it still runs: as soon as
every program of that one has begun, said so (``let_next_start``), and left room. It may then read
what was there before the call, and must wait (``wait_for_previous``) before it touches what the
call's own kernels write. Every program of a dependent waits, so it never ends before those ahead of
it, and what follows the last one is behind them all.

Behind a kernel that says nothing a dependent starts when that one has ended, but has been made
ready before.
"""

import triton
import triton.language as tl

from fastmm_op.kernels.common import INTERPRETED


@triton.jit
def let_next_start(LETS_NEXT: tl.constexpr):
    """LETS_NEXT: the next kernel of the call may start once every program has come here."""
    if LETS_NEXT and not INTERPRETED:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(WAITS: tl.constexpr):
    """WAITS: until the kernels ahead have ended, and what they wrote can be read."""
    if WAITS and not INTERPRETED:
        tl.extra.cuda.gdc_wait()
