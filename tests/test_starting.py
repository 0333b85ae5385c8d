"""How compiled kernels are started again: the same launches as Triton's own, at less cost."""

import gc
import os
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton import knobs
from triton.knobs import HookChain

from fastmm_op import launch, running, starting, triton_compat
from fastmm_op.arch import ARCHES
from fastmm_op.plan import make_plan
from fastmm_op.starting import Address, CompiledLaunch, DirectLaunch, EncodedDescriptor
from fastmm_op.triton_compat import Recorded, hooks_installed

HERE = Path(__file__).parent


# What reaches the driver, with Triton's real launchers and kernels.


@pytest.mark.compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="the driver is there: see the GPU tests")
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_driver_is_given_the_same_both_ways(tmp_path) -> None:
    headers = Path(triton.__file__).parent / "backends/nvidia/include"
    library = tmp_path / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{headers}"]
    subprocess.run([*command, HERE / "fake_libcuda.c", "-o", library], check=True)
    env = os.environ | {
        "LD_LIBRARY_PATH": str(tmp_path),
        "TRITON_LIBCUDA_PATH": str(tmp_path),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": str(HERE.parent),
    }
    command = [sys.executable, HERE / "launches_without_a_gpu.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    started = {"balance", "pack_rows", "pack_strips", "gemm_hopper", "reduce_tail"}
    started.add("gemm_tf32_hopper")
    assert set(done.stdout.split()) == {"direct", *started, "gemm", "reduce"}


# Descriptors.


def test_tma_can_round() -> None:
    """With the versions that are supported: 3.6 by a kernel's own record, later by a field."""
    assert triton_compat.tma_can_round()
    assert ARCHES["sm_90"].tma_rounds


class Unfinished:
    """As a kernel that Triton still compiles in its asynchronous mode."""

    def __init__(self, metadata: list[dict]) -> None:
        self.kernel = SimpleNamespace(metadata=SimpleNamespace(tensordesc_meta=metadata))

    def result(self) -> SimpleNamespace:
        return self.kernel


@pytest.mark.parametrize("finished", [False, True])
def test_a_kernel_is_told_to_round(finished) -> None:
    a, b, c = ({"elem_type": 7} for _ in range(3))
    kernel = Unfinished([a, b, c])
    given = kernel.kernel if finished else kernel
    assert triton_compat.round_as_copied(given, [True, True, False]) is kernel.kernel
    assert [x["elem_type"] for x in (a, b, c)] == [11, 11, 7]


class HostDescriptor:
    """As a TensorDescriptor."""

    def __init__(self) -> None:
        self.base = Address(0)
        self.shape = [1, 64, 64]


@pytest.fixture
def slot() -> EncodedDescriptor:
    """Encodes to a text that tells the address and the shape."""
    return EncodedDescriptor(HostDescriptor(), lambda d: f"{d.base.data_ptr()} {d.shape}")


def test_descriptors_are_remembered_by_address(slot) -> None:
    first = slot(4096)
    assert first == "4096 [1, 64, 64]"
    assert slot(8192) == "8192 [1, 64, 64]"
    assert slot.known == {4096: first, 8192: "8192 [1, 64, 64]"}
    assert slot.known[4096] is first
    assert slot.template.base.data_ptr() == 0, "another thread may be using it"


def test_descriptors_are_forgotten_in_time(slot) -> None:
    known = slot.known
    for i in range(10 * starting.MAX_ENCODED):
        slot(16 * i)
        assert len(known) <= starting.MAX_ENCODED
    assert known is slot.known, "launches hold this dictionary"


def test_what_cannot_be_encoded_is_not_remembered() -> None:
    def encode(descriptor):
        raise RuntimeError("misaligned")

    slot = EncodedDescriptor(HostDescriptor(), encode)
    with pytest.raises(RuntimeError, match="misaligned"):
        slot(8)
    assert not slot.known


# Arguments.


def direct(slot: EncodedDescriptor, as_list: bool) -> tuple[DirectLaunch, list[tuple]]:
    """A launch (a, its size, a descriptor of the workspace, bias, a flag), and what it started."""
    started = []
    args = ["mark a", 640, "first encoding", 64, "mark bias", True]
    after = ("function", None)
    recorded = Recorded(
        "kernel",
        lambda *given: started.append(given),
        (8, 1, 1),
        after if as_list else (),
        args if as_list else [*after, *args],
        as_list,
    )
    at = 0 if as_list else len(after)
    pointers = [(at, "a", 0), (at + 4, "bias", 0)]
    return DirectLaunch(recorded, pointers, [(at + 2, "workspace", 512, slot)]), started


@pytest.mark.parametrize("as_list", [False, True], ids=["Triton 3.6", "Triton 3.7"])
def test_addresses_and_the_stream_are_put_in(as_list, slot) -> None:
    start, started = direct(slot, as_list)
    for i in (1, 2, 1):
        start({"a": 16 * i, "bias": 32 * i, "workspace": 4096 * i, "c": 5}, 100 + i)
    for i, given in zip((1, 2, 1), started, strict=True):
        encoded = f"{4096 * i + 512} [1, 64, 64]"
        args = [16 * i, 640, encoded, 64, 32 * i, True]
        tail = [args] if as_list else args
        assert list(given) == [8, 1, 1, 100 + i, "function", None, *tail]
    assert started[0] is not started[2]
    assert len(slot.known) == 2


def test_threads_do_not_share_arguments(slot) -> None:
    """While one call waits between its arguments and its launch, another one is made."""
    start, started = direct(slot, as_list=True)
    inner = {"a": 2, "bias": 2, "workspace": 2}

    def interrupted(descriptor):
        if descriptor.base.data_ptr() == 1 + 512:
            other = threading.Thread(target=start, args=(inner, 2))
            other.start()
            other.join()
        return descriptor.base.data_ptr()

    slot.encode = interrupted
    start({"a": 1, "bias": 1, "workspace": 1}, 1)
    (first, second) = started
    assert first[3] == 2
    assert first[-1] == [2, 640, 2 + 512, 64, 2, True]
    assert second[3] == 1
    assert second[-1] == [1, 640, 1 + 512, 64, 1, True]


# When Triton's own way is taken.


def test_no_hooks_by_default() -> None:
    assert not hooks_installed()


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_noticed(name, monkeypatch) -> None:
    for nobody in (None, HookChain()):
        monkeypatch.setattr(knobs.runtime, name, nobody)
        assert not hooks_installed()
    monkeypatch.setattr(knobs.runtime, name, print)
    assert hooks_installed()
    chain = HookChain()
    monkeypatch.setattr(knobs.runtime, name, chain)
    chain.add(print)
    assert hooks_installed()
    chain.remove(print)
    assert not hooks_installed()


class Kernel:
    """As a CompiledKernel of no arguments, with a launcher that nobody knows."""

    def __init__(self) -> None:
        self.run = SimpleNamespace()
        self.started = []

    def __getitem__(self, grid):
        return lambda *args, stream: self.started.append((grid, args, stream))


def test_an_unknown_launcher_is_left_to_triton() -> None:
    kernel = Kernel()
    assert triton_compat.record(kernel, (3, 1, 1), []) is None
    step = SimpleNamespace(grid=3, args=(7,), constexprs={"BLOCK": 16})
    started = CompiledLaunch(kernel, step, [7])
    assert started.fastest is started
    started({}, 9)
    assert kernel.started == [((3, 1, 1), (7, 16), 9)]


@pytest.mark.parametrize(
    "changed",
    [
        {"global_scratch_size": 128},
        {"profile_scratch_size": 128},
        {"gsan_enabled": True},
        {"launch": lambda *args: None},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_launchers_that_do_more_are_left_to_triton(changed, monkeypatch) -> None:
    """The first is recorded as it is; each change makes it one to keep away from."""
    launcher = object.__new__(triton_compat.nvidia.CudaLauncher)
    state = {"global_scratch_size": 0, "profile_scratch_size": 0, "launch": len}
    monkeypatch.setattr(
        type(launcher), "__call__", lambda self, *given: self.launch(*given), raising=True
    )
    kernel = SimpleNamespace(
        run=launcher,
        function=5,
        packed_metadata=(4, 1, 0),
        metadata=SimpleNamespace(),
        src=SimpleNamespace(signature={"n": "i32"}),
    )
    launcher.__dict__.update(state)
    recorded = triton_compat.record(kernel, (3, 1, 1), [7])
    assert recorded.start is len
    assert recorded.before == (3, 1, 1)
    assert [*recorded.after, *recorded.args] == [5, (4, 1, 0), None, None, None, 7]
    launcher.__dict__.update(changed)
    assert triton_compat.record(kernel, (3, 1, 1), [7]) is None


def test_the_environment_can_ask_for_tritons_launcher(monkeypatch) -> None:
    monkeypatch.setenv("FASTMM_TRITON_LAUNCHER", "1")
    monkeypatch.setattr(triton_compat, "_record", lambda *args: pytest.fail("recorded"))
    assert triton_compat.record(Kernel(), (1, 1, 1), []) is None


# Calls: what is remembered of the first, without running anything; then on a GPU.


@pytest.fixture
def started(monkeypatch) -> list[tuple]:
    """(way, addresses, stream) of every later launch of a call on CPU tensors; nothing runs."""
    found = []

    class Started:
        def __call__(self, addresses, stream):
            found.append(("triton", addresses, stream))

        def fastest(self, addresses, stream):
            found.append(("direct", addresses, stream))

    monkeypatch.setattr(launch, "plan_for", lambda problem, index: make_plan(problem))
    monkeypatch.setattr(launch, "run_plan", lambda *args: [Started(), Started()])
    monkeypatch.setattr(launch, "current_raw_stream", lambda index: 77)
    monkeypatch.setattr(
        launch, "empty_strided_cuda", lambda size, stride, dtype: torch.empty(size, dtype=dtype)
    )
    return found


def test_later_calls_launch_with_their_own_addresses(started, monkeypatch) -> None:
    a, b = torch.randn(257, 4097), torch.randn(4097, 255)
    call = launch.Call(a, b, "tf32", ARCHES["sm_90"])
    call(a, b)
    assert not started
    a, b = a.clone(), b.clone()
    out = call(a, b)
    assert (out.shape, out.stride(), out.dtype) == ((257, 255), (255, 1), a.dtype)
    expected = {"a": a.data_ptr(), "b": b.data_ptr(), "c": out.data_ptr()}
    for way, addresses, stream in started:
        assert (way, stream) == ("direct", 77)
        assert call.plan.workspace_bytes
        assert addresses == expected | {"workspace": addresses["workspace"]}
    monkeypatch.setattr(launch, "hooks_installed", lambda: True)
    call(a, b)
    assert [way for way, *_ in started] == ["direct"] * 2 + ["triton"] * 2


@pytest.mark.parametrize("copied", [False, True])
def test_only_folds_that_copy_are_repeated(copied, started) -> None:
    a, b = torch.randn(3, 5, 64), torch.randn(64, 32)
    a = a.transpose(0, 1) if copied else a
    call = launch.Call(a, b, "ieee", ARCHES["sm_90"])
    for _ in range(3):
        call(a, b)
    assert len(started) == 4
    for _, addresses, _ in started:
        assert (addresses["a"] == a.data_ptr()) != copied
        assert addresses["b"] == b.data_ptr()


@pytest.mark.parametrize("copied", [False, True])
def test_a_weight_is_given_as_it_is(copied, started) -> None:
    x, weight = torch.randn(3, 5, 64), torch.randn(32, 64)
    x = x.transpose(0, 1) if copied else x
    call = launch.Call(x, weight, "ieee", ARCHES["sm_90"], of_weight=True)
    for _ in range(3):
        out = call(x, weight)
        assert out.shape == (*x.shape[:-1], 32)
    assert call.fold_copies == copied
    assert len(started) == 4
    for _, addresses, _ in started:
        assert addresses["b"] == weight.data_ptr()


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 1, 5, 7)])
def test_contiguous_strides(shape) -> None:
    assert launch.contiguous_strides(shape) == torch.empty(shape).stride()


