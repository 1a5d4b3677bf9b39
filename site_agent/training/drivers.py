"""How a device is asked what it is: by the modules of torch and of the makers' packages, which differ in that.

All of it may raise whatever a driver raises.
"""

from __future__ import annotations

import platform
from typing import Any

import torch


def module(device_type: str) -> Any:
    """`torch.cuda`, `torch.npu`, …"""
    return getattr(torch, device_type)


def count(device_type: str) -> int:
    """How many devices work; 0 where torch has no such module."""
    asked = getattr(torch, device_type, None)
    # `is_available` first: some count cards by their management library, which works without a driver that does.
    return int(asked.device_count()) if asked is not None and asked.is_available() else 0


def title(device: torch.device) -> str:
    return str(module(device.type).get_device_name(device))


def memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes."""
    ask = getattr(torch.accelerator, "get_memory_info", None)
    try:
        if ask is not None:
            free, total = ask(device)
            return free, total
    except (RuntimeError, ValueError, NotImplementedError):
        pass  # packages of before torch had it, and a second kind of accelerator beside the current one
    free, total = module(device.type).mem_get_info(device)
    return free, total


def always(device: torch.device) -> bool:
    return True


def never(device: torch.device) -> bool:
    return False


def says_bf16(device: torch.device) -> bool:
    """As the package says of its current device; machines hold one model of card."""
    says = getattr(module(device.type), "is_bf16_supported", None)
    return says is not None and bool(says())


def capability(device: torch.device) -> tuple[int, int]:
    major, minor = module(device.type).get_device_capability(device)
    return major, minor


def has(device: torch.device, name: str) -> bool:
    """Whether its properties say so; those of older versions may lack the word."""
    return bool(getattr(module(device.type).get_device_properties(device), name, False))


def mps_memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of what Metal advises to take of the memory that it shares with the CPU; what other programs
    have of it does not show."""
    total = torch.mps.recommended_max_memory()
    return max(0, total - torch.mps.driver_allocated_memory()), total


def mps_title(device: torch.device) -> str:
    name = getattr(torch.backends.mps, "get_name", None)
    return str(name()) if name is not None else "Apple GPU"


def cpu_bf16(device: torch.device) -> bool:
    """Instructions that multiply in bf16; elsewhere torch widens to fp32, which is slower than fp32."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:
        return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return any(capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))


def cpu_title(device: torch.device) -> str:
    return platform.processor() or platform.machine()
