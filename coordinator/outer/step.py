"""One outer step of one fragment: decode and merge K contributions, step the master, encode the delta.

The fragment is walked chunk by chunk; a chunk's sum, Θ, the optimizer's slots and Θ̂ stay in the cache while
all of it happens, and contributions are read section by section from disk. So memory does not grow with the
number of sites. Chunks are independent and run in parallel threads (zstd, the kernels and the hash all release
the GIL); the result does not depend on how many.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np
import xxhash

from coordinator.outer import kernels
from coordinator.outer.merge import Merge, Weighted
from coordinator.outer.optimizers import SLOTS, Optimizer, OuterRule, Sections, Update, update_of
from coordinator.outer.vectors import Vectors
from shared.codecs import DENSE, Dense
from shared.codecs import warm_up as warm_up_codecs
from shared.codecs.kernels import F32, U8, accumulate_fp32, sum_chunk
from shared.fragments import CHUNK_ELEMENTS, Chunk, Fragment, combine_digests, digest_chunk, digest_flat
from shared.wire import Buffer, Header, container_pieces, pack_section, tensor_table


@dataclass
class OuterState:
    """A fragment's state at the coordinator: flat fp32 vectors of fragment.size elements.

    `slots` are the vectors of the outer optimizer by name, `count` is what it counts (see `optimizers`). `vectors` is
    where new ones come from.
    """

    fragment: Fragment
    master: F32
    published: F32
    slots: dict[str, F32] = field(default_factory=dict)
    count: int = 0
    version: int = 0
    tokens: int = 0
    digest: str = ""
    vectors: Vectors = field(default_factory=Vectors)

    @classmethod
    def initial(cls, fragment: Fragment, weights: F32) -> OuterState:
        """Version 0: Θ = Θ̂ = the initial weights, nothing in the optimizer."""
        digest = digest_flat(weights, fragment.chunks())
        return cls(fragment, weights.copy(), weights.copy(), digest=digest)

    def digests(self) -> Digests:
        """Digests of Θ̂, of Θ and of the optimizer's state."""
        chunks = self.fragment.chunks()
        slots = {name: digest_flat(values, chunks) for name, values in self.slots.items()}
        return Digests(
            digest_flat(self.published, chunks), digest_flat(self.master, chunks), _optimizer_digest(slots, self.count)
        )

    def adopt(self, optimizer: Optimizer) -> None:
        """Makes the slots those of this optimizer. What it shares with the one before (the momentum) stays; where
        it brings something new, counting starts anew. Nesterov's momentum is a sum and Adam's an average: neither is
        of use to the other."""
        wanted = SLOTS[optimizer]
        if ("variance" in wanted) != ("variance" in self.slots):
            self.slots = {}
        if set(wanted) != set(self.slots):
            self.count = 0
        kept, size = self.slots, self.fragment.size
        self.slots = {name: kept[name] if name in kept else self.vectors.zeros(name, size) for name in wanted}


class Room:
    """Memory that deltas are built in, one after the other: fresh pages for each would cost as much as its merge. What
    was built is of no use once the next one is begun."""

    def __init__(self) -> None:
        self._held = np.empty(0, dtype=np.uint8)

    def reserve(self, size: int) -> None:
        """Makes room for so many bytes now, and not in a running round."""
        if self._held.size < size:
            self._held = np.empty(size, dtype=np.uint8)
            self._held.fill(0)

    def cut(self, sizes: Sequence[int]) -> list[U8]:
        """A place for each of so many bytes, uint8 (size,)."""
        ends = list(itertools.accumulate(sizes))
        self.reserve(ends[-1] if ends else 0)
        return [self._held[end - size : end] for end, size in zip(ends, sizes, strict=True)]


@dataclass(frozen=True)
class Digests:
    """XXH3-128 of Θ̂, Θ and the optimizer's state, in hexadecimal; a replay must end in the same."""

    published: str
    master: str
    optimizer: str


@dataclass(frozen=True)
class Stepped:
    """A finished outer step: the delta as a container of `delta_size` bytes, in pieces, and the digests after it.

    The delta is in memory until it is on disk, and not written out as it comes: a disk that refuses in the middle of a
    step would leave a state that is neither version. It is never joined, for it may have the size of the fragment.
    `merged_norm` is the length of the merged pseudo-gradient, `cosine` the mean cosine between the contributions
    (None where there was one).
    """

    version: int
    delta: tuple[Buffer, ...]
    delta_size: int
    digests: Digests
    tokens: int
    merged_norm: float
    cosine: float | None


