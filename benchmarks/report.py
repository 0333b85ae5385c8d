"""Results files -> a page and a plot beside each file, and what README shows of them.

    python benchmarks/report.py [--check]

Reads benchmarks/results/*/matmul*.json (one for each precision of fp32 inputs), writes a page and a
plot of the same name next to each, and rewrites what stands between the two markers in README.md:
means, the seed workload, every losing case. ``--check`` writes nothing: exit code 1 if README.md or
a page is not in step.
"""

import argparse
import json
import re
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fastmm_op.bench import summary
from fastmm_op.bench.tables import host_line, means_table, table
from fastmm_op.problem import PRECISIONS

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
EMPTY = "No results recorded yet: `make bench` on a machine with a GPU writes them."
# The groups that README shows; all are on the page.
SHOWN_GROUPS = ("seed",)
# Losing rows are listed openly up to this many; a longer list unfolds.
SHORT_LIST = 12


def load(folder: Path) -> dict[Path, dict]:
    """All results files under a folder, by path."""
    return {path: json.loads(path.read_text()) for path in sorted(folder.glob("*/matmul*.json"))}


def heading(results: dict) -> str:
    """The card, and what fp32 inputs were computed in."""
    found = {row["precision"] for row in results["rows"]}
    precisions = [name for name in PRECISIONS if name in found]
    inputs = "".join(f', fp32 inputs in "{precision}"' for precision in precisions)
    return f"{results['env']['gpu']}{inputs}"


def provenance(env: dict) -> list[str]:
    """Versions, commit, date and command of a run."""
    return [
        f"Driver {env['driver']}, torch {env['torch']}, Triton {env['triton']}, Python "
        f"{env['python']}; commit `{env['commit'][:12]}`, {env['date'][:10]}.",
        "",
        "```",
        re.sub(r" --out \S+", "", env["command"]),  # where that machine put it says nothing
        "```",
    ]


def explanation(env: dict) -> list[str]:
    """What the columns of the tables mean on this machine."""
    rates = env["matmul_ceiling_flops"]
    return [
        "Times are medians in microseconds; every result was checked before it was timed. Error is "
        "normwise against float64. The limit is the larger of FLOPs over this card's measured rate "
        f"({rates['fp16'] / 1e12:.0f} fp16, {rates['bf16'] / 1e12:.0f} bf16, "
        f"{rates['fp32'] / 1e12:.0f} fp32 TFLOP/s; TF32 is held to the fp16 rate) and bytes over "
        f"its measured copy bandwidth ({env['copy_bandwidth_bytes_per_s'] / 1e12:.2f} TB/s).",
        host_line(env),
    ]


def means_and_losses(results: dict) -> list[str]:
    """Geometric means, every row that is slower than a peer, what failed and what is missing."""
    rows = results["rows"]
    slow = summary.losing(rows)
    lines = ["Geometric means over the eager rows:", "", *means_table(rows), ""]
    lines.append("<details open>" if len(slow) <= SHORT_LIST else "<details>")
    lines[-1] += f"<summary>Slower than the best peer: {len(slow)} of {len(rows)} rows</summary>"
    lines += [""] + [
        f"- {summary.ratio(row, 'best'):.2f}x `{summary.label(row)}` "
        f"(best: {summary.best_peer(row)[0]})"
        for row in slow
    ]
    lines += ["", "</details>"]
    failed = summary.failures(rows)
    lines += ["", "Failed:", "", *(f"- {entry}" for entry in failed)] if failed else []
    if results.get("missing"):
        lines += ["", f"Not run: {len(results['missing'])} cases of the suite."]
    return lines


def group_table(rows: list[dict], group: str) -> list[str]:
    return table([row for row in rows if row["group"] == group])


