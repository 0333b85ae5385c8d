"""The benchmark and its report, on tiny shapes with a timer that does not measure."""

import json
from collections import Counter

import pytest
import torch

pytest.importorskip("rich", reason="the benchmark's progress needs rich")

from benchmarks import bench_matmul, report
from fastmm_op import ops, timing
from fastmm_op.arch import ARCHES
from fastmm_op.bench import contenders, environment, runner, session, summary, warm
from fastmm_op.bench.cases import SUITE, Case, load_cases
from fastmm_op.plan import make_plan
from fastmm_op.timing import Timing

CPU = torch.device("cpu")
TINY = {
    "kernelbench_level1_fp32": [
        {"id": 8, "M": 33, "K": 29, "N": 21, "layout": "NN", "seed": True},
        {"id": 3, "batch": 3, "M": 5, "K": 6, "N": 7, "layout": "NN"},
        {"id": 10, "fold": [2, 4], "M": 8, "K": 9, "N": 10, "layout": "NN"},
        {"id": 18, "M": 8, "K": 9, "N": 10, "layout": "TT"},
    ],
    "odd_sweep": {"dtypes": ["fp32", "bf16", "fp16"], "M": 16, "K": 16, "N": [15, 16]},
    "gpt2_vocab": [{"M": 8, "K": 7, "N": 57, "layout": "NT"}],
    "odd_rows": {"M": [1, 2], "K": 100, "N": 10, "layout": "TN", "dtypes": ["bf16"]},
    "skinny": {"M": [1], "KN": [[16, 17]], "layout": ["NN", "NT"], "dtypes": ["fp32", "bf16"]},
    "aligned_squares": {"n": [16], "dtypes": ["fp32", "fp16", "bf16"]},
}
ROW_KEYS = [
    "case", "group", "M", "K", "N", "batch", "layout", "dtype", "precision", "mode", "us", "us_p20",
    "us_p80", "tflops", "limit_us", "limit_fraction", "error", "strategy", "peers",
]  # fmt: skip
ENV_KEYS = [
    "gpu", "driver", "torch", "triton", "python", "commit", "date", "command",
    "copy_bandwidth_bytes_per_s", "matmul_ceiling_flops", "host_us",
]  # fmt: skip
CEILINGS = {
    "copy_bandwidth_bytes_per_s": 1e12,
    "matmul_ceiling_flops": dict.fromkeys(("tf32", "fp32", "ieee", "fp16", "bf16"), 1e14),
}

# Triton's interpreter truncates where it should round fp32 to bf16, and the benchmark notices.
INACCURATE = {"bf16"} if ops.INTERPRETED else set()


