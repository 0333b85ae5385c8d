"""Who is measured on a case: ours and its peers, each made (compiled) only when it is its turn."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmm_op import ModelNew, matmul, ops
from fastmm_op.bench.cases import Case
from fastmm_op.timing import torch_tf32

PEERS = ("torch", "inductor", "seed-style")
Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Attributes:
        name: ``"fastmm"``, ``"fastmm-compiled"`` or a peer's.
        make: returns the function of a and b; may compile.
        precision: what it claims to compute in, as ``Case.precision``.
        tf32: torch's own setting for fp32 products while it runs.
    """

    name: str
    make: Callable[[], Product]
    precision: str
    tf32: bool = False

    def setting(self) -> AbstractContextManager:
        return torch_tf32(self.tf32)


def ours(case: Case) -> list[Contender]:
    """The eager function; on the seed also ``torch.compile`` of ModelNew."""
    precision = case.precision if case.dtype == "fp32" else "tf32"

    def eager() -> Product:
        return lambda a, b: matmul(a, b, precision=precision)

    def compiled() -> Product:
        torch._dynamo.reset()
        return torch.compile(ModelNew(precision), fullgraph=True)

    contenders = [Contender("fastmm", eager, case.precision)]
    if case.group == "seed":
        contenders.append(Contender("fastmm-compiled", compiled, case.precision))
    return contenders


def peers(case: Case, names: set[str], device: torch.device) -> list[Contender]:
    """The chosen peers that can run a case; torch.matmul under the case's own precision first.

    TF32 cases also get ``"torch-fp32"``: what the user has without giving up accuracy.
    """
    found = []
    tf32 = case.precision == "tf32"
    if "torch" in names:
        found.append(Contender("torch", lambda: torch.matmul, case.precision, tf32))
        if tf32:
            found.append(Contender("torch-fp32", lambda: torch.matmul, "fp32", False))
    if "inductor" in names:
        found.append(Contender("inductor", inductor, case.precision, tf32))
    is_matrix_product = case.batch == 1 and not case.fold
    runs_triton = ops.HAVE_TRITON and (device.type == "cuda" or ops.INTERPRETED)
    if "seed-style" in names and tf32 and is_matrix_product and runs_triton:
        found.append(Contender("seed-style", seed_style, "tf32"))
    return found


def inductor() -> Product:
    """torch.matmul as Inductor's longest search makes it; compiles on its first call."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b)

    # All cases share this code object, and Dynamo stops recompiling after a few shapes.
    torch._dynamo.reset()
    return torch.compile(product, mode="max-autotune-no-cudagraphs", dynamic=False)


def seed_style() -> Product:
    from fastmm_op.bench.seed_style import seed_style_matmul

    return seed_style_matmul
