"""The page about whole models: what it says of a results file."""

import json

import pytest

pytest.importorskip("rich", reason="the benchmark's tables need rich")

from benchmarks import report_models


def row(workload: str, setting: str, contender: str, ms: float, **more) -> dict:
    common = {"logits_error": 1e-6, "first_call_seconds": 12.34}
    names = {"workload": workload, "setting": setting, "contender": contender}
    return {**names, "ms": ms, **common, **more}


ENV = {
    "date": "2026-11-25T00:00:00",
    "commit": "0123456789abcdef",
    "driver": "1.2",
    "torch": "2.11",
    "triton": "3.6",
    "python": "3.12",
    "gpu": "Some GPU",
    "command": "python benchmarks/bench_models.py --out /tmp/x.json --contenders eager",
}
TAKEN = {"products": 148, "products_taken": 100, "pass_seconds": 0.61}
ROWS = [
    row("gpt2", "fp32", "fastmm", 80.0, gradient_error=1e-6, losses_apart=1e-4, **TAKEN),
    row("gpt2", "fp32", "eager", 200.0, gradient_error=2e-6, losses=[1.0, 0.5]),
    row("gpt2", "fp32", "inductor", 180.0, gradient_error=2e-6, losses_apart=1e-4),
    row("vit", "fp32", "inductor", 50.0),
    row("vit", "fp32", "fastmm", 25.0),
    row("vit", "tf32", "inductor", 50.0, failed="wrong"),
]
RESULTS = {"gpu": "Some GPU", "tiny": False, "runs": [ENV], "rows": ROWS}
TODAY = "- 2026-11-25, commit `0123456789ab`: "


@pytest.mark.parametrize(
    "line",
    [
        TODAY + "`python benchmarks/bench_models.py --contenders eager`",
        "| model | setting | eager | inductor | fastmm | x eager | x inductor |",
        "| GPT-2 124M, training step, 8 x 1024 tokens, vocabulary 50257 | fp32 "
        "| 200.00 | 180.00 | 80.00 | 2.50 | 2.25 |",
        "| ViT-B/16, inference, batch 64 | tf32 | - | failed | - | - | - |",
        "- gpt2 fp32: at least 2 x torch.compile: 2.25, reached",
        "- vit fp32: at least 2.2 x torch.compile: 2.00, **missed**",
        "- passes over a model's graphs: under 2 s: 0.61 at most, reached",
        "- gpt2 fp32: gradient error no worse than eager's 2.00e-06: 1.00e-06, reached",
        "| gpt2 | fp32 | fastmm | 1.00e-06 | 1.00e-06 | 1.00e-04 |",
        "| gpt2 | fp32 | 100 of 148 | 0.61 | 12.3 | 12.3 | 12.3 |",
        "- vit tf32 inductor: wrong",
    ],
)
def test_the_page_says(line) -> None:
    assert line in report_models.page(RESULTS).splitlines()


def test_a_page_without_failures_has_no_such_section() -> None:
    fine = RESULTS | {"rows": ROWS[:-1]}
    assert "## Failed" in report_models.page(RESULTS)
    assert "## Failed" not in report_models.page(fine)
    assert report_models.page(RESULTS | {"rows": []}).count("Nothing to judge yet.") == 1


def test_pages_in_step(tmp_path, capsys) -> None:
    folder = tmp_path / "Some_GPU"
    folder.mkdir()
    (folder / "models.json").write_text(json.dumps(RESULTS))
    where = ["--results", str(tmp_path)]
    assert report_models.main([*where, "--check"]) == 1
    assert report_models.main(where) == 0
    assert (folder / "models.md").read_text() == report_models.page(RESULTS)
    assert report_models.main([*where, "--check"]) == 0
    (folder / "models.md").write_text("old")
    assert report_models.main([*where, "--check"]) == 1
    assert "is not in step" in capsys.readouterr().out
