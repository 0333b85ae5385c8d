"""The benchmark of whole models: what it runs, what it checks, and what it writes."""

import importlib.util
import json

import pytest
import torch

pytest.importorskip("rich", reason="the benchmark's tables need rich")

from benchmarks import bench_models, model_runs, models
from fastmm_op.timing import Timing

ARGS = ("--tiny", "--device", "cpu", "--steps", "4")


def timer(fn, seconds: float) -> Timing:
    fn()
    return Timing(1000.0 * seconds, 1.0, 2.0, 3)


def run(tmp_path, *args: str, **contenders) -> tuple[int, dict]:
    out = tmp_path / "models.json"
    found = {"eager": model_runs.eager, **contenders}
    code = bench_models.main([*ARGS, "--out", str(out), *args], timer, found)
    return code, json.loads(out.read_text())


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
    assert {"gpu", "torch", "commit", "command", "date"} <= set(results["env"])


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
