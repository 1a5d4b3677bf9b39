"""What makes of accelerator differ in, as one table, and which devices of them this machine has.

torch calls them all by a device type and a module of that name (`torch.cuda`, `torch.npu`, …), so training code needs
no more than a `torch.device`. What is left is here: the package that adds the make to torch, the library of its
collectives, what it computes natively, and what its driver and its collectives read from the environment.

A package that is not installed is never imported. One that is installed and broken must not take the site down with it
(a node image often carries packages for cards that this node lacks): it is told, and passed over.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed

from shared.errors import ConfigError
from shared.memory import available_bytes, memory_bytes
from site_agent.training import drivers

log = logging.getLogger(__name__)

GLOO = "gloo"
"""The collectives of the host: what every build of torch has, and what devices of different makes have in common."""
_NAMED = re.compile(r"([a-z]+)(?::(\d+))?")


@dataclass(frozen=True)
class Make:
    """A make of accelerator.

    `device`: its device type in torch. `package`: what adds it to torch, None where torch is built with it.
    `collectives`: names for `torch.distributed.init_process_group`, the best first; `bindings`: the package that adds
    the last of them, where torch lacks the others. `visible`: the variable that says which devices a process sees.
    `environment`: what its collectives read and people have to set (which network, how long to wait). `bf16`, `fp64`:
    whether a device computes in these itself. `count`: how many there are; `title`: a device's make and model;
    `memory`: its (free, total) bytes. All of these may raise what the driver raises.
    """

    name: str
    device: str
    package: str | None
    collectives: tuple[str, ...]
    visible: str
    environment: tuple[str, ...]
    bf16: Callable[[torch.device], bool]
    fp64: Callable[[torch.device], bool]
    count: Callable[[], int]
    title: Callable[[torch.device], str]
    memory: Callable[[torch.device], tuple[int, int]]
    bindings: str | None = None


@dataclass(frozen=True)
class Found:
    """A device of this machine; its bytes are None where its driver does not say."""

    make: Make
    device: torch.device
    name: str
    total: int | None
    free: int | None
    bf16: bool
    fp64: bool


# -- the table

_NCCL = ("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_IB_DISABLE", "NCCL_DEBUG")

# torch/cuda/__init__.py (`is_bf16_supported`: major >= 8); NCCL user guide, "Environment Variables"
CUDA = Make(
    name="cuda",
    device="cuda",
    package=None,
    collectives=("nccl",),
    visible="CUDA_VISIBLE_DEVICES",
    environment=_NCCL,
    bf16=lambda device: drivers.capability(device) >= (8, 0),
    fp64=drivers.always,
    count=lambda: 0 if torch.version.hip else drivers.count("cuda"),
    title=drivers.title,
    memory=drivers.memory,
)

# the same module: a build for ROCm says so in torch.version.hip, and that every one of its cards has bf16
# (torch/cuda/__init__.py); ROCm docs, "GPU isolation techniques"; RCCL docs, "RCCL environment variables"
ROCM = Make(
    name="rocm",
    device="cuda",
    package=None,
    collectives=("nccl",),
    visible="HIP_VISIBLE_DEVICES",
    environment=_NCCL,
    bf16=drivers.always,
    fp64=drivers.always,
    count=lambda: drivers.count("cuda") if torch.version.hip else 0,
    title=drivers.title,
    memory=drivers.memory,
)

# torch_npu 2.14: npu/__init__.py (`_parse_visible_devices`, `mem_get_info`), npu/utils.py, and
# _init/registry/distributed.py (hccl); CANN docs, HCCL environment variables. Its operators refuse DT_DOUBLE or hand
# it to the host (huggingface/diffusers issue 10428).
ASCEND = Make(
    name="ascend",
    device="npu",
    package="torch_npu",
    collectives=("hccl",),
    visible="ASCEND_RT_VISIBLE_DEVICES",
    environment=("HCCL_SOCKET_IFNAME", "HCCL_IF_IP", "HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT"),
    bf16=drivers.says_bf16,
    fp64=drivers.never,
    count=lambda: drivers.count("npu"),
    title=drivers.title,
    memory=drivers.memory,
)

# Cambricon/torch_mlu: torch_mlu/mlu/__init__.py (`_parse_visible_devices`, and `is_bf16_supported`: major >= 5),
# mlu/memory.py, distributed/ (cncl). CNCL's manual is not public: these variables stand in published training
# scripts. No fp64 is documented.
CAMBRICON = Make(
    name="cambricon",
    device="mlu",
    package="torch_mlu",
    collectives=("cncl",),
    visible="MLU_VISIBLE_DEVICES",
    environment=("CNCL_IB_DISABLE", "CNCL_IB_GID_INDEX", "CNCL_MLULINK_DISABLE"),
    bf16=lambda device: drivers.module("mlu").get_device_properties(device).major >= 5,
    fp64=drivers.never,
    count=lambda: drivers.count("mlu"),
    title=drivers.title,
    memory=drivers.memory,
)

# MooreThreads/torch_musa: torch_musa/core/device.py, core/memory.py, core/mccl.py; MCCL_* as published training
# scripts set them. Its matrix products refuse fp64 (flagos-ai/Torch-FL issue 215).
MUSA = Make(
    name="musa",
    device="musa",
    package="torch_musa",
    collectives=("mccl",),
    visible="MUSA_VISIBLE_DEVICES",
    environment=("MCCL_SOCKET_IFNAME", "MCCL_IB_HCA", "MCCL_IB_GID_INDEX"),
    bf16=drivers.says_bf16,
    fp64=drivers.never,
    count=lambda: drivers.count("musa"),
    title=drivers.title,
    memory=drivers.memory,
)

# torch/xpu/__init__.py (`_parse_visible_devices`, `is_bf16_supported`, has_fp64); xccl is in torch from 2.8 on,
# before it Intel's bindings add ccl (intel/torch-ccl); oneCCL and libfabric manuals
XPU = Make(
    name="xpu",
    device="xpu",
    package=None,
    collectives=("xccl", "ccl"),
    visible="ZE_AFFINITY_MASK",
    environment=("CCL_KVS_IFACE", "CCL_ATL_TRANSPORT", "FI_PROVIDER", "FI_TCP_IFACE"),
    bf16=lambda device: drivers.has(device, "has_bfloat16_conversions"),
    fp64=lambda device: drivers.has(device, "has_fp64"),
    count=lambda: drivers.count("xpu"),
    title=drivers.title,
    memory=drivers.memory,
    bindings="oneccl_bindings_for_pytorch",
)

# torch/mps/__init__.py, torch/backends/mps/__init__.py; bf16 from macOS 14 on (transformers, utils/import_utils.py);
# "the MPS framework doesn't support float64" (torch's own TypeError)
MPS = Make(
    name="mps",
    device="mps",
    package=None,
    collectives=(),
    visible="",
    environment=(),
    bf16=lambda device: torch.backends.mps.is_macos_or_newer(14, 0),
    fp64=drivers.never,
    count=lambda: int(torch.backends.mps.is_available()),
    title=drivers.mps_title,
    memory=drivers.mps_memory,
)

# torch/cpu/__init__.py (`get_capabilities`)
CPU = Make(
    name="cpu",
    device="cpu",
    package=None,
    collectives=(),
    visible="",
    environment=(),
    bf16=drivers.cpu_bf16,
    fp64=drivers.always,
    count=lambda: 1,
    title=drivers.cpu_title,
    memory=lambda device: (available_bytes(), memory_bytes()),
)

ACCELERATORS = (CUDA, ROCM, ASCEND, CAMBRICON, MUSA, XPU, MPS)
"""In the order in which devices are found and listed. (torch has room for one make of those that packages add; of two
that are installed the second breaks, and is passed over.)"""


def make_of(device: torch.device) -> Make:
    """The make of a device of this machine. Raises ConfigError where the table lacks it."""
    if device.type == "cuda":
        return ROCM if torch.version.hip else CUDA
    for make in (*ACCELERATORS, CPU):
        if make.device == device.type:
            return make
    raise ConfigError(f'"{device.type}" is a device that Isthmus does not know; it knows {_types()}')


def backend(make: Make) -> str:
    """What `torch.distributed.init_process_group` calls the make's collectives: the best that this torch has, else
    gloo, which goes through the host's memory."""
    if not torch.distributed.is_available():
        return GLOO
    for name in make.collectives:
        if make.bindings is not None and name == make.collectives[-1]:
            _load(make.bindings)
        if torch.distributed.is_backend_available(name):
            return name
    return GLOO