def section(results: dict, page: str) -> str:
    """One run as README shows it.

    Args:
        results: a results file's content.
        page: its page, as README links to it.
    """
    rows = results["rows"]
    lines = [f"### {heading(results)}", "", *provenance(results["env"])]
    lines += ["", *means_and_losses(results)]
    for group in SHOWN_GROUPS:
        if any(row["group"] == group for row in rows):
            lines += ["", f"**{group}**", "", *group_table(rows, group)]
    lines += ["", f"All {len(rows)} rows, what the columns mean, and a plot: [{page}]({page})."]
    return "\n".join(lines)


def page(results: dict, plot_name: str) -> str:
    """All of one run as a page of its own, beside its plot."""
    env, rows = results["env"], results["rows"]
    lines = [f"# {heading(results)}", "", *provenance(env), "", *explanation(env), ""]
    lines += [f"![Time relative to the best peer, and fraction of the limit]({plot_name})", ""]
    lines += means_and_losses(results)
    for group in dict.fromkeys(row["group"] for row in rows):
        lines += ["", f"## {group}", "", *group_table(rows, group)]
    return "\n".join(lines) + "\n"


def rewritten(readme: str, found: dict[Path, dict]) -> str:
    """README's text with the results between its markers.

    Raises:
        ValueError: the two markers are not there once each, in order.
    """
    if (
        readme.count(BEGIN) != 1
        or readme.count(END) != 1
        or readme.index(BEGIN) > readme.index(END)
    ):
        raise ValueError(f"README needs one {BEGIN} and one {END} after it")
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    sections = [
        section(results, f"benchmarks/results/{path.parent.name}/{path.stem}.md")
        for path, results in found.items()
    ]
    return f"{before}{BEGIN}\n\n" + "\n\n".join(sections or [EMPTY]) + f"\n\n{END}{after}"


def plot(results: dict, path: Path) -> None:
    """Draw a results file: our time over the best peer's, and the fraction of the limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in results["rows"] if summary.is_good(r) and summary.best_peer(r)]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(13, max(4.0, 0.16 * len(rows) + 1.5)), sharey=True, layout="constrained"
    )
    for i, group in enumerate(dict.fromkeys(row["group"] for row in rows)):
        places = [y for y, row in enumerate(rows) if row["group"] == group]
        relative = [1 / summary.ratio(rows[y], "best") for y in places]
        left.scatter(relative, places, s=14, color=f"C{i}", label=group)
        shares = [rows[y]["limit_fraction"] for y in places]
        right.barh(places, shares, color=f"C{i}", height=0.7)
    left.axvline(1.0, color="black", linewidth=0.8)
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter("{x:g}")
    left.set_xlabel("time / best peer's time (left of the line: faster)")
    left.set_yticks(range(len(rows)), [summary.label(row) for row in rows], fontsize=6)
    if rows:
        left.set_ylim(len(rows) - 0.5, -0.5)
        left.legend(fontsize=7)
    right.set_xlabel("fraction of the limit (measured FLOP rate or copy bandwidth)")
    right.axvline(1.0, color="black", linewidth=0.8)
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    env = results["env"]
    figure.suptitle(
        f"{env['gpu']}, torch {env['torch']}, Triton {env['triton']}, {env['date'][:10]}"
    )
    # Without a date in the file, the same results give the same bytes.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Run the report with command line arguments ``argv``; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether README is in step")
    parser.add_argument("--no-plot", action="store_true", help="no matplotlib: the table only")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args(argv)
    found = load(options.results)
    try:
        wanted = {options.readme: rewritten(options.readme.read_text(), found)}
    except ValueError as error:
        parser.error(str(error))
    for path, results in found.items():
        wanted[path.with_suffix(".md")] = page(results, path.with_suffix(".png").name)
    if options.check:
        stale = [path for path, text in wanted.items() if not holds(path, text)]
        for path in stale:
            print(f"{path} is not in step with {options.results}: run report.py")
        return int(bool(stale))
    for path, text in wanted.items():
        path.write_text(text)
        print(f"wrote {path}")
    if not options.no_plot:
        for path, results in found.items():
            plot(results, path.with_suffix(".png"))
            print(f"wrote {path.with_suffix('.png')}")
    return 0


def holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


if __name__ == "__main__":
    sys.exit(main())
