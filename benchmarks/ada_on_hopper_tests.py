"""The test part of ada_on_hopper.py: numerics, the GPU's own tests and an exported file."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/test_numerics.py", "tests/test_gpu.py", "tests/test_gpu_linear.py")
# Kernels that Inductor generates are not what is tested here, and Hopper's own are not built.
DESELECT = "not reduce_overhead and not compile and not hopper"
# What becomes of tests is looked at so often, seconds.
INTERVAL = 5
NOT_RUN = {"state": "not run", "summary": "not run", "failed": []}
NOT_JUDGED = {"state": "not run", "faults": [], "runs": []}


def run_tests(
    folder: Path, seconds: float, progress: Callable[[dict], object], workers: str = "auto"
) -> dict:
    """Run the tests on these kernels, in processes of their own.

    Args:
        folder: where ``ada_on_hopper.prepare`` was.
        seconds: after so many, the run is stopped.
        progress: is called with the result so far, again and again.
        workers: how many processes, for pytest-xdist.

    Returns:
        ``state`` (``"passed"``, ``"failed"`` or ``"stopped"``), ``summary``, and the names of the
        tests that ``failed``.
    """
    command = [sys.executable, "-m", "pytest", *TESTS, "-q", "-k", DESELECT]
    command += ["-p", "benchmarks.ada_on_hopper_plugin", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", workers, "--dist", "worksteal"]
    # A thread a worker: what is held against float64 on the CPU is small.
    env = os.environ | {"ADA_ON_HOPPER": str(folder), "OMP_NUM_THREADS": "1"}
    env.pop("PYTEST_XDIST_WORKER", None)  # these tests have workers of their own
    (folder / "outcomes.jsonl").unlink(missing_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True
        )
        try:
            while process.poll() is None and time.monotonic() - started < seconds:
                try:
                    process.wait(INTERVAL)
                except subprocess.TimeoutExpired:
                    progress(result(folder, "stopped"))
        finally:
            if running := process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        said = output.read()
    if running:
        found = result(folder, "stopped")
    else:
        found = result(folder, "failed" if process.returncode else "passed")
        if process.returncode and not found["failed"]:  # not by a test
            found["failed"] = [said[-1500:]]
    return found | {"seconds": round(time.monotonic() - started)}


def result(folder: Path, state: str) -> dict:
    """What became of the tests so far; ``state`` is how it stands if none failed."""
    path = folder / "outcomes.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    collected = max((entry.get("collected", 0) for entry in entries), default=0)
    outcomes = {entry["test"]: entry["outcome"] for entry in entries if "test" in entry}
    counts = Counter(outcomes.values())
    summary = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped"))
    summary += f" of {collected}"
    if state == "stopped":
        summary += "; stopped before the others"
    failed = [test for test, outcome in outcomes.items() if outcome == "failed"]
    return {"state": "failed" if failed else state, "summary": summary, "failed": failed}


def judge_export(folder: Path, seconds: float) -> dict:
    """judge_export.py's verdict on the file for the 4090, whose kernels are these."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "benchmarks/judge_export.py", "--arch", "sm_89", "--out", out]
        env = os.environ | {"ADA_ON_HOPPER": str(folder)}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return {"state": "stopped", "faults": [f"took more than {seconds:g} s"], "runs": []}
        path = Path(out) / "export_sm_89.json"
        verdict = json.loads(path.read_text()) if path.exists() else {"runs": []}
    verdict.setdefault("faults", [done.stderr[-1500:]])
    return verdict | {"state": "failed" if done.returncode else "accepted"}
