"""Timing of one function on a device: warmed up, with a cold L2, as a median and its spread."""

import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch

MIN_REPETITIONS, MAX_REPETITIONS = 10, 500
# Written in some 200 us at an H200's bandwidth: longer than any call keeps the host.
MIN_FLUSH_BYTES = 2**30


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, 20th and 80th percentile, and how many were timed."""

    us: float
    us_p20: float
    us_p80: float
    repetitions: int


def summarize(samples: list[float]) -> Timing:
    """Times in microseconds (at least one) as a Timing."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    p20, p80 = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
    return Timing(statistics.median(ordered), p20, p80, len(ordered))


class Timer:
    """Times a function on a device.

    On CUDA between two events, with more than the L2 cache overwritten before every call: operands
    come from memory, and the host's own cost hides behind that write. On a CPU by the wall clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        if self.is_cuda:
            size = max(MIN_FLUSH_BYTES, 2 * l2_bytes(device))
            self.flush = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self, fn: Callable[[], object], seconds: float = 0.2) -> Timing:
        """Time ``fn`` for about ``seconds``, a fifth of it warm-up; at least ten calls."""
        fn()
        estimate = statistics.median(self.samples(fn, 3)) / 1e6
        repetitions = int(0.8 * seconds / max(estimate, 1e-6))
        repetitions = min(max(repetitions, MIN_REPETITIONS), MAX_REPETITIONS)
        self.samples(fn, max(1, repetitions // 4))
        return summarize(self.samples(fn, repetitions))

    def samples(self, fn: Callable[[], object], repetitions: int) -> list[float]:
        """Microseconds of each of ``repetitions`` calls."""
        if not self.is_cuda:
            return [cpu_microseconds(fn) for _ in range(repetitions)]
        with torch.cuda.device(self.device):
            pairs = []
            for _ in range(repetitions):
                self.flush.zero_()
                start = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                start.record()
                fn()
                end.record()
                pairs.append((start, end))
            torch.cuda.synchronize()
            return [start.elapsed_time(end) * 1e3 for start, end in pairs]


def cpu_microseconds(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return (time.perf_counter() - start) * 1e6


def l2_bytes(device: torch.device) -> int:
    """Size of the device's L2 cache; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))


def host_microseconds(
    fn: Callable[[], object], device: torch.device, calls: int = 100, rounds: int = 5
) -> float:
    """What one call costs the host: the median over rounds of calls that nobody waits for.

    ``calls`` times the kernels of one call must stay below the 1024 launches a stream holds.
    """

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(rounds + 1):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        times.append((time.perf_counter() - start) / calls * 1e6)
    wait()
    return statistics.median(times[1:])


@contextmanager
def torch_tf32(allowed: bool):
    """torch.matmul on float32 with or without TF32, and the user's own setting back afterwards."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        older = matmul.allow_tf32
    except RuntimeError:
        # The older of the two settings refuses to be read while they differ.
        older = before != "tf32"
    matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32 = older
        matmul.fp32_precision = before
