"""Is a tuned choice found again, and can a cache file do no harm, whatever it holds?"""

import dataclasses
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastmm_op
from fastmm_op import cache
from fastmm_op.arch import ARCHES
from fastmm_op.choices import choices
from fastmm_op.plan import make_plan, write_plan
from fastmm_op.problem import PRECISIONS, Epilogue, Problem, problem_of
from fastmm_op.search import STAGES, legal
from fastmm_op.tiles import Choice
from oracle import assert_accurate

# derandomize: a failure in CI can be repeated.
SEARCH = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
ROOT = Path(__file__).resolve().parents[1]
CARD = "NVIDIA GeForce RTX 4090"


def fresh_view() -> None:
    """Forget what this process has read of any cache, as a new process would."""
    cache.files_in.cache_clear()
    cache.environment.cache_clear()
    cache.sources_hash.cache_clear()
    cache._warned.clear()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache that is switched on; what this process knew of others is forgotten."""
    monkeypatch.setenv("FASTMM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTMM_NO_CACHE")
    fresh_view()
    yield tmp_path / "cache"
    fresh_view()


@contextmanager
def in_new_folder():
    """As the fixture, for hypothesis: it runs a test's body many times."""
    with tempfile.TemporaryDirectory() as path, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTMM_CACHE_DIR", path)
        patch.delenv("FASTMM_NO_CACHE", raising=False)
        fresh_view()
        yield Path(path)
        fresh_view()


def problem(m=130, k=300, n=70, dtype="fp32", layout="NN", precision="tf32", **how) -> Problem:
    arch = ARCHES[how.pop("arch", "sm_89")]
    batch = how.pop("batch", 1)
    made = problem_of(
        m, k, n, batch=batch, dtype=dtype, layout=layout, precision=precision, arch=arch
    )
    return dataclasses.replace(made, **how)


def kept(p: Problem, number: int = 0, us: float = 12.5, card: str = CARD) -> tuple[Path, Choice]:
    """Keep one of the problem's choices; the file and the choice."""
    choice = list(legal(p))[number]
    path = cache.store(p, card, cache.Entry(choice, us))
    assert path is not None
    return path, choice


