"""A site's copy of the model, fragment by fragment: its weights θ, the snapshots θ_s that contributions on their way
were taken of, and the error feedback e.

All of it is on the device that holds the weights: pseudo-gradients are made and encoded there, and weights aligned.
Only anchors, which must be the same bits everywhere, come from the CPU, where their arithmetic is done. Where several
devices train one model, each has a replica of its own, and of every fragment its part: some of the chunks, end to end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.codecs import grid
from shared.codecs.kernels import U8
from shared.config import RoundsTable, WireTable
from shared.errors import FaultError
from shared.fragments import F32, Chunk, Fragment
from shared.wire import encode_sections
from site_agent.core.alignment import How, take_up
from site_agent.training import encoders


class DivergedError(FaultError):
    """The weights are no longer finite; a checkpoint of them would be worth nothing."""


@dataclass(frozen=True)
class Part:
    """Elements `start` to `stop` of a fragment's flat vector, and the chunks that they are, counted from `start`."""

    start: int
    stop: int
    chunks: tuple[Chunk, ...]

    @property
    def size(self) -> int:
        return self.stop - self.start


NOTHING = Part(0, 0, ())


def whole(fragment: Fragment) -> Part:
    """All of a fragment."""
    return Part(0, fragment.size, tuple(fragment.chunks()))


def parts_of(fragment: Fragment, ranks: int) -> list[Part]:
    """The fragment dealt among ranks: to each a run of its chunks, as many elements as can be without cutting one."""
    dealt: list[list[Chunk]] = [[] for _ in range(ranks)]
    for chunk in fragment.chunks():
        # A chunk is whose its middle is.
        dealt[(chunk.start + chunk.stop) * ranks // (2 * fragment.size)].append(chunk)
    return [_part(chunks) for chunks in dealt]


def _part(chunks: Sequence[Chunk]) -> Part:
    if not chunks:
        return NOTHING
    start = chunks[0].start
    counted = tuple(Chunk(chunk.start - start, chunk.stop - start) for chunk in chunks)
    return Part(start, chunks[-1].stop, counted)


class Replica(ABC):
    """Vectors that go in and out are fp32 (part.size,): of the fragment's flat vector, this replica's part. Those of
    NumPy are on the CPU and only read; snapshots and feedback are on `device` and never written to."""

    device: torch.device

    def __init__(self, parts: Sequence[Part], wire: WireTable, rounds: RoundsTable) -> None:
        self.parts, self.wire, self.rounds = list(parts), wire, rounds
        self.snapshots: dict[int, Tensor] = {}
        self.residuals: dict[int, Tensor] = {}
        self._left: dict[int, Tensor] = {}
        """What the codec lost of the contributions on their way: the error feedback once they are accepted."""

    @abstractmethod
    def read(self, fragment: int) -> Tensor:
        """The weights now, as a new vector on `device`."""

    @abstractmethod
    def write(self, fragment: int, flat: Tensor) -> None:
        """Sets the weights from a vector on any device."""

    def begin(self, fragment: int, published: F32) -> None:
        """θ ← Θ̂, whatever was before."""
        self.write(fragment, torch.from_numpy(published))

    # -- contributions

    def snapshot(self, fragment: int) -> None:
        """θ_s ← θ."""
        self.snapshots[fragment] = self.read(fragment)

    def forget(self, fragment: int) -> None:
        """There is no contribution on its way."""
        self.snapshots.pop(fragment, None)
        self._left.pop(fragment, None)

    def encode(self, fragment: int, anchor: F32) -> list[U8]:
        """The raw bytes of every chunk of Δ + βe, Δ = Θ̂ − θ_s. What the codec loses of them is kept until it is known
        what became of them. Raises DivergedError where Δ is not finite, FaultError where the device's memory is too
        small."""
        try:
            return self._sections(fragment, self._delta(fragment, anchor))
        except ValueError as error:
            raise DivergedError(
                f"the weights of fragment {fragment} have diverged ({error}); lower [inner] lr and start anew"
            ) from None
        except torch.OutOfMemoryError as error:
            raise FaultError(
                f"the device has too little memory to encode a contribution: {str(error).splitlines()[0]}; lower "
                "[inner] batch_size, or raise [rounds] fragments"
            ) from None

    def leave(self, fragment: int, anchor: F32, delivered: F32) -> None:
        """The same where not what would be encoded now is sent, but what was before a restart, of another training of
        the same steps: `delivered`. What is kept are the bits of `encode`'s where both came to the same."""
        if self.wire.error_feedback:
            self._left[fragment] = self._delta(fragment, anchor).sub_(torch.from_numpy(delivered).to(self.device))

    def settle(self, fragment: int, *, delivered: bool) -> None:
        """A contribution was accepted; `delivered`: it was the one that was encoded last. Without error feedback none
        is left: what a run had of it before its config was changed has just been sent, once."""
        self.residuals.pop(fragment, None)
        left = self._left.pop(fragment, None)
        if delivered and left is not None:
            self.residuals[fragment] = left

    def _sections(self, fragment: int, delta: Tensor) -> list[U8]:
        """The raw bytes of `delta`, encoded where it is; it is used up. Raises ValueError."""
        part, kept = self.parts[fragment], self.wire.error_feedback
        codec, chunks = grid(self.wire.upload_codec, self.wire.upload_grid), part.chunks
        encode = encoders.encoder(codec, delta.device)
        if encode is not None and chunks:
            sections = encode(codec, delta, chunks)
        else:
            flat = delta.cpu()
            x = flat.numpy()
            sections = encode_sections(codec, chunks, x, x if kept else None)
            delta = flat.to(delta.device)
        if kept:
            self._left[fragment] = delta
        return sections

    def _delta(self, fragment: int, anchor: F32) -> Tensor:
        """Δ + βe, of which each operation rounds once."""
        delta = self._here(anchor) - self.snapshots[fragment]
        if (residual := self.residuals.get(fragment)) is not None:
            # (Where the config has dropped error feedback since, what there is of it goes out once, whole.)
            decay = self.wire.feedback or 1.0
            delta += residual if decay == 1.0 else decay * residual
        return delta

    # -- versions

    def take_up(self, fragment: int, how: How, anchor: F32, published: F32) -> None:
        """Aligns the weights with Θ̂ (`published`); `anchor` is the version before. Nothing is on its way after it."""
        theta, since = self.read(fragment), self.snapshots.get(fragment)
        if how == "rebase":
            since = self._here(anchor)
        rule, alpha = self.rounds.align, self.rounds.blend
        self.write(fragment, take_up(how, theta, since, self._here(published), rule, alpha))
        self.forget(fragment)

    def _here(self, flat: F32) -> Tensor:
        """`flat` on the device of the weights; on the CPU the same memory."""
        return torch.from_numpy(flat).to(self.device)

    # -- checkpoints

    def kept(self) -> Iterator[tuple[str, Tensor]]:
        """Snapshots and error feedback by name, on the CPU. A contribution on its way is encoded again."""
        yield from ((f"snapshot.{p}", flat.cpu()) for p, flat in self.snapshots.items())
        yield from ((f"residual.{p}", flat.cpu()) for p, flat in self.residuals.items())

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `kept`."""
        self.snapshots, self.residuals = (
            {p: tensors[f"{kind}.{p}"].to(self.device) for p in range(len(self.parts)) if f"{kind}.{p}" in tensors}
            for kind in ("snapshot", "residual")
        )
        self._left.clear()