@pytest.fixture
def calls(monkeypatch) -> dict:
    remembered = {}
    monkeypatch.setattr(launch, "_calls", remembered)
    return remembered


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sizes", "dtype"), [((1025, 1025, 1025), "float32"), ((256, 256, 256), "float16")]
)
def test_calls_start_kernels_directly(sizes, dtype, calls) -> None:
    m, n, k = sizes
    dtype = getattr(torch, dtype)
    a = torch.randn(m, k, dtype=dtype, device="cuda")
    b = torch.randn(k, n, dtype=dtype, device="cuda")
    first = launch.matmul(a, b, "tf32")
    (call,) = calls.values()
    assert all(isinstance(start, DirectLaunch) for start in call.fastest)
    kept = [launch.matmul(a, b, "tf32") for _ in range(3)]  # at other addresses each
    heard = []
    knobs.runtime.launch_enter_hook.add(heard.append)
    try:
        kept.append(launch.matmul(a, b, "tf32"))
    finally:
        knobs.runtime.launch_enter_hook.remove(heard.append)
    assert len(heard) == len(call.kernels)
    assert all(torch.equal(again, first) for again in kept)
    # In the memory that those had, and in other memory, in a graph.
    del kept
    assert torch.equal(launch.matmul(a, b, "tf32"), first)
    other = a.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = launch.matmul(other, b, "tf32")
    graph.replay()
    assert torch.equal(captured, first)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        beside = launch.matmul(a, b, "tf32")
    side.synchronize()
    assert torch.equal(beside, first)


