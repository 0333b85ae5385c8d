"""What this machine has: versions, cards, driver. Looks only when asked."""

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from fastmm_op.card import card_of
from fastmm_op.planned import planned_arch


def versions() -> dict[str, str | None]:
    """Versions of what matters here; None for what is not installed."""
    import fastmm_op

    return {
        "fastmm_op": fastmm_op.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "cuda": torch.version.cuda,
        "driver": nvidia_smi("driver_version"),
    }


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def nvidia_smi(field: str) -> str | None:
    """One field of ``nvidia-smi --query-gpu`` for the first card; None if it cannot be had."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def gpus() -> list[dict[str, object]]:
    """One entry a CUDA device: name, capability, SMs, memory, and the plans it gets (or None)."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        card = card_of(index)
        arch = planned_arch(card)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": "{}.{}".format(*card.capability),
                "sms": card.sms,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "plans": arch.name if arch else None,
            }
        )
    return found
