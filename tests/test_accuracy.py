"""The accuracy benchmark: its families are what they say, and it tells a broken promise."""

import json

import pytest
import torch

from benchmarks import accuracy
from benchmarks.families import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family) -> None:
    a, b = FAMILIES[family](12, 40, 9, torch.Generator().manual_seed(0))
    assert (a.dtype, b.dtype, a.shape, b.shape) == (torch.float32,) * 2 + ((12, 40), (40, 9))
    product = a.double() @ b.double()
    finite = product.float().isfinite()
    assert finite.all() if family != "Inf and NaN" else not finite.all()
    if family.startswith("inverse"):
        decades = float(family.split("-")[1])
        sizes = a.abs().amax(0).log10()
        assert sizes.max() - sizes.min() == pytest.approx(2 * decades, abs=1)
        assert (a.double().abs().amax(0) * b.double().abs().amax(1)).log10().abs().max() < 1.5


def test_errors() -> None:
    exact = torch.tensor([[3.0, 4.0], [0.0, torch.inf]], dtype=torch.float64)
    got = torch.tensor([[3.0, 4.5], [0.0, torch.inf]])
    found = accuracy.errors(got, exact, torch.tensor([[10.0, 5.0], [0.0, 1.0]]).double())
    assert found == {"normwise": pytest.approx(0.1), "worst": pytest.approx(0.1), "specials": True}
    got[1, 1] = 1.0
    assert not accuracy.errors(got, exact, exact)["specials"]


def test_a_broken_promise_is_said() -> None:
    fine = {"normwise": 1e-7, "worst": 1e-7, "specials": True}
    peers = ["torch fp32", "torch TF32", "rounded to TF32"]
    found = dict.fromkeys([*peers, "tf32", "fp32", "ieee"], fine)
    assert accuracy.broken_promises(found) == []
    assert len(accuracy.broken_promises(found | {"fp32": fine | {"normwise": 3e-7}})) == 1
    assert len(accuracy.broken_promises(found | {"tf32": fine | {"normwise": torch.nan}})) == 1
    # Where torch does not round to TF32, what rounding costs is granted.
    lossy = {"normwise": 3e-4, "worst": 3e-4, "specials": True}
    assert len(accuracy.broken_promises(found | {"tf32": lossy})) == 1
    assert accuracy.broken_promises(found | {"tf32": lossy, "rounded to TF32": lossy}) == []
    assert len(accuracy.broken_promises(found | {"ieee": fine | {"specials": False}})) == 1


@pytest.mark.kernels
def test_a_run(tmp_path, capsys) -> None:
    families = ["randn", "inverse along K, 1e+-12", "Inf and NaN"]
    arguments = ["--size", "21", "18", "--k", "150", "--packed", "--out", str(tmp_path)]
    assert accuracy.main([*arguments, "--family", *families]) == 0
    rows = json.loads((tmp_path / "accuracy.json").read_text())["rows"]
    assert [row["family"] for row in rows[:3]] == families
    assert {row["layout"] for row in rows} == set(accuracy.LAYOUTS)
    for row in rows:
        assert row["errors"]["fp32"]["normwise"] < 1e-6 < row["errors"]["tf32"]["normwise"]
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    text = (tmp_path / "accuracy.md").read_text()
    assert text.count("\n| ") == len(rows) + 1
    assert text.endswith("None.\n")
    assert "every promise kept" in capsys.readouterr().out
