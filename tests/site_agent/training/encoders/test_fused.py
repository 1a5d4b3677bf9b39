"""The Triton kernel, interpreted on the CPU (or run on a CUDA device where one is), and compiled for devices that are
not here. Triton comes with torch's CUDA builds and is no dependency of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.codecs import grid
from shared.fragments import Chunk

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed; it comes with torch's CUDA builds"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHUNKS = [Chunk(0, 4999), Chunk(4999, 5063), Chunk(5063, 5064), Chunk(5064, 9000)]


@pytest.fixture(scope="module")
def fused() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            if "triton" in sys.modules:
                pytest.skip("Triton was imported before it could be told to interpret: set TRITON_INTERPRET=1")
            patch.setenv("TRITON_INTERPRET", "1")
        from site_agent.training.encoders import fused

        yield fused


def values(kind: str) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(9000).astype(np.float32)
    match kind:
        case "wide":
            return (x * 2.0 ** rng.integers(-30, 30, x.size)).astype(np.float32)
        case "huge":
            return (x * np.float32(1e30)).astype(np.float32)  # whose squares overflow
        case "tiny":
            return (x * np.float32(1e-39)).astype(np.float32)
        case "sparse":
            return np.where(rng.random(x.size) < 0.01, x, 0).astype(np.float32)
    return x


@pytest.mark.parametrize("kind", ["normal", "wide", "huge", "tiny", "sparse"])
@pytest.mark.parametrize(("name", "step"), [("int8", 0.0), ("int8", 0.1), ("int4", 0.0), ("int4", 1.0)])
def test_the_kernel_encodes_and_leaves_what_the_cpu_does(fused: Any, name: str, step: float, kind: str) -> None:
    codec, x = grid(name, step), values(kind)
    left = torch.from_numpy(x.copy()).to(DEVICE)
    sections = fused.encode(codec, left, CHUNKS)
    for section, chunk in zip(sections, CHUNKS, strict=True):
        part = x[chunk.start : chunk.stop]
        decoded, wanted = codec.decode(section, part.size), codec.encode(part)
        np.testing.assert_array_equal(left.cpu().numpy()[chunk.start : chunk.stop], part - decoded)
        cut = codec.cut(part.size)
        scale, wanted_scale = (raw[:cut].view("<u2").astype(np.int32) for raw in (section, wanted))
        assert np.abs(scale - wanted_scale).max() <= (1 if step else 0)  # a unit of bf16
        same = np.repeat(scale == wanted_scale, 64)[: part.size]
        np.testing.assert_array_equal(decoded[same], codec.decode(wanted, part.size)[same])


@pytest.mark.parametrize(
    ("bad", "said"), [(np.nan, "NaN or infinite"), (-np.inf, "NaN or infinite"), (3e38, "too large for int4")]
)
def test_the_kernel_refuses_what_the_cpu_does(fused: Any, bad: float, said: str) -> None:
    x = torch.zeros(9000, device=DEVICE)
    x[5063] = bad
    with pytest.raises(ValueError, match=said):
        fused.encode(grid("int4", 0.0), x, CHUNKS)


def test_compiled_for_cuda_it_rounds_every_operation_correctly(tmp_path: Path) -> None:
    """No device is needed to compile for one. In a process of its own, because here it is interpreted."""
    script = """
import re
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from site_agent.training.encoders import fused
types = {"x_ptr": "*fp32", "raw_ptr": "*u8", "flaw_ptr": "*i32", "tiles_ptr": "*i64", "step": "fp32"}
for levels, coarse in ((127, False), (7, True)):
    constants = {"LEVELS": levels, "COARSE": coarse, "ROWS": fused.ROWS}
    source = ASTSource(fused._encode_tiles, types | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm["ptx"]
    print(*sorted(set(re.findall(r"(?:fma|div|sqrt|[a-z]+\\.ftz)[.a-z0-9]*f32", ptx))))
"""
    environment = {
        "PATH": "/usr/bin:/bin",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": ":".join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    assert done.stdout.splitlines() == ["div.rn.f32", "div.rn.f32 sqrt.rn.f32"]
