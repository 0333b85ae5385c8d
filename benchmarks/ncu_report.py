"""Nsight Compute's view of the seed-style kernel and of ours, side by side.

    python benchmarks/ncu_report.py [--shape M K N] [--out DIR]

Needs a GPU, Nsight Compute (``ncu``) and the right to read its counters. Every kernel is profiled
alone, with cold caches and at the card's own clocks, after a run that compiled it. With ``--out``
writes ``ncu.json`` and ``ncu.md``. Exit codes: 0 fine, 1 it could not be profiled, 2 bad arguments.
"""

import argparse
import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    sys.path[0] = str(ROOT)

SEED_SHAPE = (8205, 2949, 5921)
# A label, and the metric behind it. The first five are what the seed workload was reported with.
METRICS = {
    "SM throughput, % of peak": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "grid size": "launch__grid_size",
    "warps active, % of peak": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "DRAM throughput, % of peak": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2 hit rate, %": "lts__t_sector_hit_rate.pct",
    "stalled on memory, warps an issue": (
        "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"
    ),
    "warp latency, cycles an issue": "smsp__average_warp_latency_per_inst_issued.ratio",
    "duration, ns": "gpu__time_duration.sum",
}
STALLED, LATENCY = list(METRICS)[5:7]
STALL_SHARE = "stalled on memory, % of the latency"
# The seed's own report on an RTX 4090, by the same labels.
SEED_ON_4090 = dict(zip(METRICS, (34.07, 3055.0, 16.66, 28.97, 85.54), strict=False))
# The largest share of our GEMM's latency that waiting for memory may be, percent.
STALL_TARGET = 20.0


class ProfilingError(RuntimeError):
    """Nsight Compute could not do what it was asked."""


@dataclass(frozen=True)
class Profile:
    """One profiled launch: the kernel's name, and its metrics by label; None where ncu has none."""

    kernel: str
    values: dict[str, float | None]


def parse(text: str) -> list[Profile]:
    """Read what ``ncu --csv --page raw --metrics ...`` prints, its messages included.

    Raises:
        ProfilingError: with ncu's own reason, if there is no table in it.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if '"Kernel Name"' in line), None)
    if start is None:
        raise ProfilingError(reason(text))
    table = [line for line in lines[start:] if line.startswith('"')]
    # The line after the header has the units; its ID is empty.
    rows = [row for row in csv.DictReader(table) if row["ID"]]
    if not rows:
        raise ProfilingError(reason(text))
    return [Profile(row["Kernel Name"], values(row)) for row in rows]


def values(row: dict[str, str]) -> dict[str, float | None]:
    """A row's metrics by label, and the share of the latency that is waiting for memory."""
    found = {label: number(row.get(metric)) for label, metric in METRICS.items()}
    share = None
    if found[STALLED] is not None and found[LATENCY]:
        share = 100 * found[STALLED] / found[LATENCY]
    return found | {STALL_SHARE: share}


def number(text: str | None) -> float | None:
    """``"3,055"`` -> 3055.0; None for a metric that is missing or not a number."""
    try:
        value = float((text or "").replace(",", ""))
    except ValueError:
        return None
    return value if value == value else None


def reason(text: str) -> str:
    """Why ncu profiled nothing, in a sentence, from what it printed."""
    if "ERR_NVGPUCTRPERM" in text:
        return (
            "this user may not read the GPU's performance counters (ERR_NVGPUCTRPERM): run as root "
            "or load the driver with NVreg_RestrictProfilingToAdminUsers=0"
        )
    said = [line for line in text.splitlines() if line.startswith(("==ERROR==", "==WARNING=="))]
    return "ncu profiled nothing: " + (" ".join(said) or text.strip()[-300:] or "it said nothing")


def find_ncu() -> str:
    """The path of ncu: NCU if set, the search path, CUDA's usual place.

    Raises:
        ProfilingError: it is nowhere there.
    """
    candidates = [os.environ.get("NCU"), "ncu", "/usr/local/cuda/bin/ncu"]
    for candidate in candidates:
        if candidate and (path := shutil.which(candidate)):
            return path
    raise ProfilingError(
        "Nsight Compute (ncu) was found neither on the search path nor under /usr/local/cuda; "
        "NCU=/path/to/ncu names another place"
    )


