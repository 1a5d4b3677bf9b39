"""The device of a process that trains alone, and what is set for it. What devices there are: `makes`."""

from __future__ import annotations

import torch

from site_agent.training.makes import devices_of, make_of


def choose_device(wanted: str) -> torch.device:
    """The first of the devices that `[devices] device` means. Raises ConfigError."""
    return devices_of(wanted)[0]


def describe(device: torch.device) -> str:
    """The device's make and model, for people."""
    return make_of(device).title(device)


def set_threads(threads: int) -> None:
    """CPU threads for torch; 0 leaves its own choice."""
    if threads:
        torch.set_num_threads(threads)
