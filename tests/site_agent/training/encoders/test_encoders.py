"""What torch operations encode is what the numba kernels do, byte for byte where the device rounds as IEEE 754 says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.codecs import DENSE, Codec, codec_named, grid
from shared.codecs.kernels import F32, U8
from shared.fragments import CHUNK_ELEMENTS, Chunk, Layout
from site_agent.training import encoders
from site_agent.training.encoders import dense, topk

ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)
DEVICES = [torch.device("cpu"), *([ACCELERATOR] if ACCELERATOR else [])]
EXACT = {"cpu", "cuda"}
"""Devices that divide and take roots as IEEE 754 says."""

SETTINGS = [
    *((name, 0.0) for name in ("fp32", "bf16", "fp16", "int8", "int4", "e3m0", "topk2-128", "topk2-3")),
    *(("int8", step) for step in (0.1, 3.0)),
    *(("int4", step) for step in (0.5, 1.0)),
]
CODECS = [grid(name, step) for name, step in SETTINGS]
NAMES = [f"{name}, step {step:g}" if step else name for name, step in SETTINGS]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=NAMES)
every_device = pytest.mark.parametrize("device", DEVICES, ids=str)
INT4 = DENSE["int4"].with_step(1.0)
TRAINED = 2.0**10
"""What is encoded and is larger a screening may refuse, though it is encoded soundly."""
quick = settings(max_examples=40)


def cut(sizes: Sequence[int]) -> list[Chunk]:
    """Chunks of these sizes, one after the other."""
    ends = np.cumsum(sizes).tolist()
    return [Chunk(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def on_cpu(codec: Codec, x: F32, chunks: Sequence[Chunk]) -> tuple[list[U8], F32]:
    """(sections, what was lost) as the numba kernels have them."""
    left = x.copy()
    parts = [left[chunk.start : chunk.stop] for chunk in chunks]
    return [codec.encode(part, part, -1.0) for part in parts], left


def encode_on(codec: Codec, device: torch.device) -> encoders.Encode:
    return encoders.encoder(codec, device) or encoders.torch_operations(codec)


def on_device(codec: Codec, x: F32, chunks: Sequence[Chunk], device: torch.device) -> tuple[list[U8], F32]:
    left = torch.from_numpy(x.copy()).to(device)
    return encode_on(codec, device)(codec, left, chunks), left.cpu().numpy()


def length(x: F32) -> float:
    return float(np.linalg.norm(x.astype(np.float64)))


def assert_same(codec: Codec, x: F32, chunks: Sequence[Chunk], device: torch.device) -> None:
    sections, left = on_device(codec, x, chunks, device)
    wanted, wanted_left = on_cpu(codec, x, chunks)
    if device.type in EXACT:
        assert [section.tobytes() for section in sections] == [section.tobytes() for section in wanted]
        np.testing.assert_array_equal(left, wanted_left)
    for section, chunk in zip(sections, chunks, strict=True):
        part = slice(chunk.start, chunk.stop)
        if np.abs(x[part]).max() < TRAINED:
            codec.screen(section, chunk.size)
        np.testing.assert_array_equal(left[part], x[part] - codec.decode(section, chunk.size))
        assert length(left[part]) <= 1.02 * length(wanted_left[part])


@st.composite
def cut_vectors(draw: st.DrawFn) -> tuple[F32, list[Chunk]]:
    """Vectors in a few chunks of awkward sizes: every exponent, denormals, both zeros; or a band, as real data are."""
    sizes = draw(
        st.lists(st.sampled_from([1, 2, 3, 63, 64, 65, 127, 128, 200, 4095, 4096, 4097]), min_size=1, max_size=4)
    )
    rng, n = np.random.default_rng(draw(st.integers(0, 2**32))), sum(sizes)
    bits = rng.integers(0, 2**32, n, dtype=np.uint32)
    if draw(st.booleans()):
        bits = (bits & np.uint32(0x80FFFFFF)) | np.uint32(draw(st.integers(0, 250)) << 23)
    bits = np.where((bits & 0x7F800000) == 0x7F800000, bits ^ np.uint32(0x00800000), bits).astype(np.uint32)
    x = np.clip(bits.view(np.float32), -1e36, 1e36)  # beyond, encoding refuses
    x[rng.random(n) < draw(st.sampled_from([0.0, 0.5, 0.99, 1.0]))] = draw(st.sampled_from([0.0, -0.0, 1.0, -1e-45]))
    return x.astype(np.float32), cut(sizes)


@every_device
@every_codec
@given(case=cut_vectors())
@quick
def test_a_device_encodes_and_leaves_what_the_cpu_does(codec: Codec, device: torch.device, case: Any) -> None:
    assert_same(codec, *case, device)


@every_device
@every_codec
def test_a_fragment_of_many_slabs_is_the_same_as_chunk_by_chunk(
    codec: Codec, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (dense, topk):
        monkeypatch.setattr(module, "SLAB_ELEMENTS", 10_000)
    shapes: list[tuple[str, list[int]]] = [("a", [257, 100]), ("b", [64]), ("c", [1]), ("d", [300_000]), ("e", [4096])]
    fragment = Layout.from_wire([shapes]).fragments[0]
    x = np.random.default_rng(0).standard_normal(fragment.size).astype(np.float32)
    assert_same(codec, x, fragment.chunks(), device)
    assert max(chunk.size for chunk in fragment.chunks()) == CHUNK_ELEMENTS


@every_device
@every_codec
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 99, 5000])
def test_what_is_not_finite_is_refused_wherever_it_is(codec: Codec, device: torch.device, bad: float, at: int) -> None:
    x = torch.ones(5001, device=device)
    x[at] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        encode_on(codec, device)(codec, x, cut([100, 4901]))


@every_device
@every_codec
def test_what_is_too_large_is_refused_or_clipped_as_on_the_cpu(codec: Codec, device: torch.device) -> None:
    x = np.full(5001, np.finfo(np.float32).min, np.float32)
    if codec.name in ("fp32", "bf16", "fp16"):
        assert_same(codec, x, cut([100, 4901]), device)
        return
    for encode in (on_cpu, lambda *case: on_device(*case, device)):
        with pytest.raises(ValueError, match=f"too large for {codec.name}"):
            encode(codec, x, cut([100, 4901]))


@every_device
@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("step", [0.0, 1.0])
def test_halves_go_to_even_and_the_largest_never_clips(name: str, step: float, device: torch.device) -> None:
    levels = {"int8": 127, "int4": 7}[name]
    x = np.append(np.arange(-2 * levels, 2 * levels + 1) / 2, 0).astype(np.float32)
    assert_same(grid(name, step), np.tile(x, 13), cut([x.size] * 13), device)


@every_device
@pytest.mark.parametrize("name", ["int8", "int4", "e3m0"])
def test_a_scale_that_needs_no_rounding_is_not_rounded(name: str, device: torch.device) -> None:
    """A largest value of `levels` times a bf16 value, for every one between two powers of two."""
    levels = {"int8": 127, "int4": 7, "e3m0": 64}[name]
    x = np.zeros(128 * 64, np.float32)
    x[::64] = levels * np.arange(128, 256) / 1024
    (section,), left = on_device(codec_named(name), x, cut([x.size]), device)
    scales = (section[:256].view("<u2").astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(scales, np.arange(128, 256) / 1024)
    assert not left.any()


# -- what a device is trusted with


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Named as a CUDA device is, with Triton there; samples are encoded on the CPU."""
    flaw_of = encoders._flaw_of
    monkeypatch.setattr(encoders, "find_spec", lambda name: object())
    monkeypatch.setattr(encoders, "_flaw_of", lambda encode, codec, device: flaw_of(encode, codec, DEVICES[0]))
    encoders.encoder.cache_clear()
    yield torch.device("cuda")
    encoders.encoder.cache_clear()


