"""From the host to the device, without waiting."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device. The copy to a GPU is made from pinned memory, behind what the GPU has to do
    already, while the host prepares the next thing."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
