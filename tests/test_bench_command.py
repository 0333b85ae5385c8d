"""``python -m fastmm_op bench``: tiny products, a timer that does not measure, and no card."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the benchmark's progress needs rich")

from fastmm_op import __main__, ops
from fastmm_op.arch import ARCHES
from fastmm_op.bench import tables
from fastmm_op.bench.cases import Case
from fastmm_op.bench.gpu_model import H200, RTX_4090
from fastmm_op.cli import bench
from fastmm_op.timing import Timing

CPU = torch.device("cpu")
CASES = [
    Case("seed", 33, 29, 21, "fp32", "tf32"),
    Case("squares", 16, 16, 16, "fp16", "fp16"),
]


def timer(fn, seconds=0.2) -> Timing:
    fn()
    return Timing(10.0, 9.0, 12.0, 10)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bench, "load_cases", lambda precision: CASES)
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)


def options(tmp_path: Path, suite: str, **more) -> Namespace:
    argv = ["bench", "--suite", suite, "--out", str(tmp_path / "run.json")]
    parsed = __main__.make_parser().parse_args(argv)
    return Namespace(**vars(parsed) | more)


@pytest.mark.uninterpreted
@pytest.mark.usefixtures("tiny")
def test_the_seed_suite(tmp_path, capsys):
    assert bench.run(options(tmp_path, "seed"), CPU, timer) == 0
    results = json.loads((tmp_path / "run.json").read_text())
    assert [row["case"] for row in results["rows"]] == [CASES[0].name] * 2
    assert {"torch", "torch-fp32"} <= set(results["rows"][0]["peers"])
    assert "inductor" not in results["rows"][0]["peers"]
    assert "missing" not in results
    report = (tmp_path / "run.md").read_text()
    for part in ("# fastmm_op ", " on cpu", "| 33x29x21-NN-fp32-tf32 |", "copies at"):
        assert part in report
    assert "predicted |" not in report, "there is no model of a CPU"
    assert "please attach both to an issue" in capsys.readouterr().out


@pytest.mark.uninterpreted
@pytest.mark.usefixtures("tiny")
def test_the_full_suite_with_inductor_and_predictions(tmp_path, monkeypatch):
    fields = {"predicted_us": 8.0, "predicted_us_range": [7.0, 9.5]}
    monkeypatch.setattr(bench, "predictor", lambda gpu, device: lambda case: fields)
    assert bench.run(options(tmp_path, "full", inductor=True), CPU, timer) == 0
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert [row["group"] for row in rows] == ["seed", "seed", "squares"]
    assert all("inductor" in row["peers"] for row in rows)
    assert all(row["predicted_us"] == 8.0 for row in rows)
    report = (tmp_path / "run.md").read_text()
    assert "predicted | measured / predicted |" in report
    assert "| 8.0 (7 - 10) | 1.25 |" in report


def test_a_failed_row_and_one_without_prediction_have_their_cells():
    assert tables.prediction_cells({"us": 10.0, "not_predicted": "no model"}) == ["-", "-"]
    failed = {"us": None, "predicted_us": 8.0, "predicted_us_range": [7.0, 9.0]}
    assert tables.prediction_cells(failed) == ["8.0 (7 - 9)", "-"]


@pytest.mark.uninterpreted
@pytest.mark.usefixtures("tiny")
def test_what_is_missing_is_told(tmp_path):
    assert bench.run(options(tmp_path, "full", budget=1e-9), CPU, timer) == 0
    assert "Not run: 2 cases (budget of 1e-09 s spent)." in (tmp_path / "run.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_told(tmp_path, capsys):
    assert __main__.main(["bench", "--out", str(tmp_path / "x.json")]) == 1
    assert "bench: needs a CUDA GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_other_obstacles_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(ops, "HAVE_TRITON", False)
    assert "needs Triton" in bench.obstacle()
    monkeypatch.setattr(ops, "HAVE_TRITON", True)
    monkeypatch.setattr(ops, "INTERPRETED", True)
    assert "TRITON_INTERPRET is set" in bench.obstacle()
    monkeypatch.setattr(ops, "INTERPRETED", False)
    monkeypatch.setattr(bench.environment, "device_arch", lambda device: None)
    assert "7.5 gets ATen's" in bench.obstacle()
    monkeypatch.setattr(bench.environment, "device_arch", lambda device: ARCHES["sm_89"])
    assert bench.obstacle() is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--suite", "half"], "invalid choice: 'half'"),
        (["--budget", "0"], "not a positive number of seconds"),
        (["--precision", "fp8"], "invalid choice: 'fp8'"),
    ],
)
def test_bad_arguments_end_with_code_2(capsys, args, message):
    with pytest.raises(SystemExit) as stop:
        __main__.main(["bench", *args])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.compiled
def test_predictions_of_the_cards_that_have_a_model() -> None:
    from fastmm_op.bench.predict import predictor

    assert predictor("NVIDIA Toaster", ARCHES["sm_89"]) is None
    case = Case("squares", 512, 512, 512, "fp16", "fp16")
    fields = predictor(RTX_4090.name, ARCHES["sm_89"])(case)
    fastest, slowest = fields["predicted_us_range"]
    assert 3 < fastest < fields["predicted_us"] < slowest < 50
    big = Case("squares", 4096, 4096, 4096, "bf16", "bf16")
    hopper = predictor(H200.name, ARCHES["sm_90"])(big)
    assert "gemm_hopper" in hopper["not_predicted"]
