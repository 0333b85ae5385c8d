"""The undocumented names of torch's compiler that this package uses, in one place.

Each is checked by ``tests/test_compat.py`` against the versions we support (torch 2.11 to 2.13).
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch._functorch import config as functorch_config
from torch._inductor import config, list_mode_options, list_options
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = [
    "CustomGraphPass",
    "Flags",
    "backward_at_once",
    "chain",
    "fake_tensors_only",
    "flags",
    "hint",
    "list_mode_options",
    "option_names",
    "select_decomp_table",
    "surely_equal",
]

TORCH = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
# Before 2.13 a hook of Inductor holds one pass, not a list of them.
HOOKS_TAKE_LISTS = TORCH >= (2, 13)


@dataclass(frozen=True)
class Flags:
    """What Inductor's configuration says about matrix products, as it is now.

    Attributes:
        pads: ``pad_mm`` may pad products that it finds faster padded.
        tunes: Triton templates compete for products, and fuse what follows them.
        graphs: CUDA graphs replay the compiled code: calls cost the host nothing.
    """

    pads: bool
    tunes: bool
    graphs: bool


def flags() -> Flags:
    # pad_mm measures both ways, which it must not do when asked to be deterministic.
    may_measure = not config.deterministic or config.force_shape_pad
    return Flags(
        pads=config.shape_padding and may_measure,
        tunes=config.max_autotune or config.max_autotune_gemm,
        graphs=config.triton.cudagraphs,
    )


def option_names() -> set[str]:
    """What ``torch.compile(options=...)`` takes, underscores for dashes."""
    return {name.replace("-", "_") for name in list_options()}


def hint(size: int | torch.SymInt) -> int | None:
    """A size as a number, without a guard on it; None where it is known at run time only."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def surely_equal(size: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    """Whether two sizes are one whatever their symbols stand for, without a guard on them."""
    return statically_known_true(size == other)


@contextmanager
def fake_tensors_only() -> Iterator[None]:
    """A context for tracing something else while a graph is being compiled: nothing is computed."""
    with (
        torch._guards.tracing(None),
        unset_fake_temporarily(),
        FakeTensorMode(),
        torch.no_grad(),
    ):
        yield


def backward_at_once():
    """A context in which a backward graph is compiled along with its forward, not when it runs."""
    return functorch_config.patch(force_non_lazy_backward_lowering=True)


class Chain(CustomGraphPass):
    """Several passes as one. Its uuid is theirs; None, which bypasses caches, if one has none."""

    def __init__(self, passes: Sequence) -> None:
        self.passes = tuple(passes)

    def __call__(self, graph: Graph) -> None:
        for one in self.passes:
            one(graph)

    def uuid(self) -> tuple | None:
        known = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in self.passes]
        return None if None in known else tuple(known)


def chain(present, ours: CustomGraphPass):
    """The value for a hook that holds ``present`` (None, a pass or several): ours runs last."""
    before = list(present) if isinstance(present, (list, tuple)) else [present] if present else []
    if not before:
        return ours
    return [*before, ours] if HOOKS_TAKE_LISTS else Chain([*before, ours])