def faulty(fault: str) -> encoders.Encode:
    def encode(codec: Codec, x: Tensor, chunks: Sequence[Chunk]) -> list[U8]:
        if fault == "no compiler":
            raise RuntimeError("no compiler")
        sections = dense.encode(INT4.with_step(2.0) if fault == "loses" else codec, x, chunks)
        if fault == "leaves":
            x[-1] += 1
        return sections

    return encode


def test_the_cpu_has_its_own_kernels() -> None:
    assert all(encoders.encoder(codec, torch.device("cpu")) is None for codec in CODECS)


@every_codec
def test_every_codec_has_an_encoder_and_integers_on_cuda_the_one_in_triton(
    codec: Codec, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders, "_fused", faulty("none"))
    assert encoders.encoder(codec, torch.device("xpu")) is encoders.torch_operations(codec)
    if codec.name in ("int8", "int4"):
        assert encoders.encoder(codec, cuda) is encoders._fused
    else:
        assert encoders.encoder(codec, cuda) is encoders.torch_operations(codec)


@pytest.mark.parametrize("fault", ["leaves", "loses", "no compiler"])
def test_what_does_not_encode_a_sample_soundly_is_told_of_and_not_used(
    fault: str, cuda: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(encoders, "_fused", faulty(fault))
    assert encoders.encoder(INT4, cuda) is dense.encode
    assert "Triton cannot encode int4 on cuda:" in caplog.text
    assert fault in caplog.text
    monkeypatch.setattr(encoders, "torch_operations", lambda codec: faulty(fault))
    encoders.encoder.cache_clear()
    assert encoders.encoder(INT4, cuda) is None


def test_a_full_device_is_not_one_that_cannot_encode(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> list[U8]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(encoders, "_fused", full)
    with pytest.raises(torch.OutOfMemoryError):
        encoders.encoder(INT4, cuda)
