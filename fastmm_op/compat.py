"""The private torch APIs this project uses, in one place.

Each is checked by ``tests/test_compat.py`` against the versions we support (torch 2.11 to 2.13). A
newer torch that lacks one makes ``takes_short_path`` answer no: calls go through the dispatcher.
"""

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


_PLAIN = (Tensor, torch.nn.Parameter)


def takes_short_path(a: Tensor, b: Tensor) -> bool:
    """Whether calling the CUDA implementation directly is the same as going through the dispatcher.

    True only if nothing is listening: no autograd, autocast, tracing, functorch transform, dispatch
    or function mode, profiler, tensor subclass, or lazily negated view.
    """
    return (
        HAVE_SHORT_PATH
        and type(a) in _PLAIN
        and type(b) in _PLAIN
        and a.is_cuda
        and b.is_cuda
        and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))
        and not torch.is_autocast_enabled("cuda")
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
    )
