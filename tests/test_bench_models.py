"""The benchmark of whole models: what it runs, what it checks, and what it writes."""

import importlib.util
import itertools
import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("rich", reason="the benchmark's tables need rich")

from benchmarks import bench_models, model_runs, models
from fastmm_op.timing import Timing

pytestmark = pytest.mark.compiled  # once: it is all the same to it how kernels would run

ARGS = ("--tiny", "--device", "cpu", "--steps", "4")


def timer(fn, seconds: float) -> Timing:
    fn()
    return Timing(1000.0 * seconds, 1.0, 2.0, 3)


def run(tmp_path, *args: str, read: bool = True, **contenders) -> tuple[int, dict]:
    out = tmp_path / "models.json"
    found = {"eager": model_runs.eager, **contenders}
    code = bench_models.main([*ARGS, "--out", str(out), *args], timer, found)
    return code, json.loads(out.read_text()) if read else {}


@pytest.mark.parametrize(
    ("workload", "settings", "products"), [("mlp", "fp32,bf16", 5), ("llama_block", "tf32", 15)]
)
def test_rows(workload, settings, products, tmp_path) -> None:
    """With eager as ours: no code is generated, and all the rest is real."""
    what = ("--workloads", workload, "--settings", settings)
    code, results = run(tmp_path, *what, fastmm=model_runs.eager)
    assert code == 0
    rows = results["rows"]
    assert [(r["workload"], r["setting"], r["contender"]) for r in rows] == [
        (workload, setting, contender)
        for setting in settings.split(",")
        for contender in ("eager", "fastmm")
    ]
    for row in rows:
        assert row["ms"] == 2.0
        assert len(row["losses"]) == 4
        assert row["losses"][-1] < row["losses"][0], "it trains"
        rough = row["setting"] == "bf16"
        for name in ("logits_error", "gradient_error"):
            assert (1e-4 if rough else 1e-9) < row[name] < (2e-2 if rough else 1e-5), row
    for row in rows[1::2]:
        assert row["losses_apart"] < 1e-3
        assert (row["products"], row["products_taken"]) == (products, 0)
    (env,) = results["runs"]
    assert {"gpu", "torch", "commit", "command", "date"} <= set(env)
    assert all(row["first_call_seconds"] > 0 and row["run"] == 0 for row in rows)
    assert all(row["pass_seconds"] >= 0 for row in rows[1::2])


class Wrong(torch.nn.Module):
    """A model's results, made worse."""

    def __init__(self, model, change) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, *data):
        return self.change(*self.model(*data))


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        (lambda logits, loss: (logits * 1.001, loss), "logits_error is 1.00e-03, allowed"),
        (lambda logits, loss: (logits, loss * 1.1), "gradient_error is 1.00e-01, allowed"),
        (lambda logits, loss: (logits * torch.nan, loss), "logits_error is nan"),
        (lambda logits, loss: logits.view(-1), "ValueError: too many values"),
    ],
    ids=["logits", "gradients", "nan", "no result"],
)
def test_what_is_wrong_is_not_timed(change, failed, tmp_path, capsys) -> None:
    code, results = run(
        tmp_path,
        *("--workloads", "mlp", "--settings", "fp32", "--contenders", "eager,fastmm"),
        fastmm=lambda model: Wrong(model, change),
    )
    assert code == 1
    fine, wrong = results["rows"]
    assert "failed" not in fine
    assert "ms" in fine
    assert failed in wrong["failed"]
    assert "ms" not in wrong
    assert "FAILED mlp fp32 fastmm" in capsys.readouterr().err


def test_a_loss_curve_that_leaves_eagers(tmp_path) -> None:
    """Right at first, then trained on other gradients."""
    calls = iter(range(100))

    def drifting(logits, loss):
        return logits, loss if next(calls) < 3 else loss * 1.5

    _, results = run(
        tmp_path,
        *("--workloads", "mlp", "--settings", "fp32"),
        fastmm=lambda model: Wrong(model, drifting),
    )
    assert "the loss curve is" in results["rows"][1]["failed"]


def test_a_run_in_parts(tmp_path) -> None:
    """Later parts are judged by the first one's eager, and measure only what is not there."""
    files = [tmp_path / f"{i}.json" for i in range(3)]
    parts = (
        ("eager", model_runs.eager),
        ("eager,fastmm", lambda model: Wrong(model, lambda logits, loss: (logits * 1.001, loss))),
        ("eager,fastmm", model_runs.eager),
    )
    codes = []
    for i, (names, ours) in enumerate(parts):
        args = ["--workloads", "mlp", "--settings", "fp32", "--contenders", names]
        args += ["--add-to", str(files[i - 1])] if i else []
        code, _ = run(tmp_path, *args, "--out", str(files[i]), read=False, fastmm=ours)
        codes.append(code)
    assert codes == [0, 1, 0]
    first, second, last = (json.loads(file.read_text()) for file in files)
    assert second["rows"][0] == last["rows"][0] == first["rows"][0]
    assert second["rows"][1]["failed"].startswith("logits_error"), "held against that eager"
    assert [row["run"] for row in last["rows"]] == [0, 2], "what failed is measured again"
    assert len(last["runs"]) == 3
    assert last["rows"][1]["losses_compared"] == 4


