"""A pytest plugin: every process of a test run, workers too, builds the RTX 4090's kernels.

    python -m pytest -p benchmarks.ada_on_hopper_plugin ...

with the folder of ``ada_on_hopper.prepare`` in ADA_ON_HOPPER. The process that hands out the tests
writes there what becomes of them, line by line, so that a run that is stopped has a result.
"""

import json
import os
from pathlib import Path

import pytest

from benchmarks.ada_on_hopper import prepare

FOLDER = Path(os.environ["ADA_ON_HOPPER"])
OUTCOMES = FOLDER / "outcomes.jsonl"

prepare(FOLDER)


def note(entry: dict) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        with OUTCOMES.open("a") as file:
            file.write(json.dumps(entry) + "\n")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(ids: list[str]) -> None:
    note({"collected": len(ids)})


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.items:  # with xdist it is the workers that collect
        note({"collected": len(session.items)})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        note({"test": report.nodeid, "outcome": report.outcome})
