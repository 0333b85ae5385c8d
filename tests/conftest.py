"""Which mode this process runs in, what that mode can run, and memory that tells on its users.

Triton decides at import whether kernels are interpreted on CPU tensors or compiled, so one process
does one of the two; ``make test`` starts both. A plain ``pytest`` interprets where there is no GPU.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
# What is tested is what ships, not what this user has tuned.
os.environ["FASTMM_NO_CACHE"] = "1"

HAVE_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAVE_TRITON and os.environ["TRITON_INTERPRET"] == "1"
ON_GPU = HAVE_TRITON and torch.cuda.is_available() and not INTERPRETED

MODES = {
    "gpu": (ON_GPU, "needs a CUDA GPU and TRITON_INTERPRET=0"),
    "interpreted": (INTERPRETED, "needs TRITON_INTERPRET=1"),
    "compiled": (HAVE_TRITON and not INTERPRETED, "needs Triton and TRITON_INTERPRET=0"),
    "uninterpreted": (not INTERPRETED, "shows no more with interpreted kernels, and takes longer"),
    "kernels": (INTERPRETED or ON_GPU, "needs TRITON_INTERPRET=1 or a GPU: the CPU path is ATen"),
}


def pytest_report_header() -> str:
    kernels = "interpreted" if INTERPRETED else "compiled" if HAVE_TRITON else "none (no Triton)"
    return f"torch {torch.__version__}, GPU: {torch.cuda.is_available()}, kernels: {kernels}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker, (possible, reason) in MODES.items():
            if not possible and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device() -> str:
    """Where this process runs the op: the GPU, or the CPU (interpreted kernels or ATen)."""
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture
def hopper():
    """The GPU at hand as the planner knows it, an ``Arch``, if Gluon's kernels drive it."""
    from fastmm_op import launch

    arch = launch.device_arch(torch.cuda.current_device())
    if not arch.tma:
        pytest.skip("needs a Hopper GPU and a Triton whose Gluon drives it")
    return arch


@pytest.fixture(autouse=True)
def _same_random_numbers_in_every_test() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _pytorchs_own_precision():
    """How PyTorch computes float32 products, as in a new process."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Compiled code and recompile counts of one test are no concern of the next."""
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def entry_point_folder(tmp_path_factory: pytest.TempPathFactory) -> str | None:
    """A folder that makes setup.py's entry points known when it is on the path; None: they are."""
    found = importlib.metadata.entry_points(group="torch_dynamo_backends")
    if any(entry.value.startswith("fastmm_op.") for entry in found):
        return None
    folder = str(tmp_path_factory.mktemp("entry_points"))
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture
def entry_points(entry_point_folder: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.compile(backend="fastmm")`` works here and in subprocesses, installed or not."""
    folders = [str(ROOT), os.environ.get("PYTHONPATH")]
    if entry_point_folder:
        monkeypatch.syspath_prepend(entry_point_folder)
        folders.insert(0, entry_point_folder)
        from torch._dynamo.backends import registry

        # Dynamo looks once; it may have, in an earlier test.
        registry._lazy_import.cache_clear()
        registry._discover_entrypoint_backends.cache_clear()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))


class GuardedTorch:
    """``torch`` as calls and runs of plans see it: new memory is NaN and has guards around it.

    Bytes of 0xff are a NaN in fp16, bf16 and fp32 and -1 in int32, so what a kernel leaves out, or
    reads before it is written, shows up in the result.
    """

    GUARD = 256  # bytes; keeps the alignment of PyTorch's allocators

    def __init__(self) -> None:
        self.allocations: list[torch.Tensor] = []

    def __getattr__(self, name: str):
        return getattr(torch, name)

    def empty(self, *size, dtype: torch.dtype, device) -> torch.Tensor:
        shape = torch.Size(size[0] if size and not isinstance(size[0], int) else size)
        length = shape.numel() * dtype.itemsize
        memory = torch.full((length + 2 * self.GUARD,), 0xFF, dtype=torch.uint8, device=device)
        self.allocations.append(memory)
        return memory[self.GUARD : self.GUARD + length].view(dtype).view(shape)

    def check_guards(self) -> None:
        for memory in self.allocations:
            for side, guard in (("before", memory[: self.GUARD]), ("after", memory[-self.GUARD :])):
                assert (guard == 0xFF).all(), f"a kernel wrote {side} a buffer it was given"


@pytest.fixture
def guarded_memory(monkeypatch: pytest.MonkeyPatch):
    """Every output and workspace starts as NaN; writes outside of them fail the test."""
    if not HAVE_TRITON:
        yield GuardedTorch()
        return
    from fastmm_op import launch, running

    guarded = GuardedTorch()
    for module in (launch, running):
        monkeypatch.setattr(module, "torch", guarded)
    monkeypatch.setattr(
        launch,
        "empty_strided_cuda",
        lambda size, stride, dtype: guarded.empty(size, dtype=dtype, device="cuda"),
    )
    yield guarded
    guarded.check_guards()
