"""What the user asked for: the options of the backend, and PyTorch's own precision setting."""

from dataclasses import dataclass

import torch

from fastmm_op.arch import ARCHES, Arch


@dataclass(frozen=True)
class Settings:
    """How products are chosen for rewriting.

    Attributes:
        always: take every product that the op supports, whatever is predicted, on any device.
        arch: decide as for this card, for tensors on any device; None: for the card they are on.

    Raises:
        TypeError: ``always`` is not a bool, or ``arch`` neither a str, an Arch nor None.
        ValueError: ``arch`` names no known architecture.
    """

    always: bool = False
    arch: Arch | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.always, bool):
            raise TypeError(f"fastmm_op.compile: always must be True or False, got {self.always!r}")
        arch = self.arch
        if isinstance(arch, str):
            if arch not in ARCHES:
                raise ValueError(
                    f"fastmm_op.compile: arch must be one of {tuple(ARCHES)}, got {arch!r}"
                )
            object.__setattr__(self, "arch", ARCHES[arch])
        elif arch is not None and not isinstance(arch, Arch):
            raise TypeError(
                f"fastmm_op.compile: arch must be one of {tuple(ARCHES)}, an Arch or None, "
                f"got {arch!r}"
            )


def float32_precision() -> str:
    """What the user's own setting lets float32 products be computed in: ``"tf32"`` or ``"fp32"``.

    ``torch.backends.cuda.matmul.fp32_precision`` is where PyTorch's three ways to say it meet
    (the others: ``allow_tf32`` and ``torch.set_float32_matmul_precision``).
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"
