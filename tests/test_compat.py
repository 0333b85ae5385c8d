"""The private PyTorch functions in fastmm_op/compat.py still exist and still mean what we think."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastmm_op import compat
from fastmm_op.compat import takes_short_path


class OnCuda(torch.nn.Parameter):
    """A parameter that says it is on a GPU: the short path is for CUDA tensors only."""

    is_cuda = True


class Function(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.fixture
def x(device, monkeypatch) -> torch.Tensor:
    """A tensor that takes the short path; without a GPU, one that only claims to be on it."""
    if device == "cuda":
        return torch.ones(2, 2, device="cuda")
    monkeypatch.setattr(compat, "_PLAIN", (OnCuda,))
    return OnCuda(torch.ones(2, 2), requires_grad=False)


def test_the_short_path_exists() -> None:
    assert compat.HAVE_SHORT_PATH, "a private function that it needs is gone from this torch"


def test_a_plain_call_takes_it(x) -> None:
    assert takes_short_path(x, x)


def test_cpu_tensors_do_not() -> None:
    assert not takes_short_path(torch.ones(2, 2), torch.ones(2, 2))


def test_requires_grad(x) -> None:
    other = x.detach().clone()
    other = other if other.is_cuda else OnCuda(other)
    other.requires_grad_()
    assert not takes_short_path(x, other)
    assert not takes_short_path(other, x)
    with torch.no_grad():
        assert takes_short_path(x, other)
    with torch.inference_mode():
        assert takes_short_path(x, other)


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cuda", dtype=torch.float16),
        Function,
        Dispatch,
        torch.profiler.profile,
    ],
    ids=["autocast", "function mode", "dispatch mode", "profiler"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # autocast to CUDA without a GPU
def test_somebody_listens(context, x, monkeypatch) -> None:
    # Without a GPU, autocast("cuda") turns itself off.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with context():
        assert not takes_short_path(x, x)
    assert takes_short_path(x, x), "and not for ever after"


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad, torch.func.functionalize])
def test_functorch_transforms(transform, x) -> None:
    """Their tensors are wrapped; inside, even an unwrapped one must not go past them."""
    answers = []

    def inside(y):
        answers.append(takes_short_path(x, x))
        return y.sum()

    transform(inside)(torch.ones(3))
    assert answers == [False]


def test_subclasses(x) -> None:
    class Subclass(torch.Tensor):
        is_cuda = True

    assert not takes_short_path(x, x.as_subclass(Subclass))
    assert not takes_short_path(x.as_subclass(Subclass), x)


def test_negated_view(x, monkeypatch) -> None:
    negated = torch._neg_view(x)
    if not negated.is_cuda:
        negated = torch.Tensor._make_subclass(OnCuda, negated)
    assert negated.is_neg()
    assert not takes_short_path(x, negated)
    assert not takes_short_path(negated, x)


def test_a_torch_without_them_is_served_by_the_dispatcher(x, monkeypatch) -> None:
    monkeypatch.setattr(compat, "HAVE_SHORT_PATH", False)
    assert not takes_short_path(x, x)


@pytest.mark.gpu
def test_raw_stream() -> None:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert compat.current_raw_stream(0) == side.cuda_stream
    assert compat.current_raw_stream(0) == torch.cuda.current_stream().cuda_stream


def test_tracing(x, monkeypatch) -> None:
    monkeypatch.setattr(compat, "_get_tracing_state", object)
    assert not takes_short_path(x, x)


def test_forward_ad(x) -> None:
    with torch.autograd.forward_ad.dual_level():
        assert not takes_short_path(x, x)


def test_zero_tensor(x) -> None:
    zero = torch._efficientzerotensor((2, 2), device=x.device)
    assert zero._is_zerotensor()
    assert not takes_short_path(x, zero)
