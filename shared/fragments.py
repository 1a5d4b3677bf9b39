"""How a model's tensors are dealt into fragments, and how a fragment is cut into chunks.

A fragment is a fixed subset of the model's parameters, in order of their names, laid end to end as
one flat fp32 vector. Everything happens by fragment: it is sent, merged, stepped, versioned and
recovered by itself. Two layouts:

- `balanced` packs tensors by size so that all fragments cost the same on the wire: the link then sees
  an even load, in exchange for fragments that mix layers (Decoupled DiLoCo, arXiv 2604.21428);
- `strided` keeps a layer together and gives layer i to fragment i mod P (Streaming DiLoCo, 2501.18512).

A tensor is never split between fragments; within one it is cut into chunks that fit a cache, the
unit of a wire section, of a digest and of a merge job.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import msgpack
import numpy as np
import xxhash
from numpy.typing import NDArray

from shared.errors import ConfigError

F32 = NDArray[np.float32]

CHUNK_ELEMENTS = 1 << 18
"""Elements of a chunk: 1 MiB of fp32. Four such vectors (Θ, Θ̂, momentum, Δ) stay within a core's share of
the last-level cache, and a section's fixed costs vanish beside its work (benchmarks/merge)."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's name and shape; its values travel as fp32 whatever the model computes in."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Chunk:
    """Elements `start` to `stop` of a fragment's flat vector; never across two tensors."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Fragment:
    """Fragment `index` of a layout: its tensors in order of name."""

    index: int
    tensors: tuple[TensorSpec, ...]

    @cached_property
    def size(self) -> int:
        """Number of elements in the flat vector."""
        return sum(tensor.size for tensor in self.tensors)

    @cached_property
    def offsets(self) -> dict[str, tuple[int, int]]:
        """For each tensor its (start, stop) in the flat vector."""
        offsets, start = {}, 0
        for tensor in self.tensors:
            offsets[tensor.name] = (start, start + tensor.size)
            start += tensor.size
        return offsets

    def chunks(self, elements: int = CHUNK_ELEMENTS) -> list[Chunk]:
        """The flat vector cut into chunks of at most `elements`, tensor by tensor."""
        return self._usual_chunks if elements == CHUNK_ELEMENTS else self._cut(elements)

    @cached_property
    def _usual_chunks(self) -> list[Chunk]:
        return self._cut(CHUNK_ELEMENTS)

    def _cut(self, elements: int) -> list[Chunk]:
        return [
            Chunk(at, min(at + elements, stop))
            for start, stop in self.offsets.values()
            for at in range(start, stop, elements)
        ]

    def flatten(self, arrays: Mapping[str, F32]) -> F32:
        """The named arrays as one flat vector, fp32 (size,)."""
        flat = np.empty(self.size, dtype=np.float32)
        for tensor in self.tensors:
            start, stop = self.offsets[tensor.name]
            flat[start:stop] = arrays[tensor.name].reshape(-1)
        return flat

    def unflatten(self, flat: F32) -> dict[str, F32]:
        """Views into `flat` under each tensor's name and shape."""
        return {tensor.name: flat[slice(*self.offsets[tensor.name])].reshape(tensor.shape) for tensor in self.tensors}