def environment(make: Make) -> dict[str, str]:
    """Of the variables that matter to the make's devices and collectives, and to gloo, those that are set."""
    names = (make.visible, *make.environment, "GLOO_SOCKET_IFNAME")
    return {name: os.environ[name] for name in names if name in os.environ}


# -- what is here


def find_devices() -> list[Found]:
    """Every accelerator that works, and the CPU last. Asking a device for its memory opens it: not for a process that
    only starts others."""
    return [found for make in (*ACCELERATORS, CPU) for device in _here(make) if (found := _look(make, device))]


def devices_of(wanted: str | Sequence[str]) -> list[torch.device]:
    """The devices that `[devices] device` means, one for each process of a site on this machine; none is opened.

    "": every accelerator, else one CPU. "cuda": all of that type. "cuda:0": that one. A list of these is all of them,
    in its order; "cpu" may be in it several times. Raises ConfigError where one is absent or named twice.
    """
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    if names in ([], [""]):
        return _accelerators() or [torch.device("cpu")]
    devices = [device for name in names for device in _named(name)]
    for device in devices:
        if device.type != "cpu" and devices.count(device) > 1:
            raise ConfigError(
                f'[devices] device: "{device}" is named twice, and a device has one process; name it once'
            )
    return devices


def _accelerators() -> list[torch.device]:
    return [device for make in ACCELERATORS for device in _here(make)]


