"""The measurement of host costs runs, checks what it times, and says what it found."""

import json
import subprocess

import pytest
import torch

from benchmarks import host_cost
from benchmarks.host_cost import KINDS, Kind

pytestmark = pytest.mark.compiled

SMALL = Kind("small", (8, 16), (16, 24), "float32")
LINEAR = Kind("linear", (2, 8, 16), (16, 24), "float16", linear=True)


@pytest.fixture
def host(device) -> torch.device:
    return torch.device(device)


def test_kinds_have_names_of_their_own() -> None:
    names = {kind.name for kind in KINDS}
    assert len(names) == len(KINDS)
    assert names >= set(host_cost.FIRST_CALLS)


@pytest.mark.parametrize("kind", [SMALL, LINEAR], ids=lambda kind: kind.name)
def test_rows(kind, host) -> None:
    row = host_cost.measure(kind, host, calls=1)
    one_kernel = row["kernels"] is None or len(row["kernels"]) == 1
    assert row["allowed_us"] == pytest.approx(row["torch_us"] + (10 if one_kernel else 25), abs=0.1)
    assert row["met"] == (row["fastmm_us"] <= row["allowed_us"])
    assert (row["parts_us"] is None) == (row["kernels"] is None) == (host.type == "cpu")
    assert row["direct"] in (None, True)


@pytest.mark.parametrize("kind", [SMALL, LINEAR], ids=lambda kind: kind.name)
def test_wrong_results_are_not_timed(kind, host, monkeypatch) -> None:
    ours = Kind.ours
    monkeypatch.setattr(Kind, "ours", lambda self, x: lambda: 1.01 * ours(self, x)())
    with pytest.raises(RuntimeError, match=kind.name):
        host_cost.measure(kind, host, calls=1)


def test_first_calls_share_a_cache_by_road(monkeypatch) -> None:
    """Cold, warm by the same road, and cold by the other."""
    asked = []

    def run(command, env, **kwargs):
        asked.append((command[2:], env["TRITON_CACHE_DIR"]))
        return subprocess.CompletedProcess(command, 0, stdout="a warning\n2.5\n")

    monkeypatch.setattr(subprocess, "run", run)
    found = host_cost.first_calls(SMALL)
    (cold, first), (warm, second), (serial, third) = asked
    assert cold == warm == ["--child", "small"]
    assert serial == ["--child", "small", "--serial"]
    assert first == second != third
    assert found["cold_threads_s"] == found["warm_threads_s"] == found["cold_serial_s"] == 2.5
    assert found["met"]


def test_written_and_printed(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(host_cost, "KINDS", [SMALL, LINEAR])
    monkeypatch.setattr(host_cost, "FIRST_CALLS", ("small",))
    first = {"kind": "small", "cold_threads_s": 4.0, "met": False}
    monkeypatch.setattr(host_cost, "first_calls", lambda kind: first)
    assert host_cost.main(["--calls", "1", "--only", "small", "--out", str(tmp_path)]) == 1
    results = json.loads((tmp_path / "host_cost.json").read_text())
    assert [row["kind"] for row in results["calls"]] == ["small"]
    assert results["first_calls"] == [first]
    assert "--only small" in results["env"]["command"]
    assert "first call, small: cold threads 4.0 s  MISSED" in capsys.readouterr().out


def test_a_child_prints_its_first_call(monkeypatch, capsys) -> None:
    monkeypatch.setattr(host_cost, "KINDS", [SMALL])
    assert host_cost.main(["--child", "small"]) == 0
    assert 0 < float(capsys.readouterr().out) < 60
