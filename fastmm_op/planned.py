"""For which card the op plans: the one it runs on, unless the environment says otherwise."""

import os
from dataclasses import replace

from fastmm_op.arch import ARCHES, Arch, arch_for


def planned_arch(capability: tuple[int, int], sms: int) -> Arch | None:
    """The entry by which the op plans on a card: its own, or the one FASTMM_ARCH names.

    The environment variable is for trying one card's plans on another: FASTMM_ARCH=sm_89 on a
    Hopper card runs the RTX 4090's plans there.

    Args: as ``arch_for``.

    Raises:
        ValueError: FASTMM_ARCH names no architecture, or one whose plans the card cannot run.
    """
    own = arch_for(capability, sms)
    name = os.environ.get("FASTMM_ARCH")
    if not name or own is None:
        return own
    if name not in ARCHES:
        raise ValueError(f"FASTMM_ARCH must be one of {', '.join(ARCHES)}, got {name!r}")
    wanted = replace(ARCHES[name], sms=sms)
    if wanted.shared_memory > own.shared_memory or (wanted.tma and not own.tma):
        major, minor = capability
        raise ValueError(
            f"FASTMM_ARCH={name}: a card of compute capability {major}.{minor} cannot run its plans"
        )
    return wanted
