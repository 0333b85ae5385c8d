"""Does the search measure what it says, check before it times, and keep the fastest?"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the command's tables need rich")

import fastmm_op
from fastmm_op import __main__, cache, ops
from fastmm_op.arch import ARCHES
from fastmm_op.bench import runner, warm
from fastmm_op.choices import choices
from fastmm_op.cli import tune as command
from fastmm_op.cli import tune_report
from fastmm_op.plan import make_plan, write_plan
from fastmm_op.problem import Operand, Problem, problem_of
from fastmm_op.search import STAGES, label, legal, road, shortlist
from fastmm_op.shared_memory import shared_memory
from fastmm_op.tiles import Choice
from fastmm_op.timing import Timing
from oracle import assert_accurate

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SMALL = (9, 20, 11)


def problem(m, k, n, dtype="fp32", layout="NN", precision="tf32", arch="sm_89", batch=1) -> Problem:
    how = {"batch": batch, "dtype": dtype, "layout": layout, "precision": precision}
    return problem_of(m, k, n, **how, arch=ARCHES[arch])


PROBLEMS = [
    problem(m, k, n, dtype, layout, precision, arch, batch)
    for arch in ARCHES
    for m, k, n in [(1, 4097, 33), (300, 256, 128), (8205, 2949, 5921), (64, 40000, 64)]
    for layout, batch in (("NN", 1), ("TT", 3))
    for dtype, precision in [("fp32", "tf32"), ("fp32", "fp32"), ("fp32", "ieee"), ("bf16", "tf32")]
]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty cache that is switched on."""
    monkeypatch.setenv("FASTMM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTMM_NO_CACHE")
    return tmp_path / "cache"


# The space.


@pytest.mark.parametrize("stages", [(), STAGES])
def test_the_planners_choice_comes_first(stages) -> None:
    for p in PROBLEMS:
        everything = list(legal(p, stages))
        for top in (1, 5, None):
            found = shortlist(p, top, stages)
            assert found[0] == make_plan(p).choice
            assert len(set(found)) == len(found)
            assert set(found) <= set(everything)
            assert {road(c) for c in found} == {road(c) for c in choices(p)}
        assert set(found) == set(everything)


def test_the_best_by_the_model_are_in_a_shortlist() -> None:
    p = problem(8205, 2949, 5921, "bf16")
    ranked = shortlist(p, None)
    assert shortlist(p, 7)[:7] == ranked[:7]
    assert {c.pack_a for c in shortlist(p, 1)} == {True, False}


def test_stages_are_those_of_plain_triton_tiles_that_fit() -> None:
    tried = 0
    for p in PROBLEMS:
        own = set(choices(p))
        without_stages = {with_stages(c, 0) for c in own}
        others = set(legal(p, STAGES)) - own
        tried += len(others)
        for choice in others:
            assert choice.tile.kernel == "gemm"
            assert choice.tile.num_stages in STAGES
            assert shared_memory(p, choice) <= p.arch.shared_memory
            assert with_stages(choice, 0) in without_stages
        for choice in list(others)[:1]:
            (gemm,) = (s for s in write_plan(p, choice).launches if s.kernel == "gemm")
            assert gemm.num_stages == choice.tile.num_stages
    assert tried


def with_stages(choice: Choice, count: int) -> Choice:
    return dataclasses.replace(choice, tile=dataclasses.replace(choice.tile, num_stages=count))


def test_the_own_number_of_stages_is_not_tried_twice() -> None:
    p = problem(300, 256, 128)
    found = [c for c in legal(p, STAGES) if road(c) == road(make_plan(p).choice)]
    assert len(found) == len({dataclasses.astuple(c) for c in found})


