"""``patch`` and ``unpatch``: the linear layers of an existing model, computed by ``linear``.

A module is not replaced but told to be of another class: its parameters, buffers, hooks and name in
the model stay what they are, and so does the model's ``state_dict``.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastmm_op import contract
from fastmm_op.compat import constant_while_compiling, is_traceable_wrapper_subclass
from fastmm_op.functional import linear
from fastmm_op.problem import PRECISIONS


@dataclass(frozen=True)
class Report:
    """What ``patch`` or ``unpatch`` did, by the modules' names in the model.

    Attributes:
        changed: the modules that were patched, or unpatched.
        left_alone: other modules that look like a linear layer: name -> why.
    """

    changed: tuple[str, ...]
    left_alone: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.changed)} changed, {len(self.left_alone)} left alone"]
        lines += [f"  {name or '(the model itself)'}" for name in self.changed]
        lines += [
            f"  {name or '(the model itself)'} left alone: {why}"
            for name, why in self.left_alone.items()
        ]
        return "\n".join(lines)


def patch(model: nn.Module, *, precision: str | None = None) -> Report:
    """Compute the linear layers of a model by ``fastmm_op.linear``, in place.

    Patched are modules of exactly the class ``torch.nn.Linear``, and those that are built as
    ``Conv1D`` of the transformers library is (its weight is (K, N)). Parameters are neither copied
    nor renamed; hooks, ``state_dict``, ``deepcopy``, pickling and torch.compile work as before.
    What fastmm does not support (complex numbers, nested tensors, tensor subclasses such as
    DTensor) is computed by the module's own class.

    Args:
        model: changed in place, in whatever mode and on whatever device it is.
        precision: of float32 products, as ``fastmm_op.matmul``. None obeys PyTorch's setting at
            the time of each call (``torch.backends.cuda.matmul.fp32_precision``, by whichever of
            PyTorch's ways it was set): ``"tf32"`` where it allows TF32, else ``"fp32"``.

    Returns:
        What was patched, and what looks like a linear layer but was left alone, and why.

    Raises:
        TypeError: model is not a module.
        ValueError: unknown precision.
    """
    if precision is not None:
        contract.check_choice("patch", "precision", precision, PRECISIONS)
    changed, left_alone = [], {}
    for name, module in named_modules(model):
        if is_patched(module):
            vars(module).pop("fastmm_kept", None)
            module.fastmm_precision = precision
            changed.append(name)
        elif looks_linear(module):
            why = reason_against(module)
            if why:
                left_alone[name] = why
            else:
                module.__class__ = patched_class(type(module))
                module.fastmm_precision = precision
                changed.append(name)
    return Report(tuple(changed), left_alone)


def unpatch(model: nn.Module) -> Report:
    """Undo ``patch``: every patched module of the model is of its own class again.

    Returns:
        The modules that were changed back; left alone is what another tool has derived from a
        patched module since (``torch.nn.utils.parametrize``, for one), which must undo that first.

    Raises:
        TypeError: model is not a module.
    """
    changed, left_alone = [], {}
    for name, module in named_modules(model):
        if is_patched(module):
            module.__class__ = type(module).original
            del module.fastmm_precision
            vars(module).pop("fastmm_kept", None)
            changed.append(name)
        elif isinstance(module, _Patched):
            left_alone[name] = f"its class {type(module).__name__} was derived after patch"
    return Report(tuple(changed), left_alone)


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastmm_op: model must be a torch.nn.Module, got {type(model).__name__}")
    return list(model.named_modules())


def is_patched(module: nn.Module) -> bool:
    return isinstance(module, _Patched) and "original" in vars(type(module))


def looks_linear(module: nn.Module) -> bool:
    name = type(module).__name__
    return isinstance(module, nn.Linear) or "Linear" in name or name == "Conv1D"


def reason_against(module: nn.Module) -> str | None:
    """Why a module that looks like a linear layer cannot be patched; None if it can."""
    cls = type(module)
    if parametrize.is_parametrized(module):
        return "it is parametrized"
    if cls is not nn.Linear and cls.__name__ != "Conv1D":
        return f"its class is {cls.__module__}.{cls.__name__}, not torch.nn.Linear itself"
    if "forward" in vars(module):
        return "it has a forward of its own"
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or is_traceable_wrapper_subclass(weight):
        return f"its weight is a {type(weight).__name__}"
    if weight.layout is not torch.strided or weight.dtype not in contract.SUPPORTED:
        return f"its weight is {weight.dtype}, {weight.layout}"
    if cls is not nn.Linear:
        width = getattr(module, "nf", None)
        bias = getattr(module, "bias", None)
        built_alike = weight.dim() == 2 and isinstance(bias, Tensor)
        if not built_alike or not weight.shape[1] == bias.numel() == width:
            return "it is not built as the Conv1D of transformers is"
    return None


@lru_cache
def patched_class(original: type) -> type:
    """The class that modules of exactly this class take."""
    if original is nn.Linear:
        return PatchedLinear
    return type(f"Patched{original.__name__}", (_PatchedConv1D, original), {"original": original})


@constant_while_compiling
def torchs_precision() -> str:
    """What PyTorch's own setting allows float32 products on CUDA to be computed in."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"


class _Patched:
    """A module whose products ``fastmm_op.linear`` computes.

    Attributes:
        fastmm_precision: as ``patch`` was given it.
        fastmm_kept: the weight's packed copy (prepacking.Kept), where ``prepack`` made one.
    """

    fastmm_precision: str | None
    fastmm_kept = None

    def fastmm_weight(self) -> Tensor:
        """The weight as (N, K)."""
        return self.weight

    def fastmm_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        precision = self.fastmm_precision or torchs_precision()
        kept = self.fastmm_kept
        if kept is not None and kept.serves(x, weight, self.bias, precision):
            return kept.linear(x, weight, self.bias, precision)
        return linear(x, weight, self.bias, precision=precision)

    def _apply(self, fn, recurse: bool = True):
        module = super()._apply(fn, recurse)
        # Moved or cast: an old copy is never used, and this is the time to free its memory. Twice
        # cast, the weight may be back at its address, and PyTorch has counted nothing.
        if self.fastmm_kept is not None and not self.fastmm_kept.is_current(self.fastmm_weight()):
            del self.fastmm_kept
        return module

    def extra_repr(self) -> str:
        said = super().extra_repr()
        mine = f"fastmm precision={self.fastmm_precision!r}"
        mine += ", prepacked" if self.fastmm_kept is not None else ""
        return f"{said}, {mine}" if said else mine


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether ``linear`` takes such tensors; what it does not is left to the original class."""
    plain = not (is_traceable_wrapper_subclass(x) or is_traceable_wrapper_subclass(weight))
    return (
        plain
        and x.dtype in contract.SUPPORTED
        and x.layout is weight.layout is torch.strided
        and not x.is_nested
    )


class PatchedLinear(_Patched, nn.Linear):
    """``torch.nn.Linear`` as ``patch`` leaves it."""

    original = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        if not serves(input, self.weight):
            return super().forward(input)
        return self.fastmm_linear(input, self.weight)


class _PatchedConv1D(_Patched):
    """What ``patch`` puts before a Conv1D class; the weight is (K, N)."""

    original: type

    def forward(self, x: Tensor) -> Tensor:
        if not serves(x, self.weight):
            return super().forward(x)
        return self.fastmm_linear(x, self.weight.mT)

    def fastmm_weight(self) -> Tensor:
        return self.weight.mT

    def __reduce_ex__(self, protocol: int) -> tuple:
        # The class was made here and now; another process has to make its own.
        _, _, *state = super().__reduce_ex__(protocol)
        return _restore, (self.original,), *state


def _restore(original: type) -> nn.Module:
    cls = patched_class(original)
    return cls.__new__(cls)
