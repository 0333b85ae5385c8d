"""Which mode this process runs in, what that mode can run, and memory that tells on its users.

Triton decides at import whether kernels are interpreted on CPU tensors or compiled, so one process
does one of the two; ``make test`` starts both. A plain ``pytest`` interprets where there is no GPU.
"""

import importlib.util
import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

HAVE_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAVE_TRITON and os.environ["TRITON_INTERPRET"] == "1"
ON_GPU = HAVE_TRITON and torch.cuda.is_available() and not INTERPRETED

MODES = {
    "gpu": (ON_GPU, "needs a CUDA GPU and TRITON_INTERPRET=0"),
    "interpreted": (INTERPRETED, "needs TRITON_INTERPRET=1"),
    "compiled": (HAVE_TRITON and not INTERPRETED, "needs Triton and TRITON_INTERPRET=0"),
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


@pytest.fixture(autouse=True)
def _same_random_numbers_in_every_test() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Compiled code and recompile counts of one test are no concern of the next."""
    yield
    torch._dynamo.reset()


class GuardedTorch:
    """``torch`` as ``fastmm_op.launch`` sees it: new memory reads as NaN and has guards around it.

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
    from fastmm_op import launch

    guarded = GuardedTorch()
    monkeypatch.setattr(launch, "torch", guarded)
    yield guarded
    guarded.check_guards()
