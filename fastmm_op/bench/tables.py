"""Rows of a results file as Markdown: for README, and for a report to attach to an issue."""

from fastmm_op.bench import summary

PEER_COLUMNS = ("torch", "torch-fp32", "inductor", "seed-style")


def cell(value: float | None, form: str, suffix: str = "") -> str:
    return "-" if value is None else format(value, form) + suffix


def compared(value: float | None) -> str:
    """A ratio; in bold where we lose."""
    text = cell(value, ".2f")
    return f"**{text}**" if value is not None and value < 1 else text


def table(rows: list[dict]) -> list[str]:
    """Markdown lines, one a row; times in microseconds."""
    names = [n for n in PEER_COLUMNS if any(n in row["peers"] for row in rows)]
    headings = ["case", "plan", "fastmm", *names, "x torch", "x best peer", "of limit", "error"]
    predicted = any("predicted_us" in row for row in rows)
    headings += ["predicted", "measured / predicted"] if predicted else []
    lines = ["| " + " | ".join(headings) + " |", "|---|---|" + "---:|" * (len(headings) - 2)]
    for row in rows:
        share = row["limit_fraction"]
        ours = "failed" if "failed" in row else cell(row["us"], ".1f")
        cells = [summary.label(row).split("/", 1)[-1], row["strategy"] or "ATen", ours]
        for name in names:
            failed = "failed" in row["peers"].get(name, {})
            cells.append("failed" if failed else cell(summary.peer_us(row, name), ".1f"))
        cells += [compared(summary.ratio(row, name)) for name in ("torch", "best")]
        cells += [cell(share and 100 * share, ".0f", " %"), cell(row["error"], ".1e")]
        if predicted:
            cells += prediction_cells(row)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def prediction_cells(row: dict) -> list[str]:
    """The model's time and its range, and what was measured over it."""
    predicted = row.get("predicted_us")
    if predicted is None:
        return ["-", "-"]
    fastest, slowest = row["predicted_us_range"]
    ratio = row["us"] and row["us"] / predicted
    return [f"{predicted:.1f} ({fastest:.0f} - {slowest:.0f})", cell(ratio, ".2f")]


def means_table(rows: list[dict]) -> list[str]:
    lines = ["| computed in | cases | x torch | x best peer |", "|---|---:|---:|---:|"]
    for precision, entry in summary.means(rows).items():
        ratios = " | ".join(cell(entry[name], ".2f") for name in ("torch", "best"))
        lines.append(f"| {precision} | {entry['cases']} | {ratios} |")
    return lines


def host_line(env: dict) -> str:
    parts = [
        f"{kind} {cost['dtype']} {'x'.join(map(str, cost['shape']))} ({cost['strategy']}): "
        f"{cost['fastmm']:.1f} (torch.mm {cost['torch']:.1f})"
        for kind, cost in env["host_us"].items()
    ]
    return "Host cost of one eager call, microseconds: " + "; ".join(parts) + "."


def issue_report(results: dict, version: str) -> str:
    """A run as a short report: the machine, its ceilings, every row, what failed.

    Args:
        results: a results file's content.
        version: of fastmm_op.
    """
    env, rows = results["env"], results["rows"]
    rates = env["matmul_ceiling_flops"]
    lines = [
        f"# fastmm_op {version} on {env['gpu']}",
        "",
        f"- driver {env['driver']}, torch {env['torch']}, Triton {env['triton']}, Python "
        f"{env['python']}, {env['host_cpus']} host CPUs",
        f"- commit `{env['commit'][:12]}`, {env['date']}, `{env['command']}`",
        f"- SM clock up to {env['max_sm_clock_mhz']} MHz, L2 {env['l2_bytes'] / 2**20:.0f} MiB",
        f"- measured: copies at {env['copy_bandwidth_bytes_per_s'] / 1e12:.2f} TB/s; torch.mm at "
        f"{rates['fp16'] / 1e12:.0f} fp16, {rates['bf16'] / 1e12:.0f} bf16, "
        f"{rates['fp32'] / 1e12:.0f} fp32 TFLOP/s",
        f"- {host_line(env)}",
        "",
        "Medians in microseconds, L2 overwritten before each call; every result was checked "
        "against float64 before it was timed. A predicted time is this project's model of the "
        "card, with its range.",
        "",
        *means_table(rows),
    ]
    for group in dict.fromkeys(row["group"] for row in rows):
        lines += ["", f"## {group}", "", *table([row for row in rows if row["group"] == group])]
    failed = summary.failures(rows)
    lines += ["", "## Failed", "", *(f"- {entry}" for entry in failed)] if failed else []
    if results.get("missing"):
        lines += ["", f"Not run: {len(results['missing'])} cases ({results.get('stopped')})."]
    return "\n".join(lines) + "\n"
