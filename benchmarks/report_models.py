"""Results of whole models -> a Markdown page beside each file.

    python benchmarks/report_models.py [--check]

Writes benchmarks/results/<gpu>/models.md from the models.json there. ``--check`` writes nothing:
exit code 1 if a page is not in step.
"""

import argparse
import json
import re
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.bench_models import BASELINE, OURS, row_of
from benchmarks.model_runs import CONTENDERS, SETTINGS
from benchmarks.models import WORKLOADS

ROOT = Path(__file__).resolve().parents[1]
TITLES = {
    "gpt2": "GPT-2 124M, training step, 8 x 1024 tokens, vocabulary 50257",
    "vit": "ViT-B/16, inference, batch 64",
    "llama_block": "Llama-style block, training step, 4093 tokens, width 2048",
    "mlp": "MLP 2047-8189-2047, training step, 8191 rows",
}
# Workload, setting, how many times torch.compile's speed was the aim.
AIMS = (
    ("gpt2", "fp32", 2.0),
    ("gpt2", "tf32", 1.2),
    ("vit", "fp32", 2.2),
    *((name, "bf16", 1.0) for name in TITLES),
)
LARGEST_PASS_SECONDS = 2.0


def page(results: dict) -> str:
    """A results file's content as Markdown."""
    rows = results["rows"]
    runs = results["runs"]
    last = runs[-1]
    lines = [
        f"# Whole models on {results['gpu']}",
        "",
        f"Driver {last['driver']}, torch {last['torch']}, Triton {last['triton']}, Python "
        f"{last['python']}. Measured in {len(runs)} part(s):",
        "",
        *(f"- {run['date'][:10]}, commit `{run['commit'][:12]}`: `{command(run)}`" for run in runs),
        "",
        "Milliseconds of a step (median): forward, backward and AdamW, or forward alone for "
        "inference. Weights and data are random, bf16 is autocast. Every contender's logits and "
        "gradients were held against float64 before it was timed, and a loss curve of "
        f"{longest_curve(rows)} steps against eager's after.",
        "",
        *times(rows),
        "",
        "## Aims",
        "",
        *aims(rows),
        "",
        "## Errors",
        "",
        "Normwise, against float64; the loss curve's largest distance from eager's, of the first "
        "loss.",
        "",
        *errors(rows),
        "",
        "## What it takes",
        "",
        "Seconds in fastmm's passes (all graphs of a model, nothing planned before), and of the "
        "first call, compilation included (PyTorch's caches may hold part of it from an earlier "
        "part of the run).",
        "",
        *costs(rows),
    ]
    failed = [row for row in rows if "failed" in row]
    lines += ["", "## Failed", "", *(f"- {place(row)}: {row['failed']}" for row in failed)]
    return "\n".join(lines if failed else lines[:-3]) + "\n"


def command(run: dict) -> str:
    """As it was typed, but for where that machine kept its files."""
    return re.sub(r" --(out|add-to) \S+", "", run["command"])


def place(row: dict) -> str:
    return f"{row['workload']} {row['setting']} {row['contender']}"


def longest_curve(rows: list[dict]) -> int:
    return max((len(row.get("losses", ())) for row in rows), default=0)


def groups(rows: list[dict]) -> list[tuple[str, str]]:
    """The models and settings that there are rows of, in the benchmark's order."""
    there = {(row["workload"], row["setting"]) for row in rows}
    return [(name, s) for name in WORKLOADS for s in SETTINGS if (name, s) in there]


def contenders(rows: list[dict]) -> list[str]:
    there = {row["contender"] for row in rows}
    return [name for name in CONTENDERS if name in there]


def milliseconds(rows: list[dict], workload: str, setting: str, contender: str) -> float | None:
    """A time, of a row whose result and training were right; else None."""
    row = row_of(rows, workload, setting, contender)
    return None if row is None or "failed" in row else row.get("ms")


def gain(rows: list[dict], workload: str, setting: str, peer: str) -> float | None:
    """How many times as fast as a peer fastmm is."""
    ours = milliseconds(rows, workload, setting, "fastmm")
    theirs = milliseconds(rows, workload, setting, peer)
    return theirs / ours if ours and theirs else None


