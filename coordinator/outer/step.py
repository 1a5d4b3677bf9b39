"""One outer step of one fragment: decode and merge K contributions, step the master, encode the delta.

The fragment is walked chunk by chunk; a chunk's sum, Θ, the optimizer's slots and Θ̂ stay in the cache while
all of it happens, and contributions are read section by section from disk. So memory does not grow with the
number of sites. A plain mean is one pass; a correction needs one more over the contributions, for norms and
angles, and RDA one that sums before the step, because a tensor's length is known only when all of it is there.
Chunks are independent and run in parallel threads (zstd, the kernels and the hash all release the GIL); the
result does not depend on how many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import xxhash

from coordinator.outer import kernels
from coordinator.outer.optimizers import SLOTS, OuterRule, Update, update_of
from coordinator.outer.rules import Combination, Measures, combination, mean_cosine
from coordinator.outer.vectors import Vectors
from shared.codecs import DENSE
from shared.codecs import warm_up as warm_up_codecs
from shared.codecs.kernels import F32, accumulate_fp32, square_sum
from shared.fragments import CHUNK_ELEMENTS, Chunk, Fragment, combine_digests, digest_chunk, digest_flat
from shared.wire import Container, Header, container_pieces, pack_section, tensor_table

T = TypeVar("T")
CANCELLED = 1e-5
"""A weighted mean of unit vectors that is shorter than this is what rounding left of zero."""


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

    def adopt(self, rule: OuterRule) -> None:
        """Makes the slots those of the rule's optimizer. What it shares with the one before (the momentum) stays; where
        it brings something new, counting starts anew. Nesterov's momentum is a sum and Adam's an average: neither is
        of use to the other."""
        wanted = SLOTS[rule.optimizer]
        if ("variance" in wanted) != ("variance" in self.slots):
            self.slots = {}
        if set(wanted) != set(self.slots):
            self.count = 0
        kept, size = self.slots, self.fragment.size
        self.slots = {name: kept[name] if name in kept else self.vectors.zeros(name, size) for name in wanted}


@dataclass(frozen=True)
class Digests:
    """XXH3-128 of Θ̂, Θ and the optimizer's state, in hexadecimal; a replay must end in the same."""

    published: str
    master: str
    optimizer: str


@dataclass(frozen=True)
class Weighted:
    """A contribution ready to merge: its normalised weight, and its L2 norm as it was screened."""

    container: Container
    weight: float
    norm: float


@dataclass(frozen=True)
class Stepped:
    """A finished outer step: the delta as a container of `delta_size` bytes, in pieces, and the digests after it.

    The delta is in memory until it is on disk, and not written out as it comes: a disk that refuses in the middle of a
    step would leave a state that is neither version. It is never joined, for it may have the size of the fragment.
    `merged_norm` is the length of the merged pseudo-gradient, `cosine` the mean cosine between the contributions
    (None where there was one).
    """

    version: int
    delta: tuple[bytes, ...]
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
) -> Stepped:
    """Moves `state` in place from version v to v+1 and returns the delta that takes any copy of Θ̂ along.

    Contributions are summed in the order given. `tokens` are those that they carry, `embeddings` names the tensors
    that are merged by the mean whatever the rule. Raises FormatError or OSError where a contribution cannot be read;
    `state` is unusable then and must be rebuilt from the journal.
    """
    state.adopt(rule)
    merge = _Merge(state, contributions, rule, executor, embeddings)
    merge.prepare()
    update, state.count = update_of(rule, state.count, len(contributions))
    done = merge.over_chunks(lambda section, chunk: _step_chunk(state, merge, update, rule, section, chunk))
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
    state: OuterState, merge: _Merge, update: Update, rule: OuterRule, section: int, chunk: Chunk
) -> tuple[bytes, list[bytes], float]:
    """Steps one chunk: (packed section of the delta, digests of Θ̂, Θ and each slot, Σ of the merged squares)."""
    at = slice(chunk.start, chunk.stop)
    master, published = state.master[at], state.published[at]
    slots = [values[at] for values in state.slots.values()]
    raw, squares = update(merge.merged(section, chunk), master, slots, published, DENSE[rule.codec])
    digests = [digest_chunk(values) for values in (published, master, *slots)]
    return pack_section(raw, rule.zstd_level), digests, squares


