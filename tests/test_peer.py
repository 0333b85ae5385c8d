"""The model of Inductor's own time, and the decisions it leads to, against what was measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastmm_op.arch import ARCHES, Card, arch_for
from fastmm_op.chains import FEW_ROWS
from fastmm_op.compile import decide, peer
from fastmm_op.compile.peer import Surroundings
from fastmm_op.plan import make_plan
from fastmm_op.problem import Operand, Problem, problem_of

RESULTS = Path(__file__).parents[1] / "benchmarks/results/NVIDIA_H200"
# The whole suite three times, twice beside Inductor: what was measured last counts.
NAMES = ("suite_2026-11-24.json", "suite_2026-11-25.json", "matmul.json")
RUNS = [json.loads((RESULTS / name).read_text()) for name in NAMES]
LATEST = {(row["case"], row["mode"]): row for run in RUNS for row in run["rows"]}
ALONE = Surroundings(graphs=True)
CARDS = {
    "NVIDIA_H100_80GB_HBM3": arch_for(Card((9, 0), 132, 3.352e12)),
    "NVIDIA_H200": arch_for(Card((9, 0), 132, 4.917e12)),
}


def problem(m, k, n, dtype="bf16", layout="NN", precision="tf32", batch=1, arch="sm_90") -> Problem:
    how = {"batch": batch, "dtype": dtype, "layout": layout, "precision": precision}
    return problem_of(m, k, n, **how, arch=ARCHES[arch])


def recorded(row: dict) -> Problem:
    return problem(*(row[key] for key in ("M", "K", "N", "dtype", "layout")), batch=row["batch"])


def as_measured(row: dict) -> bool:
    """Whether the row would still be computed as it was: one kernel is newer."""
    plan = make_plan(recorded(row))
    newer = any(step.kernel == "gemm_tf32_hopper" for step in plan.launches)
    return plan.strategy == row["strategy"] and not newer


EAGER = [row for (_, mode), row in LATEST.items() if mode == "eager" and as_measured(row)]


def verdict(row: dict) -> decide.Verdict:
    """The decision, given the peers that the row was measured against."""
    return decide.decide(recorded(row), replace(ALONE, pads="inductor" in row["peers"]))


def speedup(row: dict) -> float:
    """Measured: the faster of torch.matmul and Inductor, over ours."""
    peers = [row["peers"][name]["us"] for name in ("torch", "inductor") if name in row["peers"]]
    return min(peers) / row["us"]


def test_nothing_is_taken_that_was_measured_slower() -> None:
    taken = [row for row in EAGER if verdict(row).take]
    assert len(taken) > 30
    slower = {row["case"]: speedup(row) for row in taken if speedup(row) < 1}
    assert not slower


def test_decisions_agree_with_the_measurements() -> None:
    """In 95 % of the rows: taken where at least a tenth faster, else left alone."""
    wrong = [row["case"] for row in EAGER if verdict(row).take != (speedup(row) >= decide.MARGIN)]
    assert len(wrong) <= 0.05 * len(EAGER), wrong


def test_the_model_of_cublas() -> None:
    """Nine tenths within a third of torch.matmul; none a fifth slower, which would mislead most."""
    ratios = {}
    for row in EAGER:
        for name, precision in (("torch", "tf32"), ("torch-fp32", "fp32")):
            one, seconds = replace(recorded(row), precision=precision), 0.0
            if name in row["peers"]:
                seconds = row["peers"][name]["us"] * 1e-6
            if seconds > decide.HOST_SECONDS and not peer.memory_bound(one):
                ratios[row["case"], name] = peer.cublas_seconds(one) / seconds
    assert len(ratios) > 90
    assert max(ratios.values()) < 1.2
    off = {case: ratio for case, ratio in ratios.items() if ratio < 0.75}
    assert len(off) <= 0.1 * len(ratios), off


def eager_rows(card: str, file: str) -> list[dict]:
    rows = json.loads((RESULTS.parent / card / file).read_text())["rows"]
    return [row for row in rows if row["mode"] == "eager"]


@pytest.mark.parametrize("card", CARDS)
def test_later_runs(card) -> None:
    """In "tf32" and 16 bits, on another card too, for which only the memory differs.

    Nothing is taken that was slower; nine tenths of the decisions are right.
    """
    wrong, rows = [], eager_rows(card, "matmul.json")
    assert len(rows) > 120
    for row in rows:
        one = replace(recorded(row), arch=CARDS[card])
        assert make_plan(one).strategy == row["strategy"], row["case"]
        gain = row["peers"]["torch"]["us"] / row["us"]
        found = decide.decide(one, ALONE)
        assert not found.take or gain >= 1, (row["case"], found)
        if found.take != (gain >= decide.MARGIN):
            wrong.append(row["case"])
    assert len(wrong) <= 0.1 * len(rows), wrong


@pytest.mark.parametrize("card", CARDS)
def test_later_runs_in_fp32(card) -> None:
    wrong, rows = [], eager_rows(card, "matmul_fp32.json")
    for row in rows:
        one = replace(recorded(row), precision="fp32", arch=CARDS[card])
        assert make_plan(one).strategy == row["strategy"], row["case"]
        measured, take = row["peers"]["torch"]["us"], decide.decide(one, ALONE).take
        assert not take or measured >= row["us"], row["case"]
        if take != (measured >= decide.MARGIN * row["us"]):
            wrong.append(row["case"])
    assert len(wrong) <= 0.05 * len(rows), wrong


def test_a_large_c_of_a_short_k_is_taken() -> None:
    """Where cuBLAS was measured; not of fp32, of a longer K, a C in L2, a batch, or odd rows."""
    one = recorded(LATEST["kernelbench/32768x64x32768-NN-bf16", "eager"])
    assert peer.memory_bound(one)
    assert decide.decide(one, ALONE).take
    for other in (
        replace(one, K=65),
        replace(one, M=512),
        replace(one, batch=2),
        replace(one, N=32769),
        replace(one, arch=ARCHES["sm_89"]),
        replace(one, dtype="fp32", precision="fp32"),
    ):
        assert not peer.moves_slowly(other)


def test_few_rows_in_fp32_on_another_card() -> None:
    """The H100's, for which nothing but its memory differs from the H200's model."""
    card, ratios = "NVIDIA_H100_80GB_HBM3", {}
    for row in eager_rows(card, "matmul_fp32.json"):
        one = replace(recorded(row), precision="fp32", arch=CARDS[card])
        if 1 < one.M <= FEW_ROWS:
            measured = row["peers"]["torch"]["us"]
            ratios[row["case"]] = peer.cublas_seconds(one) * 1e6 / measured
    assert len(ratios) == 12
    assert all(0.8 < ratio < 1.2 for ratio in ratios.values()), ratios


def test_the_model_of_pad_mm() -> None:
    """Inductor's longest search on the seed workload, of which it chose to pad all three."""
    rows = {row["case"]: row for run in RUNS for row in run["rows"] if "inductor" in row["peers"]}
    assert len(rows) == 3
    for row in rows.values():
        seconds, how = peer.inductor_seconds(recorded(row), Surroundings(pads=True))
        assert how == "padded cuBLAS"
        assert seconds == pytest.approx(row["peers"]["inductor"]["us"] * 1e-6, rel=0.15)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_aligned_16_bit_products_stay_with_cublas(dtype, arch) -> None:
    for n in (1024, 4096, 8192):
        for layout in ("NN", "NT", "TN", "TT"):
            found = decide.decide(problem(n, n, n, dtype, layout, arch=arch), ALONE)
            assert not found.take, (n, layout, found)