def _here(make: Make) -> list[torch.device]:
    """The make's devices, after loading what adds it; empty where there are none, or where it does not work."""
    if make.package is not None and not _load(make.package):
        return []
    try:
        count = make.count()
        if make.package is not None and count == 0:
            log.warning("%s is installed and finds no device: is its driver? It is passed over", make.package)
        return [torch.device(make.device, i) for i in range(count)] if make is not CPU else [torch.device("cpu")]
    except Exception as error:  # whatever a vendor's driver raises
        log.warning("%s does not work here and is passed over: %s", make.package or make.name, _first_line(error))
        return []


def _load(package: str) -> bool:
    """Whether the package is there and sound; imported now unless it was before, or torch has done it."""
    if package in sys.modules:
        return True
    if importlib.util.find_spec(package) is None:
        return False
    try:
        importlib.import_module(package)
    except Exception as error:  # a library that is missing, another torch, no driver: whatever a vendor's code raises
        log.warning("%s is installed and cannot be loaded, so it is passed over: %s", package, _first_line(error))
        return False
    return True


def look_at(device: torch.device) -> Found:
    """What a device is and has. It is opened. Raises ConfigError where it does not work."""
    found = _look(make_of(device), device)
    if found is None:
        raise ConfigError(f'[devices] device: "{device}" does not work (see above); {_would_do()}')
    return found


def _look(make: Make, device: torch.device) -> Found | None:
    try:
        name, bf16, fp64 = make.title(device), make.bf16(device), make.fp64(device)
    except Exception as error:
        log.warning("%s does not work and is passed over: %s", device, _first_line(error))
        return None
    free: int | None
    total: int | None
    try:
        free, total = make.memory(device)
    except Exception as error:
        log.warning("%s does not say how much memory it has: %s", device, _first_line(error))
        free = total = None
    return Found(make, device, name, total, free, bf16, fp64)


def _named(name: str) -> list[torch.device]:
    """What one entry of `[devices] device` means."""
    match = _NAMED.fullmatch(name)
    makes = [make for make in (*ACCELERATORS, CPU) if match and make.device == match[1]]
    if match is None or not makes:
        raise ConfigError(f'[devices] device: "{name}" is no device{_meant(name)}; {_would_do()}')
    if makes == [CPU]:
        if int(match[2] or 0) > 0:
            raise ConfigError(
                f'[devices] device: "{name}" is no device: a CPU is "cpu", and may be listed several times'
            )
        return [torch.device("cpu")]
    here = [device for make in makes for device in _here(make)]
    chosen = [device for device in here if match[2] is None or device.index == int(match[2])]
    if not chosen:
        raise ConfigError(f'[devices] device: "{name}" is not on this machine; {_would_do()}')
    return chosen


def _meant(name: str) -> str:
    """A hint for who wrote a make's name, or nearly a device's."""
    types = {make.name: make.device for make in ACCELERATORS} | {make.device: make.device for make in ACCELERATORS}
    near = difflib.get_close_matches(name.lower().partition(":")[0], [*types, "cpu"], n=1, cutoff=0.7)
    return f'; did you mean "{types.get(near[0], near[0])}"?' if near else f", as {_types()} are"


def _would_do() -> str:
    found = [f'"{device}"' for device in _accelerators()]
    return f"found: {', '.join([*found, chr(34) + 'cpu' + chr(34)])}" + ("" if found else " (and no accelerator)")


def _types() -> str:
    return ", ".join(dict.fromkeys(f'"{make.device}"' for make in (*ACCELERATORS, CPU)))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
