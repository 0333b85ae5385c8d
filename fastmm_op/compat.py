"""The private torch APIs this project uses, in one place.

Each is checked by ``tests/test_compat.py`` against the versions we support (torch 2.11 to 2.13). A
newer torch that lacks one makes ``takes_short_path`` answer no: calls go through the dispatcher.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    from torch._C import _cuda_getCurrentRawStream as current_raw_stream
except ImportError:

    def current_raw_stream(device_index: int) -> int:
        """The address of the device's current CUDA stream."""
        return torch.cuda.current_stream(device_index).cuda_stream


try:
    from torch._C import _cuda_getDevice as current_device
except ImportError:  # a torch without CUDA
    current_device = torch.cuda.current_device

try:
    # (size, stride, dtype), tuples: what Inductor's graphs allocate by. It parses little and goes
    # past the dispatcher.
    from torch._C._dynamo.guards import _empty_strided_cuda as empty_strided_cuda
except ImportError:

    def empty_strided_cuda(
        size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        """A new tensor of uninitialised memory on the current CUDA device."""
        return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


try:
    from torch._C import (
        _get_tracing_state,
        _is_torch_function_mode_enabled,
        _len_torch_dispatch_stack,
    )
    from torch._C._autograd import _profiler_enabled
    from torch._C._functorch import maybe_current_level

    HAVE_SHORT_PATH = True
except ImportError:
    HAVE_SHORT_PATH = False


def inside_torch_func() -> bool:
    """Whether a ``torch.func`` transform (grad, vmap, jacrev ...) is running."""
    return HAVE_SHORT_PATH and maybe_current_level() is not None


def inside_forward_ad() -> bool:
    """Whether a ``torch.autograd.forward_ad.dual_level`` is active."""
    return forward_ad._current_level >= 0


try:
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass
except ImportError:

    def is_traceable_wrapper_subclass(x: Tensor) -> bool:
        """Whether x is a tensor made of others, with rules of its own, such as a DTensor."""
        return hasattr(x, "__tensor_flatten__")


def constant_while_compiling(function: Callable) -> Callable:
    """Have Dynamo call the function while it traces, and take the answer for a constant.

    As ``torch.compiler.assume_constant_result``, which would import Dynamo here and now. For what
    Dynamo's guard on PyTorch's global settings watches, so that a new setting compiles anew.
    """
    function._dynamo_marked_constant = True
    return function


@constant_while_compiling
def is_exporting() -> bool:
    """Whether ``torch.export`` is tracing. Dynamo of torch 2.11 says so whenever it compiles."""
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


_PLAIN = (Tensor, torch.nn.Parameter)


def takes_short_path(a: Tensor, b: Tensor, *others: Tensor | None) -> bool:
    """Whether calling the CUDA implementation directly is the same as going through the dispatcher.

    True only if neither autocast nor anything else is listening. ``others`` are further operands,
    None for those not given.
    """
    return not torch.is_autocast_enabled("cuda") and only_autocast_listens(a, b, *others)


def only_autocast_listens(a: Tensor, b: Tensor, *others: Tensor | None) -> bool:
    """As ``takes_short_path``, of an op that autocast leaves alone.

    True only if there is no autograd, tracing, functorch transform, dispatch or function mode,
    profiler, tensor subclass, or lazily negated view.
    """
    return (
        HAVE_SHORT_PATH
        and type(a) in _PLAIN
        and type(b) in _PLAIN
        and a.is_cuda
        and b.is_cuda
        and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))
        and not _len_torch_dispatch_stack()
        and not _is_torch_function_mode_enabled()
        and maybe_current_level() is None
        and _get_tracing_state() is None
        and not inside_forward_ad()
        and not _profiler_enabled()
        and a.layout is torch.strided
        and b.layout is torch.strided
        and not a.is_neg()
        and not b.is_neg()
        and not a._is_zerotensor()
        and not b._is_zerotensor()
        and (not others or all(x is None or _is_ordinary(x) for x in others))
    )


def _is_ordinary(x: Tensor) -> bool:
    """What ``takes_short_path`` asks of one operand."""
    return (
        type(x) in _PLAIN
        and x.is_cuda
        and not (torch.is_grad_enabled() and x.requires_grad)
        and x.layout is torch.strided
        and not x.is_neg()
        and not x._is_zerotensor()
    )