def table(heading: list[str], body: list[list[str]], words: int) -> list[str]:
    """Markdown; the first columns, so many, hold words, the others numbers."""
    rules = ["---"] * words + ["---:"] * (len(heading) - words)
    return [f"| {' | '.join(cells)} |" for cells in (heading, rules, *body)]


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def times(rows: list[dict]) -> list[str]:
    names = contenders(rows)
    others = [name for name in names if name not in OURS]
    body = []
    for workload, setting in groups(rows):
        cells = [TITLES[workload], setting]
        for name in names:
            row = row_of(rows, workload, setting, name)
            failed = row is not None and "failed" in row
            ms = milliseconds(rows, workload, setting, name)
            cells.append("failed" if failed else number(ms, ".2f"))
        cells += [number(gain(rows, workload, setting, name), ".2f") for name in others]
        body.append(cells)
    heading = ["model", "setting", *names, *(f"x {name}" for name in others)]
    return table(heading, body, 2)


def aims(rows: list[dict]) -> list[str]:
    lines = []
    for workload, setting, aim in AIMS:
        found = gain(rows, workload, setting, "inductor")
        if found is not None:
            verdict = "reached" if found >= aim else "**missed**"
            lines.append(
                f"- {workload} {setting}: at least {aim:g} x torch.compile: {found:.2f}, {verdict}"
            )
    spent = [row["pass_seconds"] for row in rows if "pass_seconds" in row]
    if spent:
        verdict = "reached" if max(spent) < LARGEST_PASS_SECONDS else "**missed**"
        lines.append(
            f"- passes over a model's graphs: under {LARGEST_PASS_SECONDS:g} s: {max(spent):.2f} "
            f"at most, {verdict}"
        )
    eager, ours = (row_of(rows, "gpt2", "fp32", name) for name in (BASELINE, "fastmm"))
    if eager and ours and "gradient_error" in eager and "gradient_error" in ours:
        verdict = "reached" if ours["gradient_error"] <= eager["gradient_error"] else "**missed**"
        lines.append(
            f"- gpt2 fp32: gradient error no worse than eager's {eager['gradient_error']:.2e}: "
            f"{ours['gradient_error']:.2e}, {verdict}"
        )
    return lines or ["Nothing to judge yet."]


def errors(rows: list[dict]) -> list[str]:
    body = []
    for workload, setting in groups(rows):
        for name in contenders(rows):
            row = row_of(rows, workload, setting, name)
            if row is not None and "logits_error" in row:
                values = (
                    row.get(key) for key in ("logits_error", "gradient_error", "losses_apart")
                )
                body.append([workload, setting, name, *(number(v, ".2e") for v in values)])
    return table(["model", "setting", "", "logits", "gradients", "loss curve"], body, 3)


def costs(rows: list[dict]) -> list[str]:
    body = []
    for workload, setting in groups(rows):
        ours = row_of(rows, workload, setting, "fastmm") or {}
        taken = f"{ours['products_taken']} of {ours['products']}" if "products" in ours else "-"
        cells = [workload, setting, taken, number(ours.get("pass_seconds"), ".2f")]
        for name in contenders(rows):
            row = row_of(rows, workload, setting, name) or {}
            cells.append(number(row.get("first_call_seconds"), ".1f"))
        body.append(cells)
    first = [f"{name}, first call" for name in contenders(rows)]
    return table(["model", "setting", "products taken", "passes", *first], body, 2)


def main(argv: list[str] | None = None) -> int:
    """Run the report with command line arguments ``argv``; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether pages are in step")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(argv)
    stale = 0
    for file in sorted(options.results.glob("*/models.json")):
        beside, wanted = file.with_suffix(".md"), page(json.loads(file.read_text()))
        if not options.check:
            beside.write_text(wanted)
            print(f"wrote {beside}")
        elif not beside.exists() or beside.read_text() != wanted:
            print(f"{beside} is not in step with {file}: run report_models.py")
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
