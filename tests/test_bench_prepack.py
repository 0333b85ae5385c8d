"""The benchmark of prepacked layers: what it checks, times and writes."""

import json

import pytest

from benchmarks import bench_prepack
from fastmm_op import ops
from fastmm_op.timing import Timing

ARGS = ("--device", "cpu", "--weights", "40", "33", "--rows", "1", "9")


def timer(fn, seconds: float) -> Timing:
    return Timing(2.0, 1.0, 3.0, 3)


def test_rows(tmp_path, capsys) -> None:
    out = tmp_path / "prepack.json"
    assert bench_prepack.main([*ARGS, "--out", str(out)], timer) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["kind"], row["rows"]) for row in rows] == [
        (kind, rows) for kind in ("tf32", "fp32", "bf16") for rows in (1, 9)
    ]
    for row in rows:
        assert row["torch_us"] == row["patched_us"] == row["prepacked_us"] == 2.0
        assert max(row["patched_error"], row["prepacked_error"]) < 1e-2
        assert row["read"] <= (row["kept_bytes"] > 0 and row["rows"] > 1)
    misaligned = [row["read"] for row in rows if row["kind"] == "bf16"]
    assert misaligned == [False, ops.INTERPRETED], "33 columns of 16 bits"
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (
        "     1 x (40, 33) tf32: torch       2.0  patched       2.0  prepacked       2.0 us, "
        "1.00x patched, copy not read"
    )


def test_what_is_wrong_fails(monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench_prepack, "FLOOR", {"tf32": -1.0})
    monkeypatch.setattr(bench_prepack, "ALLOWED", 0.0)
    assert bench_prepack.main([*ARGS, "--kinds", "tf32"], timer) == 1
    assert ", FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("args", [("--kinds", "fp8"), ("--rows", "many")])
def test_bad_arguments(args) -> None:
    with pytest.raises(SystemExit):
        bench_prepack.main([*ARGS, *args])