@pytest.mark.parametrize("pads", [False, True])
def test_odd_16_bit_products_are_taken_unless_they_can_be_padded(pads) -> None:
    found = decide.decide(problem(4096, 4096, 2041), replace(ALONE, pads=pads, c_leaves=False))
    assert found.take is not pads
    assert found.why.endswith("padded cuBLAS: no clear win" if pads else "as fast as cuBLAS")


def test_gradients_of_aligned_weights_stay_with_cublas() -> None:
    """GPT-2's in bf16, which take cuBLAS 57 us on an H200, in tiles that fill the card."""
    for m, n in ((768, 3072), (3072, 768), (768, 2304), (768, 768)):
        one = problem(m, 8192, n, layout="TN")
        found = decide.decide(one, ALONE)
        assert not found.take, (m, n, found)
    seconds = peer.cublas_seconds(problem(3072, 8192, 768, layout="TN"))
    assert seconds == pytest.approx(57e-6, rel=0.15)


def test_what_padding_costs() -> None:
    """Copies of the operands unless their writers pad them; one of C if it leaves the graph."""
    odd = problem(4095, 4095, 4095)
    free = Surroundings(pads=True, a_made_here=True, b_made_here=True, c_leaves=False)
    base, how = peer.inductor_seconds(odd, free)
    assert how == "padded cuBLAS"
    one_copy = peer.copy_seconds(odd, 4095 * 4095)
    for change in ({"a_made_here": False}, {"b_made_here": False}, {"c_leaves": True}):
        seconds, _ = peer.inductor_seconds(odd, replace(free, **change))
        assert seconds == pytest.approx(base + one_copy), change