def rewrite(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def ignored_with_one_warning(p: Problem, card: str = CARD) -> str:
    """Demand that the problem's entry does not count, and that this is said exactly once."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert cache.lookup(p, card) is None
        assert cache.lookup(p, card) is None
        cache.files_in.cache_clear()
        assert cache.lookup(p, card) is None
    (warning,) = said
    return str(warning.message)


def silently_absent(p: Problem, card: str = CARD) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.lookup(p, card) is None


# What is kept is found again.

problems = st.builds(
    problem,
    m=st.integers(1, 3000),
    k=st.integers(1, 3000),
    n=st.integers(1, 3000),
    dtype=st.sampled_from(["fp32", "fp16", "bf16"]),
    layout=st.sampled_from(["NN", "NT", "TN", "TT"]),
    precision=st.sampled_from(PRECISIONS),
    arch=st.sampled_from(list(ARCHES)),
    batch=st.integers(1, 3),
)


@settings(SEARCH, max_examples=50)
@given(problems, st.data(), st.floats(min_value=1e-3, max_value=1e9))
def test_round_trip(p, data, us) -> None:
    choice = data.draw(st.sampled_from(list(legal(p, STAGES))))
    with in_new_folder():
        assert cache.store(p, CARD, cache.Entry(choice, us))
        assert cache.lookup(p, CARD) == cache.Entry(choice, us)
        fresh_view()
        assert cache.lookup(p, CARD) == cache.Entry(choice, us)
        assert cache.survey({CARD: p.arch})["valid"] == 1


@settings(SEARCH, max_examples=200)
@given(problems, problems)
def test_keys_tell_problems_apart(p, q) -> None:
    def plain(x: Problem) -> Problem:
        return x if x.dtype == "fp32" else dataclasses.replace(x, precision="tf32")

    assert (cache.key(p) == cache.key(q)) == (plain(p) == plain(q))
    assert (cache.file_name(p) == cache.file_name(q)) == (plain(p) == plain(q))


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Problem)])
def test_every_field_of_a_problem_counts(folder, field) -> None:
    p = problem()
    kept(p)
    others = {
        "batch": 2, "M": 131, "N": 71, "K": 301, "dtype": "fp16", "precision": "ieee",
        "a": dataclasses.replace(p.a, pointer_alignment=4),
        "b": dataclasses.replace(p.b, row_stride=2),
        "arch": dataclasses.replace(p.arch, sms=127),
        "epilogue": Epilogue(activation="relu"), "prepacked": True,
    }  # fmt: skip
    silently_absent(dataclasses.replace(p, **{field: others[field]}))
    assert cache.lookup(p, CARD) is not None


def test_rates_of_the_cost_model_do_not_count(folder) -> None:
    p = problem()
    _, choice = kept(p)
    faster = dataclasses.replace(p, arch=dataclasses.replace(p.arch, bandwidth=1e15))
    assert cache.lookup(faster, CARD).choice == choice


def test_precision_of_16_bit_inputs_does_not_count(folder) -> None:
    _, choice = kept(problem(dtype="bf16"))
    assert cache.lookup(problem(dtype="bf16", precision="fp32"), CARD).choice == choice


def test_the_last_one_stays(folder) -> None:
    p = problem()
    kept(p, number=0, us=3.0)
    path, choice = kept(p, number=1, us=2.0)
    assert cache.lookup(p, CARD) == cache.Entry(choice, 2.0)
    assert [f.name for f in path.parent.iterdir()] == [path.name]


def test_a_process_sees_what_was_there_when_it_first_asked(folder) -> None:
    """One listing a process: no call looks at the disk for an entry that was not there."""
    p, q = problem(), problem(m=131)
    path, _ = kept(p)
    assert cache.lookup(p, CARD) is not None
    other = path.with_name(cache.file_name(q))
    other.write_text("{")
    silently_absent(q)
    fresh_view()
    ignored_with_one_warning(q)


def test_switched_off(folder, monkeypatch) -> None:
    p = problem()
    kept(p)
    monkeypatch.setenv("FASTMM_NO_CACHE", "1")
    assert cache.lookup(p, CARD) is None
    assert cache.survey({CARD: p.arch})["enabled"] is False
    monkeypatch.setenv("FASTMM_NO_CACHE", "0")
    assert cache.lookup(p, CARD) is not None


def test_the_folder_is_the_users(monkeypatch) -> None:
    platformdirs = pytest.importorskip("platformdirs")
    monkeypatch.delenv("FASTMM_CACHE_DIR", raising=False)
    assert cache.root() == Path(platformdirs.user_cache_dir("fastmm_op"))


def test_without_platformdirs_there_is_no_cache(monkeypatch) -> None:
    monkeypatch.delenv("FASTMM_CACHE_DIR", raising=False)
    monkeypatch.delenv("FASTMM_NO_CACHE", raising=False)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    silently_absent(problem())
    assert cache.store(problem(), CARD, cache.Entry(next(legal(problem())), 1.0)) is None
    assert cache.survey({})["path"] is None


# What was measured elsewhere, or with other code, does not count.


def test_another_card_has_its_own(folder) -> None:
    p = problem()
    path, _ = kept(p)
    silently_absent(p, "NVIDIA H200")
    moved = cache.folder(folder, "NVIDIA H200") / path.name
    moved.parent.mkdir()
    moved.write_bytes(path.read_bytes())
    cache.files_in.cache_clear()
    assert "another card" in ignored_with_one_warning(p, "NVIDIA H200")


@pytest.mark.parametrize("what", ["format", "torch", "triton", "sources"])
def test_another_version_has_its_own(folder, monkeypatch, what) -> None:
    p = problem()
    path, choice = kept(p)
    change = {
        "format": (cache, "FORMAT", 0),
        "torch": (torch, "__version__", "1.0"),
        "triton": (cache, "installed_version", lambda package: "1.0"),
        "sources": (cache, "sources_hash", lambda: "0"),
    }[what]
    with monkeypatch.context() as patch:
        patch.setattr(*change)
        cache.environment.cache_clear()
        silently_absent(p)
        moved = cache.folder(folder, CARD) / path.name
        assert moved.parent != path.parent
        moved.parent.mkdir()
        moved.write_bytes(path.read_bytes())
        cache.files_in.cache_clear()
        assert "another version" in ignored_with_one_warning(p)
    cache.environment.cache_clear()
    assert cache.lookup(p, CARD).choice == choice


def test_sources_are_what_turns_a_choice_into_code(monkeypatch, tmp_path) -> None:
    for name in (
        "kernels/gemm.py",
        "chains.py",
        "choices.py",
        "tiles.py",
        "packing.py",
        "partition.py",
        "launches.py",
        "plan.py",
        "estimate.py",
    ):
        copy = tmp_path / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes((ROOT / "fastmm_op" / name).read_bytes())
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "cache.py"))

    def changes(name: str) -> bool:
        cache.sources_hash.cache_clear()
        before = cache.sources_hash()
        with (tmp_path / name).open("a") as file:
            file.write("# more\n")
        cache.sources_hash.cache_clear()
        return cache.sources_hash() != before

    found = {name: changes(name) for name in ("kernels/gemm.py", "launches.py", "estimate.py")}
    cache.sources_hash.cache_clear()
    assert found == {"kernels/gemm.py": True, "launches.py": True, "estimate.py": False}


# What is broken is ignored, with one warning.


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"null", b"[]", b"1e999", b"[" * 100_000, b'{"choice": 1}'],
    ids=["empty", "cut short", "not text", "null", "a list", "a number", "deep", "no entry"],
)
def test_garbage(folder, content) -> None:
    p = problem()
    path, _ = kept(p)
    path.write_bytes(content)
    assert str(path) in ignored_with_one_warning(p)
    assert cache.survey({CARD: p.arch})["broken"] == 1
    # It is no obstacle to the next one.
    _, choice = kept(p)
    assert cache.lookup(p, CARD).choice == choice


@settings(SEARCH, max_examples=100)
@given(st.binary() | st.text().map(str.encode))
def test_any_bytes(content) -> None:
    p = problem()
    with in_new_folder():
        path, _ = kept(p)
        path.write_bytes(content)
        ignored_with_one_warning(p)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@settings(SEARCH, max_examples=150)
@given(st.data())
def test_any_value_in_any_place(data) -> None:
    """One value of a good file is replaced: the entry is ignored, or names a legal choice."""
    p = problem()
    with in_new_folder(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, _ = kept(p)
        content = json.loads(path.read_text())
        place, name = content, data.draw(st.sampled_from(list(content)))
        while isinstance(place[name], dict) and data.draw(st.booleans()):
            place = place[name]
            name = data.draw(st.sampled_from(list(place)))
        place[name] = data.draw(json_values | st.sampled_from([True, False, 1, 2, 4, 64]))
        path.write_text(json.dumps(content))
        found = cache.lookup(p, CARD)
        assert found is None or found.choice in set(legal(p, STAGES))
        cache.survey({CARD: p.arch})


def tile_with(**changes):
    def change(choice: dict) -> dict:
        return choice | {"tile": choice["tile"] | changes}

    return change


@pytest.mark.parametrize(
    "change",
    [
        tile_with(block_m=48),
        tile_with(num_stages=40),
        tile_with(num_stages=5),
        tile_with(num_warps=3),
        tile_with(kernel="gemm_hopper"),
        tile_with(kernel="rm -rf"),
        tile_with(efficiency=9.0),
        tile_with(block_k=float("nan")),
        tile_with(block_k=True),
        tile_with(more=1),
        lambda choice: choice | {"split": 3},
        lambda choice: choice | {"split": 512},  # as a rule fine, but not for so short a K
        lambda choice: choice | {"pack_a": not choice["pack_a"]},
        lambda choice: choice | {"pack_a": 0},
        lambda choice: choice | {"pack_a": None},
        lambda choice: choice | {"more": 1},
        lambda choice: {name: value for name, value in choice.items() if name != "split"},
        lambda choice: list(choice.values()),
        lambda choice: "packed",
        lambda choice: None,
    ],
)
def test_illegal_choices(folder, change) -> None:
    p = problem()
    path, _ = kept(p)
    rewrite(path, choice=change(json.loads(path.read_text())["choice"]))
    assert "not legal" in ignored_with_one_warning(p)


def test_a_choice_of_another_precision_is_illegal(folder) -> None:
    """Packing rounds: an entry that says so does not make "ieee" inexact."""
    packed = next(c for c in choices(problem()) if c.pack_a and c.pack_b)
    p = problem(precision="ieee")
    path, _ = kept(p)
    rewrite(path, choice=dataclasses.asdict(packed))
    assert "not legal" in ignored_with_one_warning(p)


def test_too_much_shared_memory_is_illegal(folder) -> None:
    """A tile of one card's that does not fit another."""
    p = problem(4096, 4096, 4096, dtype="fp16", arch="sm_89")
    small = dataclasses.replace(p, arch=dataclasses.replace(p.arch, shared_memory=2**14))
    largest = max(choices(p), key=lambda c: c.tile.block_m * c.tile.block_n)
    path = cache.store(small, CARD, cache.Entry(largest, 1.0))
    assert path is not None
    assert "not legal" in ignored_with_one_warning(small)


@pytest.mark.parametrize("us", [None, "1", 0.0, -1.0, math.nan, math.inf, True])
def test_times_that_are_none(folder, us) -> None:
    p = problem()
    path, _ = kept(p)
    rewrite(path, us=us)
    assert "no number of microseconds" in ignored_with_one_warning(p)


def test_an_entry_under_anothers_name(folder) -> None:
    p, q = problem(), problem(m=131)
    path, _ = kept(p)
    os.replace(path, path.with_name(cache.file_name(q)))
    cache.files_in.cache_clear()
    assert "another problem" in ignored_with_one_warning(q)
    assert cache.survey({CARD: p.arch}) | {"path": "", "writable": ""} == {
        "path": "", "enabled": True, "writable": "", "valid": 0, "broken": 1, "other": 0,
    }  # fmt: skip


def test_a_size_of_zero_has_no_choices(folder) -> None:
    p = problem(m=0)
    assert list(legal(p, STAGES)) == []
    assert cache.store(p, CARD, cache.Entry(next(choices(problem())), 1.0))
    assert "not legal" in ignored_with_one_warning(p)


# Files that cannot be read or written.


def test_a_folder_where_a_file_should_be(folder) -> None:
    p = problem()
    path, _ = kept(p)
    path.unlink()
    path.mkdir()
    assert str(path) in ignored_with_one_warning(p)
    assert cache.survey({CARD: p.arch})["broken"] == 1
    fresh_view()
    with pytest.warns(UserWarning, match="cannot keep"):
        assert cache.store(p, CARD, cache.Entry(next(legal(p)), 1.0)) is None


def test_a_file_where_a_folder_should_be(folder) -> None:
    p = problem()
    folder.mkdir()
    place = cache.folder(folder, CARD)
    place.write_text("")
    assert str(place) in ignored_with_one_warning(p)


def test_no_folder_can_be_made(folder) -> None:
    folder.write_text("a file is in the way")
    p = problem()
    silently_absent(p)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert cache.store(p, CARD, cache.Entry(next(legal(p)), 1.0)) is None
    assert len(said) == 1
    assert "cannot keep" in str(said[0].message)
    assert cache.survey({CARD: p.arch})["writable"] is False


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(folder) -> None:
    p, q = problem(), problem(m=131)
    path, choice = kept(p)
    path.parent.chmod(0o500)
    try:
        with pytest.warns(UserWarning, match="cannot keep"):
            assert cache.store(q, CARD, cache.Entry(next(legal(q)), 1.0)) is None
        assert cache.lookup(p, CARD).choice == choice
    finally:
        path.parent.chmod(0o700)


def test_a_failed_write_leaves_the_old_entry(folder, monkeypatch) -> None:
    p = problem()
    path, choice = kept(p)

    def full(*args) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.warns(UserWarning, match="No space left"):
            assert cache.store(p, CARD, cache.Entry(list(legal(p))[1], 1.0)) is None
    assert [f.name for f in path.parent.iterdir()] == [path.name]
    assert cache.lookup(p, CARD).choice == choice


# Many processes.

WRITER = """
import sys, warnings
warnings.simplefilter("error")
from fastmm_op import cache
from test_cache import CARD, problem
from fastmm_op.search import legal
number, rounds = int(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for i in range(rounds):
    for p in (problem(), problem(m=1000 * number + i + 1)):
        options = list(legal(p))
        entry = cache.Entry(options[number], number + 1.0)
        assert cache.store(p, CARD, entry)
        found = cache.lookup(p, CARD)
        assert found.choice == options[int(found.us) - 1], "one writer's choice, another's time"
"""


@pytest.mark.compiled  # once: no kernel runs
def test_concurrent_writers_neither_lose_nor_mix_entries(folder) -> None:
    """Each process writes one entry that all write, over and over, and some of its own."""
    writers, rounds = 3, 25
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", WRITER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [
        subprocess.Popen(
            [*command, str(i), str(rounds)],
            env=os.environ | {"PYTHONPATH": path},
            text=True,
            **pipes,
        )
        for i in range(writers)
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n", process.communicate()
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    fresh_view()
    shared = cache.lookup(problem(), CARD)
    assert shared.choice == list(legal(problem()))[int(shared.us) - 1]
    for i in range(writers):
        for j in range(rounds):
            p = problem(m=1000 * i + j + 1)
            assert cache.lookup(p, CARD) == cache.Entry(list(legal(p))[i], i + 1.0)
    found = cache.survey({CARD: problem().arch})
    assert (found["valid"], found["broken"], found["other"]) == (writers * rounds + 1, 0, 0)
    left = [f.name for f in cache.folder(folder, CARD).iterdir() if f.suffix != ".json"]
    assert not left


# Calls.


def plan_of_call(a: torch.Tensor, b: torch.Tensor):
    """The plan under which launch remembers the one call that was made."""
    from fastmm_op import launch

    (call,) = launch._calls.values()
    assert (call.out_shape, call.dtype) == ((a.shape[0], b.shape[1]), a.dtype)
    return call.plan


@pytest.fixture
def no_calls(monkeypatch) -> None:
    from fastmm_op import launch

    monkeypatch.setattr(launch, "_calls", {})


def described(a: torch.Tensor, b: torch.Tensor) -> tuple[Problem, str]:
    """The problem of a call in "tf32", and the card it runs on."""
    from fastmm_op import launch

    arch = launch.device_arch(a.get_device())
    return launch.describe(a[None], b[None], "tf32", arch), launch.card_name(a.get_device())


@pytest.mark.kernels
@pytest.mark.usefixtures("no_calls", "folder")
def test_calls_take_what_was_tuned(device) -> None:
    a, b = torch.randn(40, 70, device=device), torch.randn(70, 33, device=device)
    p, card = described(a, b)
    usual = make_plan(p)
    other = random.Random(0).choice([c for c in legal(p, STAGES) if c != usual.choice])
    assert cache.store(p, card, cache.Entry(other, 1.0))
    assert_accurate(fastmm_op.matmul(a, b), a, b)
    assert plan_of_call(a, b) == write_plan(p, other)


@pytest.mark.kernels
@pytest.mark.usefixtures("no_calls", "folder")
def test_calls_survive_a_broken_cache(device) -> None:
    a, b = torch.randn(40, 70, device=device), torch.randn(70, 33, device=device)
    p, card = described(a, b)
    path, _ = kept(p, card=card)
    path.write_text("{")
    with pytest.warns(UserWarning, match="ignores the tuned choice"):
        assert_accurate(fastmm_op.matmul(a, b), a, b)
    assert plan_of_call(a, b) == make_plan(p)


@pytest.mark.kernels
@pytest.mark.usefixtures("no_calls", "folder")
def test_calls_without_a_cache(device, monkeypatch) -> None:
    a, b = torch.randn(40, 70, device=device), torch.randn(70, 33, device=device)
    p, card = described(a, b)
    kept(p, number=1, card=card)
    monkeypatch.setenv("FASTMM_NO_CACHE", "1")
    assert_accurate(fastmm_op.matmul(a, b), a, b)
    assert plan_of_call(a, b) == make_plan(p)
