"""What ``tune`` says: its rows for JSON, its table, and how often the planner was as good."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fastmm_op.bench.cases import Case
from fastmm_op.bench.runner import finite
from fastmm_op.cli.demo import say
from fastmm_op.search import label

if TYPE_CHECKING:  # it loads the kernels
    from fastmm_op.bench.tune import Search

# A planner's choice that takes at most so many times the best one's time is as good.
AS_GOOD = 1.05


def row_of(case: Case) -> dict:
    """What is known of a case before it is searched."""
    names = ("M", "K", "N", "batch", "layout", "dtype", "precision")
    return {"case": case.name} | {name: getattr(case, name) for name in names}


def found(search: "Search") -> dict:
    """What a search adds to its case's row, ready for JSON; times in microseconds."""
    best = search.best
    return {
        "allowed_error": search.allowed_error,
        "chosen": label(search.chosen.choice),
        "chosen_us": search.chosen.final and search.chosen.final.us,
        "best": best and label(best.choice),
        "best_us": best and best.final.us,
        "ratio": search.ratio,
        "measurements": [
            {
                "label": label(m.choice),
                "choice": asdict(m.choice),
                "estimate_us": m.estimate_us,
                "error": finite(m.error),
                "first_round": m.timing and asdict(m.timing),
                "second_round": m.final and asdict(m.final),
                "failed": m.failure,
                "wrong": m.wrong,
            }
            for m in search.measurements
        ],
    }


def is_as_good(row: dict) -> bool:
    """Whether the planner's own choice was right, and within 5 % of the best."""
    return row.get("ratio") is not None and row["ratio"] <= AS_GOOD


def share(rows: list[dict]) -> float | None:
    """Of all cases, those where the planner's own choice is within 5 % of the best."""
    return sum(map(is_as_good, rows)) / len(rows) if rows else None


def failures(row: dict) -> list[str]:
    """One line for the case, if it could not be measured, or for every choice that failed."""
    if "failed" in row:
        return [f"{row['case']}: {row['failed']}"]
    failed = [m for m in row["measurements"] if m["failed"]]
    return [f"{row['case']}: {m['label']}: {m['failed']}" for m in failed]


def went_wrong(row: dict) -> bool:
    """Whether anything computed a wrong result, or nothing of the case could be measured."""
    return row.get("best") is None or any(m["wrong"] for m in row["measurements"])


def microseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def print_results(results: dict, console: Console) -> None:
    rows = results["rows"]
    table = Table(title=f"the planner's choice beside the best found on {results['env']['gpu']}")
    for heading in ("case", "planner's", "us", "best", "us", "ratio", "tried", "failed"):
        if heading in ("case", "planner's", "best"):
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        ratio = row.get("ratio")
        measured = row.get("measurements", ())
        table.add_row(
            row["case"],
            row.get("chosen", "-"),
            microseconds(row.get("chosen_us")),
            "the same" if ratio == 1 else row.get("best") or "-",
            microseconds(row.get("best_us")),
            "-" if ratio is None else f"{ratio:.2f}",
            str(len(measured)),
            str(sum(m["failed"] is not None for m in measured)),
        )
    console.print(table)
    for text in (text for row in rows for text in failures(row)):
        say(console, f"FAILED {text}")
    if rows:
        good = sum(map(is_as_good, rows))
        say(
            console,
            f"The planner's choice is within 5 % of the best found in {good} of {len(rows)} cases "
            f"({100 * share(rows):.0f} %).",
        )
    if "stopped" in results:
        say(console, f"stopped early: {results['stopped']}")
    if results["missing"]:
        say(console, f"not tuned: {', '.join(results['missing'])}")
