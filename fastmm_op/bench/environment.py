"""Where a benchmark ran, and the ceilings of that machine, measured in the same run."""

import os
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from fastmm_op import machine, matmul, ops
from fastmm_op.arch import ARCHES, Arch
from fastmm_op.plan import make_plan
from fastmm_op.problem import problem_of
from fastmm_op.timing import Timer, host_microseconds, l2_bytes, torch_tf32

# The source tree, if the package is used from one.
ROOT = Path(__file__).resolve().parents[2]
# The shapes on which cuBLAS comes closest to the card's rate differ from card to card.
CEILING_SHAPES = ((8192, 8192, 8192), (4096, 4096, 4096), (2048, 2048, 13312))
COPY_BYTES = 2**30


def commit() -> str:
    """FASTMM_COMMIT if set (a copy without its history), else git's HEAD, else ``"unknown"``."""
    if os.environ.get("FASTMM_COMMIT"):
        return os.environ["FASTMM_COMMIT"]
    # An installed package may lie inside somebody else's repository.
    if not (ROOT / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def folder_name(name: str) -> str:
    """A device's name as a folder: ``"NVIDIA H200"`` -> ``"NVIDIA_H200"``."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_")


def device_arch(device: torch.device) -> Arch | None:
    """The entry by which the op plans on a device; None where it leaves the product to ATen."""
    if not ops.HAVE_TRITON:
        return None
    if device.type != "cuda":
        return ARCHES["sm_89"] if ops.INTERPRETED else None
    from fastmm_op import launch  # imports triton

    return launch.device_arch(device.index or 0)


def describe(device: torch.device, command: str) -> dict[str, object]:
    """The env of a results file, before anything is measured; ``command`` is what started it."""
    versions = machine.versions()
    return {
        "gpu": device_name(device),
        "driver": versions["driver"],
        "torch": versions["torch"],
        "triton": versions["triton"],
        "python": versions["python"],
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "host_cpus": os.cpu_count(),
        "max_sm_clock_mhz": machine.nvidia_smi("clocks.max.sm") if device.type == "cuda" else None,
        "l2_bytes": l2_bytes(device),
        "timing": "CUDA events, L2 overwritten before each call"
        if device.type == "cuda"
        else "wall clock on the CPU",
    }


def measure(device: torch.device, timer: Timer) -> dict[str, object]:
    """Copy bandwidth, matmul ceilings and host costs of this machine.

    Returns:
        copy_bandwidth_bytes_per_s: read plus written, of one large device-to-device copy.
        matmul_ceiling_flops: FLOP/s by precision: torch.mm's best on large aligned products.
            ``"tf32"`` has fp16's: the hardware's own rate for a 10-bit significand.
        host_us: what one eager call costs the host, ours and torch.mm's, by kind of plan.
    """
    return {
        "copy_bandwidth_bytes_per_s": copy_bandwidth(device, timer),
        "matmul_ceiling_flops": matmul_ceilings(device, timer),
        "host_us": host_costs(device),
    }


def copy_bandwidth(device: torch.device, timer: Timer) -> float:
    size = COPY_BYTES if device.type == "cuda" else 2**24
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (timer(lambda: target.copy_(source)).us * 1e-6)


def matmul_ceilings(device: torch.device, timer: Timer) -> dict[str, float]:
    shapes = CEILING_SHAPES if device.type == "cuda" else ((128, 128, 128),)
    rates = {}
    for name, dtype in (
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
        ("fp32", torch.float32),
    ):
        best = 0.0
        for M, N, K in shapes:
            a = torch.randn(M, K, dtype=dtype, device=device)
            b = torch.randn(K, N, dtype=dtype, device=device)
            with torch_tf32(False):
                us = timer(lambda a=a, b=b: torch.mm(a, b)).us
            best = max(best, 2 * M * N * K / (us * 1e-6))
        rates[name] = best
    return {**rates, "tf32": rates["fp16"], "ieee": rates["fp32"]}


def host_costs(device: torch.device) -> dict[str, dict[str, object]]:
    """Host microseconds of small calls: an aligned fp32 one, and a misaligned fp16 one."""
    costs = {}
    arch = device_arch(device)
    # A CPU waits for every call; interpreted kernels take their time.
    calls = 100 if device.type == "cuda" else 3
    for name, n, dtype in (("aligned", 256, "fp32"), ("misaligned", 1025, "fp16")):
        if device.type != "cuda":
            n = min(n, 65)
        torch_dtype = {"fp32": torch.float32, "fp16": torch.float16}[dtype]
        a = torch.randn(n, n, dtype=torch_dtype, device=device)
        b = torch.randn(n, n, dtype=torch_dtype, device=device)
        how = {"batch": 1, "dtype": dtype, "layout": "NN", "precision": "tf32"}
        plan = make_plan(problem_of(n, n, n, **how, arch=arch)) if arch else None
        costs[name] = {
            "shape": [n, n, n],
            "dtype": dtype,
            "strategy": plan.strategy if plan else None,
            "kernels": len(plan.launches) if plan else None,
            "fastmm": round(host_microseconds(lambda a=a, b=b: matmul(a, b), device, calls), 2),
            "torch": round(host_microseconds(lambda a=a, b=b: torch.mm(a, b), device, calls), 2),
        }
    return costs