@dataclass(frozen=True)
class Layout:
    """All fragments of a run; every site must hold exactly these tensors."""

    fragments: tuple[Fragment, ...]

    @property
    def parameters(self) -> int:
        return sum(fragment.size for fragment in self.fragments)

    @cached_property
    def digest(self) -> str:
        """XXH3-128 of the names and shapes; equal layouts have equal digests."""
        return xxhash.xxh3_128_hexdigest(msgpack.packb(self.to_wire()))

    def to_wire(self) -> list[list[tuple[str, list[int]]]]:
        return [[(t.name, list(t.shape)) for t in fragment.tensors] for fragment in self.fragments]

    @classmethod
    def from_wire(cls, fragments: Sequence[Sequence[tuple[str, Sequence[int]]]]) -> Layout:
        return cls(
            tuple(
                Fragment(p, tuple(TensorSpec(name, tuple(shape)) for name, shape in tensors))
                for p, tensors in enumerate(fragments)
            )
        )

    def check_model(self, tensors: Iterable[TensorSpec]) -> None:
        """Raises ConfigError naming the first tensor in which `tensors` differ from this layout."""
        here = {tensor.name: tensor.shape for tensor in tensors}
        run = {tensor.name: tensor.shape for fragment in self.fragments for tensor in fragment.tensors}
        way_out = "use the task and the options of the run"
        for name in sorted(run.keys() | here.keys()):
            if name not in here:
                raise ConfigError(f"the model of this task lacks the run's tensor {name}; {way_out}")
            if name not in run:
                raise ConfigError(f"the model of this task has a tensor {name} that the run lacks; {way_out}")
            if here[name] != run[name]:
                raise ConfigError(
                    f"tensor {name} is {list(here[name])} in this task and {list(run[name])} in the run; {way_out}"
                )


def digest_flat(flat: F32, chunks: Iterable[Chunk]) -> str:
    """The digest of a version: XXH3-128 over the XXH3-128 of each chunk's little-endian fp32 bytes.

    A tree, so that chunks can be hashed in parallel in the pass that writes them. It detects weights that
    drifted apart, not an adversary: blobs are addressed by BLAKE3.
    """
    return combine_digests(digest_chunk(flat[chunk.start : chunk.stop]) for chunk in chunks)


def digest_chunk(values: F32) -> bytes:
    """XXH3-128 of a contiguous chunk's bytes (16 bytes)."""
    return xxhash.xxh3_128_digest(values.astype("<f4", copy=False).data)


def combine_digests(parts: Iterable[bytes]) -> str:
    """The hexadecimal root over chunk digests in their order."""
    return xxhash.xxh3_128_hexdigest(b"".join(parts))


def build_layout(tensors: Sequence[TensorSpec], fragments: int, kind: Literal["balanced", "strided"]) -> Layout:
    """`tensors`, in the model's order, dealt into `fragments`. Raises ConfigError where one stays empty."""
    if any(tensor.size == 0 for tensor in tensors):
        empty = next(tensor.name for tensor in tensors if tensor.size == 0)
        raise ConfigError(f"tensor {empty} has no elements; leave it out of the model's parameters")
    bins = _balanced(tensors, fragments) if kind == "balanced" else _strided(tensors, fragments)
    if not all(bins):
        have = f"{len(tensors)} tensors" if kind == "balanced" else f"{len(_blocks(tensors))} blocks"
        raise ConfigError(
            f'[rounds] fragments: {fragments} are too many for a model of {have} with layout = "{kind}"; '
            "use fewer fragments"
        )
    return Layout(
        tuple(Fragment(p, tuple(sorted(group, key=lambda tensor: tensor.name))) for p, group in enumerate(bins))
    )


def _balanced(tensors: Sequence[TensorSpec], count: int) -> list[list[TensorSpec]]:
    """Greedy bin packing: largest first, ties by name, each into the lightest bin so far."""
    bins: list[list[TensorSpec]] = [[] for _ in range(count)]
    loads = [0] * count
    for tensor in sorted(tensors, key=lambda tensor: (-tensor.size, tensor.name)):
        lightest = loads.index(min(loads))
        bins[lightest].append(tensor)
        loads[lightest] += tensor.size
    return bins


def _strided(tensors: Sequence[TensorSpec], count: int) -> list[list[TensorSpec]]:
    bins: list[list[TensorSpec]] = [[] for _ in range(count)]
    for position, block in enumerate(_blocks(tensors)):
        bins[position % count].extend(block)
    return bins


def _blocks(tensors: Sequence[TensorSpec]) -> list[list[TensorSpec]]:
    """Tensors grouped by layer: the name up to its first number, or the name's module where it has none."""
    blocks: dict[str, list[TensorSpec]] = {}
    for tensor in tensors:
        parts = tensor.name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        key = ".".join(parts[: number + 1]) if number is not None else ".".join(parts[:-1]) or tensor.name
        blocks.setdefault(key, []).append(tensor)
    return list(blocks.values())