def profile(ncu: str, shape: tuple[int, int, int]) -> list[Profile]:
    """Profile the workload: every kernel of a call of the seed-style kernel, then of ours.

    Raises:
        ProfilingError: with ncu's reason, or the workload's.
    """
    with tempfile.TemporaryDirectory(prefix="ncu_report_") as folder:
        log = Path(folder) / "ncu.csv"
        command = [
            *(ncu, "--csv", "--page", "raw", "--metrics", ",".join(METRICS.values())),
            *("--clock-control", "none", "--profile-from-start", "off"),
            *("--target-processes", "all", "--log-file", str(log)),
            *(sys.executable, __file__, "--workload", "--shape", *map(str, shape)),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        text = log.read_text() if log.exists() else ""
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip()[-500:]
            if "ERR_NVGPUCTRPERM" in text + said:
                raise ProfilingError(reason(text + said))
            raise ProfilingError(f"ncu ended with code {done.returncode}: {reason(text)}; {said}")
        return parse(text)


def run_workload(shape: tuple[int, int, int]) -> None:
    """What ncu looks at: each side once to compile, then once between start and stop."""
    import torch

    from fastmm_op import matmul
    from fastmm_op.bench.seed_style import seed_style_matmul

    M, K, N = shape
    a, b = torch.randn(M, K, device="cuda"), torch.randn(K, N, device="cuda")
    for side in (seed_style_matmul, matmul):
        side(a, b)
        torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for side in (seed_style_matmul, matmul):
        side(a, b)
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def gemm_of(profiles: list[Profile]) -> Profile | None:
    """Ours among the profiles: the launch that multiplies."""
    ours = [p for p in profiles if p.kernel.startswith("gem") and p.kernel != "seed_style_kernel"]
    return ours[-1] if ours else None


def table(profiles: list[Profile]) -> list[list[str]]:
    """Header and rows: a line a metric, a column a launch, the seed's own report first."""
    names = [p.kernel.removesuffix("_kernel") for p in profiles]
    rows = [["", "seed, on an RTX 4090", *names]]
    for label in [*METRICS, STALL_SHARE]:
        cells = [SEED_ON_4090.get(label), *(p.values[label] for p in profiles)]
        digits = 0 if label in ("grid size", "duration, ns") else 2
        rows.append([label, *("-" if cell is None else f"{cell:.{digits}f}" for cell in cells)])
    return rows


def verdict(profiles: list[Profile]) -> str:
    """Whether our GEMM waits for memory less than it may."""
    gemm = gemm_of(profiles)
    share = gemm and gemm.values[STALL_SHARE]
    if share is None:
        return "no stall share of our GEMM was measured"
    outcome = "below" if share < STALL_TARGET else "NOT below"
    return f"{gemm.kernel}: {share:.1f} % of the latency is memory, {outcome} {STALL_TARGET:.0f} %"


def markdown(results: dict, profiles: list[Profile]) -> str:
    env = results["env"]
    header, *rows = table(profiles)
    lines = [
        f"# Nsight Compute on {env['gpu']}",
        "",
        f"`{env['command']}`, {env['date']}, commit `{env['commit'][:12]}`, torch {env['torch']}, "
        f"Triton {env['triton']}, driver {env['driver']}.",
        "",
        "One launch each, caches cold, clocks as they are. The first column is what the seed "
        "workload was reported with.",
        "",
        "| " + " | ".join(header) + " |",
        "|---|" + "---:|" * (len(header) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        verdict(profiles),
        "",
    ]
    return "\n".join(lines)


def describe(argv: list[str]) -> dict:
    import torch

    from fastmm_op import machine
    from fastmm_op.bench import environment

    versions = machine.versions()
    return {
        "gpu": torch.cuda.get_device_name(),
        "command": shlex.join(["python", "benchmarks/ncu_report.py", *argv]),
        "commit": environment.commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **{name: versions[name] for name in ("torch", "triton", "driver")},
    }


def show(profiles: list[Profile]) -> None:
    from rich.console import Console
    from rich.table import Table

    header, *rows = table(profiles)
    shown = Table()
    for heading in header:
        shown.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        shown.add_row(*row)
    console = Console()
    console.print(shown)
    console.print(verdict(profiles), highlight=False)


def main(argv: list[str] | None = None) -> int:
    """Profile, print, write; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--shape", nargs=3, type=int, default=SEED_SHAPE, metavar=("M", "K", "N"), help="A is M x K"
    )
    parser.add_argument("--out", type=Path, help="folder for ncu.json and ncu.md")
    parser.add_argument("--workload", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if min(options.shape) < 1:
        parser.error(f"argument --shape: sizes must be at least 1, got {tuple(options.shape)}")
    import torch

    if not torch.cuda.is_available():
        print("ncu_report: needs a CUDA GPU, and torch finds none", file=sys.stderr)
        return 1
    if options.workload:
        run_workload(tuple(options.shape))
        return 0
    try:
        profiles = profile(find_ncu(), tuple(options.shape))
    except ProfilingError as error:
        print(f"ncu_report: {error}", file=sys.stderr)
        return 1
    show(profiles)
    if options.out:
        rows = [{"kernel": p.kernel, **p.values} for p in profiles]
        results = {"env": describe(argv), "seed_on_4090": SEED_ON_4090, "kernels": rows}
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "ncu.json").write_text(json.dumps(results, indent=1) + "\n")
        (options.out / "ncu.md").write_text(markdown(results, profiles))
    return 0


if __name__ == "__main__":
    sys.exit(main())
