"""What ada_on_hopper.py found, as Markdown: the tests, and the model's errors."""

import statistics

from benchmarks.ada_on_hopper_tests import TESTS

# The largest median error with which the model counts as right.
TARGET = 0.12


def error(entry: dict) -> float:
    """Of a prediction, relative to what was measured; positive if it was too slow."""
    return entry["predicted_us"] / entry["us"] - 1


def medians(rows: list[dict]) -> dict[str, float]:
    """Median absolute errors: of whole calls, and of the launches of each kernel."""
    timed = [row for row in rows if "us" in row]
    kernels = [kernel for row in timed for kernel in row["kernels"]]
    found = {"calls": statistics.median(abs(error(row)) for row in timed)} if timed else {}
    for name in dict.fromkeys(kernel["kernel"] for kernel in kernels):
        errors = [abs(error(kernel)) for kernel in kernels if kernel["kernel"] == name]
        found[name] = statistics.median(errors)
    return found


def markdown(results: dict) -> str:
    tests, export = results["tests"], results["export"]
    found = medians(results["rows"])
    verdict = "no case ran"
    if found:
        verdict = "met" if found["calls"] < TARGET else "MISSED"
    gpu = next((env["gpu"] for env in results["env"].values() if "gpu" in env), "no card")
    lines = [
        f"# The RTX 4090's kernels on {gpu}",
        "",
        *(
            f"- {part}: `{env['command']}`, {env['date']}, commit `{env['commit'][:12]}`, torch "
            f"{env['torch']}, Triton {env['triton']}"
            + (f", driver {env['driver']}." if "driver" in env else ", no card.")
            + (f" Note: {env['note']}." if "note" in env else "")
            for part, env in results["env"].items()
        ),
        "",
        "Plans for sm_89, compiled by Triton for sm_89, the same PTX assembled for sm_90. The "
        "model of `fastmm_op/bench/gpu_model.py` with this card's figures, at the clock that the "
        "SMs' own counters showed under each case.",
        "",
        f"Tests ({', '.join(TESTS)}): {said_of(tests['state'])}: {tests['summary']}",
        *(f"- {line}" for line in tests["failed"]),
        "",
        f"An exported file by KernelBench's rules: {said_of(export['state'])}"
        + "".join(f"; {fault}" for fault in export["faults"]),
        *(
            f"- {'x'.join(map(str, run['shape']))}: largest error {run['largest_error']:.2g}, "
            f"{'within' if run['close'] else '**beyond**'} 1e-4; "
            f"{'the' if run['same_bits'] else '**not the**'} package's bits"
            for run in export["runs"]
        ),
        "",
        f"Median error (target: calls below {TARGET:.0%}, {verdict}): "
        + ", ".join(f"{name} {value:.1%}" for name, value in found.items()),
        "",
    ]
    if style := results.get("seed_style"):
        lines += [
            f"A kernel like the seed's, not among them: {style['us']:.1f} us measured, "
            f"{style['predicted_us']:.1f} predicted ({error(style):+.0%}).",
            "",
        ]
    lines += [
        "| case | plan | MHz | measured us | predicted us | error | launches: both |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for row in results["rows"]:
        if "failed" in row:
            lines.append(f"| {row['case']} | {row['strategy']} | | **{row['failed']}** | | | |")
            continue
        kernels = ", ".join(
            f"{k['kernel']} {k['us']:.1f} / {k['predicted_us']:.1f}" for k in row["kernels"]
        )
        lines.append(
            f"| {row['case']} | {row['strategy']} | {row['clock_mhz']:.0f} | {row['us']:.1f} | "
            f"{row['predicted_us']:.1f} | {error(row):+.0%} | {kernels} |"
        )
    return "\n".join(lines) + "\n"


def said_of(state: str) -> str:
    return state if state in ("passed", "accepted") else f"**{state.upper()}**"
