"""What there is to train on: found where it is installed, never imported where it is not, passed over where it is
broken; and which devices a config means.

Makers' packages are imagined ones, on the path of a process of their own: a back end can be added to torch once.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from shared.errors import ConfigError
from site_agent.training import devices, makes
from site_agent.training.makes import ACCELERATORS, CPU, CUDA, MPS, ROCM, XPU, backend, devices_of, find_devices

ROOT = Path(__file__).parents[3]
ADDED = [make for make in ACCELERATORS if make.package is not None]
BACK_END = """
import types, torch, torch.distributed
module = types.ModuleType("torch.{device}")
module.is_available = lambda: {available}
module.device_count = lambda: 2
module.get_device_name = lambda device=None: "Card " + str(torch.device(device).index)
module.get_device_properties = lambda device=None: types.SimpleNamespace(major=5)
module.is_bf16_supported = lambda: True
module.mem_get_info = lambda device=None: (3, 4)
torch.utils.rename_privateuse1_backend("{device}")
torch._register_device_module("{device}", module)
torch.distributed.Backend.register_backend("{collectives}", lambda *_: None, devices=["{device}"])
"""
LOOK = """
import json, logging, sys
logging.basicConfig(level=logging.WARNING)
from site_agent.training.makes import *
found = find_devices()
print(json.dumps({
    "devices": [[f.make.name, str(f.device), f.name, f.free, f.total, f.bf16, f.fp64] for f in found if f.make != CPU],
    "all": [str(device) for device in devices_of("")],
    "backends": [backend(f.make) for f in found],
    "loaded": sorted(sys.modules.keys() & {"torch_npu", "torch_mlu", "torch_musa", "intel_extension_for_pytorch"}),
}))
"""


def install(directory: Path, package: str, source: str) -> None:
    """The package as pip would leave it, with the entry point by which torch would load it."""
    (directory / f"{package}.py").write_text(source + "\ndef _autoload(): pass\n")
    about = directory / f"{package}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[torch.backends]\n{package} = {package}:_autoload\n")


def look(directory: Path, autoload: str = "1") -> tuple[dict[str, Any], str]:
    """What a process of its own finds that has `directory` on its path, and what it complained about."""
    path = f"{ROOT}{os.pathsep}{directory}"
    done = subprocess.run(
        [sys.executable, "-c", LOOK],
        env={**os.environ, "PYTHONPATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result, done.stderr


def back_end(make: makes.Make, available: bool = True) -> str:
    return BACK_END.format(device=make.device, collectives=make.collectives[0], available=available)


@pytest.mark.parametrize("make", ADDED, ids=lambda make: make.name)
def test_a_package_that_is_installed_is_found_and_its_devices_are_asked(make: makes.Make, tmp_path: Path) -> None:
    assert make.package is not None
    install(tmp_path, make.package, back_end(make))
    found, complaints = look(tmp_path, autoload="0")
    expected = [[make.name, f"{make.device}:{i}", f"Card {i}", 3, 4, True, False] for i in range(2)]
    assert found["devices"] == expected
    assert found["all"] == [f"{make.device}:0", f"{make.device}:1"]
    assert found["backends"] == [*make.collectives, *make.collectives, "gloo"]
    assert found["loaded"] == [make.package], "and nothing else was imported"
    assert complaints == ""


def test_what_torch_has_loaded_itself_is_not_loaded_again(tmp_path: Path) -> None:
    install(tmp_path, "torch_npu", back_end(makes.ASCEND))
    found, complaints = look(tmp_path, autoload="1")
    assert found["all"] == ["npu:0", "npu:1"]
    assert complaints == ""


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("raise ImportError('libhccl.so: cannot open shared object file')", "libhccl.so: cannot open"),
        ("raise OSError('no driver')", "no driver"),
        (back_end(makes.ASCEND, available=False), "finds no device"),
    ],
    ids=["a library is missing", "its import fails", "no driver"],
)
def test_a_package_that_is_installed_and_broken_is_told_and_passed_over(source: str, says: str, tmp_path: Path) -> None:
    install(tmp_path, "torch_npu", source)
    found, complaints = look(tmp_path, autoload="0")
    assert found["devices"] == []
    assert found["all"] == ["cpu"]
    assert says in complaints
    assert "torch_npu" in complaints
    assert "passed over" in complaints


def test_of_two_packages_one_of_them_broken_the_other_is_found(tmp_path: Path) -> None:
    install(tmp_path, "torch_npu", "raise RuntimeError('built for another torch')")
    install(tmp_path, "torch_musa", back_end(makes.MUSA))
    found, complaints = look(tmp_path, autoload="0")
    assert found["all"] == ["musa:0", "musa:1"]
    assert "built for another torch" in complaints


def test_a_broken_package_does_not_keep_the_program_from_loading_torch(tmp_path: Path) -> None:
    install(tmp_path, "torch_npu", "raise RuntimeError('built for another torch')")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    environment.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    program = "import contextlib, isthmus\nwith contextlib.suppress(SystemExit): isthmus.main()\nimport torch"
    arguments = [sys.executable, "-c", program, "--version"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is imported, by name, of what cannot be found."""
    imported: list[str] = []
    real = makes.importlib.import_module

    def spy(name: str, package: str | None = None) -> ModuleType:
        imported.append(name)
        return real(name, package)

    monkeypatch.setattr(makes.importlib, "import_module", spy)
    return imported