def test_out_of_budget(tmp_path, monkeypatch) -> None:
    """No contender is started after it; what has been measured is written."""
    clock = itertools.count(0, 40)
    monkeypatch.setattr(bench_models.time, "monotonic", lambda: next(clock))
    _, results = run(
        tmp_path,
        *("--workloads", "mlp", "--settings", "fp32,bf16", "--budget", "300"),
        fastmm=model_runs.eager,
    )
    assert 0 < len(results["rows"]) < 4
    assert results["runs"][0]["stopped"].startswith("budget of 300 s spent")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tiny": False}, "one is of tiny models and the other is not"),
        ({"runs": [{"gpu": "another"}]}, "its gpu is another, here it is cpu"),
        ({"rows": None}, "it holds no results of models"),
    ],
)
def test_results_of_another_kind(change, message, tmp_path, capsys) -> None:
    results = {"gpu": "cpu", "tiny": True, "runs": [], "rows": []} | change
    if results["rows"] is None:
        del results["rows"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(results))
    with pytest.raises(SystemExit):
        bench_models.main([*ARGS, "--add-to", str(other)])
    assert message in capsys.readouterr().err


def test_the_reference_in_parts() -> None:
    """float64 is asked about a part of the data at a time, where parts are independent."""
    workload = replace(models.WORKLOADS["mlp"], data=lambda tiny: (torch.randn(16, 33),) * 2)
    whole = model_runs.Subject(workload, torch.device("cpu"), True).reference
    parts = model_runs.Subject(replace(workload, parts=4), torch.device("cpu"), True).reference
    assert [x.dtype for x in parts] == [torch.float64] * 2
    for got, want in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, want)


def test_what_the_passes_do_is_logged() -> None:
    """Of code that is compiled, and by the way of ``explain`` where a cache has it."""

    def always(graph, inputs):
        from test_backend import graphs

        return graphs(graph, inputs)

    subject = model_runs.Subject(models.WORKLOADS["mlp"], torch.device("cpu"), True)
    one = model_runs.ModelRun(subject, "fp32", 2, 0.1, timer)
    row = one.row("fastmm", lambda model: torch.compile(model, backend=always), None)
    assert "failed" not in row, row["failed"]
    assert (row["products"], row["products_taken"]) == (5, 5)
    assert row["pass_seconds"] > 0
    other = one.row("fastmm", model_runs.eager, None)
    assert (other["products"], other["products_taken"]) == (5, 0)


def test_prepacking_is_for_inference() -> None:
    inference, training = models.WORKLOADS["vit"], models.WORKLOADS["mlp"]
    assert bench_models.may_run(inference, "fp32", "prepacked")
    assert not bench_models.may_run(inference, "bf16", "prepacked")
    assert not bench_models.may_run(training, "fp32", "prepacked")
    assert bench_models.may_run(training, "fp32", "fastmm")


@pytest.mark.parametrize(("name", "package"), [("gpt2", "transformers"), ("vit", "timm")])
def test_optional_models(name, package, tmp_path) -> None:
    """Skipped with a message where their package is not installed; else they run."""
    code, results = run(tmp_path, "--workloads", name, "--settings", "fp32")
    assert code == 0
    if importlib.util.find_spec(package) is None:
        message = f"{name} needs the package {package!r}, which is not installed"
        assert results["skipped"] == [message]
        assert results["rows"] == []
    else:
        assert "ms" in results["rows"][0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--workloads", "bert"), "'bert' is none of gpt2, vit, llama_block, mlp"),
        (("--settings", "fp8"), "'fp8' is none of fp32, tf32, bf16"),
        (("--steps", "0"), "'0' is not a positive number"),
    ],
)
def test_bad_arguments(args, message, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        bench_models.main([*ARGS, *args])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_sizes_are_the_ones_that_hurt() -> None:
    """Odd widths and token counts, and GPT-2's own vocabulary."""
    x, _ = models.mlp_data(False)
    assert all(size % 2 for size in x.shape)
    tokens, _ = models.llama_data(False)
    assert len(tokens) % 2
    (ids,) = models.gpt2_data(False)
    assert (ids.shape, int(ids.max()) < 50257) == ((8, 1024), True)
