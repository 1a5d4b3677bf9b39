"""The merge of one round: contributions read section by section, and summed under the coefficients of its rule.

A plain mean is no pass of its own: the step's kernel sums a chunk's contributions while it steps. A correction needs
one pass more, for norms and angles, and RDA one that sums before the step, because a tensor's length is known only
when all of it is there.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from coordinator.outer import kernels
from coordinator.outer.optimizers import NOTHING, OuterRule, Sections
from coordinator.outer.rules import Combination, Measures, combination, mean_cosine
from shared.codecs import Codec, Dense
from shared.codecs.kernels import F32, U8, accumulate_fp32, square_sum, sum_chunk
from shared.fragments import CHUNK_ELEMENTS, Chunk, Fragment
from shared.parallel import over_chunks
from shared.wire import Container

T = TypeVar("T")
CANCELLED = 1e-5
"""A weighted mean of unit vectors that is shorter than this is what rounding left of zero."""
GROUP_BYTES = 4 << 20
"""Raw sections of one chunk that a thread holds at once."""
_NO_DELTA = np.empty(0, dtype=np.float32)


@dataclass(frozen=True)
class Weighted:
    """A contribution ready to merge: its normalised weight, and its L2 norm as it was screened."""

    container: Container
    weight: float
    norm: float


class Merge:
    """The merge of one round: which coefficients each tensor gets, and the merged pseudo-gradient chunk by chunk."""

    def __init__(
        self,
        fragment: Fragment,
        momentum: F32 | None,
        contributions: Sequence[Weighted],
        rule: OuterRule,
        executor: Executor,
        embeddings: Collection[str],
    ) -> None:
        self._fragment, self._momentum = fragment, momentum
        self._contributions, self._rule = contributions, rule
        self._executor, self._embeddings = executor, embeddings
        self._chunks = fragment.chunks()
        self._groups = _groups([contribution.container.codec for contribution in contributions])
        starts = {chunk.start: section for section, chunk in enumerate(self._chunks)}
        stops = {chunk.stop: section + 1 for section, chunk in enumerate(self._chunks)}
        self._tensors = [
            (tensor.name, range(starts[start], stops[stop]))
            for tensor in fragment.tensors
            for start, stop in [fragment.offsets[tensor.name]]
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
        return over_chunks(self._chunks, work, self._executor)

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
            self._summed = np.empty(self._fragment.size, dtype=np.float32)
            self._sum_squares = self.over_chunks(self._sum_up)
            for index, (_, sections) in enumerate(self._tensors):
                if (length := self._combinations[index].length) is not None:
                    norm = math.sqrt(math.fsum(self._sum_squares[section] for section in sections))
                    # Directions that cancel leave the rounding of fp32, which has none.
                    self._scales[index] = np.float32(length / norm if norm > CANCELLED else 0.0)

    def parts(self, section: int, chunk: Chunk) -> tuple[Sections, F32]:
        """A chunk's merged pseudo-gradient as an outer step takes it: contributions that are still to be summed, and
        what is summed already (fp32 (chunk.size,), or empty). Both are this thread's until it asks again."""
        if self._summed is not None:
            delta = self._summed[chunk.start : chunk.stop]
            if (scale := self._scales[self._tensor_of[section]]) is not None:
                delta *= scale
            return NOTHING, delta
        terms = self._combinations[self._tensor_of[section]]
        if not self._groups:
            return NOTHING, _NO_DELTA
        if terms.momentum or not isinstance(self._groups[-1].codec, Dense):
            return NOTHING, self._sum(section, chunk)
        *before, last = self._groups
        # First, because both read into the same memory.
        delta = self._sum_groups(before, terms.weights, section, chunk) if before else _NO_DELTA
        return self._read(last, terms.weights, section, chunk), delta

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
        terms = self._combinations[self._tensor_of[section]]
        delta = self._sum_groups(self._groups, terms.weights, section, chunk)
        if terms.momentum and self._momentum is not None:
            accumulate_fp32(self._momentum[chunk.start : chunk.stop], np.float32(terms.momentum), delta)
        return delta

    def _sum_groups(self, groups: Sequence[_Group], weights: Sequence[float], section: int, chunk: Chunk) -> F32:
        delta = _scratch.delta(chunk.size)
        for group in groups:
            if isinstance(group.codec, Dense):
                sections = self._read(group, weights, section, chunk)
                sum_chunk(sections.kind, sections.cut, sections.raws, sections.weights, delta)
            else:
                for n in group.members:
                    self._contributions[n].container.accumulate(section, weights[n], delta)
        return delta

    def _read(self, group: _Group, weights: Sequence[float], section: int, chunk: Chunk) -> Sections:
        codec = group.codec
        if not isinstance(codec, Dense):
            raise AssertionError(f"{codec.name} is summed as it comes")
        size = codec.size(chunk.size)
        raws = _scratch.raws(len(group.members), size)
        for row, n in zip(raws, group.members, strict=True):
            self._contributions[n].container.read_raw(section, row[:size])
        chosen = np.array([weights[n] for n in group.members], dtype=np.float32)
        return Sections(codec.kind, codec.cut(chunk.size), raws, chosen)

    def _sum_up(self, section: int, chunk: Chunk) -> float:
        if self._summed is None:
            raise AssertionError("summed before there is a place for it")
        delta = self._sum(section, chunk)
        self._summed[chunk.start : chunk.stop] = delta
        return float(square_sum(delta))

    def _measure(self, section: int, chunk: Chunk) -> list[tuple[float, float]]:
        """(Σ Δ², Σ Δ·m) of each contribution in this chunk, and last (Σ m², 0)."""
        here = np.zeros(chunk.size, dtype=np.float32)
        if self._momentum is not None:
            here = self._momentum[chunk.start : chunk.stop]
        found = []
        for contribution in self._contributions:
            decoded = _scratch.delta(chunk.size)
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


@dataclass(frozen=True)
class _Group:
    """Contributions, by number, that are read and summed together: of one codec, and not more than fit GROUP_BYTES."""

    codec: Codec
    members: range


def _groups(codecs: Sequence[Codec]) -> list[_Group]:
    groups: list[_Group] = []
    for n, codec in enumerate(codecs):
        most = max(1, GROUP_BYTES // codec.size(CHUNK_ELEMENTS))
        if groups and groups[-1].codec is codec and len(groups[-1].members) < most:
            groups[-1] = _Group(codec, range(groups[-1].members.start, n + 1))
        else:
            groups.append(_Group(codec, range(n, n + 1)))
    return groups


class _Scratch(threading.local):
    """Memory of a thread that it uses again for every chunk: fresh pages would cost more than what is done in them."""

    def __init__(self) -> None:
        self._raws, self._delta = np.empty(0, dtype=np.uint8), np.empty(0, dtype=np.float32)

    def raws(self, rows: int, size: int) -> U8:
        """uint8 (rows, size or more); rows begin at multiples of 64 bytes."""
        stride = -(-size // 64) * 64
        if self._raws.size < rows * stride:
            self._raws = np.empty(rows * stride, dtype=np.uint8)
        return self._raws[: rows * stride].reshape(rows, stride)

    def delta(self, size: int) -> F32:
        """fp32 (size,), zero."""
        if self._delta.size < size:
            self._delta = np.empty(size, dtype=np.float32)
        delta = self._delta[:size]
        delta[:] = 0
        return delta


_scratch = _Scratch()