def test_a_package_that_is_missing_is_never_imported(imports: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(makes.importlib.util, "find_spec", lambda name: None)
    find_devices()
    for wanted in ("", "cpu", "npu", "mlu:0", "musa"):
        try:
            devices_of(wanted)
        except ConfigError:
            continue
    for make in ACCELERATORS:
        backend(make)
    assert imports == []
    assert not {"torch_npu", "torch_mlu", "torch_musa", "oneccl_bindings_for_pytorch"} & sys.modules.keys()


def test_a_named_make_loads_no_other_package(imports: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, 1)
    monkeypatch.setattr(makes.importlib.util, "find_spec", lambda name: SimpleNamespace())
    assert devices_of("cuda") == [torch.device("cuda:0")]
    assert imports == []


# -- what torch itself is built with: its functions are imagined


def cards(patch: pytest.MonkeyPatch, count: int, capability: tuple[int, int] = (9, 0), hip: str | None = None) -> None:
    """`count` cards of torch's device type cuda."""
    patch.setattr(torch.version, "hip", hip)
    patch.setattr(torch.cuda, "is_available", lambda: count > 0)
    patch.setattr(torch.cuda, "device_count", lambda: count)
    patch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    patch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 20))


def accelerators() -> list[makes.Found]:
    return [found for found in find_devices() if found.make is not CPU]


@pytest.mark.parametrize(("hip", "make"), [(None, CUDA), ("6.4.43482", ROCM)])
def test_rocm_is_told_from_cuda(hip: str | None, make: makes.Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, 2, (7, 5), hip)
    assert [(found.make, str(found.device)) for found in accelerators()] == [(make, "cuda:0"), (make, "cuda:1")]
    assert [found.bf16 for found in accelerators()] == [make is ROCM] * 2
    assert makes.make_of(torch.device("cuda:1")) is make
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "4")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    seen = {"CUDA_VISIBLE_DEVICES": "3"} if make is CUDA else {"HIP_VISIBLE_DEVICES": "4"}
    assert makes.environment(make) == {**seen, "GLOO_SOCKET_IFNAME": "eth0"}


@pytest.mark.parametrize(("capability", "native"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_bf16_is_native_from_capability_8_on(
    capability: tuple[int, int], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards(monkeypatch, 1, capability)
    (found,) = accelerators()
    assert found == makes.Found(CUDA, torch.device("cuda:0"), "A card", 20, 10, native, True)


def test_memory_is_asked_of_torch_before_the_make(monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, 1)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (1, 2))
    assert [(found.free, found.total) for found in accelerators()] == [(1, 2)]


def test_a_device_that_does_not_say_its_memory_is_found_and_one_that_does_not_answer_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(device: torch.device) -> tuple[int, int]:
        raise RuntimeError(f"driver says no of {device}\nand more")

    cards(monkeypatch, 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fails)
    with caplog.at_level(logging.WARNING):
        assert [(found.free, found.total) for found in accelerators()] == [(None, None)] * 2
    assert "cuda:1 does not say how much memory it has: driver says no of cuda:1" in caplog.text
    assert "and more" not in caplog.text
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card" if device.index else fails(device))
    assert [str(found.device) for found in accelerators()] == ["cuda:1"]


def test_a_driver_that_fails_is_told_and_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> bool:
        raise RuntimeError("the driver is too old")

    cards(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda, "is_available", fails)
    assert devices_of("") == [torch.device("cpu")]
    assert "cuda does not work here and is passed over: the driver is too old" in caplog.text


def test_the_gpu_of_an_apple_shares_its_memory_and_has_no_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: (major, minor) <= (14, 3))
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M3")
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 100)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 30)
    assert accelerators() == [makes.Found(MPS, torch.device("mps:0"), "Apple M3", 100, 70, True, False)]
    assert backend(MPS) == "gloo"
    assert devices_of("mps") == devices_of("mps:0") == [torch.device("mps:0")]