def test_only_sizes_known_when_compiling_are_padded() -> None:
    odd = problem(4095, 4095, 4095)
    wide = peer.padded(odd, (False, True, True))
    assert (wide.M, wide.N, wide.K) == (4095, 4096, 4096)
    assert (wide.a, wide.b) == (Operand(0, 4096, 1), Operand(0, 1, 4096))
    assert peer.padded(odd, (False, False, False)) == odd
    fp32 = peer.padded(problem(1, 5, 7, dtype="fp32", batch=3), (True, True, True))
    assert (fp32.M, fp32.N, fp32.K) == (1, 8, 8)
    assert (fp32.a, fp32.b) == (Operand(8, 8, 1), Operand(64, 1, 8))
    aligned = problem(64, 64, 64, layout="TN")
    assert peer.padded(aligned, (True, True, True)) == aligned


def test_alignment_is_the_worst_of_a_b_and_c() -> None:
    assert peer.alignment(problem(64, 64, 64)) == 16
    assert peer.alignment(problem(64, 64, 68)) == 8
    assert peer.alignment(problem(64, 66, 64)) == 4
    assert peer.alignment(problem(64, 64, 65, layout="NT")) == 2, "C alone"
    assert peer.alignment(problem(64, 64, 65, dtype="fp32")) == 4
    shifted = problem(64, 64, 64)
    assert peer.alignment(replace(shifted, a=replace(shifted.a, pointer_alignment=2))) == 2
    strided = replace(shifted, b=Operand(0, 2, 128))
    assert peer.alignment(strided) == 2, "no dimension is contiguous"


def test_small_and_thin_products_are_left_alone() -> None:
    small = problem(1021, 1031, 1033)
    assert "too small" in decide.decide(small, replace(ALONE, graphs=False)).why
    assert decide.decide(small, ALONE).take, "CUDA graphs replay it for nothing"
    assert "memory traffic" in decide.decide(problem(8, 4096, 11008), ALONE).why
    assert "memory traffic" in decide.decide(problem(1, 4097, 11009), ALONE).why
    assert decide.decide(problem(8, 4097, 11009), ALONE).take, "cuBLAS reads it by element"
    assert decide.decide(problem(8, 4096, 11008, "fp32", "NT", "fp32"), ALONE).take
    assert "memory traffic" in decide.decide(problem(8, 4096, 11008, "fp32"), ALONE).why, "in TF32"
    cached = problem(8, 1024, 1024, "fp32", "NT", "fp32")
    assert "memory traffic" in decide.decide(cached, ALONE).why, "nobody has measured it"
    assert "a size is zero" in decide.decide(problem(0, 5, 5), ALONE).why


def test_another_pass_over_c_counts() -> None:
    one = problem(4096, 4096, 4096, dtype="fp32")
    alone = decide.decide(one, ALONE)
    biased = decide.decide(one, replace(ALONE, extra_pass=True))
    assert biased.ours_seconds == alone.ours_seconds + decide.pass_seconds(one)
    assert biased.inductor_seconds == alone.inductor_seconds
