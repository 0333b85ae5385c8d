"""Reading Nsight Compute's tables, and telling people what it lacks."""

import subprocess

import pytest
import torch

from benchmarks import ncu_report
from benchmarks.ncu_report import METRICS, STALL_SHARE, ProfilingError, parse

# A sample of the format, written by hand after what `ncu --csv --page raw --metrics ...` prints:
# its messages, a line of names, one of units, one a launch, thousands with commas. The numbers are
# made up; they are no record of a run.
NAMES = [
    "ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream",
    "Block Size", "Grid Size", "Device", "CC", *sorted(METRICS.values()),
]  # fmt: skip
UNITS = [""] * 11 + ["%", "ns", "", "%", "%", "%", "cycle", "inst"]


def line(cells: list[str]) -> str:
    return ",".join(f'"{cell}"' for cell in cells)


def launch(number: int, kernel: str, grid: str, **metrics: str) -> str:
    fixed = [str(number), "4242", "python3.12", "127.0.0.1", kernel, "1", "7"]
    fixed += ["(256, 1, 1)", f"({grid}, 1, 1)", "0", "9.0"]
    found = {name: metrics.get(label, "1.00") for label, name in METRICS.items()}
    found["launch__grid_size"] = grid
    return line(fixed + [found[name] for name in sorted(found)])


SAMPLE = "\n".join(
    [
        "==PROF== Connected to process 4242 (/usr/bin/python3.12)",
        '==PROF== Profiling "seed_style_kernel" - 0: 0%....50%....100% - 9 passes',
        "==PROF== Disconnected from process 4242",
        line(NAMES),
        line(UNITS),
        launch(
            0, "seed_style_kernel", "3,055",
            **{
                "SM throughput, % of peak": "31.90",
                "L2 hit rate, %": "66.70",
                "stalled on memory, warps an issue": "1.20",
                "warp latency, cycles an issue": "4.80",
                "duration, ns": "3,354,016",
            },
        ),
        launch(1, "pack_rows_kernel", "8,205", **{"warp latency, cycles an issue": "n/a"}),
        launch(
            2, "gemm_hopper_kernel", "132",
            **{
                "stalled on memory, warps an issue": "0.30",
                "warp latency, cycles an issue": "3.00",
            },
        ),
    ]
)  # fmt: skip


def test_a_table_is_read_by_its_names():
    seed, pack, gemm = parse(SAMPLE)
    assert [p.kernel for p in (seed, pack, gemm)] == [
        "seed_style_kernel", "pack_rows_kernel", "gemm_hopper_kernel",
    ]  # fmt: skip
    assert seed.values["grid size"] == 3055
    assert seed.values["SM throughput, % of peak"] == 31.9
    assert seed.values["L2 hit rate, %"] == 66.7
    assert seed.values["duration, ns"] == 3354016
    assert seed.values[STALL_SHARE] == pytest.approx(25)
    assert pack.values["warp latency, cycles an issue"] is None
    assert pack.values[STALL_SHARE] is None


def test_columns_may_come_in_any_order_and_be_missing():
    names = [NAMES[4], NAMES[0], "launch__grid_size"]
    rows = [line(names), line(["", "", ""]), line(["gemm_kernel", "0", "12"])]
    (found,) = parse("\n".join(rows))
    assert found.kernel == "gemm_kernel"
    assert found.values["grid size"] == 12
    assert found.values["L2 hit rate, %"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU "
            "Performance Counters on the target device 0.",
            "may not read the GPU's performance counters",
        ),
        ("==WARNING== No kernels were profiled.", "profiled nothing: ==WARNING== No kernels"),
        ("", "it said nothing"),
        (line(NAMES) + "\n" + line(UNITS), "profiled nothing"),
    ],
)
def test_no_table_is_an_error_with_ncus_reason(text, message):
    with pytest.raises(ProfilingError, match=message):
        parse(text)


def test_the_report_stands_beside_the_seeds_own_numbers():
    profiles = parse(SAMPLE)
    rows = ncu_report.table(profiles)
    assert rows[0] == ["", "seed, on an RTX 4090", "seed_style", "pack_rows", "gemm_hopper"]
    by_label = {row[0]: row[1:] for row in rows[1:]}
    assert by_label["SM throughput, % of peak"][:2] == ["34.07", "31.90"]
    assert by_label["grid size"] == ["3055", "3055", "8205", "132"]
    assert by_label["warps active, % of peak"][0] == "16.66"
    assert by_label["DRAM throughput, % of peak"][0] == "28.97"
    assert by_label["L2 hit rate, %"][:2] == ["85.54", "66.70"]
    assert by_label[STALL_SHARE] == ["-", "25.00", "-", "10.00"]
    expected = "gemm_hopper_kernel: 10.0 % of the latency is memory, below 20 %"
    assert ncu_report.verdict(profiles) == expected
    assert ncu_report.verdict(profiles[:2]) == "no stall share of our GEMM was measured"
    env = dict.fromkeys(("gpu", "command", "commit", "date", "torch", "triton", "driver"), "x")
    text = ncu_report.markdown({"env": env}, profiles)
    assert "| grid size | 3055 | 3055 | 8205 | 132 |" in text


def test_ncu_is_asked_for_the_raw_page_and_its_failures_told(monkeypatch):
    asked = []

    def run(command, **options):
        asked.append(command)
        log = command[command.index("--log-file") + 1]
        with open(log, "w") as file:
            file.write(SAMPLE)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert len(ncu_report.profile("ncu", (3, 4, 5))) == 3
    (command,) = asked
    for part in ("--csv", "raw", "none", ",".join(METRICS.values()), "--workload"):
        assert part in command
    assert command[-3:] == ["3", "4", "5"]

    def denied(command, **options):
        return subprocess.CompletedProcess(command, 1, "==ERROR== ERR_NVGPUCTRPERM", "")

    monkeypatch.setattr(subprocess, "run", denied)
    with pytest.raises(ProfilingError, match="NVreg_RestrictProfilingToAdminUsers=0"):
        ncu_report.profile("ncu", (3, 4, 5))

    def broken(command, **options):
        return subprocess.CompletedProcess(command, 9, "", "no such option")

    monkeypatch.setattr(subprocess, "run", broken)
    with pytest.raises(ProfilingError, match=r"code 9: .*no such option"):
        ncu_report.profile("ncu", (3, 4, 5))


def test_a_missing_ncu_is_told(monkeypatch):
    monkeypatch.delenv("NCU", raising=False)
    monkeypatch.setattr(ncu_report.shutil, "which", lambda name: None)
    with pytest.raises(ProfilingError, match="NCU=/path/to/ncu"):
        ncu_report.find_ncu()
    monkeypatch.setenv("NCU", "/opt/nvidia/ncu")
    monkeypatch.setattr(ncu_report.shutil, "which", lambda name: name)
    assert ncu_report.find_ncu() == "/opt/nvidia/ncu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_told(capsys):
    assert ncu_report.main([]) == 1
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_bad_sizes_are_told(capsys):
    with pytest.raises(SystemExit) as stop:
        ncu_report.main(["--shape", "0", "1", "1"])
    assert stop.value.code == 2
    assert "at least 1, got (0, 1, 1)" in capsys.readouterr().err
