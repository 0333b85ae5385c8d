"""Predict the suite on an RTX 4090, from the machine code that its plans compile to. Needs no GPU.

    python benchmarks/model_4090.py [--filter TEXT] [--choices] [--out DIR]

Writes ``model.json`` and ``model.md``. ``--choices`` writes nothing: it prints what the model says
of every way to compute the cases, beside the planner's estimate. The model is
fastmm_op/bench/gpu_model.py; benchmarks/ada_on_hopper.py holds it against a card.
"""

import argparse
import shlex
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.progress import track

from fastmm_op import machine
from fastmm_op.arch import ARCHES
from fastmm_op.bench import environment
from fastmm_op.bench.cases import Case, load_cases
from fastmm_op.bench.gpu_model import RTX_4090
from fastmm_op.bench.predict import Forecast, forecast
from fastmm_op.bench.predict_seed_style import forecast_seed_style
from fastmm_op.bench.session import write
from fastmm_op.choices import choices
from fastmm_op.estimate import estimate
from fastmm_op.plan import make_plan, write_plan
from fastmm_op.problem import PRECISIONS

OUT = Path(__file__).with_name("results") / "RTX_4090_prediction"
ARCH = ARCHES["sm_89"]
# NVIDIA's figures for the card, FLOP/s and bytes/s: the rooflines.
PEAKS = {"tf32": 82.6e12, "fp16": 165.2e12}
MEMORY = 1008e9
# What others measured on 4090s with cuBLAS, TFLOP/s, lowest and highest; fp16 with fp32 sums.
PUBLIC = {
    "fp32, IEEE": (46, 56),
    "TF32": (69, 87),
    "fp16": (154, 172),
    "bf16, odd sizes": (107, 116),
}
# The seed's counter, as it was reported: SM throughput as a share of the peak.
SEED_SM_THROUGHPUT = 0.3407
# fp16 4096^3 at a clock locked to the 2520 MHz that this model assumes.
PUBLIC_LOCKED = {"squares/4096x4096x4096-NN-fp16": 895.0}


def rooflines(case: Case) -> dict[str, float]:
    """Microseconds that no kernel of a precision can undercut: arithmetic, or memory traffic."""
    memory = case.bytes / MEMORY
    return {name: 1e6 * max(case.flops / peak, memory) for name, peak in PEAKS.items()}


def row(case: Case) -> dict:
    """A case's prediction, ready for JSON; times in microseconds."""
    problem = case.problem(ARCH)
    plan = make_plan(problem)
    found = forecast(problem, plan, RTX_4090)
    return {
        "case": case.name,
        "group": case.group,
        "strategy": plan.strategy,
        "us": round(1e6 * found.seconds, 2),
        "us_fastest": round(1e6 * found.fastest, 2),
        "us_slowest": round(1e6 * found.slowest, 2),
        "us_warm_l2": round(1e6 * forecast(problem, plan, RTX_4090, flushed=False).seconds, 2),
        "tflops": round(case.flops / found.seconds / 1e12, 2),
        "roofline_us": {name: round(us, 2) for name, us in rooflines(case).items()},
        "planner_us": round(1e6 * plan.seconds, 2),
        "kernels": kernel_rows(found),
    }


def kernel_rows(found: Forecast) -> list[dict]:
    return [
        {
            "kernel": step.launch.kernel,
            "us": round(1e6 * prediction.seconds, 2),
            "bound_by": prediction.bound_by,
            "blocks": work.blocks,
            "blocks_per_sm": prediction.blocks_per_sm,
            "waves": prediction.waves,
            "trips": round(work.trips, 2),
            "registers": step.found.registers,
            "spills": step.found.spills,
            "shared_memory": step.found.shared_memory,
            "dram_read_mb": round(work.dram_read / 1e6, 2),
            "dram_written_mb": round(work.dram_written / 1e6, 2),
            "pipes_us": {name: round(1e6 * s, 2) for name, s in prediction.pipes.items()},
        }
        for step, work, prediction in found.kernels
    ]


def describe(argv: list[str]) -> dict:
    versions = machine.versions()
    return {
        "prediction": "nothing here was measured",
        "machine": asdict(RTX_4090),
        "command": shlex.join(["python", "benchmarks/model_4090.py", *argv]),
        "commit": environment.commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "torch": versions["torch"],
        "triton": versions["triton"],
    }


