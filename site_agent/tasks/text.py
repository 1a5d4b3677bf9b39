"""A corpus as training windows: a held-out split, disjoint shards, an exact restart.

Positions count tokens, which are bytes where a text is not tokenised. The corpus is cut into contiguous
blocks, and blocks are what is dealt out: some to the held-out set, the others in turn to the shards.
Dealing single windows would mix more finely, in exchange for windows of different shards that overlap
as soon as an epoch shifts them. Inside its own blocks a shard may cut windows wherever it likes; it
sees a token of another shard only once it has been through its own, and never one of the held-out set.

Nothing here depends on where the files lie, only on the tokens in their order: sites that
have the same text agree on every block without exchanging a word about it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.errors import ConfigError
from shared.task import Manifest, Shard
from site_agent.tasks.corpus import Corpus, Ints
from site_agent.tasks.options import Partition

MOST_SHARDS, LEAST_WINDOWS = 1024, 64
"""A text is leased in shards of several blocks where it is long, or its blocks hold few windows: what a site trains in
a cycle should be few shards."""
LEAST_BLOCKS = 64
"""A small text is cut into at least so many blocks, so that it still splits among several sites."""


@dataclass(frozen=True)
class Blocks:
    """Ranges of the text, `starts` up to but not including `ends`, both (N,) int64 in tokens."""

    starts: Ints
    ends: Ints

    def pick(self, which: Any) -> Blocks:
        return Blocks(self.starts[which], self.ends[which])

    def windows(self, window: int, offsets: Ints | int) -> Ints:
        """Starts of the consecutive windows that fit into each block after its offset, (W,) int64."""
        counts = (self.ends - self.starts - offsets) // window  # (N,)
        first = np.repeat(self.starts + offsets, counts)  # (W,)
        index_of_block = np.repeat(np.cumsum(counts) - counts, counts)
        windows: Ints = first + window * (np.arange(len(first)) - index_of_block)
        return windows


@dataclass(frozen=True)
class Text:
    """A corpus and its split. `window` is context + 1 tokens: inputs, and targets one further on."""

    corpus: Corpus
    window: int
    train: Blocks
    held_out: Blocks

    def training_parts(self, shard: Shard, partition: Partition) -> list[Blocks]:
        """The training blocks of `shard`, epoch by epoch in turn; its own first.

        "sharded": every `count`-th block, then everyone else's, in turn. Sites are not equally fast: one that has been
        through its own part would otherwise see it again while most of the text has not been seen at all.
        "contiguous": one run of the blocks, so that every site has texts of its own. "local": all of them, where the
        text is the site's own. "leased" is "sharded" where nobody leases. Raises ConfigError where there are
        fewer blocks than shards.
        """
        if partition == "local":
            return [self.train]
        if not 0 <= shard.index < shard.count:
            raise ConfigError(f"there is no shard {shard.index} of {shard.count}; shards count from 0")
        blocks = len(self.train.starts)
        if blocks < shard.count:
            raise ConfigError(
                f"[data] paths: {len(self.corpus)} {self.corpus.unit} make {blocks} training blocks, too few for "
                f"{shard.count} shards; add text, or set smaller blocks or a smaller context"
            )
        if partition == "contiguous":
            own = slice(shard.index * blocks // shard.count, (shard.index + 1) * blocks // shard.count)
            return [self.train.pick(own)]
        mine = np.arange(blocks) % shard.count == shard.index
        return [self.train.pick(part) for part in (mine, ~mine) if part.any()]

    @cached_property
    def shards(self) -> list[Ints]:
        """The training windows as they are leased, block by block: starts of each shard's, (W,) int64."""
        blocks, windows = len(self.train.starts), len(self.train.windows(self.window, 0))
        count = min(blocks, MOST_SHARDS, max(1, windows // LEAST_WINDOWS))
        bounds = np.arange(count + 1) * blocks // count
        cut = [slice(first, last) for first, last in itertools.pairwise(bounds)]
        return [self.train.pick(which).windows(self.window, 0) for which in cut]

    def manifest(self) -> Manifest:
        """The shards' sizes in windows; the digest is of the text itself."""
        digest = self.corpus.digest(f"{len(self.corpus)} {self.window} {len(self.train.starts)}")
        return Manifest(digest, [len(shard) for shard in self.shards])

    def pick(self, sequences: Sequence[tuple[int, int]]) -> Tensor:
        """The windows (shard, index), (B, window) int64."""
        return self.gather(np.array([self.shards[shard][index] for shard, index in sequences], dtype=np.int64))

    def held_out_batches(self, batch_size: int, most: int) -> list[Tensor]:
        """At most `most` batches (B, window) int64, evenly over the held-out blocks, always the same."""
        starts = self.held_out.windows(self.window, 0)
        chosen = min(len(starts), most * batch_size)
        starts = starts[np.arange(chosen) * len(starts) // chosen]
        return [self.gather(starts[i : i + batch_size]) for i in range(0, chosen, batch_size)]

    def gather(self, starts: Ints) -> Tensor:
        """The windows at `starts`, (B, window) int64."""
        return torch.from_numpy(self.corpus.gather(starts, self.window))


class WindowStream:
    """An endless `BatchStream` over the windows of the parts, one part an epoch in turn, each epoch in another order.

    Epoch e shuffles its windows under (seed, shard, e) and shifts each block's windows by a random part
    of a window, so that the model is not shown the same cuts again; the tokens before the shift wait for
    another epoch. All of it follows from the epoch's number. The whole state is therefore two integers,
    and a restart costs one shuffle, however far the run is. An epoch's order holds 8 bytes per window.

    A batch may cross into the next epoch. Dropping the remainder would be simpler, in exchange for
    windows that go unseen and shards of fewer windows than a batch that never yield anything.
    """

    def __init__(self, text: Text, parts: Sequence[Blocks], shard: Shard, batch_size: int) -> None:
        self.text = text
        self.parts = list(parts)
        self.shard = shard
        self.batch_size = batch_size
        self._enter(0, 0)

    def __iter__(self) -> WindowStream:
        return self

    def __next__(self) -> Tensor:
        """(B, window) int64."""
        parts: list[Ints] = []
        missing = self.batch_size
        while missing:
            if self._position >= len(self._order):
                self._enter(self._epoch + 1, 0)
            part = self._order[self._position : self._position + missing]
            self._position += len(part)
            missing -= len(part)
            parts.append(part)
        return self.text.gather(np.concatenate(parts))

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and how many of its windows have been seen."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues at the next unseen window; at the next epoch where the text has shrunk to fewer windows."""
        self._enter(int(state["epoch"]), int(state["position"]))

    def _enter(self, epoch: int, position: int) -> None:
        rng = np.random.default_rng((self.shard.seed, self.shard.index, epoch))
        blocks = self.parts[epoch % len(self.parts)]
        lengths = blocks.ends - blocks.starts
        slack = np.minimum(self.text.window, lengths - self.text.window + 1)  # at least one window stays whole
        self._order = blocks.windows(self.text.window, rng.integers(0, slack))
        rng.shuffle(self._order)
        self._epoch, self._position = epoch, position


def cut(corpus: Corpus, context: int, block: int, held_out: float) -> Text:
    """The corpus in blocks of `block` tokens or more, with a `held_out` share set apart.

    A text of fewer than 64 such blocks gets shorter ones, down to one window of context + 1 tokens.
    Raises ConfigError where it is too short.
    """
    window = context + 1
    count = len(corpus) // min(block, max(window, len(corpus) // LEAST_BLOCKS))
    if count < 2:
        raise ConfigError(
            f"[data] paths: {len(corpus)} {corpus.unit} are too few for context = {context}, which needs "
            f"{2 * window} (one window to train on, one held out); add text, or set a smaller context"
        )
    bounds = np.arange(count + 1, dtype=np.int64) * len(corpus) // count
    blocks = Blocks(bounds[:-1], bounds[1:])
    held = evenly_spread(count, min(count - 1, max(1, round(held_out * count))))
    return Text(corpus, window, train=blocks.pick(~held), held_out=blocks.pick(held))


def evenly_spread(count: int, chosen: int) -> npt.NDArray[np.bool_]:
    """(count,) bool with `chosen` True, every (count/chosen)-th one, first and last gap alike."""
    mask = np.zeros(count, dtype=np.bool_)
    mask[(2 * np.arange(chosen) + 1) * count // (2 * chosen)] = True
    return mask
