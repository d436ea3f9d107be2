"""Utilisation of a device: the share of the operations that it could make at most (MFU, model FLOPs utilisation)."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

Result = TypeVar("Result")
# Dense operations per second of a device, by a part of its name: with numbers of 16 bits, with those of 32 bits of
# which products take 19 (TF32), and with all of 32 bits. Longer names come first. Source: NVIDIA's data sheets.
PEAK_FLOPS = {
    "B200": (2250e12, 1125e12, 75e12),
    "H100 PCIe": (756e12, 378e12, 51e12),
    "H100": (989e12, 494e12, 67e12),
    "H200": (989e12, 494e12, 67e12),
    "A100": (312e12, 156e12, 19.5e12),
    "L40S": (362e12, 183e12, 91.6e12),
    "A10G": (70e12, 35e12, 31.2e12),
    "V100": (125e12, 15.7e12, 15.7e12),
    "T4": (65e12, 8.1e12, 8.1e12),
}


def find_peak_flops(device: torch.device, dtype: torch.dtype | None) -> float | None:
    """Returns the operations per second that a device can make, None if it is not known.

    `dtype`: that of automatic mixed precision; None: 32 bits.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = next((peaks for part, peaks in PEAK_FLOPS.items() if part in name), None)
    if peaks is None:
        return None
    # Convolutions take TF32 unless it is forbidden.
    has_tf32 = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    return peaks[0 if dtype is not None else 1 if has_tf32 else 2]


class UtilizationMeter:
    """Counts the operations of one step, in matrix products, convolutions and attention, forward and backward.

    It counts in the first step of the process, which then runs uncompiled, and only where the peak is known.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        self.peak = find_peak_flops(device, dtype)
        self.flops_per_image: float | None = None

    def take_step(self, step: Callable[[], Result], images: int) -> Result:
        """Calls `step`, which trains on `images` images of this worker."""
        if self.peak is None or self.flops_per_image is not None:
            return step()
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            result = step()
        self.flops_per_image = counter.get_total_flops() / images
        return result

    def compute_share(self, images_per_s: float) -> dict[str, float]:
        """Returns the metric `mfu` for the images per second of one worker; {} if it is not known."""
        if self.peak is None or self.flops_per_image is None:
            return {}
        return {"mfu": images_per_s * self.flops_per_image / self.peak}