HEADINGS = ("case", "plan", "predicted us", "range", "TFLOP/s", "TF32 roofline", "fp16 roofline")


def case_line(entry: dict) -> str:
    cells = [
        entry["case"].split("/", 1)[-1],
        entry["strategy"],
        f"{entry['us']:.1f}",
        f"{entry['us_fastest']:.0f} - {entry['us_slowest']:.0f}",
        f"{entry['tflops']:.1f}",
        *(f"{entry['roofline_us'][name]:.1f}" for name in PEAKS),
    ]
    return "| " + " | ".join(cells) + " |"


def kernel_lines(entry: dict) -> list[str]:
    """The launches of one case, and how long each pipe would be busy."""
    pipes = list(entry["kernels"][0]["pipes_us"])
    lines = [
        "| kernel | us | bound by | blocks an SM | waves | MB read | MB written | "
        + " | ".join(pipes)
        + " |",
        "|---|---:|---|" + "---:|" * (4 + len(pipes)),
    ]
    for k in entry["kernels"]:
        cells = [k["kernel"], f"{k['us']:.1f}", k["bound_by"], str(k["blocks_per_sm"])]
        cells += [str(k["waves"]), f"{k['dram_read_mb']:.0f}", f"{k['dram_written_mb']:.0f}"]
        cells += [f"{k['pipes_us'][name]:.0f}" for name in pipes]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def public_lines(rows: list[dict]) -> list[str]:
    """The direct fp16 squares, operands in L2 as far as they fit, beside others' cuBLAS runs."""
    low, high = PUBLIC["fp16"]
    lines = ["| case | predicted TFLOP/s | range | public | |", "|---|---:|---:|---:|---|"]
    for entry in rows:
        name = entry["case"]
        if entry["group"] != "squares" or not name.endswith("-fp16") or entry["tflops"] < 100:
            continue
        flops = entry["tflops"] * entry["us"]
        predicted = flops / entry["us_warm_l2"]
        worst, best = flops / entry["us_slowest"], flops / entry["us_fastest"]
        verdict = "range overlaps" if worst <= high and best >= low else "DISAGREES"
        if low <= predicted <= high:
            verdict = "inside"
        if name in PUBLIC_LOCKED:
            locked = f"{PUBLIC_LOCKED[name]:.0f} us public, {entry['us_warm_l2']:.0f} us predicted"
            verdict += f"; at a locked 2520 MHz {locked}"
        lines.append(
            f"| {name.split('/')[1]} | {predicted:.1f} | {worst:.0f} - {best:.0f} | "
            f"{low} - {high} | {verdict} |"
        )
    return lines


def seed_style_row(case: Case) -> dict:
    found = forecast_seed_style(case.problem(ARCH), RTX_4090)
    times = {"us": found.seconds, "us_fastest": found.fastest, "us_slowest": found.slowest}
    return {name: round(1e6 * seconds, 2) for name, seconds in times.items()}


def seed_style_lines(seed: dict, style: dict) -> list[str]:
    reported = seed["roofline_us"]["tf32"] / SEED_SM_THROUGHPUT
    return [
        "A kernel like the seed's (`fastmm_op/bench/seed_style.py`) by the same model: "
        f"{style['us'] / 1e3:.2f} ms ({style['us_fastest'] / 1e3:.2f} - "
        f"{style['us_slowest'] / 1e3:.2f}), {style['us'] / seed['us']:.1f} times as long. It takes "
        "longer than that: the model knows no bank conflicts, and that a block with one buffer "
        "waits for each of its copies it knows only in part. The seed itself was reported with "
        f"{100 * SEED_SM_THROUGHPUT:.2f} % of the SMs' peak throughput; if its tensor cores were "
        f"the busiest part, it took {reported / 1e3:.1f} ms, {reported / seed['us']:.1f} times as "
        "long.",
    ]