def outer_step(
    state: OuterState,
    contributions: Sequence[Weighted],
    rule: OuterRule,
    run: str,
    tokens: int,
    executor: Executor,
    embeddings: Collection[str] = (),
    room: Room | None = None,
) -> Stepped:
    """Moves `state` in place from version v to v+1 and returns the delta that takes any copy of Θ̂ along.

    Contributions are summed in the order given. `tokens` are those that they carry, `embeddings` names the tensors
    that are merged by the mean whatever the rule, `room` is where the delta may be built. Raises FormatError or OSError
    where a contribution cannot be read; `state` is unusable then and must be rebuilt from the journal.
    """
    state.adopt(rule.optimizer)
    merge = Merge(state.fragment, state.slots.get("momentum"), contributions, rule, executor, embeddings)
    merge.prepare()
    update, state.count = update_of(rule, state.count, len(contributions))
    codec = DENSE[rule.codec].with_step(rule.grid_step)
    places = (room or Room()).cut([codec.size(chunk.size) for chunk in state.fragment.chunks()])
    done = merge.over_chunks(
        lambda section, chunk: _step_chunk(
            state, merge, update, codec, rule.zstd_level, section, chunk, places[section]
        )
    )
    chunks_of = [section for section, _, _ in done]
    slots = [combine_digests(digests[2 + n] for _, digests, _ in done) for n in range(len(state.slots))]
    digests = Digests(
        combine_digests(digests[0] for _, digests, _ in done),
        combine_digests(digests[1] for _, digests, _ in done),
        _optimizer_digest(dict(zip(state.slots, slots, strict=True)), state.count),
    )
    state.version += 1
    state.tokens += tokens
    state.digest = digests.published
    header = Header(
        kind="delta",
        run=run,
        site="",
        fragment=state.fragment.index,
        base_version=state.version - 1,
        version=state.version,
        digest=digests.published,
        codec=rule.codec,
        zstd=rule.zstd_level > 0,
        chunk=CHUNK_ELEMENTS,
        tensors=tensor_table(state.fragment),
        tokens=state.tokens,
        steps=0,
        sizes=[],
    )
    squares = [square for _, _, square in done]
    delta = container_pieces(header, chunks_of)
    return Stepped(
        version=state.version,
        delta=delta,
        delta_size=sum(len(piece) for piece in delta),
        digests=digests,
        tokens=tokens,
        merged_norm=math.sqrt(math.fsum(squares)),
        cosine=merge.cosine(squares),
    )


def _step_chunk(
    state: OuterState,
    merge: Merge,
    update: Update,
    codec: Dense,
    zstd_level: int,
    section: int,
    chunk: Chunk,
    out: U8,
) -> tuple[Buffer, list[bytes], float]:
    """Steps one chunk: (packed section of the delta, digests of Θ̂, Θ and each slot, Σ of the merged squares). `out` is
    where the section's raw bytes go."""
    at = slice(chunk.start, chunk.stop)
    master, published = state.master[at], state.published[at]
    slots = [values[at] for values in state.slots.values()]
    squares = update(*merge.parts(section, chunk), master, slots, published, codec, out)
    digests = [digest_chunk(values) for values in (published, master, *slots)]
    return pack_section(out, zstd_level), digests, squares


def _optimizer_digest(slots: dict[str, str], count: int) -> str:
    """XXH3-128 over the names and digests of the slots, and the count."""
    return xxhash.xxh3_128_hexdigest(repr((sorted(slots.items()), count)).encode())


def warm_up() -> None:
    """Compile (or load) every kernel that a step uses, so that no round waits for a compiler."""
    warm_up_codecs()
    x = np.ones(3, dtype=np.float32)
    update, _ = update_of(OuterRule("nesterov", 1.0, 0.0, "int8", 0), 0, 1)
    codec = DENSE["int8"]
    raws = np.stack([codec.encode(x)] * 2)
    sections = Sections(codec.kind, codec.cut(x.size), raws, np.ones(2, dtype=np.float32))
    update(sections, x[:0], x.copy(), [x.copy()], x.copy(), codec, raws[0].copy())
    sum_chunk(sections.kind, sections.cut, sections.raws, sections.weights, x.copy())
    kernels.dot(x, x)
    accumulate_fp32(x, np.float32(1), x.copy())
