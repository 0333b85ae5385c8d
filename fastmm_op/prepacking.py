"""``prepack``: the weights of a frozen model packed once and kept, for products without gradients.

A module that ``patch`` has changed gets a ``Kept`` beside its parameters: no parameter or buffer,
so neither ``state_dict`` nor an optimizer knows it, and it stays behind when the module moves.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastmm_op import contract, ops
from fastmm_op.compat import (
    inside_forward_ad,
    inside_torch_func,
    is_exporting,
    is_traceable_wrapper_subclass,
    takes_short_path,
)
from fastmm_op.kept_weight import is_current
from fastmm_op.patching import named_modules, patch, torchs_precision


@dataclass(frozen=True, eq=False)
class Kept:
    """A weight's packed copy. Copies and pickles of it are None: a copied model has none.

    Attributes:
        packed: the copy, as bytes.
        source: an alias of the weight as (N, K).
        version: the weight's, when it was packed.
        precision: that float32 was packed for; None for 16 bits.
    """

    packed: Tensor
    source: Tensor
    version: int
    precision: str | None

    def is_current(self, weight: Tensor) -> bool:
        """Whether a module's weight, as (N, K), is still what was packed."""
        plain = not is_traceable_wrapper_subclass(weight)  # which may have no memory to ask for
        return plain and is_current(weight, self.source, self.version)

    def serves(self, x: Tensor, weight: Tensor, bias: Tensor | None, precision: str) -> bool:
        """Whether a module may ask for its product by the copy, which may turn out to be old."""
        if self.precision not in (None, precision) or x.device != self.source.device:
            return False
        tensors = [x, weight] if bias is None else [x, weight, bias]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return False
        if torch.is_autocast_enabled(x.device.type):
            return False
        if torch.compiler.is_compiling():
            # An exported program's weights may be replaced where nothing counts it.
            return not is_exporting()
        return not (inside_torch_func() or inside_forward_ad())

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, precision: str) -> Tensor:
        """x @ weight.T + bias. By the copy unless it is old, which the op finds out."""
        operands = (x, weight, self.source, self.packed, bias)
        how = {"version": self.version, "precision": precision}
        if not torch.compiler.is_compiling():
            if ops.HAVE_TRITON and takes_short_path(x, weight, bias):
                from fastmm_op import launch_kept

                return launch_kept.linear_prepacked(*operands, self.version, precision)
            given = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
            contract.check_layouts("linear", **given)
        return torch.ops.fastmm.linear_prepacked.default(*operands, **how)

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


