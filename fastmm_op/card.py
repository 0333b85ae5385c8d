"""What the driver says of a CUDA device, as far as the planner asks."""

import torch

from fastmm_op.arch import Card

# Memory moves data at both edges of its clock.
TRANSFERS_A_CLOCK = 2


def card_of(index: int) -> Card:
    """The facts of CUDA device ``index``."""
    properties = torch.cuda.get_device_properties(index)
    # kHz and bits; a torch that does not give them, or a driver that gives zero, says nothing.
    clock = getattr(properties, "memory_clock_rate", 0)
    width = getattr(properties, "memory_bus_width", 0)
    peak = TRANSFERS_A_CLOCK * clock * 1e3 * width / 8
    capability = torch.cuda.get_device_capability(index)
    return Card(capability, properties.multi_processor_count, peak or None)
