"""``fastmm::matmul_in_graph`` and ``linear_in_graph``: the ops as compiled graphs call them.

The same but for autocast. A graph has its casts already. If an op cast its inputs once more when
the graph runs (a backward pass that is called under autocast, say, after a forward pass that was
not), it would return another dtype than the code around it was compiled for.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastmm_op import ops, ops_linear

ops._lib.define(
    "matmul_in_graph(Tensor a, Tensor b, *, str precision) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
ops._lib.define(
    "linear_in_graph(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, *, "
    "str activation, str precision) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def _without_autocast(implementation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An implementation whose own calls of ATen cast nothing: what has no kernel goes on to it."""

    @wraps(implementation)
    def impl(first: Tensor, *args, **kwargs) -> Tensor:
        device_type = first.device.type
        if not torch.is_autocast_enabled(device_type):
            return implementation(first, *args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return implementation(first, *args, **kwargs)

    return impl


def _register(name: str, like, flops: Callable[..., int]) -> None:
    """What is registered for an op of ``like``, a module, is registered for the one in graphs.

    Graphs are differentiated before our pass sees them; autograd is for whoever runs one as it is.
    """
    cuda = like._triton_impl if ops.HAVE_TRITON else like._aten_impl
    cpu = like._triton_impl if ops.INTERPRETED else like._aten_impl
    ops._lib.impl(name, _without_autocast(cuda), "CUDA")
    ops._lib.impl(name, _without_autocast(cpu), "CPU")
    torch.library.register_fake(f"fastmm::{name}", like._fake, lib=ops._lib)
    torch.library.register_autograd(
        f"fastmm::{name}", like._backward, setup_context=like._setup_context, lib=ops._lib
    )
    # That formula takes tensors as it is: registering it for the op has wrapped it.
    register_flop_formula(getattr(torch.ops.fastmm, name), get_raw=True)(flops)


_register("matmul_in_graph", ops, ops._flops)
_register("linear_in_graph", ops_linear, ops_linear._flops)
