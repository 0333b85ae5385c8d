"""Does the planner choose what was measured to be fastest?"""

import json
from pathlib import Path

import pytest

from fastmm_op.arch import Card, arch_for
from fastmm_op.plan import make_plan
from fastmm_op.problem import problem_of
from fastmm_op.search import label

RESULTS = Path(__file__).parents[1] / "benchmarks/results"


@pytest.mark.uninterpreted
@pytest.mark.parametrize(
    ("file", "memory_peak", "cases"),
    [
        ("NVIDIA_H100_80GB_HBM3/tune_suite", 3.352e12, 124),
        ("NVIDIA_H200/tune_skinny", 4.917e12, 33),
    ],
)
def test_measured_cases(file, memory_peak, cases) -> None:
    """Of some 17 choices a case within 5 % of the fastest, in nine tenths of the cases.

    Wider last tiles did not exist then, and were timed since, in the suite. A change of the model
    may plan what nobody has timed; if it does so in many cases, they are to be timed.
    """
    rows = json.loads((RESULTS / f"{file}.json").read_text())["rows"]
    suite = json.loads((RESULTS / file).with_name("matmul.json").read_text())["rows"]
    in_suite = {(r["case"], r["strategy"]): r["us"] for r in suite if r["mode"] == "eager"}
    arch = arch_for(Card((9, 0), 132, memory_peak))
    as_good, unknown = [], []
    for row in rows:
        sizes = row["M"], row["K"], row["N"]
        how = {name: row[name] for name in ("batch", "dtype", "layout", "precision")}
        plan = make_plan(problem_of(*sizes, **how, arch=arch))
        chosen, strategy = label(plan.choice), (row["case"], plan.strategy)
        # What was timed again, for longer, is compared with its like.
        times = row["second_round" if chosen in row["second_round"] else "first_round"]
        if chosen in times:
            as_good.append(times[chosen] <= 1.05 * min(times.values()))
        elif strategy in in_suite and plan.choice.edge_n:
            as_good.append(in_suite[strategy] <= 1.05 * min(times.values()))
        else:
            unknown.append(row["case"])
    assert len(rows) == cases
    assert len(unknown) <= 0.05 * len(rows), unknown
    assert sum(as_good) >= 0.9 * len(as_good)