def markdown(results: dict) -> str:
    env, rows = results["env"], results["rows"]
    machine_lines = [f"- {name}: {value}" for name, value in env["machine"].items()]
    lines = [
        "# Prediction for the RTX 4090",
        "",
        "**A prediction: nothing on this page was measured.** Each plan's kernels were compiled "
        "for sm_89, and their machine code and memory traffic put through the model of "
        "`fastmm_op/bench/gpu_model.py`.",
        "",
        f"`{env['command']}`, {env['date']}, commit `{env['commit'][:12]}`, torch {env['torch']}, "
        f"Triton {env['triton']}.",
        "",
        "Times are microseconds of one call whose operands come from memory and whose L2 was full "
        "of dirty lines, as the benchmark times. The range is the same card with its clock, "
        "caches, memory and launches as good and as bad as public measurements lie apart. A "
        "roofline is the larger of FLOPs over NVIDIA's rate (82.6 TF32, 165.2 fp16 TFLOP/s) and "
        "bytes over 1008 GB/s.",
        "",
    ]
    if "seed_style" in results:
        seed = rows[0]
        lines += [
            "## The seed workload",
            "",
            f"`{seed['case']}`: **{seed['us'] / 1e3:.2f} ms predicted** "
            f"({seed['us_fastest'] / 1e3:.2f} - {seed['us_slowest'] / 1e3:.2f}); "
            f"{seed['us_warm_l2'] / 1e3:.2f} ms if no other data has to leave L2 first.",
            "",
            "Microseconds, then those for which each part alone would be busy:",
            "",
            *kernel_lines(seed),
            "",
            *seed_style_lines(seed, results["seed_style"]),
            "",
        ]
    lines += [
        "## Beside public figures",
        "",
        "cuBLAS on 4090s, TFLOP/s, as others measured: "
        + ", ".join(f"{name} {low}-{high}" for name, (low, high) in PUBLIC.items())
        + ". Here: this project's own kernels on aligned fp16 squares, which read their operands "
        "as they are; calls back to back.",
        "",
        *public_lines(rows),
        "",
        "## The suite",
        "",
    ]
    for group in dict.fromkeys(r["group"] for r in rows):
        lines += [f"### {group}", "", "| " + " | ".join(HEADINGS) + " |"]
        lines += ["|---|---|" + "---:|" * (len(HEADINGS) - 2)]
        lines += [case_line(r) for r in rows if r["group"] == group]
        lines.append("")
    lines += ["## The card, as assumed", "", *machine_lines, ""]
    return "\n".join(lines)


def print_choices(cases: list[Case], console: Console) -> None:
    """Every way to compute each case: the model's time beside the planner's, best first."""
    for case in cases:
        problem = case.problem(ARCH)
        found = []
        for choice in track(list(choices(problem)), description=case.name, transient=True):
            predicted = forecast(problem, write_plan(problem, choice), RTX_4090).seconds
            found.append((predicted, estimate(problem, choice), choice))
        console.print(case.name, style="bold", highlight=False)
        for predicted, planned, choice in sorted(found, key=lambda entry: entry[0])[:12]:
            tile = choice.tile
            packed = "".join(n for n, p in (("a", choice.pack_a), ("b", choice.pack_b)) if p)
            console.print(
                f"  {1e6 * predicted:9.1f} us, planner {1e6 * planned:9.1f}: {tile.kernel} "
                f"{tile.block_m}x{tile.block_n}x{tile.block_k} {tile.num_warps} warps "
                f"{tile.num_stages} stages, packed {packed or '-'}, split {choice.split}",
                highlight=False,
                soft_wrap=True,
            )


def main(argv: list[str] | None = None) -> int:
    """Predict, write or print; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--precision", choices=PRECISIONS, default="tf32", help="of fp32 cases")
    parser.add_argument(
        "--choices", action="store_true", help="print all ways, not only the plan's"
    )
    parser.add_argument("--out", type=Path, default=OUT, help=f"default {OUT.name}")
    options = parser.parse_args(argv)
    cases = [
        case for case in load_cases(precision=options.precision) if options.filter in case.name
    ]
    if not cases:
        parser.error(f"argument --filter: no case contains {options.filter!r}")
    console = Console(stderr=True)
    try:
        if options.choices:
            print_choices(cases, Console())
            return 0
        rows = [row(case) for case in track(cases, description="predicting", console=console)]
        results = {"env": describe(argv), "rows": rows}
        if cases[0].group == "seed" and cases[0].dtype == "fp32":
            results["seed_style"] = seed_style_row(cases[0])
    except RuntimeError as error:  # a process that interprets kernels compiles none
        print(f"model_4090: {error}", file=sys.stderr)
        return 1
    write(results, options.out / "model.json")
    (options.out / "model.md").write_text(markdown(results))
    for entry in rows:
        print(f"{entry['case']:48s} {entry['us']:9.1f} us {entry['tflops']:7.1f} TFLOP/s")
    print(f"predictions for {RTX_4090.name}, none of them measured -> {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
