"""``doctor``: what this machine has, what will run on it, and whether its results are right."""

import json
import os
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fastmm_op import cache, compat, machine, matmul, ops
from fastmm_op.arch import Arch
from fastmm_op.oracle import Oracle

# Odd on every side, and quick to compile and to interpret.
TEST_SHAPE = (33, 65, 17)


def engine(device: str, plans: str | None = None) -> str:
    """What ``fastmm_op.matmul`` runs on a device, in words.

    Args:
        device: ``"cpu"`` or ``"cuda:<index>"``.
        plans: the architecture whose plans a CUDA device gets, or None.
    """
    if device == "cpu":
        return "Triton kernels, interpreted" if ops.INTERPRETED else "ATen"
    if not ops.HAVE_TRITON:
        return "ATen (Triton is not installed)"
    if ops.INTERPRETED:
        return "Triton kernels, interpreted (TRITON_INTERPRET is set)"
    if plans is None:
        return "ATen (compute capability below 8.0)"
    return f"compiled Triton kernels, planned as {plans}"


def self_test(device: str) -> dict[str, object]:
    """Run one small product and judge it against float64; every kind of failure becomes a text."""
    M, K, N = TEST_SHAPE
    try:
        a, b = torch.randn(M, K, device=device), torch.randn(K, N, device=device)
        oracle = Oracle(a, b)
        verdict = oracle.check(matmul(a, b), oracle.allowed("tf32"))
    except Exception as error:  # the point is to report whatever is broken here
        return {"error": None, "failure": f"{type(error).__name__}: {error}"}
    return {"error": verdict.error, "failure": verdict.failure}


def cache_folder() -> dict[str, object]:
    """Where Triton keeps compiled kernels, and whether this user may write there."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    existing = next((p for p in (folder, *folder.parents) if p.exists()), folder)
    return {"path": str(folder), "writable": os.access(existing, os.W_OK)}


def cards() -> dict[str, Arch]:
    """The cards on which this process runs kernels, each with the entry by which it plans."""
    if not ops.HAVE_TRITON:
        return {}
    from fastmm_op import launch

    indices = [-1] if ops.INTERPRETED else range(torch.cuda.device_count())
    found = {launch.card_name(index): launch.device_arch(index) for index in indices}
    return {name: arch for name, arch in found.items() if arch is not None}


def examine() -> dict[str, object]:
    """Everything ``doctor`` says, ready for JSON."""
    devices: list[dict[str, object]] = machine.gpus()
    devices.append({"device": "cpu", "name": "CPU", "plans": None})
    for entry in devices:
        entry["runs"] = engine(entry["device"], entry["plans"])
        entry["self_test"] = self_test(entry["device"])
    short_path = compat.HAVE_SHORT_PATH and ops.HAVE_TRITON
    return {
        "versions": machine.versions(),
        "devices": devices,
        "short_eager_path": short_path,
        "kernel_cache": cache_folder(),
        "tuned": cache.survey(cards()),
        "usable": all(entry["self_test"]["failure"] is None for entry in devices),
    }


def tuned_text(tuned: dict[str, object]) -> str:
    """The cache of tuned choices in one line."""
    if tuned["path"] is None:
        return "tuned choices: no folder for them: install platformdirs, or set FASTMM_CACHE_DIR"
    parts = [f"{tuned['valid']} of this machine"]
    if tuned["broken"]:
        parts.append(f"{tuned['broken']} BROKEN")
    if tuned["other"]:
        parts.append(f"{tuned['other']} of other cards or versions")
    if not tuned["writable"]:
        parts.append("NOT writable: set FASTMM_CACHE_DIR")
    if not tuned["enabled"]:
        parts.append("not used: FASTMM_NO_CACHE is set")
    return f"tuned choices: {tuned['path']} ({', '.join(parts)})"


def print_report(report: dict, console: Console) -> None:
    console.print(
        ", ".join(f"{name} {value or 'none'}" for name, value in report["versions"].items()),
        highlight=False,
        soft_wrap=True,
    )
    table = Table()
    for heading in ("device", "name", "capability", "SMs", "GiB", "what runs", "self-test"):
        table.add_column(heading, overflow="fold")
    for entry in report["devices"]:
        test = entry["self_test"]
        outcome = test["failure"] or f"ok, error {test['error']:.1e}"
        cells = [entry["device"], entry["name"], entry.get("capability", "-")]
        cells += [str(entry.get("sms", "-")), str(entry.get("memory_gib", "-"))]
        table.add_row(*cells, entry["runs"], outcome)
    console.print(table)
    if len(report["devices"]) == 1:
        console.print("no CUDA device: everything runs on the CPU", highlight=False)
    kernels = report["kernel_cache"]
    writable = "writable" if kernels["writable"] else "NOT writable: set TRITON_CACHE_DIR"
    lines = (
        f"short eager path: {'available' if report['short_eager_path'] else 'not available'}"
        " (calls on CUDA tensors that skip the dispatcher)",
        f"kernel cache: {kernels['path']} ({writable})",
        tuned_text(report["tuned"]),
        "usable" if report["usable"] else "NOT usable: see the self-test",
    )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def main(as_json: bool) -> int:
    """Print the report; 0 if every device gives the right result."""
    report = examine()
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        print_report(report, Console())
    return 0 if report["usable"] else 1
