"""Which device a site trains on, found through the accelerator-neutral API of torch."""

from __future__ import annotations

import platform

import torch

from shared.errors import ConfigError


def choose_device(wanted: str) -> torch.device:
    """The device named in `[devices]`; empty: the first accelerator, else the CPU. Raises ConfigError."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if not wanted:
        return torch.device(accelerator.type, 0) if accelerator else torch.device("cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ConfigError(f'[devices] device: "{wanted}" is no device; "cpu" or {_found()} would do') from None
    if device.type == "cpu":
        return device
    present = accelerator is not None and device.type == accelerator.type
    if not present or (device.index or 0) >= torch.accelerator.device_count():
        raise ConfigError(f'[devices] device: "{wanted}" is not on this machine; "cpu" or {_found()} would do')
    return device


def describe(device: torch.device) -> str:
    """The device's make and model, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine() if device.type == "cpu" else device.type


def set_threads(threads: int) -> None:
    """CPU threads for torch; 0 leaves its own choice."""
    if threads:
        torch.set_num_threads(threads)


def _found() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return "an accelerator (none was found)"
    return ", ".join(f'"{accelerator.type}:{i}"' for i in range(torch.accelerator.device_count()))
