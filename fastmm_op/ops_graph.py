"""``fastmm::matmul_in_graph`` and ``linear_in_graph``: the ops as compiled graphs call them.

The same but for autocast. A graph has its casts already. If an op cast its inputs once more when
the graph runs (a backward pass that is called under autocast, say, after a forward pass that was
not), it would return another dtype than the code around it was compiled for; Inductor's kernels
would read past the end of a bfloat16 tensor that they take for float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils.flop_counter import register_flop_formula

from fastmm_op import ops, ops_linear
from fastmm_op.compat import only_autocast_listens


def straight_to_kernels(kernels: Callable[..., Tensor], op: Callable) -> Callable[..., Tensor]:
    """An implementation for autograd's turn, which a compiled graph's call has nothing to ask of.

    It need not go through the dispatcher again. A call that somebody listens to is ``op``'s.
    """

    def impl(first: Tensor, *args, **kwargs) -> Tensor:
        if only_autocast_listens(first, *args):
            return kernels(first, *args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return op(first, *args, **kwargs)

    return impl


def _register(op: torch._ops.OpOverloadPacket, page) -> None:
    """Everything that ``page``, a module, tells PyTorch about the op, but autocast and vmap."""
    name = f"{op.__name__}_in_graph"
    _, signature = str(op.default._schema).split("(", 1)
    ops._lib.define(f"{name}({signature}", tags=op.default.tags)
    in_graph = getattr(torch.ops.fastmm, name)
    cuda = page._triton_impl if ops.HAVE_TRITON else page._aten_impl
    cpu = page._triton_impl if ops.INTERPRETED else page._aten_impl
    ops._lib.impl(name, cuda, "CUDA")
    ops._lib.impl(name, cpu, "CPU")
    torch.library.register_fake(f"fastmm::{name}", page._fake, lib=ops._lib)
    # Compilers differentiate before they trace; this is for whoever runs a graph as it is.
    torch.library.register_autograd(
        f"fastmm::{name}", page._backward, setup_context=page._setup_context, lib=ops._lib
    )
    straight = straight_to_kernels(cuda, op.default)
    ops._lib.impl(name, straight, "AutogradCUDA")
    # That formula takes tensors as it is: registering it for the op has wrapped it.
    register_flop_formula(in_graph, get_raw=True)(page._flops)

    # Where a graph is traced of the op below autograd and autocast, this is what it will call.
    @torch.library.register_torch_dispatch(op.default, ProxyTorchDispatchMode, lib=ops._lib)
    def _traced(mode, func, types, args=(), kwargs=None) -> Tensor:
        with mode:
            return in_graph.default(*args, **(kwargs or {}))


_register(torch.ops.fastmm.matmul, ops)
_register(torch.ops.fastmm.linear, ops_linear)