class _Merge:
    """The merge of one round: which coefficients each tensor gets, and the merged pseudo-gradient chunk by chunk."""

    def __init__(
        self,
        state: OuterState,
        contributions: Sequence[Weighted],
        rule: OuterRule,
        executor: Executor,
        embeddings: Collection[str],
    ) -> None:
        self._state, self._contributions, self._rule = state, contributions, rule
        self._executor, self._embeddings = executor, embeddings
        self._chunks = state.fragment.chunks()
        starts = {chunk.start: section for section, chunk in enumerate(self._chunks)}
        stops = {chunk.stop: section + 1 for section, chunk in enumerate(self._chunks)}
        self._tensors = [
            (tensor.name, range(starts[start], stops[stop]))
            for tensor in state.fragment.tensors
            for start, stop in [state.fragment.offsets[tensor.name]]
        ]
        weights = tuple(contribution.weight for contribution in contributions)
        norms = tuple(contribution.weight * contribution.norm for contribution in contributions)
        self._plain = rule.merge == "mean" and rule.correction == "none"
        self._combinations = [Combination(weights, 0.0, None, norms)]
        self._tensor_of = [0] * len(self._chunks)
        self._summed: F32 | None = None
        self._sum_squares: list[float] = []
        self._scales: list[np.float32 | None] = [None]

    def over_chunks(self, work: Callable[[int, Chunk], T]) -> list[T]:
        """`work(section, chunk)` of every chunk, in parallel; the results in order."""
        return list(self._executor.map(work, range(len(self._chunks)), self._chunks))

    def prepare(self) -> None:
        """The passes that come before the step, if the rule needs any."""
        if self._plain:
            return
        measured = self.over_chunks(self._measure)
        weights = [contribution.weight for contribution in self._contributions]
        self._combinations = []
        for index, (name, sections) in enumerate(self._tensors):
            measures = _measures([measured[section] for section in sections], len(weights))
            self._combinations.append(
                combination(
                    self._rule.merge, self._rule.correction, weights, measures, embedding=name in self._embeddings
                )
            )
            for section in sections:
                self._tensor_of[section] = index
        self._scales = [None] * len(self._tensors)
        if any(tensor.length is not None for tensor in self._combinations):
            self._summed = np.empty(self._state.fragment.size, dtype=np.float32)
            self._sum_squares = self.over_chunks(self._sum_up)
            for index, (_, sections) in enumerate(self._tensors):
                if (length := self._combinations[index].length) is not None:
                    norm = math.sqrt(math.fsum(self._sum_squares[section] for section in sections))
                    # Directions that cancel leave the rounding of fp32, which has none.
                    self._scales[index] = np.float32(length / norm if norm > CANCELLED else 0.0)

    def merged(self, section: int, chunk: Chunk) -> F32:
        """The merged pseudo-gradient of a chunk, in an array that the caller may keep."""
        if self._summed is None:
            return self._sum(section, chunk)
        delta = self._summed[chunk.start : chunk.stop]
        if (scale := self._scales[self._tensor_of[section]]) is not None:
            delta *= scale
        return delta

    def cosine(self, merged_squares: Sequence[float]) -> float | None:
        """The mean cosine between the contributions, before a correction turned them or RDA brought their sum to its
        length."""
        if self._plain:
            return mean_cosine(math.fsum(merged_squares), [self._combinations[0].norms])
        squares, norms, sums = 0.0, [], self._sum_squares or merged_squares
        for (_, sections), terms in zip(self._tensors, self._combinations, strict=True):
            # RDA sums directions: at the length that they get, every tensor counts for what it moves.
            length = 1.0 if terms.length is None else terms.length
            squares += length**2 * (math.fsum(sums[section] for section in sections) - terms.pulled)
            norms.append([length * norm for norm in terms.norms])
        return mean_cosine(squares, norms)

    def _sum(self, section: int, chunk: Chunk) -> F32:
        delta = np.zeros(chunk.size, dtype=np.float32)
        terms = self._combinations[self._tensor_of[section]]
        for contribution, weight in zip(self._contributions, terms.weights, strict=True):
            contribution.container.accumulate(section, weight, delta)
        if terms.momentum:
            momentum = self._state.slots["momentum"][chunk.start : chunk.stop]
            accumulate_fp32(momentum, np.float32(terms.momentum), delta)
        return delta

    def _sum_up(self, section: int, chunk: Chunk) -> float:
        if self._summed is None:
            raise AssertionError("summed before there is a place for it")
        delta = self._sum(section, chunk)
        self._summed[chunk.start : chunk.stop] = delta
        return float(square_sum(delta))

    def _measure(self, section: int, chunk: Chunk) -> list[tuple[float, float]]:
        """(Σ Δ², Σ Δ·m) of each contribution in this chunk, and last (Σ m², 0)."""
        momentum = self._state.slots.get("momentum")
        here = np.zeros(chunk.size, dtype=np.float32) if momentum is None else momentum[chunk.start : chunk.stop]
        found = []
        decoded = np.empty(chunk.size, dtype=np.float32)
        for contribution in self._contributions:
            decoded[:] = 0
            contribution.container.accumulate(section, 1.0, decoded)
            found.append((float(square_sum(decoded)), float(kernels.dot(decoded, here))))
        return [*found, (float(square_sum(here)), 0.0)]


def _measures(chunks: Sequence[list[tuple[float, float]]], count: int) -> Measures:
    """A tensor's scalars from those of its chunks."""
    norms = [math.sqrt(math.fsum(chunk[n][0] for chunk in chunks)) for n in range(count)]
    momentum = math.sqrt(math.fsum(chunk[count][0] for chunk in chunks))
    dots = [math.fsum(chunk[n][1] for chunk in chunks) for n in range(count)]
    cosines = [
        max(-1.0, min(1.0, dot / (norm * momentum))) if norm * momentum > 0 else 0.0
        for dot, norm in zip(dots, norms, strict=True)
    ]
    return Measures(norms, cosines, momentum)


def _optimizer_digest(slots: dict[str, str], count: int) -> str:
    """XXH3-128 over the names and digests of the slots, and the count."""
    return xxhash.xxh3_128_hexdigest(repr((sorted(slots.items()), count)).encode())


def warm_up() -> None:
    """Compile (or load) every kernel that a step uses, so that no round waits for a compiler."""
    warm_up_codecs()
    x = np.ones(3, dtype=np.float32)
    update, _ = update_of(OuterRule("nesterov", 1.0, 0.0, "int8", 0), 0, 1)
    update(x, x.copy(), [x.copy()], x.copy(), DENSE["int8"])
    kernels.dot(x, x)
    accumulate_fp32(x, np.float32(1), x.copy())
