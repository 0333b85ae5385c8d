"""``fastmm::matmul_in_graph``: the op as compiled graphs call it, the same but for autocast.

A graph has its casts already. If the op cast its inputs once more when the graph runs (a backward
pass that is called under autocast, say, after a forward pass that was not), it would return another
dtype than the code around it was compiled for.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastmm_op import ops

NAME = "matmul_in_graph"

ops._lib.define(
    f"{NAME}(Tensor a, Tensor b, *, str precision) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def _triton_impl(a: Tensor, b: Tensor, *, precision: str) -> Tensor:
    # What has no kernel goes on to ATen, whose product casts.
    if torch.is_autocast_enabled(a.device.type):
        with torch.autocast(a.device.type, enabled=False):
            return ops._triton_impl(a, b, precision=precision)
    return ops._triton_impl(a, b, precision=precision)


def _aten_impl(a: Tensor, b: Tensor, *, precision: str) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):
        return ops._aten_impl(a, b, precision=precision)


ops._lib.impl(NAME, _triton_impl if ops.HAVE_TRITON else _aten_impl, "CUDA")
ops._lib.impl(NAME, _triton_impl if ops.INTERPRETED else _aten_impl, "CPU")
torch.library.register_fake(f"fastmm::{NAME}", ops._fake, lib=ops._lib)
torch.library.register_autograd(
    f"fastmm::{NAME}", ops._backward, setup_context=ops._setup_context, lib=ops._lib
)
# That formula takes tensors as it is: registering it for the op has wrapped it.
register_flop_formula(torch.ops.fastmm.matmul_in_graph, get_raw=True)(ops._flops)