# The largest tile of each kind, with the fewest stages and the most; others are smaller in every
# part.
@pytest.mark.compiled
@pytest.mark.parametrize(
    ("shape", "dtype", "precision", "arch"),
    [
        ((1000, 2000, 1000), "fp32", "tf32", "sm_90"),
        ((1000, 2000, 1000), "fp32", "fp32", "sm_89"),
        ((1001, 2001, 1001), "bf16", "tf32", "sm_89"),
        ((1000, 2000, 1001), "bf16", "tf32", "sm_90"),
    ],
)
def test_shared_memory_of_other_stages(shape, dtype, precision, arch) -> None:
    """The planner's sum bounds the compiler's: what it lets pass can be launched."""
    from fastmm_op.codegen import compile_launch

    p = problem(*shape, dtype, "NN", precision, arch)
    largest: dict[tuple, Choice] = {}
    for c in choices(p):
        if c.tile.kernel == "gemm" and c.split == 1:
            largest.setdefault(road(c), c)
    for choice in largest.values():
        ends = legal(p, (STAGES[0], STAGES[-1]))
        for other in (c for c in ends if with_stages(choice, c.tile.num_stages) == c):
            (step,) = (s for s in write_plan(p, other).launches if s.kernel == "gemm")
            compiled = compile_launch(p, step).metadata.shared
            assert compiled <= step.shared_memory <= p.arch.shared_memory, label(other)


def test_labels_say_what_differs() -> None:
    p = problem(64, 40000, 64, arch="sm_90")
    found = [label(c) for c in legal(p, STAGES)]
    assert len(set(found)) == len(found)
    assert label(make_plan(problem(1, 4097, 33)).choice).startswith("gemv 1x")


# Operands.


