"""Where a site stands in the run's token budget, for its learning rate.

The coordinator counts tokens as they are merged; a site must know the figure between merges too, and in
a full-quorum run it must be the same figure whenever messages happen to arrive. So it is computed from
versions alone: the tokens merged into the last version that the site aligned with, plus its own tokens since
that version's snapshot, times how many tokens the whole run merged in that round for each of its own.

Where rounds close without waiting for everyone there is no such figure to agree on, and a short first contribution
would make the ratio absurd. There the figure is what the coordinator reports as merged, plus what this site has trained
that no version holds yet, times how many tokens the whole run trains for each of its own: sites that are paced have as
much on their way, in time. What was on its way is merged at another moment than what the others had, so the figure
comes in steps of up to a cycle; between them it holds its place, and only what is further off runs it backwards.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """A fragment's view: `merged` run tokens at local token count `at`, growing `ratio` per local token."""

    merged: int
    at: int
    ratio: float

    def estimate(self, local: int) -> float:
        """Run tokens when this site has trained `local` tokens."""
        return self.merged + self.ratio * max(0, local - self.at)

    def advance(self, merged: int, snapshot_at: int, contributed: int) -> None:
        """A version with `merged` run tokens, whose snapshot was taken at local count `snapshot_at` and which holds
        `contributed` tokens of this site (0: none)."""
        if contributed > 0 and merged > self.merged:
            self.ratio = max(1.0, (merged - self.merged) / contributed)
        self.merged, self.at = merged, snapshot_at
