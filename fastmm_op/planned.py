"""For which card the op plans: the one it runs on, unless the environment says otherwise."""

import os

from fastmm_op.arch import ARCHES, Arch, Card, arch_for, resized


def planned_arch(card: Card) -> Arch | None:
    """The entry by which the op plans on a card: its own, or the one FASTMM_ARCH names.

    The environment variable is for trying one card's plans on another: FASTMM_ARCH=sm_89 on a
    Hopper card runs the RTX 4090's plans there, for as many SMs as it has and a 4090's memory.

    Raises:
        ValueError: FASTMM_ARCH names no architecture, or one whose plans the card cannot run.
    """
    own = arch_for(card)
    name = os.environ.get("FASTMM_ARCH")
    if own is None or name in (None, "", own.name):
        return own
    if name not in ARCHES:
        raise ValueError(f"FASTMM_ARCH must be one of {', '.join(ARCHES)}, got {name!r}")
    wanted = resized(ARCHES[name], card.sms)
    if wanted.shared_memory > own.shared_memory or (wanted.tma and not own.tma):
        major, minor = card.capability
        raise ValueError(
            f"FASTMM_ARCH={name}: a card of compute capability {major}.{minor} cannot run its plans"
        )
    return wanted