@pytest.mark.parametrize("layout", ["NN", "NT", "TN", "TT"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("sizes", [(5, 6, 7), (1, 6, 1), (5, 1, 7)], ids=str)
def test_operands_lie_as_the_problem_says(sizes, dtype, layout) -> None:
    launch = pytest.importorskip("fastmm_op.launch")
    from fastmm_op.bench.tune import operands

    usual = problem(*sizes, dtype, layout, batch=2)
    for p in (
        usual,
        dataclasses.replace(usual, batch=1, a=Operand(0, 9, 1), b=Operand(0, 1, 0)),
        dataclasses.replace(usual, a=dataclasses.replace(usual.a, pointer_alignment=8)),
        dataclasses.replace(usual, b=dataclasses.replace(usual.b, pointer_alignment=4)),
    ):
        a, b = operands(p, CPU)
        found = launch.describe(a, b, p.precision, p.arch)
        if sizes == (5, 6, 7) or p is usual:
            assert found == p
        assert (a.shape, b.shape) == ((p.batch, p.M, p.K), (p.batch, p.K, p.N))
        assert a.isfinite().all()
        assert a.std() > 0.3 or a.numel() == 1


# One search, with interpreted kernels and a clock that is told what to say.


class Clock:
    """Calls what it is given once, and claims the microseconds that a function gives its choice."""

    def __init__(self, us) -> None:
        self.us = us
        self.calls: list[tuple[Choice, float]] = []

    def __call__(self, fn, seconds) -> Timing:
        fn()
        choice = fn.__closure__[-1].cell_contents.plan.choice
        self.calls.append((choice, seconds))
        us = self.us(choice, seconds)
        return Timing(us, us, us, 10)


def searched(p: Problem, clock: Clock, found: list[Choice], advance=lambda: None):
    from fastmm_op.bench import tune

    return tune.search(p, found, CPU, clock, 1.0, advance)


@pytest.mark.interpreted
def test_the_fastest_wins() -> None:
    p = problem(*SMALL)
    found = shortlist(p, 6)
    fastest = found[-1]
    clock = Clock(lambda choice, seconds: 5.0 if choice == fastest else 10.0 + found.index(choice))
    steps = []
    result = searched(p, clock, found, lambda: steps.append(1))
    assert len(steps) == len(found)
    assert [m.choice for m in result.measurements] == found
    assert result.best.choice == fastest
    assert result.chosen.choice == make_plan(p).choice
    assert result.ratio == 2.0
    assert not result.failed
    assert all(0 < m.error <= result.allowed_error for m in result.measurements)


@pytest.mark.interpreted
def test_finalists_are_timed_again_for_longer_and_only_that_counts() -> None:
    """A lucky first round does not win, and the planner's own choice is always among them."""
    p = problem(*SMALL)
    found = shortlist(p, 7)
    lucky, steady = found[5], found[6]

    def us(choice: Choice, seconds: float) -> float:
        if choice == lucky:
            return 1.0 if seconds == 1.0 else 30.0
        return {steady: 2.0, found[0]: 100.0}.get(choice, 50.0)

    clock = Clock(us)
    result = searched(p, clock, found)
    again = [choice for choice, seconds in clock.calls if seconds == 3.0]
    assert len(again) == 5
    assert {found[0], lucky, steady} <= set(again)
    assert (result.best.choice, result.ratio) == (steady, 50.0)


@pytest.mark.interpreted
@pytest.mark.parametrize("way", ["wrong", "nothing", "raises"])
def test_only_what_is_right_is_timed(monkeypatch, way) -> None:
    from fastmm_op import running

    p = problem(*SMALL)
    found = shortlist(p, 3)
    broken = found[1]
    run_plan = running.run_plan

    def run(plan, a, b, out, *more):
        if plan.choice != broken:
            return run_plan(plan, a, b, out)
        if way == "raises":
            raise RuntimeError("no kernel image\nfor this card")
        if way == "wrong":
            run_plan(plan, a, b, out)
            out[0, 7, 3] += 1.0
        return [None]

    monkeypatch.setattr(running, "run_plan", run)
    clock = Clock(lambda choice, seconds: 1.0 + found.index(choice))
    result = searched(p, clock, found)
    assert broken not in [choice for choice, _ in clock.calls]
    (failed,) = result.failed
    assert failed.choice == broken
    assert failed.wrong == (way != "raises")
    expected = {"wrong": "worst at (item, row, column) (0, 7, 3)", "nothing": "values are NaN",
                "raises": "RuntimeError: no kernel image for this card"}[way]  # fmt: skip
    assert expected in failed.failure
    assert result.best.choice == found[0]


@pytest.mark.interpreted
def test_a_wrong_choice_of_the_planner_has_no_ratio(monkeypatch) -> None:
    from fastmm_op import running

    p = problem(*SMALL)
    found = shortlist(p, 2)
    run_plan = running.run_plan

    def run(plan, a, b, out, *more):
        started = run_plan(plan, a, b, out)
        if plan.choice == found[0]:
            out.zero_()
        return started

    monkeypatch.setattr(running, "run_plan", run)
    result = searched(p, Clock(lambda choice, seconds: 1.0), found)
    assert result.ratio is None
    assert result.best.choice in found[1:]
    monkeypatch.setattr(running, "run_plan", lambda plan, a, b, out, *more: [None])
    result = searched(p, Clock(lambda choice, seconds: 1.0), found)
    assert result.best is result.ratio is None


@pytest.mark.interpreted
def test_a_lost_device_ends_the_search(monkeypatch) -> None:
    from fastmm_op import running
    from fastmm_op.bench import tune

    def run(*args):
        raise RuntimeError("illegal memory access")

    def lost(device, text) -> None:
        raise runner.DeviceLost(text)

    monkeypatch.setattr(running, "run_plan", run)
    monkeypatch.setattr(tune, "require_device", lost)
    p = problem(*SMALL)
    with pytest.raises(runner.DeviceLost, match=r"gemm .*illegal memory access"):
        searched(p, Clock(lambda choice, seconds: 1.0), shortlist(p, 2))


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("dtype", "layout", "precision", "batch"),
    [("fp16", "NT", "tf32", 1), ("fp32", "TT", "ieee", 1), ("fp32", "NN", "fp32", 2)],
)
def test_kinds(dtype, layout, precision, batch) -> None:
    p = problem(*SMALL, dtype, layout, precision, batch=batch)
    found = shortlist(p, 2, (1,))
    result = searched(p, Clock(lambda choice, seconds: 1.0), found)
    assert not result.failed
    assert len(result.measurements) == len(found)


# The command.


def tune(*args: str, us=lambda choice, seconds: 10.0) -> int:
    argv = ["tune", *args]
    options = __main__.make_parser().parse_args(argv)
    return command.main(options, argv, Clock(us))


SHAPE = ("--shape", *map(str, SMALL))


@pytest.mark.interpreted
def test_the_best_is_kept_and_used(folder, tmp_path, capsys, monkeypatch) -> None:
    from fastmm_op import launch

    p = problem(*SMALL)
    fastest = shortlist(p, 4, STAGES)[-1]
    file = tmp_path / "folder" / "tune.json"
    code = tune(
        *SHAPE, "--top", "4", "--stages", "--json", str(file),
        us=lambda choice, seconds: 5.0 if choice == fastest else 10.0,
    )  # fmt: skip
    assert code == 0
    text = capsys.readouterr().out
    assert "within 5 % of the best found in 0 of 1 cases (0 %)" in text
    assert str(folder) in text
    # Recorded,
    found = json.loads(file.read_text())
    (row,) = found["rows"]
    assert row["case"] == "shape/9x20x11-NN-fp32-tf32"
    assert (row["chosen_us"], row["best_us"], row["ratio"]) == (10.0, 5.0, 2.0)
    assert (row["chosen"], row["best"]) == (label(make_plan(p).choice), label(fastest))
    assert [m["label"] for m in row["measurements"]] == [label(c) for c in shortlist(p, 4, STAGES)]
    assert found["search"] == {"top": 4, "stages": [1, 2, 3, 4], "seconds": 0.1}
    assert found["env"]["command"].startswith("python -m fastmm_op tune --shape 9 20 11")
    assert found["env"]["torch"] == torch.__version__
    assert (found["as_good_share"], found["missing"]) == (0.0, [])
    # explained,
    assert __main__.main(["explain", *SHAPE]) == 0
    assert "from the cache of tuned choices: 5 us" in capsys.readouterr().out
    assert __main__.main(["explain", *SHAPE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["tuned_us"] == 5.0
    assert __main__.main(["explain", *SHAPE, "--arch", "sm_89", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["tuned_us"] is None
    # counted,
    assert __main__.main(["doctor", "--json"]) == 0
    tuned = json.loads(capsys.readouterr().out)["tuned"]
    assert (tuned["path"], tuned["valid"], tuned["broken"]) == (str(folder), 1, 0)
    # and used.
    monkeypatch.setattr(launch, "_calls", {})
    a, b = torch.randn(SMALL[:2]), torch.randn(SMALL[1:])
    assert_accurate(fastmm_op.matmul(a, b), a, b)
    (call,) = launch._calls.values()
    assert call.plan == write_plan(p, fastest)


@pytest.mark.interpreted
def test_the_planner_is_credited(folder, capsys) -> None:
    """Slower by 5 % is as good, by 6 % is not."""
    p = problem(*SMALL)
    first = make_plan(p).choice
    for slower, good in ((10.5, 1), (10.6, 0)):

        def us(choice, seconds, slower=slower):
            return slower if choice == first else 10.0

        assert tune(*SHAPE, "--top", "2", us=us) == 0
        assert f"in {good} of 1 cases" in capsys.readouterr().out
    assert tune(*SHAPE, "--top", "2") == 0
    assert "the same" in capsys.readouterr().out


@pytest.mark.interpreted
def test_every_choice_on_request(folder, tmp_path) -> None:
    file = tmp_path / "tune.json"
    assert tune("--shape", "5", "6", "7", "--all", "--json", str(file)) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert len(row["measurements"]) == len(list(choices(problem(5, 6, 7))))


@pytest.mark.interpreted
def test_what_is_measured_is_compiled_first(folder, monkeypatch) -> None:
    """On a card, if other processes are to do it: every choice of every case."""
    work = []
    monkeypatch.setattr(warm, "compile_all", lambda *args: work.append(args))
    options = __main__.make_parser().parse_args(
        ["tune", *SHAPE, "--top", "2", "--compile-processes", "3"]
    )
    cases = command.cases_of(options)
    cuda = torch.device("cuda", 0)
    tuner = command.Tuner(options, cuda, ARCHES["sm_90"], "a card", Clock(None), {})
    p = cases[0].problem(ARCHES["sm_90"])
    found = shortlist(p, 2)
    tuner.compile_first([(cases[0], found)])
    assert work == [([(p, write_plan(p, choice)) for choice in found], cuda, 3)]
    assert tune(*SHAPE, "--top", "1", "--compile-processes", "3") == 0
    assert len(work) == 1, "nothing is compiled for a CPU"


@pytest.mark.interpreted
def test_nothing_is_kept_where_the_cache_is_off(folder, monkeypatch, capsys) -> None:
    monkeypatch.setenv("FASTMM_NO_CACHE", "1")
    assert tune(*SHAPE, "--top", "1") == 0
    assert "Nothing was kept" in capsys.readouterr().out
    assert not folder.exists()


@pytest.mark.interpreted
def test_what_cannot_be_kept_is_said(folder, capsys) -> None:
    folder.write_text("a file is in the way")
    with pytest.warns(UserWarning, match="cannot keep"):
        assert tune(*SHAPE, "--top", "1") == 1
    assert "NOT kept: shape/9x20x11" in capsys.readouterr().out


@pytest.mark.interpreted
def test_wrong_results_are_a_failure(folder, monkeypatch, capsys) -> None:
    from fastmm_op import running

    monkeypatch.setattr(running, "run_plan", lambda plan, a, b, out, *more: [None])
    assert tune(*SHAPE, "--top", "1") == 1
    text = capsys.readouterr().out
    assert "FAILED shape/9x20x11-NN-fp32-tf32: gemm" in text
    assert "values are NaN" in text
    assert "0 of 1 cases" in text
    assert not folder.exists()


@pytest.mark.interpreted
@pytest.mark.parametrize("trouble", ["memory", "lost", "budget"])
def test_a_run_that_is_cut_short_leaves_what_it_has(folder, tmp_path, monkeypatch, trouble) -> None:
    from fastmm_op.bench import tune as core

    search = core.search
    cases = []

    def troubled(p, *args):
        cases.append(p)
        if len(cases) == 2 and trouble == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1 TB")
        if len(cases) == 2 and trouble == "lost":
            raise runner.DeviceLost("illegal access")
        return search(p, *args)

    monkeypatch.setattr(core, "search", troubled)
    file = tmp_path / "tune.json"
    shapes = ("--shape", "5", "6", "7", "--shape", "6", "7", "8", "--shape", "7", "8", "9")
    options = ("--budget", "1e-9") if trouble == "budget" else ()
    code = tune(*shapes, *options, "--top", "1", "--json", str(file))
    found = json.loads(file.read_text())
    done, missing = len(found["rows"]), len(found["missing"])
    assert (code, done, missing) == {"memory": (1, 3, 0), "lost": (1, 1, 2), "budget": (0, 0, 3)}[
        trouble
    ]
    if trouble == "memory":
        assert found["rows"][1]["failed"] == "CUDA out of memory."
        assert found["as_good_share"] == 2 / 3
    elif trouble == "lost":
        assert found["stopped"] == "device lost at shape/6x7x8-NN-fp32-tf32: illegal access"
    else:
        assert found["stopped"] == "budget of 1e-09 s spent"
        assert found["as_good_share"] is None


def test_the_suite_and_its_groups() -> None:
    def cases(*args: str):
        return command.cases_of(__main__.make_parser().parse_args(["tune", *args]))

    assert {c.group for c in cases("--suite", "seed", "squares")} == {"seed", "squares"}
    assert len(cases("--suite")) > 100
    assert {c.precision for c in cases("--suite", "--precision", "ieee")} == {
        "ieee",
        "bf16",
        "fp16",
    }
    mixed = cases(*SHAPE, "--dtype", "fp16", "--layout", "NT", "--batch", "2", "--suite", "seed")
    assert mixed[0].name == "shape/b2x9x20x11-NT-fp16"
    assert mixed[0].problem(ARCHES["sm_80"]) == problem(*SMALL, "fp16", "NT", arch="sm_80", batch=2)
    assert len(mixed) == 4
    two = cases(*SHAPE, "--shape", "1", "2", "3")
    assert [(c.M, c.K, c.N) for c in two] == [SMALL, (1, 2, 3)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "nothing to tune"),
        (["--suite", "flying"], "no group 'flying'"),
        (["--shape", "1", "2"], "expected 3 arguments"),
        (["--shape", "1", "0", "3"], "must be at least 1"),
        ([*SHAPE, "--top", "0"], "must be at least 1"),
        ([*SHAPE, "--top", "3", "--all"], "not allowed with"),
        ([*SHAPE, "--seconds", "-1"], "'-1' is not a positive number"),
        ([*SHAPE, "--budget", "nan"], "'nan' is not a positive number"),
        ([*SHAPE, "--precision", "fp8"], "invalid choice: 'fp8'"),
        ([*SHAPE, "--json"], "expected one argument"),
    ],
)
def test_bad_arguments_end_with_code_2(capsys, args, message) -> None:
    try:
        code = __main__.main(["tune", *args])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available() or ops.INTERPRETED, reason="there is a device here")
def test_without_a_device_nothing_is_measured(capsys) -> None:
    assert __main__.main(["tune", *SHAPE]) == 1
    assert "nothing to measure on" in capsys.readouterr().out


def test_a_table_of_all_outcomes() -> None:
    measured = {"label": "gemm", "failed": None, "wrong": False}
    failed = measured | {"failed": "RuntimeError: no", "wrong": False}
    good = {"case": "good", "chosen": "x", "chosen_us": 1.0, "best": "x", "best_us": 1.0,
            "ratio": 1.0, "measurements": [measured, failed]}  # fmt: skip
    none = {"case": "none", "failed": "out of memory"}
    assert tune_report.share([good, none]) == 0.5
    assert not tune_report.went_wrong(good)
    assert tune_report.went_wrong(none)
    assert tune_report.went_wrong(good | {"measurements": [failed | {"wrong": True}]})
    assert tune_report.failures(good) == ["good: gemm: RuntimeError: no"]
    assert tune_report.failures(none) == ["none: out of memory"]


@pytest.mark.interpreted
def test_a_real_run_is_found_by_the_next_process(folder) -> None:
    """Nothing replaced: the interpreter's kernels, the wall clock, two processes."""

    def run(*args: str) -> str:
        done = subprocess.run(
            [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=300,
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    text = run("-m", "fastmm_op", "tune", "--shape", "1", "300", "3", "--all", "--seconds", "0.02")
    assert "of 1 cases" in text
    check = (
        "import torch, fastmm_op; from fastmm_op import cache, launch; "
        "a, b = torch.randn(1, 300), torch.randn(300, 3); c = fastmm_op.matmul(a, b); "
        "(call,) = launch._calls.values(); "
        "p = launch.describe(a[None], b[None], 'tf32', launch.INTERPRETED_ARCH); "
        "assert call.plan.choice == cache.lookup(p, launch.card_name(-1)).choice; "
        "assert torch.allclose(c, a @ b, rtol=1e-4, atol=1e-4)"
    )
    run("-c", check)


@pytest.mark.gpu
def test_a_real_search_on_the_gpu(folder, tmp_path, monkeypatch) -> None:
    from fastmm_op import launch

    file = tmp_path / "tune.json"
    shape = (1021, 1031, 1033)
    args = ["tune", "--shape", *map(str, shape), "--top", "8", "--stages", "--seconds", "0.02"]
    failures = []
    compile_all = warm.compile_all
    monkeypatch.setattr(warm, "compile_all", lambda *args: failures.append(compile_all(*args)))
    assert __main__.main([*args, "--compile-processes", "2", "--json", str(file)]) == 0
    assert failures == [0]
    (row,) = json.loads(file.read_text())["rows"]
    assert all(m["failed"] is None for m in row["measurements"])
    assert 1 <= row["ratio"] < math.inf
    assert row["best_us"] > 1
    monkeypatch.setattr(launch, "_calls", {})
    a, b = torch.randn(shape[:2], device="cuda"), torch.randn(shape[1:], device="cuda")
    assert_accurate(fastmm_op.matmul(a, b), a, b)
    (call,) = launch._calls.values()
    assert label(call.plan.choice) == row["best"]
    index = a.get_device()
    p = launch.describe(a[None], b[None], "tf32", launch.device_arch(index))
    assert cache.lookup(p, launch.card_name(index)).us == row["best_us"]