def test_intels_collectives_are_torchs_where_it_has_them_else_those_of_the_bindings(
    monkeypatch: pytest.MonkeyPatch, imports: list[str]
) -> None:
    there = {"gloo", "xccl", "ccl"}
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda name: name in there)
    monkeypatch.setattr(makes.importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setitem(sys.modules, "oneccl_bindings_for_pytorch", ModuleType("bindings"))
    assert backend(XPU) == "xccl"
    there.remove("xccl")
    assert backend(XPU) == "ccl"
    there.remove("ccl")
    assert backend(XPU) == "gloo"


def test_the_cpu_has_what_the_machine_can_give_and_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, 1)
    found = find_devices()
    assert [str(each.device) for each in found] == ["cuda:0", "cpu"]
    cpu = found[-1]
    assert cpu.total is not None
    assert cpu.free is not None
    assert 0 < cpu.free <= cpu.total
    assert cpu.fp64
    assert devices.describe(cpu.device) == cpu.name != ""


# -- what a config means


@pytest.mark.parametrize(
    ("wanted", "means"),
    [
        ("", ["cuda:0", "cuda:1", "xpu:0"]),
        ([], ["cuda:0", "cuda:1", "xpu:0"]),
        ("cuda", ["cuda:0", "cuda:1"]),
        ("cuda:1", ["cuda:1"]),
        ("cpu", ["cpu"]),
        ("cpu:0", ["cpu"]),
        (["xpu:0", "cuda:1"], ["xpu:0", "cuda:1"]),
        (["cuda", "xpu"], ["cuda:0", "cuda:1", "xpu:0"]),
        (["cpu", "cpu", "cuda:0", "cpu"], ["cpu", "cpu", "cuda:0", "cpu"]),
    ],
)
def test_which_devices_a_config_means(
    wanted: str | list[str], means: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards(monkeypatch, 2)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    assert [str(device) for device in devices_of(wanted)] == means


def test_without_an_accelerator_a_site_is_one_process_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, 0)
    assert devices_of("") == [devices.choose_device("")] == [torch.device("cpu")]


TYPES = '"cuda", "npu", "mlu", "musa", "xpu", "mps", "cpu"'


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("cuda:2", '"cuda:2" is not on this machine; found: "cuda:0", "cuda:1", "cpu"'),
        ("xpu", '"xpu" is not on this machine; found: "cuda:0", "cuda:1", "cpu"'),
        (["cpu", "npu:0"], '"npu:0" is not on this machine; found: "cuda:0", "cuda:1", "cpu"'),
        (["cuda", "cuda:1"], '"cuda:1" is named twice, and a device has one process; name it once'),
        ("cdua:0", '"cdua:0" is no device; did you mean "cuda"?; found: "cuda:0", "cuda:1", "cpu"'),
        ("rocm", '"rocm" is no device; did you mean "cuda"?; found: "cuda:0", "cuda:1", "cpu"'),
        ("ascend:1", '"ascend:1" is no device; did you mean "npu"?; found: "cuda:0", "cuda:1", "cpu"'),
        ("cuda:-1", '"cuda:-1" is no device; did you mean "cuda"?; found: "cuda:0", "cuda:1", "cpu"'),
        ("gpu", f'"gpu" is no device, as {TYPES} are; found: "cuda:0", "cuda:1", "cpu"'),
        (["cpu", ""], f'"" is no device, as {TYPES} are; found: "cuda:0", "cuda:1", "cpu"'),
        ("cpu:7", '"cpu:7" is no device: a CPU is "cpu", and may be listed several times'),
    ],
)
def test_a_device_that_is_absent_is_refused_with_what_was_found(
    wanted: str | list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards(monkeypatch, 2)
    with pytest.raises(ConfigError) as refused:
        devices_of(wanted)
    assert str(refused.value) == f"[devices] device: {message}"


def test_where_there_is_no_accelerator_the_refusal_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, 0)
    with pytest.raises(ConfigError, match=r'not on this machine; found: "cpu" \(and no accelerator\)$'):
        devices_of("cuda:0")


def test_a_device_that_the_table_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'"meta" is a device that Isthmus does not know; it knows "cuda", "npu", '):
        makes.make_of(torch.device("meta"))


def test_each_make_is_told_apart() -> None:
    names = [make.name for make in (*ACCELERATORS, CPU)]
    assert len(set(names)) == len(names)
    kinds = [make.device for make in ACCELERATORS if make is not ROCM]
    assert len(set(kinds)) == len(kinds)