SHAPES = [
    ((3, 4, 128), (128, 64)),
    ((4, 65, 33), (4, 33, 31)),
    ((2, 3, 64, 64), (64, 64)),
    ((64,), (64, 32)),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("shape_a", "shape_b"), SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_folds_are_views_or_repeated(shape_a, shape_b, transposed, calls) -> None:
    """A folded copy must be made again for each call; views need no folding."""
    for seed in range(3):
        torch.manual_seed(seed)
        a, b = torch.randn(shape_a, device="cuda"), torch.randn(shape_b, device="cuda")
        if transposed and a.dim() > 2:
            a = a.transpose(0, 1).contiguous().transpose(0, 1)
        got = launch.matmul(a, b, "ieee")
        torch.testing.assert_close(got, (a.double() @ b.double()).float(), rtol=1e-4, atol=1e-4)
    assert len(calls) == 1


@pytest.mark.kernels
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_a_first_call_lets_go_of_its_memory(precision, device, monkeypatch) -> None:
    """When it returns, not when Python collects cycles: a training step has many first calls."""
    made = []

    class Torch:
        """torch, whose new tensors are watched."""

        def __getattr__(self, name: str):
            return getattr(torch, name)

        def empty(self, *args, **kwargs) -> torch.Tensor:
            x = torch.empty(*args, **kwargs)
            made.append(weakref.ref(x))
            return x

    for module in (launch, running):
        monkeypatch.setattr(module, "torch", Torch())
    monkeypatch.setattr(launch, "_calls", {})
    a, b = torch.randn(33, 1100, device=device), torch.randn(1100, 17, device=device)
    gc.disable()
    try:
        for x in (a, a[:, :65]):
            launch.matmul(x, b[: x.shape[1]], precision)
        assert len(made) == 4, "results and workspaces"
        assert not any(x() is not None for x in made)
    finally:
        gc.enable()
