"""One outer step of one fragment: decode and merge K contributions, step the master, encode the delta.

The fragment is walked chunk by chunk; a chunk's sum, Θ, momentum and Θ̂ stay in the cache while all of it
happens, and contributions are read section by section from disk. So memory does not grow with the
number of sites, and the cost is one pass over the state. Chunks are independent and run in parallel
threads (zstd, the kernels and the hash all release the GIL); the result does not depend on how many.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from coordinator.outer import kernels
from shared.codecs import CODECS
from shared.codecs import warm_up as warm_up_codecs
from shared.codecs.kernels import F32, square_sum
from shared.fragments import CHUNK_ELEMENTS, Chunk, Fragment, combine_digests, digest_chunk, digest_flat
from shared.wire import Container, Header, pack_container, pack_section, tensor_table


@dataclass(frozen=True)
class OuterRule:
    """What an outer step does, as the journal records it with each round: a replay must do the same."""

    optimizer: Literal["nesterov", "sgd"]
    lr: float
    momentum: float
    codec: str
    zstd_level: int


@dataclass
class OuterState:
    """A fragment's state at the coordinator: flat fp32 vectors of fragment.size elements."""

    fragment: Fragment
    master: F32
    momentum: F32
    published: F32
    version: int = 0
    tokens: int = 0
    digest: str = ""

    @classmethod
    def initial(cls, fragment: Fragment, weights: F32) -> OuterState:
        """Version 0: Θ = Θ̂ = the initial weights, no momentum."""
        digest = digest_flat(weights, fragment.chunks())
        return cls(fragment, weights.copy(), np.zeros_like(weights), weights.copy(), digest=digest)

    def digests(self) -> tuple[str, str, str]:
        """Digests of Θ̂, Θ and the momentum."""
        chunks = self.fragment.chunks()
        return (
            digest_flat(self.published, chunks),
            digest_flat(self.master, chunks),
            digest_flat(self.momentum, chunks),
        )


@dataclass(frozen=True)
class Weighted:
    """A contribution ready to merge, with its normalised weight."""

    container: Container
    weight: float


@dataclass(frozen=True)
class Stepped:
    """A finished outer step: the delta as a container, and the digests of Θ̂, Θ and momentum after it."""

    version: int
    delta: bytes
    published_digest: str
    master_digest: str
    momentum_digest: str
    tokens: int
    merged_norm: float


def outer_step(
    state: OuterState,
    contributions: Sequence[Weighted],
    rule: OuterRule,
    run: str,
    tokens: int,
    executor: Executor,
) -> Stepped:
    """Moves `state` in place from version v to v+1 and returns the delta that takes any copy of Θ̂ along.

    Contributions are summed in the order given. `tokens` are those that they carry. Raises FormatError or
    OSError where one cannot be read; `state` is unusable then and must be rebuilt from the journal.
    """
    fragment, codec = state.fragment, CODECS[rule.codec]
    lr, mu = np.float32(rule.lr), np.float32(rule.momentum)

    def step_chunk(section: int, chunk: Chunk) -> tuple[bytes, tuple[bytes, bytes, bytes], float]:
        at = slice(chunk.start, chunk.stop)
        delta = np.zeros(chunk.size, dtype=np.float32)
        for weighted in contributions:
            weighted.container.accumulate(section, weighted.weight, delta)
        master, momentum, published = state.master[at], state.momentum[at], state.published[at]
        change = np.empty_like(delta)
        if rule.optimizer == "nesterov":
            kernels.nesterov(delta, master, momentum, published, lr, mu, change)
        else:
            kernels.sgd(delta, master, published, lr, change)
        raw = codec.encode(change)
        codec.accumulate(raw, 1.0, published)
        digests = (digest_chunk(published), digest_chunk(master), digest_chunk(momentum))
        return pack_section(raw, rule.zstd_level), digests, square_sum(delta)

    chunks = fragment.chunks()
    done = list(executor.map(step_chunk, range(len(chunks)), chunks))
    published_digest, master_digest, momentum_digest = (
        combine_digests(digests[which] for _, digests, _ in done) for which in range(3)
    )
    state.version += 1
    state.tokens += tokens
    state.digest = published_digest
    header = Header(
        kind="delta",
        run=run,
        site="",
        fragment=fragment.index,
        base_version=state.version - 1,
        version=state.version,
        digest=published_digest,
        codec=rule.codec,
        zstd=rule.zstd_level > 0,
        chunk=CHUNK_ELEMENTS,
        tensors=tensor_table(fragment),
        tokens=state.tokens,
        steps=0,
        sizes=[],
    )
    return Stepped(
        version=state.version,
        delta=pack_container(header, [section for section, _, _ in done]),
        published_digest=published_digest,
        master_digest=master_digest,
        momentum_digest=momentum_digest,
        tokens=tokens,
        merged_norm=float(sum(squares for _, _, squares in done)) ** 0.5,
    )


def warm_up() -> None:
    """Compile (or load) every kernel that a step uses, so that no round waits for a compiler."""
    warm_up_codecs()
    x = np.ones(3, dtype=np.float32)
    one = np.float32(1)
    kernels.nesterov(x, x.copy(), x.copy(), x.copy(), one, one, x.copy())
    kernels.sgd(x, x.copy(), x.copy(), one, x.copy())