class FakeTimer:
    """Calls the function once and claims ten microseconds."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, fn, seconds=0.2) -> Timing:
        fn()
        self.calls += 1
        return Timing(10.0, 9.0, 12.0, 10)


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "suite.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture
def no_compiler(monkeypatch):
    """torch.compile gives the function back: compilation has tests of its own."""
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)


def make_runner(timer=None) -> runner.Runner:
    return runner.Runner(CPU, CEILINGS, 0.1, timer or FakeTimer())


# cases


def test_the_suite_expands_to_its_groups():
    cases = load_cases(SUITE)
    assert [c.dtype for c in cases[:3]] == ["fp32", "bf16", "fp16"]
    assert all((c.M, c.K, c.N) == (8205, 2949, 5921) for c in cases[:3])
    assert Counter(c.group for c in cases) == {
        "seed": 3, "kernelbench": 20, "gpt2_vocab": 6, "squares": 15, "odd_sweep": 42,
        "skinny": 32, "odd_rows": 8,
    }  # fmt: skip
    assert len({c.name for c in cases}) == len(cases)
    assert {c.precision for c in cases} == {"tf32", "bf16", "fp16"}
    assert {c.precision for c in load_cases(SUITE, "ieee")} == {"ieee", "bf16", "fp16"}


def test_inputs_have_the_cases_shapes_and_strides():
    a, b = Case("g", 4, 5, 6, "fp32", "tf32", "TT").inputs(CPU)
    assert (a.shape, a.stride()) == ((4, 5), (1, 4))
    assert (b.shape, b.stride()) == ((5, 6), (1, 5))
    a, b = Case("g", 4, 5, 6, "bf16", "bf16", "TN", batch=3).inputs(CPU)
    assert (a.shape, a.stride()) == ((3, 4, 5), (20, 1, 4))
    assert (b.shape, b.stride(), b.dtype) == ((3, 5, 6), (30, 6, 1), torch.bfloat16)
    folded = Case("g", 8, 5, 6, "fp16", "fp16", fold=(2, 4))
    a, b = folded.inputs(CPU)
    assert (a.shape, b.shape) == ((2, 4, 5), (5, 6))
    again, _ = folded.inputs(CPU)
    assert torch.equal(a, again)


# one case


@pytest.mark.usefixtures("no_compiler")
def test_rows_follow_the_schema():
    case = Case("seed", 33, 29, 21, "fp32", "tf32")
    rows = make_runner().run(case, {"torch", "inductor", "seed-style"})
    assert [row["mode"] for row in rows] == ["eager", "compiled"]
    row = rows[0]
    assert set(ROW_KEYS) <= set(row)
    assert (row["us"], row["us_p20"], row["us_p80"]) == (10.0, 9.0, 12.0)
    assert row["tflops"] == pytest.approx(2 * 33 * 29 * 21 / 10 / 1e6, abs=5e-4)
    nbytes = 4 * (33 * 29 + 29 * 21 + 33 * 21)
    assert row["limit_us"] == pytest.approx(max(case.flops / 1e14, nbytes / 1e12) * 1e6, abs=5e-4)
    expected = {"torch", "torch-fp32", "inductor"} | ({"seed-style"} if ops.INTERPRETED else set())
    assert set(row["peers"]) == expected
    assert all(peer["us"] == 10.0 and peer["error"] < 1e-3 for peer in row["peers"].values())
    assert "failed" not in row


@pytest.mark.parametrize("case", [
    Case("kernelbench", 5, 6, 7, "fp32", "ieee", batch=3),
    Case("kernelbench", 8, 9, 10, "fp16", "fp16", fold=(2, 4)),
    Case("skinny", 1, 16, 17, "fp16", "fp16", "NT"),
], ids=lambda case: case.name)  # fmt: skip
def test_every_kind_of_case_passes(case):
    (row,) = make_runner().run(case, {"torch", "seed-style"})
    assert "failed" not in row
    assert set(row["peers"]) == {"torch"}


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(contenders, "matmul", lambda a, b, precision: (a @ b) * 1.01)
    timer = FakeTimer()
    (row,) = make_runner(timer).run(Case("squares", 8, 8, 8, "fp32", "tf32"), {"torch"})
    assert timer.calls == 2  # torch and torch-fp32
    assert row["us"] is None
    assert row["wrong"] is True
    assert "exceeds" in row["failed"]
    assert session.exit_code({"rows": [row]}) == 1
    assert "FAILED" in summary.line(row)
    assert len(summary.line(row)) <= 118


def test_a_peers_trouble_stays_its_own(monkeypatch):
    def broken():
        raise RuntimeError("no choices\nexist")

    monkeypatch.setattr(contenders, "inductor", broken)
    case = Case("squares", 8, 8, 8, "fp16", "fp16")
    (row,) = make_runner().run(case, {"torch", "inductor"})
    assert row["us"] == 10.0
    assert row["peers"]["inductor"]["failed"] == "RuntimeError: no choices exist"
    assert session.exit_code({"rows": [row]}) == 0
    monkeypatch.setattr(contenders, "inductor", lambda: lambda a, b: a @ b + 1)
    (row,) = make_runner().run(case, {"torch", "inductor"})
    assert row["peers"]["inductor"]["us"] is None
    assert session.exit_code({"rows": [row]}) == 1
    assert summary.failures([row])[0].startswith("squares/8x8x8-NN-fp16: inductor: error")


@pytest.mark.skipif(not ops.INTERPRETED, reason="its kernel runs interpreted here")
def test_the_seed_style_kernel_is_right():
    from fastmm_op.bench.seed_style import seed_style_matmul

    a, b = torch.randn(130, 70), torch.randn(129, 70).mT
    torch.testing.assert_close(seed_style_matmul(a, b), a @ b, atol=1e-4, rtol=1e-4)


# the whole program


def run_bench(tmp_path, suite, *args: str) -> tuple[int, dict]:
    out = tmp_path / "results" / "cpu" / "matmul.json"
    argv = ["--device", "cpu", "--suite", str(suite), "--out", str(out), *args]
    code = bench_matmul.main(argv, FakeTimer())
    return code, json.loads(out.read_text())


@pytest.mark.uninterpreted
@pytest.mark.usefixtures("no_compiler")
def test_a_run_writes_every_case(tmp_path, suite, capsys):
    code, results = run_bench(tmp_path, suite)
    failed = {row["dtype"] for row in results["rows"] if "failed" in row}
    assert failed <= INACCURATE
    assert code == int(bool(failed))
    assert set(ENV_KEYS) <= set(results["env"])
    assert results["env"]["gpu"] == "cpu"
    assert "--device cpu" in results["env"]["command"]
    assert results["env"]["host_us"]["aligned"]["fastmm"] > 0
    names = [case.name for case in load_cases(suite)]
    assert [row["case"] for row in results["rows"] if row["mode"] == "eager"] == names
    assert sum(row["mode"] == "compiled" for row in results["rows"]) == 3
    assert "missing" not in results
    assert "inductor" in results["rows"][0]["peers"]
    text = capsys.readouterr().out
    assert "geometric mean" in text
    table = text[text.index("case (") : text.index("tf32: ")]
    lines = [line for line in table.splitlines() if not line.endswith("FAILED")]
    assert max(map(len, lines)) <= 110


@pytest.mark.uninterpreted
@pytest.mark.usefixtures("no_compiler")
def test_options_narrow_the_run(tmp_path, suite):
    args = ("--group", "squares,skinny", "--filter", "fp32", "--peers", "torch")
    _, results = run_bench(tmp_path, suite, *args, "--inductor-groups", "none")
    rows = results["rows"]
    assert {row["group"] for row in rows} == {"squares", "skinny"}
    assert {row["precision"] for row in rows} == {"tf32"}
    assert {name for row in rows for name in row["peers"]} == {"torch", "torch-fp32"}
    _, results = run_bench(tmp_path, suite, "--group", "gpt2_vocab", "--precision", "fp32")
    assert {row["precision"] for row in results["rows"]} == {"fp32", "bf16"}


@pytest.mark.uninterpreted
def test_a_spent_budget_says_what_is_missing(tmp_path, suite, capsys):
    code, results = run_bench(tmp_path, suite, "--budget", "1e-9")
    assert code == 0
    assert results["rows"] == []
    assert len(results["missing"]) == len(load_cases(suite))
    assert "budget" in results["stopped"]
    assert "not run: " in capsys.readouterr().out


def test_other_processes_compile_first(monkeypatch, capsys):
    """What each case launches on the card, and a plan that fails is left to the run."""
    pytest.importorskip("fastmm_op.running")
    arch = ARCHES["sm_90"]
    compiled = []

    def compile_plan(problem, plan):
        if problem.K == 5:
            raise RuntimeError("no")
        compiled.append((problem, plan))

    def compile_here(work, device, processes):
        assert processes == 2
        return sum(not warm.compiles(*item) for item in work)

    monkeypatch.setattr("fastmm_op.running.compile_plan", compile_plan)
    monkeypatch.setattr(warm, "compile_all", compile_here)
    monkeypatch.setattr(environment, "device_arch", lambda device: arch)
    cases = [Case("g", 4, k, 6, "fp32", "tf32") for k in (4, 5, 6)]
    run = session.Session(cases, [], [], 0.1, None, "", compile_processes=2)
    run.compile_first(torch.device("cuda", 0))
    assert "compiled what 3 cases launch; 1 failed" in capsys.readouterr().out
    problems = [case.problem(arch) for case in (cases[0], cases[2])]
    assert compiled == [(problem, make_plan(problem)) for problem in problems]


@pytest.mark.uninterpreted
def test_a_lost_device_ends_the_run(tmp_path, suite, monkeypatch):
    def lost(self, case, peers):
        raise runner.DeviceLost("fastmm: illegal access")

    monkeypatch.setattr(runner.Runner, "run", lost)
    code, results = run_bench(tmp_path, suite, "--group", "squares")
    assert code == 1
    assert len(results["missing"]) == 3
    assert "device lost at squares/" in results["stopped"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--filter", "nothing"], "no case contains 'nothing'"),
        (["--group", "circles"], "no group 'circles'"),
        (["--inductor-groups", "circles"], "no group 'circles'"),
        (["--peers", "torch,numpy"], "unknown peer 'numpy'"),
        (["--budget", "-1"], "not a positive number"),
        (["--compile-processes", "-1"], "-1 is negative; 0 or more processes"),
        (["--seconds-per-case", "x"], "not a positive number"),
        (["--precision", "fp8"], "invalid choice: 'fp8'"),
        (["--device", "toaster"], "argument --device"),
        (["--suite", "nowhere.json"], "argument --suite"),
    ],
)
def test_bad_arguments_end_with_code_2(capsys, args, message):
    with pytest.raises(SystemExit) as stop:
        bench_matmul.main(args)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_commit_can_be_told(monkeypatch):
    monkeypatch.setenv("FASTMM_COMMIT", "abc123")
    assert environment.commit() == "abc123"
    assert environment.folder_name("NVIDIA GeForce RTX 4090 (x)") == "NVIDIA_GeForce_RTX_4090_x"


# timing


def test_timings_are_medians_of_real_calls():
    timed = timing.summarize([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert (timed.us, timed.us_p20, timed.us_p80, timed.repetitions) == (3.5, 2.0, 5.0, 6)
    calls = []
    timed = timing.Timer(CPU)(lambda: calls.append(1), 1e-4)
    assert timed.repetitions >= timing.MIN_REPETITIONS
    assert len(calls) > timed.repetitions
    assert 0 <= timed.us_p20 <= timed.us <= timed.us_p80
    assert timing.host_microseconds(lambda: None, CPU, calls=10, rounds=2) < 1000


def tf32_settings() -> tuple[str | bool, ...]:
    """All that PyTorch says of it; the older settings refuse while the newer one differs."""
    settings = [torch.backends.cuda.matmul.fp32_precision]
    for setting in (
        lambda: torch.backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision,
    ):
        try:
            settings.append(setting())
        except RuntimeError:
            settings.append("refuses")
    return tuple(settings)


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("older", [None, False, True])
@pytest.mark.parametrize("newer", [None, "ieee", "tf32"])
def test_the_tf32_setting_comes_back(older, newer, allowed):
    """However the user made it: by the older API, by the newer, or by both, at odds."""
    if older is not None:
        torch.backends.cuda.matmul.allow_tf32 = older
    if newer is not None:
        torch.backends.cuda.matmul.fp32_precision = newer
    before = tf32_settings()

    def fail() -> None:
        with timing.torch_tf32(allowed):
            assert torch.backends.cuda.matmul.allow_tf32 is allowed
            assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if allowed else "ieee")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert tf32_settings() == before


# summary and report


def synthetic_row(name: str, us: float, torch_us: float, **more) -> dict:
    row = {
        "case": f"squares/{name}", "group": "squares", "precision": "bf16", "mode": "eager",
        "us": us, "limit_fraction": 0.5, "error": 1.6e-3, "strategy": "direct",
        "peers": {"torch": {"us": torch_us, "error": 1.6e-3}},
    }  # fmt: skip
    return row | more


@pytest.fixture
def results():
    env = dict.fromkeys(ENV_KEYS, "x") | CEILINGS
    host = {"shape": [256] * 3, "dtype": "fp32", "strategy": "direct", "fastmm": 12.0, "torch": 9.0}
    env |= {"gpu": "Fake <1>", "date": "2026-01-02T03:04:05+00:00", "host_us": {"aligned": host}}
    rows = [
        synthetic_row("fast", 10.0, 40.0),
        synthetic_row("slow", 20.0, 10.0),
        synthetic_row("broken", None, 10.0, limit_fraction=None, failed="error 1 exceeds 0.1"),
        synthetic_row("both", 5.0, 40.0, group="seed", mode="compiled"),
    ]
    rows[0]["peers"]["inductor"] = {"us": 20.0, "error": 1.6e-3}
    return {"env": env, "rows": rows, "missing": ["odd_rows/x"]}


def test_ratios_means_and_losses(results):
    fast, slow, broken, _ = results["rows"]
    assert summary.best_peer(fast) == ("inductor", 20.0)
    assert (summary.ratio(fast, "torch"), summary.ratio(fast, "best")) == (4.0, 2.0)
    assert summary.ratio(fast, "seed-style") is None
    assert summary.ratio(broken, "best") is None
    assert [row["case"] for row in summary.losing(results["rows"])] == [slow["case"]]
    means = summary.means(results["rows"])["bf16"]
    assert means["cases"] == 3
    assert means["torch"] == pytest.approx((4.0 * 0.5) ** 0.5)
    assert means["best"] == pytest.approx((2.0 * 0.5) ** 0.5)
    assert "squares/broken: fastmm: error 1 exceeds 0.1" in summary.text(results)


def test_report_writes_a_page_and_what_readme_shows_of_it(tmp_path, results):
    folder = tmp_path / "results" / "Fake_1"
    folder.mkdir(parents=True)
    (folder / "matmul.json").write_text(json.dumps(results))
    readme, page = tmp_path / "README.md", folder / "matmul.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    args = ["--results", str(tmp_path / "results"), "--readme", str(readme)]
    assert report.main([*args, "--check"]) == 1
    assert report.main([*args, "--no-plot"]) == 0
    assert report.main([*args, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "### Fake <1>" in text
    assert "[benchmarks/results/Fake_1/matmul.md](benchmarks/results/Fake_1/matmul.md)" in text
    tables = (
        "| slow | direct | 20.0 | 10.0 | - | **0.50** | **0.50** | 50 % | 1.6e-03 |",
        "| fast | direct | 10.0 | 40.0 | 20.0 | 4.00 | 2.00 | 50 % | 1.6e-03 |",
        "| broken | direct | failed |",
        "aligned fp32 256x256x256 (direct): 12.0 (torch.mm 9.0)",
        "![Time relative to the best peer, and fraction of the limit](matmul.png)",
    )
    for part in ("# Fake <1>", *tables):
        assert part in page.read_text()
    assert not any(part in text for part in tables), "README has none of their groups"
    for part in ("- 0.50x `squares/slow` (best: torch)", "Not run: 1 cases"):
        assert part in text
        assert part in page.read_text()
    page.write_text(page.read_text() + "by hand")
    assert report.main([*args, "--check"]) == 1


def test_report_shows_the_seed_workload_in_readme(results):
    rows = [row | {"group": "seed"} for row in results["rows"]]
    assert "| slow | direct | 20.0 |" in report.section(results | {"rows": rows}, "page.md")


def test_report_without_results_or_markers(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}{report.END}")
    assert report.main(["--results", str(tmp_path), "--readme", str(readme)]) == 0
    assert report.EMPTY in readme.read_text()
    readme.write_text("no markers")
    with pytest.raises(SystemExit) as stop:
        report.main(["--results", str(tmp_path), "--readme", str(readme)])
    assert stop.value.code == 2
    assert report.BEGIN in capsys.readouterr().err


def test_report_draws_a_plot(tmp_path, results):
    pytest.importorskip("matplotlib")
    path = tmp_path / "matmul.png"
    report.plot(results, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    report.plot(results | {"rows": []}, path)


def test_readme_is_in_step_with_the_results():
    assert report.main(["--check"]) == 0