@dataclass(frozen=True)
class Prepacked:
    """What ``prepack`` did, by the modules' names in the model.

    Attributes:
        kept_bytes: memory taken by each packed copy; 0 where it is another module's, of one weight.
        weight_bytes: of the same modules: that of the weight itself, which stays.
        rows_from: of the same modules: the fewest rows of x, of the powers of two, for which a copy
            is read; for fewer, the product is computed from the weight.
        left_alone: the other linear layers: name -> why they have no copy.
    """

    kept_bytes: dict[str, int]
    weight_bytes: dict[str, int]
    rows_from: dict[str, int]
    left_alone: dict[str, str] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Memory that all copies take together, beside the weights."""
        return sum(self.kept_bytes.values())

    def __str__(self) -> str:
        kept, weights = mebibytes(self.total_bytes), mebibytes(sum(self.weight_bytes.values()))
        lines = [
            f"{len(self.kept_bytes)} prepacked, {len(self.left_alone)} left alone; "
            f"{kept} kept beside {weights} of weights"
        ]
        for name, kept in self.kept_bytes.items():
            size = mebibytes(kept) if kept else "another module's copy"
            beside = mebibytes(self.weight_bytes[name])
            rows = self.rows_from[name]
            lines.append(f"  {shown(name)}: {size} beside {beside}, from about {rows} rows")
        lines += [f"  {shown(name)} left alone: {why}" for name, why in self.left_alone.items()]
        return "\n".join(lines)


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def shown(name: str) -> str:
    return name or "(the model itself)"


def prepack(model: nn.Module, *, precision: str | None = None) -> Prepacked:
    """Patch a model, and keep its weights packed for calls without gradients.

    ``fastmm_op.linear`` packs the weight of a big product anew at each call. A frozen model needs
    that once: the packed copy is kept beside the weight, at a cost in memory that the report
    states: of float32 in ``"tf32"`` half the weight's, in ``"fp32"`` as much again, of misaligned
    16-bit weights as much again, with rows padded to 128 elements and columns to a tile.

    The copy is used where no gradient is recorded (``torch.no_grad``, ``inference_mode``, or
    nothing requires one), autocast is off, the precision is the one it was packed for, and x has so
    many rows that a plan reads it; otherwise the module computes as ``patch`` leaves it. A copy is
    old, and never used, once the weight has been changed in place, replaced, moved or cast; call
    ``prepack`` again. **Not seen is what PyTorch itself does not count as a change of the weight**:
    writes through ``weight.data`` or ``weight.numpy()``, by DLPack or a raw pointer.

    ``patch`` drops the copies, ``unpatch`` undoes both. Deep copies and pickles of a model have no
    copies; exported programs and CUDA graphs compute as if only patched.

    Args:
        model: changed in place, on the device where it is to run.
        precision: of float32 products, as ``patch``. None packs for what PyTorch's setting allows
            now; while the setting is another one, the copies are not used.

    Returns:
        What is kept and how much memory that takes, and what is not kept, and why.

    Raises: as ``patch``.
    """
    patched = patch(model, precision=precision)
    precision = precision or torchs_precision()
    report = Prepacked({}, {}, {}, dict(patched.left_alone))
    kept: dict[tuple, Kept] = {}
    modules = dict(named_modules(model))
    for name in patched.changed:
        module = modules[name]
        weight = module.fastmm_weight()
        why, rows = reason_against(weight, precision, module.bias is not None)
        if why:
            report.left_alone[name] = why
            continue
        # Modules may share a weight, as it is or transposed.
        key = (id(module.weight), weight.stride())
        report.kept_bytes[name] = 0
        if key not in kept:
            kept[key] = pack(weight, precision)
            report.kept_bytes[name] = kept[key].packed.numel()
        module.fastmm_kept = kept[key]
        report.weight_bytes[name] = weight.numel() * weight.element_size()
        report.rows_from[name] = rows
    return report


def reason_against(weight: Tensor, precision: str, bias: bool) -> tuple[str | None, int]:
    """Why a weight (N, K) gets no copy, or None and the fewest rows for which one is read."""
    if is_traceable_wrapper_subclass(weight):
        return f"its weight is a {type(weight).__name__}", 0
    if weight.dtype not in contract.DTYPES:
        return f"{weight.dtype} is not multiplied by fastmm's kernels", 0
    if weight.dtype is torch.float32 and precision == "ieee":
        return 'nothing is packed for "ieee"', 0
    if weight.is_inference():
        return "its weight is an inference tensor, whose changes PyTorch does not count", 0
    if weight.is_meta or not (weight.is_cuda or weight.device.type == "cpu"):
        return f"its weight is on the device {weight.device}", 0
    if not ops.HAVE_TRITON or (not weight.is_cuda and not ops.INTERPRETED):
        return "ATen multiplies on the CPU" if ops.HAVE_TRITON else "there is no Triton here", 0
    from fastmm_op import launch, launch_kept

    arch = launch.arch_of(weight)
    if arch is None:
        return "there are no kernels for this card", 0
    if 0 in weight.shape:
        return "its weight is empty", 0
    rows = launch_kept.rows_served(weight, precision, arch, bias)
    if not rows:
        return "no plan would read a copy: the weight itself is as fast", 0
    return None, rows[0]


def pack(weight: Tensor, precision: str) -> Kept:
    from fastmm_op import launch, launch_kept

    # Ordinary tensors, whatever the mode: the copy outlives it.
    with torch.inference_mode(False), torch.no_grad():
        source = weight.detach()
        version = source._version
        packed = launch_kept.pack_weight(source, precision, launch.arch_of(weight))
    return Kept(packed, source, version, precision if weight.dtype is torch.float32 else None)
